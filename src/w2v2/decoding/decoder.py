"""Which decoder: greedy, or a beam search and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from w2v2.decoding.config import BeamConfig
from w2v2.decoding.greedy import Decoder, Greedy, Hypothesis
from w2v2.errors import UsageError
from w2v2.text.vocabulary import Vocabulary


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
        raise UsageError("beam search needs flashlight-text: pip install flashlight-text") from None
    return make_beam(vocabulary, beam or BeamConfig(), lm=lm, lexicon=lexicon, hot_words=hot_words)
