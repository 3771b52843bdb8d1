"""CTC log-probabilities to text and times: greedy here, beam search in ``beam.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from w2v2.errors import UsageError
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
    """A word, or a label of one, and when it was said."""

    text: str
    start: float
    """Seconds from the start of the audio."""
    end: float


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How a beam search weighs and prunes. The score of a hypothesis is

        sum of ln p(label of each frame) + lm_weight * log10 p_LM(words, end of sentence) + word_score * words
        + silence_score * frames of word boundary + hot_word_boost * hot words

    of its best path, or of all its paths together (``sum_paths``). Terms of words are there with a lexicon alone,
    those of the LM with an LM, and hot words count with or without either.
    """

    beam_size: int = 50
    """Hypotheses kept after each frame (fairseq ``beam``; the paper tests with 1500 and a 4-gram LM)."""
    beam_threshold: float = 50.0
    """Hypotheses that fall this far behind the best, in nats, are dropped (``beam_threshold``)."""
    beam_size_token: int | None = None
    """Labels tried at each frame, the most probable ones (``beam_size_token``); None: all."""
    lm_weight: float = 2.0
    """Of the LM's log10 probability, as in fairseq (``lm_weight``); of its nats the weight is 2.303 times less."""
    word_score: float = -1.0
    """Nats for each word of the lexicon (``word_score``). Negative: fewer words."""
    silence_score: float = 0.0
    """Nats for each frame of word boundary (``sil_weight``)."""
    hot_word_boost: float = 5.0
    """Nats for each hot word."""
    sum_paths: bool = False
    """Whether probabilities of paths that spell the same are added, not only the best one taken (``log_add``)."""

    def __post_init__(self) -> None:
        for name, smallest in (("beam_size", 1), ("beam_size_token", 1), ("beam_threshold", 0)):
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise UsageError(f"{name} of a beam search must be {smallest} or more, got {value}")
        for name in ("lm_weight", "word_score", "silence_score", "hot_word_boost"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} of a beam search must be a finite number, got {getattr(self, name)}")


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
    said = (labels != vocabulary.blank).nonzero().flatten().tolist()
    ids = tuple(labels[said].tolist())
    return Hypothesis(
        text=vocabulary.decode(ids) if text is None else text,
        ids=ids,
        starts=tuple((ends - counts + 1)[said].tolist()),
        ends=tuple(ends[said].tolist()),
        score=score,
    )


def make_decoder(
    vocabulary: Vocabulary,
    *,
    lm: Path | None = None,
    lexicon: Path | None = None,
    hot_words: Sequence[str] = (),
    beam: BeamConfig | None = None,
) -> Decoder:
    """Greedy where nothing is asked for; beam search over any labels, or over words with an LM or a lexicon.

    Args:
        lm: n-gram of words, ARPA (also gzipped) or KenLM binary. Without a lexicon its words are the lexicon.
        lexicon: a word and its spelling per line, or a word alone, which the vocabulary spells.
        hot_words: words that get ``BeamConfig.hot_word_boost``; with a lexicon they join it.

    Raises:
        UsageError: flashlight-text is not installed; a file that cannot be used; words without a word boundary.
    """
    if beam is None and lm is None and lexicon is None and not hot_words:
        return Greedy(vocabulary)
    try:
        from w2v2.beam import make_beam
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("flashlight"):
            raise
        raise UsageError("beam search needs flashlight-text: pip install 'w2v2[beam]'") from None
    return make_beam(vocabulary, beam or BeamConfig(), lm=lm, lexicon=lexicon, hot_words=hot_words)


def word_times(hypothesis: Hypothesis, vocabulary: Vocabulary, seconds: Callable[[int], float]) -> list[Word]:
    """Words of a hypothesis, from the first frame of their first label to the last of their last.

    Args:
        seconds: time of a frame, such as ``Wav2Vec2Config.frame_seconds``.
    """
    words = [(vocabulary.decode(hypothesis.ids[place]), place) for place in vocabulary.words(hypothesis.ids)]
    words = [(text, place) for text, place in words if text]
    said = hypothesis.text.split()
    if len(said) == len(words):  # a lexicon may spell words otherwise than they are written
        words = [(text, place) for text, (_, place) in zip(said, words, strict=True)]
    return [
        Word(text, seconds(hypothesis.starts[place][0]), seconds(hypothesis.ends[place][-1])) for text, place in words
    ]


def char_times(hypothesis: Hypothesis, vocabulary: Vocabulary, seconds: Callable[[int], float]) -> list[Word]:
    """Labels of a hypothesis that stand for text, characters as a rule, each from its first frame to its last."""
    return [
        Word(vocabulary.labels[label], seconds(start), seconds(end))
        for label, start, end in zip(hypothesis.ids, hypothesis.starts, hypothesis.ends, strict=True)
        if label not in vocabulary.special
    ]
