"""How texts are made comparable, and how long their labels are."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Container, Iterator, Mapping, Sequence


def normalize_text(text: str, case: Callable[[str], str] = str.upper) -> str:
    """Upper case, or as ``case`` makes it; single spaces; composed characters (NFC): é is one, however it was typed."""
    return " ".join(unicodedata.normalize("NFC", case(text)).split())


def frames_needed(ids: Sequence[int]) -> int:
    """Frames without which CTC cannot emit some labels: one each, and a blank between two that are the same."""
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids))


def composed_ids(labels: Mapping[int, str]) -> dict[str, int]:
    """Id by the composed form of each label; of two with the same form, that of the one which is composed."""
    ids: dict[str, int] = {}
    for i, label in labels.items():
        form = unicodedata.normalize("NFC", label)
        if form == label or form not in ids:
            ids[form] = i
    return ids


def letters(word: str, labels: Container[str]) -> Iterator[str]:
    """The labels of a composed word, in their composed forms: what is canonically equivalent is the same.

    A letter with all its marks is taken as the longest labels that spell it, or, if none do, decomposed: vocabularies
    have letters that NFC takes apart (the nukta letters of Indic scripts), or are decomposed themselves. What no labels
    spell comes back as it is, character by character.
    """
    if word.isascii():
        yield from word
        return
    start = 0
    for end in range(1, len(word) + 1):
        if end == len(word) or not unicodedata.combining(word[end]):
            letter, start = word[start:end], end
            forms = (letter, unicodedata.normalize("NFD", letter))
            yield from next((parts for form in forms if (parts := _longest(form, labels))), [*letter])


def _longest(letter: str, labels: Container[str]) -> list[str] | None:
    """Labels that spell a letter, each the longest that fits; None: they do not."""
    parts: list[str] = []
    while letter:
        prefixes = ((unicodedata.normalize("NFC", letter[:n]), n) for n in range(len(letter), 0, -1))
        part, n = next(((part, n) for part, n in prefixes if part in labels), ("", 0))
        if not part:
            return None
        parts.append(part)
        letter = letter[n:]
    return parts
