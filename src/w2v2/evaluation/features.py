"""Frames of labelled utterances as a probe sees them: outputs of a model's layers, spectra, phones and speakers."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from w2v2.data.audio import AudioError, load_audio
from w2v2.data.corpora import Split
from w2v2.errors import Show, UsageError
from w2v2.evaluation.phones import Labels, frame_classes, nothing_labelled
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.warm_start import log_mel, mel_filters
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config

if TYPE_CHECKING:
    from lhotse import MonoCut

log = logging.getLogger(__name__)

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


def label_frames(
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
        try:
            audio = config.normalized(torch.from_numpy(load_audio(cut))[None])
        except AudioError as error:
            log.warning("not probed: %s", error)
            continue
        n = config.frames([audio.shape[1]])[0]
        if not n:
            log.warning("not probed: %s is shorter than a frame", cut.id)
            continue
        for compute in maps:
            for name, values in compute(audio).items():
                features.setdefault(name, []).append(values.half() if values.is_floating_point() else values)
        centers = np.array([config.frame_seconds(t) for t in range(n)])
        heard.append(torch.from_numpy(frame_classes(phones[cut.id], centers, index)))
        who.append(torch.full((n,), voices.index(speaker_of(cut))))
        bounds.append((bounds[-1][1], bounds[-1][1] + n))
        show("features", (i + 1) / len(cuts))
    if not heard:
        raise UsageError("no labelled utterance can be probed; the lines above say why")
    laid = {name: torch.cat(parts) for name, parts in features.items()}
    return Frames(bounds[1:], torch.cat(heard), torch.cat(who), laid)


def spread_cuts(split: Split, labelled: dict[str, Any], minutes: float, seed: int, name: str) -> list[MonoCut]:
    """About so many minutes of labelled cuts, the same share of each voice."""
    by_voice: dict[str, list[MonoCut]] = {}
    for cut in split:
        if cut.id in labelled:
            by_voice.setdefault(speaker_of(cut), []).append(cut)
    if not by_voice:
        raise nothing_labelled(name)
    chosen = []
    for voice, cuts in sorted(by_voice.items()):
        left = 60 * minutes / len(by_voice)
        random.Random(f"{seed}/{voice}").shuffle(cuts)
        for cut in cuts:
            if left > 0:
                chosen.append(cut)
            left -= cut.duration
    return chosen


def thin_out(cuts: Sequence[MonoCut], minutes: float, name: str) -> Split:
    """About so many minutes, every so manieth of the labelled cuts of a split.

    Raises:
        UsageError: there are none.
    """
    if not cuts:
        raise nothing_labelled(name)
    return Split.of(cuts[:: math.ceil(sum(cut.duration for cut in cuts) / (60 * minutes))])


def speaker_of(cut: MonoCut) -> str:
    """Of its first supervision; "" where it is not known."""
    return cut.supervisions[0].speaker or ""


def spectra(config: Wav2Vec2Config) -> Features:
    """Log-mel of 40 bands, and 13 cepstral coefficients of it with their first and second differences."""
    filters = mel_filters(40)
    basis = torch.cos(math.pi / 40 * (torch.arange(40)[:, None] + 0.5) * torch.arange(13))

    def compute(audio: Tensor) -> dict[str, Tensor]:
        bands = log_mel(audio, config, filters)[0]
        parts = [bands @ basis]
        for _ in range(2):
            before, after = parts[-1][:1], parts[-1][-1:]
            padded = torch.cat([before, parts[-1], after])
            parts.append((padded[2:] - padded[:-2]) / 2)
        return {"log-mel": bands, "MFCC": torch.cat(parts, 1)}

    return compute


def layer_outputs(name: str, model: Wav2Vec2, layers: Sequence[int]) -> Features:
    """Outputs of blocks, from 1, and, 0, the conv features; codes too, where the model has some."""

    def compute(audio: Tensor) -> dict[str, Tensor]:
        audio = audio.to(next(model.parameters()))
        normalised, x = model.feature_projection(model.feature_encoder(audio))
        states: list[Tensor] = []
        states.append(model.contextualize(x, inputs=states))
        states[0] = normalised
        outputs = {f"{name} {layer}": states[layer][0].cpu() for layer in layers}
        if isinstance(model, Wav2Vec2ForPretraining):
            outputs["codes"] = model.codes(audio)[0][0].cpu()
        return outputs

    return compute
