"""How far an error rate can be trusted, and a difference between two: speakers are drawn again, not utterances.

Errors of one speaker go together, so that speakers, not utterances or words, are what a test set has a sample of.
Legend: K units (speakers, or utterances where there are too few), R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


FloatArray = npt.NDArray[np.float64]


LEVEL = 0.95
"""Of all intervals."""


RESAMPLES = 2000


SWAPS = 10_000


MIN_UNITS = 5
"""With fewer there is no interval: too many resamples of so few are of one unit alone."""


MAX_GROUPS = 2000


_CHUNK = 2_000_000


class Units:
    """Counts that add up, by speaker and by utterance, in memory that does not grow with the number of utterances.

    Args:
        width: how many counts an utterance has.
    """

    def __init__(self, width: int) -> None:
        self.by_speaker: dict[str, IntArray] = {}
        self.groups = np.zeros((MAX_GROUPS, width), np.int64)
        self.utterances = 0
        self._width = width

    def add(self, speaker: str | None, *counts: int) -> None:
        """Counts of an utterance; those without a speaker are taken as of one."""
        self.by_speaker.setdefault(speaker or "", np.zeros(self._width, np.int64))[:] += counts
        self.groups[self.utterances % MAX_GROUPS] += counts
        self.utterances += 1

    def choose(self) -> tuple[str, IntArray]:
        """``speakers``, or ``utterances`` where there are fewer than ``MIN_UNITS`` speakers; counts (K, width) of each.

        From ``MAX_GROUPS`` utterances on they are taken in groups of equal number, which are as independent.
        """
        if len(self.by_speaker) >= MIN_UNITS:
            return "speakers", np.stack(list(self.by_speaker.values()))
        return "utterances", self.groups[: self.utterances]


def ratio_interval(errors: IntArray, words: IntArray, seed: int = 0) -> tuple[float, float] | None:
    """Interval of ``LEVEL`` for sum of errors / sum of words, were the units another draw from their population.

    The bootstrap-t: units are drawn with replacement, and each resample's ratio is divided by its own standard error,
    of the delete-one jackknife (Efron and Tibshirani 1993, sections 12.5 and 11.5). The usual percentiles of resampled
    ratios are too narrow: with ten speakers they hold the truth in 87 to 90 % of simulated cases. These do so in 93 to
    95 % from eight speakers on, also where some have many times the words of others; with five, in 92 to 94 %.

    Args:
        errors: (K,) of each unit; negative ones too, where they are differences.
        words: (K,) of the references of each unit, none negative.

    Returns:
        Lower and upper end, of no width where all units have the same rate. None for fewer than ``MIN_UNITS`` units, no
        words, or where so few units differ in their rate (most have no error at all) that there is no telling.
    """
    count = len(errors)
    if count < MIN_UNITS or not words.any():
        return None
    ratio = errors.sum() / words.sum()
    spread = _standard_error(np.ones((1, count), np.int64), errors, words)[0]
    if spread == 0:
        return float(ratio), float(ratio)
    parts = []
    for weights in _resamples(count, seed):
        own = _standard_error(weights, errors, words)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append((_ratios(weights @ errors, weights @ words) - ratio) / own)
    scores = np.concatenate(parts)
    scores[np.isnan(scores)] = 0.0  # the very ratio, and all drawn units have it
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(scores, [tail, 1 - tail], method="inverted_cdf")
    if np.isinf([low, high]).any():
        return None
    return float(ratio - high * spread), float(ratio - low * spread)


def _resamples(count: int, seed: int) -> Iterator[IntArray]:
    """How often each unit is drawn, (r, K), RESAMPLES in all, some at a time."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // count)
    for start in range(0, RESAMPLES, size):
        yield rng.multinomial(count, np.full(count, 1 / count), min(size, RESAMPLES - start))


def _standard_error(weights: IntArray, errors: IntArray, words: IntArray) -> FloatArray:
    """(r,) of the ratio of each resample (r, K), by leaving out one drawn unit at a time."""
    total_errors, total_words = weights @ errors, weights @ words
    ratios = _ratios(total_errors, total_words)
    without = _ratios(total_errors[:, None] - errors, total_words[:, None] - words)
    squares: FloatArray = (weights * (without - ratios[:, None]) ** 2).sum(1)
    return np.sqrt(squares * (1 - 1 / len(errors)))


def _ratios(errors: IntArray, words: IntArray) -> FloatArray:
    return np.divide(errors, words, out=np.zeros(words.shape), where=words > 0)


@dataclass(frozen=True)
class Difference:
    """Of an error rate between two systems on the same utterances."""

    difference: float
    """This system's rate less the other's: negative is better."""
    interval: tuple[float, float] | None
    """Of ``LEVEL``; None with too few units."""
    p: float
    """How often systems that are equally good differ at least so much."""


def paired_difference(errors: IntArray, other: IntArray, words: IntArray, seed: int = 0) -> Difference:
    """Interval and two-sided test of a difference between rates.

    The interval is ``ratio_interval``'s, of the differences. The test is approximate randomisation (Noreen 1989): for
    equally good systems it is chance which of the two made which transcripts of a unit, so they are swapped unit by
    unit. No distribution is assumed; with K units no p is below 2 / 2**K.

    Args:
        errors, other: (K,) of each unit.
        words: (K,) of the references of each unit.
    """
    changes = errors - other
    return Difference(
        difference=float(changes.sum() / words.sum()),
        interval=ratio_interval(changes, words, seed),
        p=_swap_p(changes, seed),
    )


def _swap_p(changes: IntArray, seed: int) -> float:
    rng = np.random.default_rng(seed)
    changes = changes[changes != 0]
    size = max(1, _CHUNK // max(1, len(changes)))
    as_large = 0
    for start in range(0, SWAPS, size):
        signs = 2 * rng.integers(0, 2, (min(size, SWAPS - start), len(changes))) - 1
        as_large += int((np.abs(signs @ changes) >= abs(changes.sum())).sum())
    return (1 + as_large) / (1 + SWAPS)
