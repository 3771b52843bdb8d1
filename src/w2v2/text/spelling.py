"""How texts are made comparable, and how long their labels are."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from w2v2.errors import UsageError

UPPER, LOWER, KEPT = CASES = "upper", "lower", "kept"
_TURKIC = {UPPER: str.maketrans("i", "\u0130"), LOWER: str.maketrans("I\u0130", "\u0131i")}
_RULES = {"tr": _TURKIC, "az": _TURKIC, "de": {UPPER: str.maketrans("\u00df", "\u1e9e"), LOWER: {}}}
_STRAY = 8
"""So many times fewer letters of one case than of the other are strays, not a vocabulary of both."""


def casing(case: str, language: str = "") -> Callable[[str], str]:
    """Return what changes the case of composed text, by Unicode's rules or those of a language.

    Args:
        case: one of ``CASES``.
        language: ``tr`` and ``az`` tell i from dotless \u0131, ``de`` has a capital \u00df; empty: none of these.

    Raises:
        UsageError: another case, or a language without rules of its own.
    """
    if case not in CASES or language not in ("", *_RULES):
        known = f"{', '.join(CASES)} and {', '.join(_RULES)} or none"
        raise UsageError(f"case and language must be of {known}, got {case!r} and {language!r}")
    if case == KEPT:
        return str
    table, change = _RULES.get(language, {}).get(case, {}), str.upper if case == UPPER else str.lower
    return lambda text: change(text.translate(table))


def case_of(labels: Iterable[str]) -> tuple[str, str]:
    """Return the case that text must have for some labels, and the letters among them that it rules out, strays.

    Both cases of the letters are labels, or hardly any of one; where letters have no case, upper.
    """
    letters = "".join(labels)
    lower, upper = ([c for c in letters if c != change(c)] for change in (str.upper, str.lower))
    if lower and upper and _STRAY * min(len(lower), len(upper)) > max(len(lower), len(upper)):
        return KEPT, ""
    lowers = len(lower) > len(upper)
    return LOWER if lowers else UPPER, " ".join(upper if lowers else lower)


def merged(text: str, case: Callable[[str], str]) -> set[str]:
    """Return letters of a text that a change of case makes others of: no longer told from these.

    Greek's final sigma is none: where it stands says what it is.
    """
    return {c for c in text if c != "\u03c2" and case(c) != c and case(c).lower() != c.lower()}


def normalize_text(text: str, case: Callable[[str], str] = str.upper) -> str:
    """Upper case, or as ``case`` makes it; single spaces; composed characters (NFC): é is one, however it was typed."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return " ".join(unicodedata.normalize("NFC", case(composed)).split())


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
