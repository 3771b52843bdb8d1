"""Transcripts to labels and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from w2v2.errors import UsageError

BLANK, UNKNOWN, BOUNDARY = "<blank>", "<unk>", "|"


def normalize_text(text: str) -> str:
    """Upper case, single spaces."""
    return " ".join(text.upper().split())


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Labels of a CTC model: characters, with a label that ends each word.

    Blank, unknown and word boundary are explicit ids, wherever they are among the labels: models from elsewhere have
    their own places and names for them.
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

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Vocabulary:
        """The characters that occur in transcripts, sorted, after blank, unknown and boundary.

        Raises:
            UsageError: no characters at all, or the word boundary's own sign among them.
        """
        characters = {c for text in texts for c in normalize_text(text)} - {" "}
        if not characters:
            raise UsageError("no transcript has any character: expected text beside the audio; check the transcripts")
        if BOUNDARY in characters:
            raise UsageError(f"transcripts contain {BOUNDARY!r}, which stands for the word boundary; remove it")
        return cls(labels=(BLANK, UNKNOWN, BOUNDARY, *sorted(characters)))

    def normalize(self, text: str) -> str:
        """Text as this vocabulary spells it: what references and hypotheses are compared in."""
        return normalize_text(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, a boundary after each word, the last one too. Of a single word: its spelling.

        Raises:
            UsageError: a character without a label, where there is no unknown label.
        """
        ids = {label: i for i, label in enumerate(self.labels)}
        found = []
        for word in self.normalize(text).split():
            found += [ids.get(c, self.unknown) for c in word]
            found += [] if self.boundary is None else [self.boundary]
        if None in found:
            strange = sorted({c for c in self.normalize(text) if c not in ids and c != " "})
            raise UsageError(f"no label for {' '.join(strange)}; expected characters of {' '.join(self.labels)}")
        return [i for i in found if i is not None]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; inverse of ``encode`` for normalised text of known characters."""
        nothing = {self.blank, *self.silent}
        text = "".join(" " if i == self.boundary else self.labels[i] for i in ids if i not in nothing)
        return " ".join(text.split())

    def save(self, path: Path) -> None:
        """Write as JSON: its fields."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def load_vocabulary(path: Path) -> Vocabulary:
    """Read what ``Vocabulary.save`` wrote.

    Raises:
        UsageError: something else.
    """
    try:
        fields = json.loads(path.read_text())
        made = Vocabulary(**{**fields, "labels": tuple(fields["labels"]), "silent": tuple(fields["silent"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a vocabulary of 'w2v2 finetune' ({error}); check the path") from error
    return made
