"""CTC log-probabilities to text and times: greedy here, beam search in ``beam.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from w2v2.text.vocabulary import Vocabulary


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


class Greedy:
    """The most probable label of each frame."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, log_probs: Tensor) -> Hypothesis:
        """Decode (T, labels)."""
        best = log_probs.max(-1)
        return path_hypothesis(best.indices, self.vocabulary, float(best.values.double().sum()))


def path_hypothesis(path: Tensor, vocabulary: Vocabulary, score: float, text: str | None = None) -> Hypothesis:
    """What a path (T,) of labels, blank among them, spells; ``text`` where that is not what its labels are."""
    labels, counts = path.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0) - 1
    kept = (labels != vocabulary.blank).nonzero().flatten().tolist()
    ids = tuple(labels[kept].tolist())
    return Hypothesis(
        text=vocabulary.decode(ids) if text is None else text,
        ids=ids,
        starts=tuple((ends - counts + 1)[kept].tolist()),
        ends=tuple(ends[kept].tolist()),
        score=score,
    )
