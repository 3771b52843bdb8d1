"""Which decoder: greedy, or a beam search and its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from w2v2.decoding.greedy import Decoder, Greedy, Hypothesis
from w2v2.errors import UsageError
from w2v2.text.vocabulary import Vocabulary


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
                raise UsageError(f"`{name}` of a beam search must be {smallest} or more, got {value}")
        for name in ("lm_weight", "word_score", "silence_score", "hot_word_boost"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"`{name}` of a beam search must be a finite number, got {getattr(self, name)}")


@runtime_checkable
class TunableDecoder(Protocol):
    """A beam search, whose weights can be tuned."""

    config: BeamConfig

    def __call__(self, log_probs: Tensor) -> Hypothesis:
        """Decode (T, labels)."""

    def tuned(self, config: BeamConfig) -> TunableDecoder:
        """The same with other weights."""


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
        from w2v2.decoding.beam import make_beam
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("flashlight"):
            raise
        raise UsageError("beam search needs flashlight-text: pip install 'w2v2[beam]'") from None
    return make_beam(vocabulary, beam or BeamConfig(), lm=lm, lexicon=lexicon, hot_words=hot_words)
