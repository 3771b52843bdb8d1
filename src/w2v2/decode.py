"""CTC log-probabilities to text and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from w2v2.text import Vocabulary


@dataclass(frozen=True)
class Hypothesis:
    """What a decoder makes of an utterance."""

    text: str
    ids: tuple[int, ...]
    """Labels, repeats merged, without blanks."""
    starts: tuple[int, ...]
    """First frame of each label."""
    ends: tuple[int, ...]
    """Last frame of each label."""
    score: float
    """Log-probability of the path, and whatever a decoder adds to it."""


Decoder = Callable[[Tensor], Hypothesis]
"""From log-probabilities (T, labels) of one utterance, on the host; T may be 0."""


@dataclass(frozen=True)
class Word:
    """A word and when it was said."""

    text: str
    start: float
    """Seconds from the start of the audio."""
    end: float
    score: float | None = None
    """Mean log-probability of the frames of its labels, where it is known."""
    characters: tuple[Word, ...] = ()
    """Its labels, timed in the same way."""

    def probability(self) -> float | None:
        """Geometric mean of the probabilities of its labels' frames, 0 to 1."""
        return None if self.score is None else math.exp(min(self.score, 0.0))


class Greedy:
    """The most probable label of each frame."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, log_probs: Tensor) -> Hypothesis:
        """Decode (T, labels)."""
        best = log_probs.max(-1)
        labels, counts = best.indices.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0) - 1
        said = (labels != self.vocabulary.blank).nonzero().flatten().tolist()
        ids = tuple(labels[said].tolist())
        return Hypothesis(
            text=self.vocabulary.decode(ids),
            ids=ids,
            starts=tuple((ends - counts + 1)[said].tolist()),
            ends=tuple(ends[said].tolist()),
            score=float(best.values.double().sum()),
        )


def word_times(
    hypothesis: Hypothesis, vocabulary: Vocabulary, seconds: Callable[[int], float], log_probs: Tensor | None = None
) -> list[Word]:
    """Words of a hypothesis, from the first frame of their first label to the last of their last.

    A frame lasts half a hop to each side of its middle.

    Args:
        seconds: time of a frame's middle, such as ``Wav2Vec2Config.frame_seconds``.
        log_probs: (T, labels) that it was made from, for scores.
    """
    half = (seconds(1) - seconds(0)) / 2
    words: list[Word] = []
    group: list[Word] = []
    for place in range(len(hypothesis.ids) + 1):
        if place < len(hypothesis.ids) and (i := hypothesis.ids[place]) != vocabulary.boundary:
            start, end = hypothesis.starts[place], hypothesis.ends[place]
            score = None if log_probs is None else float(log_probs[start : end + 1, i].mean())
            group.append(Word(vocabulary.decode([i]), max(seconds(start) - half, 0.0), seconds(end) + half, score))
            continue
        text = vocabulary.decode(hypothesis.ids[place - len(group) : place])
        if text:
            words.append(Word(text, group[0].start, group[-1].end, _mean_score(group), tuple(group)))
        group = []
    return words


def _mean_score(labels: Sequence[Word]) -> float | None:
    known = [label.score for label in labels if label.score is not None]
    return sum(known) / len(known) if known else None
