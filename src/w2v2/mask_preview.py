"""``w2v2 mask-preview``: how much a recipe really masks, by the length of the utterance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from w2v2.config import PretrainConfig
from w2v2.errors import UsageError
from w2v2.flops import expected_coverage
from w2v2.model.masking import equalize_masks, keyed_generator, slices
from w2v2.model.wav2vec2 import SAMPLE_RATE, ContrastiveConfig
from w2v2.plan import crops

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CUTS = 20_000


@dataclass(frozen=True)
class Spans:
    """Masked frames and the runs that they form, over many utterances."""

    coverage: float
    """Share of frames masked."""
    count: float
    """Spans per utterance, those that touch or overlap merged."""
    mean: float
    """Frames of a merged span."""
    median: float
    fragmented: float
    """Share of merged spans shorter than ``mask_length``."""


@dataclass(frozen=True)
class MaskRow:
    """Masks of one duration."""

    seconds: float
    frames: int
    rows: int
    """Utterances that are given equal numbers of masked frames, together in a sub-batch."""
    expected: float
    """Coverage by the formula ``1 - (1 - mask_prob / mask_length) ** mask_length``."""
    drawn: Spans
    equalized: Spans
    """As the model gets them: in each batch frames are unmasked until all have as many masked."""


def preview_masks(config: PretrainConfig, durations: Sequence[float], draws: int) -> list[MaskRow]:
    """Draw masks as training does, with the model configuration's own ``sample_mask``.

    Args:
        config: the run; of its data settings crop and batch count.
        durations: seconds; those beyond the crop are cropped.
        draws: utterances of each duration.

    Raises:
        UsageError: a duration too short to be masked.
    """
    if draws < 1:
        raise UsageError(f"--draws must be 1 or more, got {draws}")
    done: dict[float, MaskRow] = {}
    for duration in durations:
        seconds = min(duration, config.data.max_seconds)
        if seconds not in done:
            done[seconds] = _preview(config, seconds, draws)
    return list(done.values())


def _preview(config: PretrainConfig, seconds: float, draws: int) -> MaskRow:
    model, samples = config.model, round(seconds * SAMPLE_RATE)
    frames = model.frames([samples])[0]
    if frames < 3:
        raise UsageError(f"--durations must give at least 3 frames to mask, got {seconds:g} s: {frames} frames")
    assert isinstance(model, ContrastiveConfig)
    batch = max(model.sub_batches([samples] * crops(config.data, seconds)))
    rngs = [keyed_generator(config.train.seed, samples, i) for i in range(draws)]
    masks = [model.sample_mask(frames, rng) for rng in rngs]
    whole = [min(batch, draws - start) for start in range(0, draws, batch)]
    # A last batch of fewer rows would be equalised less.
    parts = slices([n for n in whole if n == batch] or whole)
    equal = [mask for part in parts for mask in equalize_masks(masks[part], rngs[part])]
    return MaskRow(
        seconds=seconds,
        frames=frames,
        rows=batch,
        expected=expected_coverage(model.mask_prob, model.mask_length),
        drawn=measure_spans(torch.stack(masks), model.mask_length),
        equalized=measure_spans(torch.stack(equal), model.mask_length),
    )


def measure_spans(masks: Tensor, mask_length: int) -> Spans:
    """Coverage and runs of (N, T) bool masks."""
    edges = torch.nn.functional.pad(masks.to(torch.int8), (1, 1)).diff(dim=1).flatten()
    lengths: npt.NDArray[np.int64] = ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().numpy()
    if not len(lengths):
        return Spans(0.0, 0.0, 0.0, 0.0, 0.0)
    return Spans(
        coverage=masks.float().mean().item(),
        count=len(lengths) / len(masks),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        fragmented=float((lengths < mask_length).mean()),
    )


def corpus_durations(config: PretrainConfig) -> list[float]:
    """Quantiles (5, 25, 50, 75, 95 %) of what pretraining would take of the training split: long enough, cropped."""
    from w2v2.data.corpora import read_run

    data = config.data
    found = [cut.duration for cut in islice(read_run(data)["train"], _CUTS) if cut.duration >= data.min_seconds]
    if not found:
        raise UsageError(
            f"no utterance of {' '.join(data.sources)} is as long as --data.min-seconds {data.min_seconds:g}; lower it"
        )
    quantiles = np.quantile(np.minimum(found, data.max_seconds), _QUANTILES)
    return [round(float(seconds), 2) for seconds in quantiles]


def mask_table(rows: Sequence[MaskRow], mask_length: int) -> list[str]:
    """Lines for a person."""
    lines = [
        f"{'':24} {'frames masked':>30}   {'merged spans as drawn':>26}   {'merged spans, equalised':>26}",
        f"{'seconds':>7} {'frames':>7} {'batch':>8} {'formula':>10}{'drawn':>8}{'equalised':>12}   "
        + 2 * f"{'mean':>7}{'median':>8}{f'< {mask_length}':>11}   ",
    ]
    for row in rows:
        spans = "   ".join(f"{s.mean:7.1f}{s.median:8g}{s.fragmented:11.1%}" for s in (row.drawn, row.equalized))
        lines.append(
            f"{row.seconds:7g} {row.frames:7d} {row.rows:8d} {row.expected:10.1%}{row.drawn.coverage:8.1%}"
            f"{row.equalized.coverage:12.1%}   {spans}"
        )
    return [line.rstrip() for line in lines]
