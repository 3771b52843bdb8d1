"""How texts are made comparable, and how long their labels are."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Sequence


def normalize_text(text: str, case: Callable[[str], str] = str.upper) -> str:
    """Upper case, or as ``case`` makes it; single spaces; composed characters (NFC): é is one, however it was typed."""
    return " ".join(unicodedata.normalize("NFC", case(text)).split())


def frames_needed(ids: Sequence[int]) -> int:
    """Frames without which CTC cannot emit some labels: one each, and a blank between two that are the same."""
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
