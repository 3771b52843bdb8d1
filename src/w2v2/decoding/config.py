"""How a beam search weighs and prunes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from w2v2.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How a beam search weighs and prunes. The score of a hypothesis is

        sum of ln p(label of each frame) + lm_weight * log10 p_LM(words, end of sentence) + word_score * words
        + silence_score * frames of word boundary + blank_score * frames of blank + hot_word_boost * hot words

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
    blank_score: float = 0.0
    """Nats for each frame of blank. Negative: less is left out, for models of few labels, which are too sure of it."""
    hot_word_boost: float = 5.0
    """Nats for each hot word."""
    sum_paths: bool = False
    """Whether probabilities of paths that spell the same are added, not only the best one taken (``log_add``)."""

    def __post_init__(self) -> None:
        for name, low, high in (("beam_size", 1, 1e6), ("beam_size_token", 1, 1e6), ("beam_threshold", 0, math.inf)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"`{name}` of a beam search must be {low} to {high:,.0f}, got {value}")
        for name in ("lm_weight", "word_score", "silence_score", "blank_score", "hot_word_boost"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"`{name}` of a beam search must be a finite number, got {getattr(self, name)}")
