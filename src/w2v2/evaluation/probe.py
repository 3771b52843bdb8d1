"""What the layers of an encoder know: linear classification of their frames, beside features that nobody trained.

Accuracy of the contrastive task is no guide to what is learned (LOG.md, "A start that hears"). A linear classifier on
frozen features is, in seconds: of phones, on frames of voices that it has not heard; of speakers, on other utterances
of the same voices, which a good representation for speech recognition tells less well, layer by layer. ABX needs no
classifier, and a library that not every Python has (``abx.py``).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2v2.data.corpora import Split, Splits
from w2v2.errors import Show, UsageError, quiet
from w2v2.evaluation.abx import abx_errors, check_abx
from w2v2.evaluation.features import Frames, label_frames, layer_outputs, speaker_of, spectra, spread_cuts
from w2v2.evaluation.phones import Labels, check_times, phone_classes, read_labels
from w2v2.model.wav2vec2 import Wav2Vec2

if TYPE_CHECKING:
    from lhotse import MonoCut

SCHEMA = 1
"""Of what ``probe`` returns; its keys change only with it."""
UNTRAINED = ("spectra", "random")
"""Features beside the model's: log-mel and MFCC; the same net with random weights."""


def probe(
    model: Wav2Vec2,
    splits: Splits,
    split: str,
    labels: Path,
    *,
    layers: Sequence[int] | None = None,
    minutes: float = 20.0,
    seed: int = 0,
    beside: Collection[str] = UNTRAINED,
    abx: bool = False,
    quick: bool = False,
    show: Show = quiet,
) -> dict[str, Any]:
    """Probe a model's layers, and for comparison log-mel, MFCC and the same net with random weights.

    Args:
        splits, split: the probe is trained on utterances of ``train``, and scored on this one.
        labels: folder of phones with times, see ``read_labels``.
        layers: outputs of blocks, from 1; 0: the conv features. None: all.
        minutes: of labelled audio at most, over all voices, of either split.
        seed: of the choice, of the random net and of the classifiers.
        beside: which of ``UNTRAINED``.
        abx, quick: measure ABX too; or phones from one frame alone, of those that ``train`` has, the rest None.

    Returns:
        ``schema``, ``split``, ``classes`` (phones), ``frames`` and ``speakers`` ({train, scored}), ``rows`` (each
        ``features``, ``layer`` (None: has none), and the accuracies ``phones_one``, ``phones_five`` (frames of context)
        and ``speakers``; with ``abx`` the error rates ``abx_within`` and ``abx_across``), ``codes`` (``purity``: share
        of frames of their code's most frequent phone, ``information``: share of the phones' entropy that the codes
        tell; None: the model has none).

    Raises:
        UsageError: labels, layers or ABX that cannot be used.
    """
    depth = len(model.transformer)
    wanted = list(range(depth + 1)) if layers is None else list(layers)
    if wrong := [layer for layer in wanted if not 0 <= layer <= depth]:
        raise UsageError(f"`layers` must be 0 to {depth}, the blocks of this model, got {wrong[0]}")
    cuts, phones, classes = _choose(splits, split, labels, minutes, seed, quick)
    voices = sorted({speaker_of(cut) for part in cuts for cut in part})
    if abx:
        check_abx(len({speaker_of(cut) for cut in cuts[1]}))
    with _still(model), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        maps = [*([spectra(model.config)] if "spectra" in beside else []), layer_outputs("model", model, wanted)]
        if "random" in beside:
            untrained = Wav2Vec2(model.config).eval().to(next(model.parameters()).device)
            maps.append(layer_outputs("random", untrained, wanted))
        train, scored = (label_frames(part, maps, model.config, phones, classes, voices, show) for part in cuts)
        rows = list(_rows(train, scored, len(classes), len(voices), seed, abx, quick, show))
    return {
        "schema": SCHEMA,
        "split": split,
        "classes": classes,
        "frames": {"train": int((train.phones >= 0).sum()), "scored": int((scored.phones >= 0).sum())},
        "speakers": {k: len({speaker_of(c) for c in part}) for k, part in zip(("train", "scored"), cuts, strict=True)},
        "rows": rows,
        "codes": _codes(scored),
    }


def best_layer(rows: Sequence[dict[str, Any]], features: str) -> dict[str, float]:
    """Accuracy on phones from ``one`` frame and from ``five``, each of the layer that has the most."""
    return {n: max(row[f"phones_{n}"] for row in rows if row["features"] == features) for n in ("one", "five")}


def _choose(
    splits: Splits, split: str, labels: Path, minutes: float, seed: int, quick: bool
) -> tuple[list[list[MonoCut]], Labels, list[str]]:
    """Utterances to train on and to score, everybody's phones, and the classes."""
    phones = read_labels(labels)
    cuts = [spread_cuts(splits.get(name, Split.of([])), phones, minutes, seed, name) for name in ("train", split)]
    check_times(phones, {cut.id: cut.duration for part in cuts for cut in part})
    train, scored = ([phones[cut.id] for cut in part] for part in cuts)
    return cuts, phones, phone_classes(train, train if quick else scored)


@contextlib.contextmanager
def _still(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards that and the random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.random.fork_rng(devices=[]):
        yield
    for module, mode in modes:
        module.training = mode


def _rows(
    train: Frames, scored: Frames, n_phones: int, n_voices: int, seed: int, abx: bool, quick: bool, show: Show
) -> Iterator[dict[str, Any]]:
    """Accuracies of each kind of features; of speakers on every third utterance, of voices that have another one."""
    names = [name for name in train.features if name != "codes"]
    held_out = torch.zeros(len(train.phones), dtype=torch.bool)
    utterances = Counter(train.speakers[a].item() for a, _ in train.bounds)
    for a, b in train.bounds[2::3]:
        held_out[a:b] = utterances[train.speakers[a].item()] > 1
    speech = train.phones >= 0
    for i, name in enumerate(names):
        x, y = train.features[name], scored.features[name]
        accuracies: list[float | None] = []
        for beside in (0,) if quick else (0, 2):
            fit = train.around(beside)[speech]
            heard = scored.around(beside)[scored.phones >= 0]
            classify = train_linear(x, fit, train.phones[speech], n_phones, seed)
            accuracies.append(share_correct(classify, y, heard, scored.phones[scored.phones >= 0]))
        alone, rest = speech & held_out, speech & ~held_out
        speakers = None
        if alone.any() and n_voices > 1 and not quick:
            classify = train_linear(x, train.around(0)[rest], train.speakers[rest], n_voices, seed)
            speakers = share_correct(classify, x, train.around(0)[alone], train.speakers[alone])
        kind, _, layer = name.partition(" ")
        row: dict[str, Any] = {
            "features": kind, "layer": int(layer) if layer else None,
            "phones_one": accuracies[0], "phones_five": None if quick else accuracies[1], "speakers": speakers,
        }  # fmt: skip
        if abx:
            row |= dict(zip(("abx_within", "abx_across"), abx_errors(scored, name, seed), strict=True))
        yield row
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
