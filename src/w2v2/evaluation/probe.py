"""What the layers of an encoder know: linear classification of their frames, beside features that nobody trained.

Accuracy of the contrastive task is no guide to what is learned (LOG.md, "A start that hears"). A linear classifier on
frozen features is, in seconds: of phones, on frames of voices that it has not heard; of speakers, on other utterances
of the same voices, which a good representation for speech recognition tells less well, layer by layer.
ABX is not here: its library, fastabx, has no release for Python 3.11.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from w2v2.data.audio import load_audio
from w2v2.data.corpora import Split, Splits
from w2v2.errors import Show, UsageError, quiet
from w2v2.evaluation.phones import Labels, check_times, frame_classes, phone_classes, read_labels
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.warm_start import log_mel, mel_filters
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config

if TYPE_CHECKING:
    from lhotse import MonoCut

SCHEMA = 1
"""Of what ``probe`` returns; its keys change only with it."""

Features = Callable[[Tensor], dict[str, Tensor]]
"""Audio (1, S) to named features (T, C)."""


@dataclass
class Frames:
    """All frames of some utterances, laid end to end."""

    bounds: list[tuple[int, int]]
    """First frame of each utterance, and the one after its last."""
    phones: Tensor
    """(N,) int64 class, -1: none."""
    speakers: Tensor
    """(N,) int64."""
    features: dict[str, Tensor]
    """(N, C) float16, by name."""

    def around(self, beside: int) -> Tensor:
        """(N, 2 beside + 1) positions of the frames around each; an utterance's first and last are repeated."""
        offsets = torch.arange(-beside, beside + 1)
        return torch.cat([(torch.arange(a, b)[:, None] + offsets).clamp(a, b - 1) for a, b in self.bounds])


def probe(
    model: Wav2Vec2,
    splits: Splits,
    split: str,
    labels: Path,
    *,
    layers: Sequence[int] | None = None,
    minutes: float = 20.0,
    seed: int = 0,
    show: Show = quiet,
) -> dict[str, Any]:
    """Probe a model's layers, and for comparison log-mel, MFCC and the same net with random weights.

    Args:
        splits, split: the probe is trained on utterances of ``train``, and scored on this one.
        labels: folder of phones with times, see ``read_labels``.
        layers: outputs of blocks, from 1; 0: the conv features. None: all.
        minutes: of labelled audio at most, over all voices, of either split.
        seed: of the choice, of the random net and of the classifiers.

    Returns:
        ``schema``, ``split``, ``classes`` (phones), ``frames`` and ``speakers`` ({train, scored}), ``rows`` (each
        ``features``, ``layer`` (None: has none), and the accuracies ``phones_one``, ``phones_five`` (frames of context)
        and ``speakers``), ``codes`` (``purity``: share of frames of their code's most frequent phone, ``information``:
        share of the phones' entropy that the codes tell; None: the model has none).

    Raises:
        UsageError: no labels for a split, times that leave the audio, phones in no class, a layer that is not there.
    """
    depth = len(model.transformer)
    wanted = list(range(depth + 1)) if layers is None else list(layers)
    if wrong := [layer for layer in wanted if not 0 <= layer <= depth]:
        raise UsageError(f"`layers` must be 0 to {depth}, the blocks of this model, got {wrong[0]}")
    phones = read_labels(labels)
    cuts = [_spread(splits.get(name, Split.of([])), phones, minutes, seed, name) for name in ("train", split)]
    check_times(phones, {cut.id: cut.duration for part in cuts for cut in part})
    classes = phone_classes(*([phones[cut.id] for cut in part] for part in cuts))
    model.eval()
    torch.manual_seed(seed)
    maps = [_spectra(model), _layers("model", model, wanted), _layers("random", Wav2Vec2(model.config).eval(), wanted)]

    voices = sorted({_speaker(cut) for part in cuts for cut in part})
    with torch.no_grad():
        train, scored = (_frames(part, maps, model.config, phones, classes, voices, show) for part in cuts)
    rows = list(_rows(train, scored, len(classes), len(voices), seed, show))
    return {
        "schema": SCHEMA,
        "split": split,
        "classes": classes,
        "frames": {"train": int((train.phones >= 0).sum()), "scored": int((scored.phones >= 0).sum())},
        "speakers": {k: len({_speaker(c) for c in part}) for k, part in zip(("train", "scored"), cuts, strict=True)},
        "rows": rows,
        "codes": _codes(scored),
    }


def _frames(
    cuts: list[MonoCut],
    maps: Sequence[Features],
    config: Wav2Vec2Config,
    phones: Labels,
    classes: Sequence[str],
    voices: Sequence[str],
    show: Show,
) -> Frames:
    """Read, compute and label all frames of some utterances."""
    index = {label: i for i, label in enumerate(classes)}
    bounds, heard, who = [(0, 0)], [], []
    features: dict[str, list[Tensor]] = {}
    for i, cut in enumerate(cuts):
        audio = config.normalized(torch.from_numpy(load_audio(cut))[None])
        n = config.frames([audio.shape[1]])[0]
        for compute in maps:
            for name, values in compute(audio).items():
                features.setdefault(name, []).append(values.half() if values.is_floating_point() else values)
        centers = np.array([config.frame_seconds(t) for t in range(n)])
        heard.append(torch.from_numpy(frame_classes(phones[cut.id], centers, index)))
        who.append(torch.full((n,), voices.index(_speaker(cut))))
        bounds.append((bounds[-1][1], bounds[-1][1] + n))
        show("features", (i + 1) / len(cuts))
    laid = {name: torch.cat(parts) for name, parts in features.items()}
    return Frames(bounds[1:], torch.cat(heard), torch.cat(who), laid)


def _spread(split: Split, labelled: dict[str, Any], minutes: float, seed: int, name: str) -> list[MonoCut]:
    """About so many minutes of labelled cuts, the same share of each voice."""
    by_voice: dict[str, list[MonoCut]] = {}
    for cut in split:
        if cut.id in labelled:
            by_voice.setdefault(_speaker(cut), []).append(cut)
    if not by_voice:
        raise UsageError(f"no utterance of split {name!r} has phones in `labels`; expected ids as in the corpus")
    chosen = []
    for voice, cuts in sorted(by_voice.items()):
        left = 60 * minutes / len(by_voice)
        random.Random(f"{seed}/{voice}").shuffle(cuts)
        for cut in cuts:
            if left > 0:
                chosen.append(cut)
            left -= cut.duration
    return chosen


def _speaker(cut: MonoCut) -> str:
    return cut.supervisions[0].speaker or ""


def _spectra(model: Wav2Vec2) -> Features:
    """Log-mel of 40 bands, and 13 cepstral coefficients of it with their first and second differences."""
    filters = mel_filters(40)
    basis = torch.cos(math.pi / 40 * (torch.arange(40)[:, None] + 0.5) * torch.arange(13))

    def compute(audio: Tensor) -> dict[str, Tensor]:
        bands = log_mel(audio, model.config, filters)[0]
        parts = [bands @ basis]
        for _ in range(2):
            before, after = parts[-1][:1], parts[-1][-1:]
            padded = torch.cat([before, parts[-1], after])
            parts.append((padded[2:] - padded[:-2]) / 2)
        return {"log-mel": bands, "MFCC": torch.cat(parts, 1)}

    return compute


def _layers(name: str, model: Wav2Vec2, layers: Sequence[int]) -> Features:
    def compute(audio: Tensor) -> dict[str, Tensor]:
        normalised, x = model.feature_projection(model.feature_encoder(audio))
        states: list[Tensor] = []
        states.append(model.contextualize(x, inputs=states))
        states[0] = normalised
        found = {f"{name} {layer}": states[layer][0] for layer in layers}
        if isinstance(model, Wav2Vec2ForPretraining):
            found["codes"] = model.codes(audio)[0][0]
        return found

    return compute


def _rows(
    train: Frames, scored: Frames, n_phones: int, n_voices: int, seed: int, show: Show
) -> Iterator[dict[str, Any]]:
    """Accuracies of each kind of features; of speakers on every third utterance of each training voice's."""
    names = [name for name in train.features if name != "codes"]
    held_out = torch.zeros(len(train.phones), dtype=torch.bool)
    for a, b in train.bounds[2::3]:
        held_out[a:b] = True
    speech = train.phones >= 0
    for i, name in enumerate(names):
        x, y = train.features[name], scored.features[name]
        accuracies = []
        for beside in (0, 2):
            fit = train.around(beside)[speech]
            told = scored.around(beside)[scored.phones >= 0]
            classify = train_linear(x, fit, train.phones[speech], n_phones, seed)
            accuracies.append(share_correct(classify, y, told, scored.phones[scored.phones >= 0]))
        alone, rest = speech & held_out, speech & ~held_out
        positions = train.around(0)
        classify = train_linear(x, positions[rest], train.speakers[rest], n_voices, seed)
        speakers = share_correct(classify, x, positions[alone], train.speakers[alone]) if alone.any() else None
        kind, _, layer = name.partition(" ")
        yield {
            "features": kind, "layer": int(layer) if layer else None,
            "phones_one": accuracies[0], "phones_five": accuracies[1], "speakers": speakers,
        }  # fmt: skip
        show("classify", (i + 1) / len(names))


def train_linear(
    x: Tensor, around: Tensor, classes: Tensor, n_classes: int, seed: int, *, epochs: int = 8, batch: int = 512
) -> Callable[[Tensor], Tensor]:
    """A linear softmax classifier: AdamW, cosine, on features brought to mean 0 and deviation 1.

    Args:
        x: (N, C) features.
        around: (M, k) rows of x that are one input together.
        classes: (M,) int64, below ``n_classes``.

    Returns:
        A function from (B, k, C) to the classes (B,).
    """
    mean, scale = x.float().mean(0), x.float().std(0) + 1e-5
    k = around.shape[1]
    linear = torch.nn.Linear(k * x.shape[1], n_classes)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    peak = 3e-3 if k == 1 else 1.5e-3
    optimizer = torch.optim.AdamW(linear.parameters(), lr=peak, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(around) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)

    def logits(frames: Tensor) -> Tensor:
        out: Tensor = linear(((frames.float() - mean) / scale).flatten(1))
        return out

    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(around), generator=rng).split(batch):
                loss = F.cross_entropy(logits(x[around[rows]]), classes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return lambda frames: logits(frames).argmax(1)


@torch.no_grad()
def share_correct(classify: Callable[[Tensor], Tensor], x: Tensor, around: Tensor, classes: Tensor) -> float:
    """Accuracy on inputs as of ``train_linear``."""
    right = [classify(x[rows]) == truth for rows, truth in zip(around.split(4096), classes.split(4096), strict=True)]
    return float(torch.cat(right).double().mean())


def _codes(frames: Frames) -> dict[str, float] | None:
    """Phone purity of the codes, all codebooks' together, and the share of the phones' entropy that they tell."""
    if "codes" not in frames.features:
        return None
    speech = frames.phones >= 0
    _, codes = frames.features["codes"][speech].unique(dim=0, return_inverse=True)
    joint = torch.zeros(int(codes.max()) + 1, int(frames.phones.max()) + 1, dtype=torch.float64)
    joint.index_put_((codes, frames.phones[speech]), torch.ones((), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    entropy = lambda p: -torch.special.xlogy(p, p).sum()  # noqa: E731
    known = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
    return {"purity": joint.max(1).values.sum().item(), "information": (known / entropy(joint.sum(0))).item()}
