"""CTC log-probabilities to text and times."""

from __future__ import annotations

from collections.abc import Callable
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


def word_times(hypothesis: Hypothesis, vocabulary: Vocabulary, seconds: Callable[[int], float]) -> list[Word]:
    """Words of a hypothesis, from the first frame of their first label to the last of their last.

    Args:
        seconds: time of a frame, such as ``Wav2Vec2Config.frame_seconds``.
    """
    words: list[Word] = []
    for place in vocabulary.words(hypothesis.ids):
        text = vocabulary.decode(hypothesis.ids[place])
        if text:
            words.append(Word(text, seconds(hypothesis.starts[place][0]), seconds(hypothesis.ends[place][-1])))
    return words
