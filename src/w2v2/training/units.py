"""What the labels of a CTC model are: a recipe's choice, from which the transcripts make a vocabulary.

Your own is a dataclass with ``vocabulary``, in your recipe file, and a subclass of :class:`w2v2.Vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from w2v2.text.vocabulary import Vocabulary


@dataclass(kw_only=True)
class Characters:
    """The characters of the transcripts, of any script, and a label after each word (the paper's letters)."""

    upper: bool = True
    """Whether text is upper-cased; else case is kept, and both cases are labels."""
    language: str = ""
    """Whose rules of upper case hold: ``tr``, ``az`` (two letters i) or ``de`` (ß is not ss); empty: none of these."""

    def vocabulary(self, texts: Iterable[str]) -> Vocabulary:
        """Labels for transcripts."""
        from w2v2.text.vocabulary import Vocabulary  # late: pretraining, whose recipes stand beside, needs no text

        return Vocabulary.from_texts(texts, "upper" if self.upper else "kept", self.language)


@dataclass(kw_only=True)
class Phonemes:
    """What spaces separate in the transcripts: phonemes, or whatever else is written so (paper section 5.3, TIMIT)."""

    def vocabulary(self, texts: Iterable[str]) -> Vocabulary:
        """Labels for transcripts."""
        from w2v2.text.vocabulary import PhonemeVocabulary

        return PhonemeVocabulary.from_texts(texts)


@dataclass(kw_only=True)
class SentencePieces:
    """Pieces of words, learned from the transcripts by SentencePiece (``pip install sentencepiece``)."""

    size: int = 500
    """Pieces at most; fewer where the transcripts do not hold as many."""
    upper: bool = True
    """Whether text is upper-cased; else case is kept."""
    language: str = ""
    """Whose rules of upper case hold: ``tr``, ``az`` (two letters i) or ``de`` (ß is not ss); empty: none of these."""

    def vocabulary(self, texts: Iterable[str]) -> Vocabulary:
        """Labels for transcripts."""
        from w2v2.text.vocabulary import PieceVocabulary

        case = "upper" if self.upper else "kept"
        return PieceVocabulary.from_texts(texts, case, self.language, size=self.size)


@dataclass(kw_only=True)
class Classes:
    """A class of each utterance, by its speaker or another label: no CTC, but a classifier (``classify.py``)."""

    label: str = "speaker"
    """``speaker``; ``text``, the transcript as it is, which any column of a table may be (``w2v2 prepare --columns
    text=emotion``); or what lhotse's supervisions have, such as ``language`` or ``gender``."""
    attention: bool = False
    """Whether frames are pooled by learned weights; else by their mean."""


@dataclass(kw_only=True)
class FrameClasses:
    """A class of each frame, such as its phone, from labels with times: a classifier of frames (``classify.py``)."""

    labels: str = ""
    """Folder of phones, or whatever else stands in their place, with times, ``*.ctm`` or ``*.TextGrid``; empty: that of
    the corpus."""
