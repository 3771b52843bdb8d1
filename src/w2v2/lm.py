"""n-gram language models of words: modified Kneser-Ney from text, ARPA files, and queries."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TextIO, cast

from w2v2.errors import UsageError


def open_text(path: Path) -> TextIO:
    """A text file, gzipped or not."""
    return cast(TextIO, gzip.open(path, "rt") if path.suffix == ".gz" else path.open())


def arpa_words(path: Path) -> list[str]:
    """The words of an ARPA file, without ``<s>``, ``</s>`` and ``<unk>``."""
    words = []
    with open_text(path) as file:
        for line in file:
            if line.startswith("\\1-grams:"):
                break
        for line in file:
            if line.startswith("\\"):
                break
            fields = line.split()
            if len(fields) > 1:
                words.append(fields[1])
    if not words:
        raise UsageError(f"{path} is no ARPA file; expected \\data\\ and \\1-grams:, or a KenLM binary")
    return [word for word in words if word not in ("<s>", "</s>", "<unk>")]
