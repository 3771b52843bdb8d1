"""What a pretraining run masks, before it starts: shares of the frames and lengths of the spans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from w2v2.data.config import DataConfig
from w2v2.model.masking import equalize_masks, keyed_generator
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.training.config import PretrainConfig


def crops(data: DataConfig, seconds: float) -> int:
    """Whole crops of so many seconds in a micro-batch."""
    return max(int(data.batch_seconds / seconds + 1e-9), 1)


@dataclass(frozen=True)
class Masks:
    """Masks of crops of one length."""

    seconds: float
    frames: int
    drawn: float
    """Share of the frames that is masked, mean, as drawn."""
    trained: float
    """The same as the model gets them: in each sub-batch frames are unmasked until all rows have as many masked."""
    spans: tuple[int, int, int]
    """Frames of a span as the model gets it, those that touch merged: 10th, 50th and 90th percentile."""


def preview_masks(config: PretrainConfig, seconds: float, draws: int = 1_000) -> Masks:
    """Draw masks of at least so many crops as training does, with the model configuration's own ``sample_mask``."""
    assert isinstance(config.model, ContrastiveConfig)
    model, samples = config.model, round(seconds * SAMPLE_RATE)
    frames = model.frames([samples])[0]
    rows = max(model.sub_batches([samples] * crops(config.data, seconds)))
    drawn, trained = [], []
    for batch in range(-(-draws // rows)):
        rngs = [keyed_generator(config.train.seed, samples, batch, row) for row in range(rows)]
        masks = [model.sample_mask(frames, rng) for rng in rngs]
        drawn += masks
        trained += equalize_masks(masks, rngs)
    low, middle, high = np.quantile(span_lengths(torch.stack(trained)), [0.1, 0.5, 0.9], method="nearest").tolist()
    shares = [torch.stack(masks).float().mean().item() for masks in (drawn, trained)]
    return Masks(seconds, frames, shares[0], shares[1], (low, middle, high))


def span_lengths(masks: Tensor) -> npt.NDArray[np.int64]:
    """Frames of each run of masked frames in (N, T) bool masks."""
    edges = nn.functional.pad(masks.to(torch.int8), (1, 1)).diff(dim=1).flatten()  # (N * (T + 1),)
    return np.asarray((edges == -1).nonzero() - (edges == 1).nonzero()).flatten()
