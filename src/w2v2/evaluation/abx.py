"""ABX: how often a phone lies nearer to one of another kind than to one of its own, without training anything.

Schatz et al. 2013; computed by fastabx (arXiv:2505.02692), which needs Python 3.12.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import pairwise

from w2v2.errors import UsageError
from w2v2.evaluation.features import Frames

_GROUP, _ACROSS = 10, 5
"""Tokens of a phone and voice, and other voices, that are compared at most: those of ZeroSpeech."""


def check_abx(voices: int) -> None:
    """Refuse to measure ABX where that cannot be, before anything is computed.

    Raises:
        UsageError: fastabx is not installed; fewer than two voices.
    """
    if find_spec("fastabx") is None:
        raise UsageError("`abx` needs fastabx, on Python 3.12 or later: pip install fastabx")
    if voices < 2:
        raise UsageError(f"`abx` compares voices: expected two or more with phones in the split, got {voices}")


def abx_errors(frames: Frames, name: str, seed: int) -> tuple[float, float]:
    """Error rates of phones within and across speakers, in any context; 0.5 is chance.

    By the angle between frames, phones warped in time onto each other.

    Args:
        frames: with two voices or more.
        name: of the features.
        seed: of which tokens are compared.
    """
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # with more, the order of rows, and so what is drawn, is chance
    import polars
    import torch
    from fastabx import Dataset, InMemoryAccessor, Score, Subsampler, Task

    tokens = _tokens(frames)
    labels = polars.DataFrame(
        {
            "phone": [int(frames.phones[start]) for start, _ in tokens],
            "speaker": [int(frames.speakers[start]) for start, _ in tokens],
        }
    )
    accessor = InMemoryAccessor(dict(enumerate(tokens)), frames.features[name].float(), torch.device("cpu"))
    dataset = Dataset(labels, accessor)
    subsampler = Subsampler(_GROUP, _ACROSS, seed)
    within = Task(dataset, on="phone", by=["speaker"], subsampler=subsampler)
    across = Task(dataset, on="phone", across=["speaker"], subsampler=subsampler)
    errors = [Score(task, "angular", progress=False).collapse(levels=["speaker"]) for task in (within, across)]
    return errors[0], errors[1]


def _tokens(frames: Frames) -> list[tuple[int, int]]:
    """First frame, and the one after the last, of each phone: runs of one class inside of an utterance."""
    tokens = []
    for first, last in frames.bounds:
        phones = frames.phones[first:last]
        edges = [0, *((phones[1:] != phones[:-1]).nonzero()[:, 0] + 1).tolist(), len(phones)]
        tokens += [(first + a, first + b) for a, b in pairwise(edges) if b > a and phones[a] >= 0]
    return tokens
