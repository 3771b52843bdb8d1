"""Words with times, from what a decoder makes of a recording."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from w2v2.decoding.greedy import Hypothesis
from w2v2.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Word:
    """A word, or a label of one, and when it was said."""

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


def confidence(words: Sequence[Word]) -> float:
    """Geometric mean of the probabilities of the frames of words' labels, 0 to 1; of words without any, 1."""
    scored = [(word.score, max(len(word.characters), 1)) for word in words if word.score is not None]
    labels = sum(count for _, count in scored)
    return math.exp(min(sum(score * count for score, count in scored) / labels, 0.0)) if labels else 1.0


LATEST_ONSET, ONSET, PAUSE = 0.12, 0.06, 0.1
"""Seconds: how late the first label of a word is at most; and where nothing tells; less between words is no pause."""


def word_times(
    hypothesis: Hypothesis,
    vocabulary: Vocabulary,
    seconds: Callable[[int], float],
    scores: Sequence[float] | None = None,
) -> list[Word]:
    """Words of a hypothesis, in their order, none over the next one.

    CTC emits a label once enough of its sound has been heard. So a word ends with the last frame of its last label, but
    its first label comes late: by 40 ms with one model, by 90 ms with another, hardly more or less from speaker to
    speaker. Most words follow each other without a pause, so the typical gap between the labels of two of them is that
    delay: the median over the recording is taken off every start. Words that then nearly touch share what is between
    them. Within a word each character lasts until the last frame of its label. On synthetic speech of unseen speakers
    this halves the errors, or better, with no constant that belongs to a model (``benchmarks/alignment.py``).

    Args:
        seconds: time of a frame's middle, such as ``Wav2Vec2Config.frame_seconds``.
        scores: of each label, as of ``label_scores``; a word's is the mean of its labels'.
    """
    half = (seconds(1) - seconds(0)) / 2  # a frame lasts so long to each side of its middle
    places = [part for part in vocabulary.words(hypothesis.ids) if vocabulary.decode(hypothesis.ids[part])]
    spelt = hypothesis.text.split()  # may not be what the labels spell, where a lexicon says how a word is written
    texts = spelt if len(spelt) == len(places) else [vocabulary.decode(hypothesis.ids[part]) for part in places]
    starts = [seconds(hypothesis.starts[part.start]) - half for part in places]
    ends = [seconds(hypothesis.ends[part.stop - 1]) + half for part in places]
    gaps = [start - end for start, end in zip(starts[1:], ends, strict=False)]
    onset = min(statistics.median(gaps), LATEST_ONSET) if gaps else ONSET
    starts = [max(start - onset, 0.0) for start in starts]
    for i, start in enumerate(starts[1:], 1):
        if start - ends[i - 1] < PAUSE:
            starts[i] = ends[i - 1] = (start + ends[i - 1]) / 2
    words: list[Word] = []
    for text, part, start, end in zip(texts, places, starts, ends, strict=True):
        own = [seconds(frame) + half for frame in hypothesis.ends[part]]
        # Sharing may have moved the word's end: the characters move with it.
        edges = [start, *(start + (edge - start) * (end - start) / (own[-1] - start) for edge in own)]
        known = [None] * len(own) if scores is None else scores[part]
        characters = tuple(
            Word(vocabulary.decode([i]), edges[n], edges[n + 1], known[n]) for n, i in enumerate(hypothesis.ids[part])
        )
        words.append(Word(text, start, end, None if scores is None else statistics.fmean(scores[part]), characters))
    return words


def label_scores(hypothesis: Hypothesis, log_probs: Tensor) -> list[float]:
    """Mean log-probability of the frames of each label, from the (T, labels) that the hypothesis was made from."""
    spans = zip(hypothesis.ids, hypothesis.starts, hypothesis.ends, strict=True)
    return [float(log_probs[start : end + 1, i].mean()) for i, start, end in spans]
