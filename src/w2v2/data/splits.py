"""Who is in which split, from names and transcripts alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import TypedDict

from w2v2.errors import NotNegative, Whole

SPLITS = ("train", "valid", "test")
SCHEMA = 2
"""Of ``corpus.json``; its keys change only with it."""
_SUBSET = re.compile(r"(train|dev|val|test)(ing|elopment|id|idation)?(?![a-z])", re.IGNORECASE)


class PreparedPiece(TypedDict):
    """A piece of a split, in ``corpus.json``."""

    cuts: str
    audio: str | None
    utterances: Whole
    seconds: NotNegative


class PreparedSplit(TypedDict):
    """A split, in ``corpus.json``."""

    pieces: list[PreparedPiece]
    speakers: Whole
    transcribed: Whole


class Prepared(TypedDict):
    """What ``corpus.json`` must have."""

    content_hash: str
    splits: dict[str, PreparedSplit]


def named_split(name: str, *, numbered: bool = True) -> str | None:
    """``dev-clean`` is valid, and so on; None for other names, and unless ``numbered`` for such as ``test01``."""
    match = _SUBSET.match(name)
    if match and not numbered and name[match.end() :].lstrip("_- ").isdigit():
        return None
    return {"train": "train", "dev": "valid", "val": "valid", "test": "test"}[match[1].lower()] if match else None


def held_out(speakers: Collection[str], share: float) -> set[str]:
    """A share of speakers, at least one, by a hash of the name."""
    return set(sorted(speakers, key=_hash)[: max(1, round(share * len(speakers)))])


def choose_labelled(rows: Iterable[tuple[str, str | None, float]], minutes: float, seed: int) -> set[str]:
    """Utterances of about so many minutes, taken in turn from the speakers, in an order that the seed decides.

    Args:
        rows: (utterance id, speaker, seconds).
    """

    def rank(name: str) -> str:
        return _hash(f"{seed}/{name}")

    by_speaker: dict[str, list[tuple[str, float]]] = {}
    for name, speaker, seconds in sorted(rows, key=lambda row: rank(row[0])):
        by_speaker.setdefault(speaker or "", []).append((name, seconds))
    queues = [by_speaker[speaker] for speaker in sorted(by_speaker, key=lambda s: rank(by_speaker[s][0][0]))]
    chosen, total = set(), 0.0
    while queues:
        for queue in queues:
            name, seconds = queue.pop()
            if total + seconds <= minutes * 60 + 8:
                chosen.add(name)
                total += seconds
            if total >= minutes * 60:
                return chosen
        queues = [queue for queue in queues if queue]
    return chosen


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
