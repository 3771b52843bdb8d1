"""Classes of whole utterances or of frames: their names, and ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from w2v2.errors import UsageError
from w2v2.files import write_text
from w2v2.serial import from_dict, read_json, to_dict


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """What a classifier tells apart.

    Raises:
        UsageError: fewer than two, or one that occurs twice.
    """

    labels: tuple[str, ...]
    """Name of each id."""
    label: str = "speaker"
    """What they are of: of an utterance its ``speaker``, or ``text``, its transcript, ...; or ``frame``."""

    def __post_init__(self) -> None:
        if len({*self.labels}) < max(2, len(self.labels)):
            raise UsageError(f"expected two different classes or more, got {', '.join(self.labels[:8]) or 'none'}")

    @classmethod
    def from_texts(cls, texts: Iterable[str], label: str) -> ClassNames:
        """The names that occur, sorted; without blanks around them."""
        return cls(labels=tuple(sorted({text.strip() for text in texts} - {""})), label=label)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each name."""
        return {name: i for i, name in enumerate(self.labels)}

    def encode(self, text: str) -> list[int]:
        """The id of an utterance's class, as its only label.

        Raises:
            UsageError: no such class.
        """
        if text.strip() not in self.ids:
            raise UsageError(f"no class {text.strip()!r}: expected {', '.join(self.labels[:8])}")
        return [self.ids[text.strip()]]

    def decode(self, ids: Sequence[int]) -> str:
        """The name of an id, given as ``encode`` returns it."""
        (number,) = ids
        return self.labels[number]

    def save(self, path: Path) -> None:
        """Write as JSON: its type and fields."""
        write_text(path, json.dumps(to_dict(self), indent=1, ensure_ascii=False) + "\n")


def load_classes(path: Path) -> ClassNames:
    """Read what ``ClassNames.save`` wrote.

    Raises:
        UsageError: something else.
    """
    return from_dict({"_type": ClassNames.__name__, **read_json(path)}, ClassNames, str(path))
