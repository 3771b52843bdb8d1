"""Transcripts to labels and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from w2v2.errors import UsageError

BLANK, UNKNOWN, BOUNDARY = "<blank>", "<unk>", "|"


def normalize_text(text: str) -> str:
    """Upper case, single spaces."""
    return " ".join(text.upper().split())


@dataclass(frozen=True)
class Vocabulary:
    """Labels of a CTC model. Blank is 0, unknown 1, word boundary 2, then characters."""

    labels: tuple[str, ...]
    """Label of each id."""

    blank = 0
    unknown = 1
    boundary = 2

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Vocabulary:
        """The characters that occur in transcripts, sorted.

        Raises:
            UsageError: no characters at all, or the word boundary's own sign among them.
        """
        characters = {c for text in texts for c in normalize_text(text)} - {" "}
        if not characters:
            raise UsageError("no transcript has any character: expected text beside the audio; check the transcripts")
        if BOUNDARY in characters:
            raise UsageError(f"transcripts contain {BOUNDARY!r}, which stands for the word boundary; remove it")
        return cls((BLANK, UNKNOWN, BOUNDARY, *sorted(characters)))

    def encode(self, text: str) -> list[int]:
        """Labels of a transcript, with a word boundary after each word, the last one too."""
        ids = {label: i for i, label in enumerate(self.labels)}
        words = normalize_text(text).split()
        return [ids.get(c, self.unknown) for word in words for c in (*word, BOUNDARY)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of labels without blanks; inverse of ``encode`` for text in upper case without unknown characters."""
        text = "".join(" " if i == self.boundary else self.labels[i] for i in ids if i != self.blank)
        return " ".join(text.split())

    def save(self, path: Path) -> None:
        """Write as JSON: label to id."""
        path.write_text(json.dumps({label: i for i, label in enumerate(self.labels)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what ``save`` wrote."""
        ids: dict[str, int] = json.loads(path.read_text())
        labels = tuple(sorted(ids, key=ids.__getitem__))
        if labels[:3] != (BLANK, UNKNOWN, BOUNDARY) or sorted(ids.values()) != list(range(len(ids))):
            raise UsageError(f"{path} is not a vocabulary: expected {BLANK}, {UNKNOWN}, {BOUNDARY} as 0, 1, 2")
        return cls(labels)
