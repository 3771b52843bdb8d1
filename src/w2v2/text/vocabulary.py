"""Transcripts to labels and back: characters, phonemes or SentencePiece pieces."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from w2v2.errors import UsageError
from w2v2.files import write_text
from w2v2.serial import from_dict, read_json, to_dict
from w2v2.text.spelling import KEPT, LOWER, UPPER, casing, composed_ids, letters, normalize_text

BLANK, UNKNOWN, BOUNDARY = "<blank>", "<unk>", "|"
SPACE = "\u2581"
"""What SentencePiece has for a space: it begins a word."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Labels of a CTC model: characters, with a label that ends each word.

    Blank, unknown and word boundary are explicit ids, wherever they are among the labels: models from elsewhere have
    their own places and names for them. What these labels are called cannot be said: in a text it is unknown.

    Raises:
        UsageError: a label that occurs twice, or an id that is none.
    """

    labels: tuple[str, ...]
    """Label of each id."""
    blank: int = 0
    """Id that CTC puts between labels."""
    unknown: int | None = 1
    """Id of what has no label; None: there is none, and text that needs it is refused."""
    boundary: int | None = 2
    """Id that ends each word; None: the labels say themselves where words end."""
    silent: tuple[int, ...] = ()
    """Further ids that stand for nothing in a text, such as ``<s>`` of a model from elsewhere."""
    case: str = ""
    """That text is given, one of ``spelling.CASES``; empty: that of the labels, or its own where they have both."""
    language: str = ""
    """Whose rules of case hold, as for ``spelling.casing``."""

    def __post_init__(self) -> None:
        twice = [label for label, count in Counter(self.labels).items() if count > 1]
        if twice:
            raise UsageError(f"labels occur twice in the vocabulary: {' '.join(twice)}; remove one of each")
        special = [i for i in (self.blank, self.unknown, self.boundary, *self.silent) if i is not None]
        if len({*special}) < len(special) or not all(0 <= i < len(self.labels) for i in special):
            raise UsageError(
                f"blank, unknown, boundary and silent must be different ids below {len(self.labels)}, got {special}"
            )
        casing(self.case or UPPER, self.language)

    @classmethod
    def from_texts(cls, texts: Iterable[str], case: str = UPPER, language: str = "") -> Vocabulary:
        """The characters that occur in transcripts, sorted, after blank, unknown and boundary.

        The boundary's own sign gets no label of its own; ``text_check.py`` refuses transcripts that have it. Case and
        language are as for ``spelling.casing``.

        Raises:
            UsageError: no characters at all.
        """
        change = casing(case, language)
        characters = {c for text in texts for c in normalize_text(text, change)} - {" ", BOUNDARY}
        labels = (BLANK, UNKNOWN, BOUNDARY, *_some(characters))
        return cls(labels=labels, case="" if case == UPPER else case, language=language)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that no text has: blank, unknown, boundary, silent ones."""
        return frozenset({self.blank, self.unknown, self.boundary, *self.silent} - {None})  # type: ignore[arg-type]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each label that a text can have, by its composed form, which is the text's."""
        return composed_ids({i: label for i, label in enumerate(self.labels) if i not in self.special})

    @cached_property
    def change_case(self) -> Callable[[str], str]:
        """As the labels are: the one place that decides it. Upper where they have no case."""
        letters = "".join(self.ids)
        lower, upper = letters != letters.upper(), letters != letters.lower()
        return casing(self.case or (LOWER if lower and not upper else KEPT if lower else UPPER), self.language)

    def normalize(self, text: str) -> str:
        """Text as this vocabulary spells it, in its labels' case: what references and hypotheses are compared in."""
        return normalize_text(text, self.change_case)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, a boundary after each word, the last one too. Of a single word: its spelling.

        Raises:
            UsageError: a character without a label, where there is no unknown label.
        """
        end = [] if self.boundary is None else [self.boundary]
        return [i for w in self.normalize(text).split() for i in [*map(self._id, letters(w, self.ids)), *end]]

    def _id(self, label: str) -> int:
        id_ = self.ids.get(label, self.unknown)
        if id_ is None:
            raise UsageError(f"no label for {label!r}; expected {' '.join(self.ids)}")
        return id_

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; inverse of ``encode`` for normalised text of known characters."""
        nothing = {self.blank, *self.silent}
        text = "".join(" " if i == self.boundary else self.labels[i] for i in ids if i not in nothing)
        return normalize_text(text, str)

    def words(self, ids: Sequence[int]) -> list[slice]:
        """Where each word is among ids, without its boundary. Empty ones too."""
        ends = [place for place, i in enumerate(ids) if i == self.boundary]
        return [slice(a + 1, b) for a, b in itertools.pairwise([-1, *ends, len(ids)])]

    def strange(self, text: str) -> list[str]:
        """Characters of a text that have no label."""
        return sorted({c for w in self.normalize(text).split() for c in letters(w, self.ids)} - self.ids.keys())

    def save(self, path: Path) -> None:
        """Write as JSON: its type and fields."""
        write_text(path, json.dumps(to_dict(self), indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True, kw_only=True)
class PhonemeVocabulary(Vocabulary):
    """Labels of any length that transcripts separate by spaces, such as phonemes. Case matters; a label is a word."""

    boundary: int | None = None
    case: str = KEPT

    @classmethod
    def from_texts(cls, texts: Iterable[str], case: str = KEPT, language: str = "") -> PhonemeVocabulary:
        """The labels that occur in transcripts, sorted, after blank and unknown, whose names are none of them.

        Raises:
            UsageError: no labels at all.
        """
        labels = {label for text in texts for label in normalize_text(text, casing(case, language)).split()}
        return cls(labels=(_other_than(labels, BLANK), _other_than(labels, UNKNOWN), *_some(labels)))

    def normalize(self, text: str) -> str:
        """Single spaces, composed characters."""
        return normalize_text(text, str)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            UsageError: a label that there is not, where there is no unknown label.
        """
        return [self._id(label) for label in self.normalize(text).split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; inverse of ``encode`` for known labels."""
        return normalize_text(" ".join(self.labels[i] for i in ids if i not in {self.blank, *self.silent}), str)

    def words(self, ids: Sequence[int]) -> list[slice]:
        """Each label by itself."""
        return [slice(place, place + 1) for place in range(len(ids))]

    def strange(self, text: str) -> list[str]:
        """Labels of a text that there are not."""
        return sorted({*self.normalize(text).split()} - self.ids.keys())


@dataclass(frozen=True, kw_only=True)
class PieceVocabulary(Vocabulary):
    """Pieces of a SentencePiece model, after the blank; a piece that begins a word begins with ``SPACE``."""

    boundary: int | None = None
    model: str
    """The SentencePiece model, base64: the vocabulary's file is all there is to keep."""

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], case: str = UPPER, language: str = "", *, size: int = 500
    ) -> PieceVocabulary:
        """Train a unigram model (arXiv:1804.10959) of at most so many pieces on transcripts; the same from the same.

        Raises:
            UsageError: fewer pieces than characters, no text, or no sentencepiece installed.
        """
        module = _sentencepiece()
        model = io.BytesIO()
        change = casing(case, language)
        lines = (line for line in (normalize_text(text, change) for text in texts) if line)
        try:
            module.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=model, vocab_size=size, hard_vocab_limit=False,
                character_coverage=1.0, normalization_rule_name="identity", bos_id=-1, eos_id=-1,
                max_sentence_length=1_000_000, num_threads=1, minloglevel=3,
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no text"
            raise UsageError(
                f"no {size} pieces can be made of the transcripts: {reason}; change `units.size`"
            ) from error
        processor = module.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        encoded = base64.b64encode(model.getvalue()).decode()
        return cls(labels=(BLANK, *pieces), model=encoded, case="" if case == UPPER else case, language=language)

    @cached_property
    def _processor(self) -> Any:
        return _sentencepiece().SentencePieceProcessor(model_proto=base64.b64decode(self.model))

    def encode(self, text: str) -> list[int]:
        """Ids of the most probable pieces of a text."""
        return [i + 1 for i in self._processor.encode(self.normalize(text))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; inverse of ``encode`` for normalised text of known characters."""
        return " ".join(super().decode(ids).replace(SPACE, " ").split())

    def words(self, ids: Sequence[int]) -> list[slice]:
        """From each piece that begins a word to before the next."""
        starts = [place for place, i in enumerate(ids) if place == 0 or self.labels[i].startswith(SPACE)]
        return [slice(a, b) for a, b in itertools.pairwise([*starts, len(ids)])]

    def strange(self, text: str) -> list[str]:
        """Characters of a text that no piece has."""
        return sorted({*self.normalize(text)} - {*"".join(self.ids)} - {" "} | ({SPACE} & {*text}))


def _other_than(labels: set[str], name: str) -> str:
    while name in labels:
        name = f"<{name}>"
    return name


def _some(labels: Iterable[str]) -> list[str]:
    ranked = sorted(labels)
    if not ranked:
        raise UsageError("no transcript has any character: expected text beside the audio; check the transcripts")
    return ranked


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ModuleNotFoundError as error:
        raise UsageError("pieces need SentencePiece: pip install sentencepiece") from error
    return sentencepiece


def load_vocabulary(path: Path) -> Vocabulary:
    """Read what ``Vocabulary.save`` wrote, of whatever kind.

    Raises:
        UsageError: something else.
    """
    return from_dict({"_type": Vocabulary.__name__, **read_json(path)}, Vocabulary, str(path))
