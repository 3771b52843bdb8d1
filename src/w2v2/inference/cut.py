"""Long recordings with a transcript, cut by alignment into utterances: a table of them, which ``prepare`` reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from w2v2.data.audio import AudioError, AudioFile
from w2v2.data.sources import Row, locate
from w2v2.errors import Show, UsageError, quiet
from w2v2.files import whole
from w2v2.inference.align import align
from w2v2.inference.recognizer import Recognizer
from w2v2.inference.recordings import Failure, Source
from w2v2.inference.words import Word, confidence
from w2v2.preparation.config import PrepareConfig
from w2v2.preparation.reading import source_rows, stamped

log = logging.getLogger(__name__)

_NEIGHBOURS = 2
"""Words to each side that a word is judged with: a name that the model does not know is no other text."""
_WORD, _LABEL = 1.0, 0.2
"""Seconds that a word may last, and a label of it more: one that lasts longer has something else in it."""
_PAUSE, _MARGIN = 2.0, 0.25
"""Seconds without words that end an utterance; and of them that it keeps at each end."""


@dataclass(frozen=True)
class CutUtterance:
    """A part of a recording that is said to be of some words."""

    start: float
    """Seconds."""
    end: float
    text: str
    confidence: float
    """Geometric mean of the probabilities of its labels' frames; 0 where a word lasts longer than words do."""


def cut_words(words: Sequence[Word], seconds: float, longest: float, least: float) -> list[CutUtterance]:
    """Cut an aligned recording at pauses, and where words begin or cease to match what is said.

    Args:
        words: in their order, with scores.
        seconds: of the recording.
        longest: seconds of an utterance, unless a single word is longer.
        least: confidence that words have that match, judged with their neighbours.
    """
    matching = _matching(words, least)
    groups: list[list[int]] = []
    for i, word in enumerate(words):
        if i and matching[i] == matching[i - 1] and word.start - words[i - 1].end <= _PAUSE:
            groups[-1].append(i)
        else:
            groups.append([i])
    utterances = []
    for part in (part for group in groups for part in _short(group, words, longest)):
        first, last = part[0], part[-1]
        before = (words[first - 1].end + words[first].start) / 2 if first else 0.0
        after = (words[last].end + words[last + 1].start) / 2 if last + 1 < len(words) else seconds
        chosen = [words[i] for i in part]
        start, end = max(before, words[first].start - _MARGIN), min(after, words[last].end + _MARGIN)
        sure = confidence(chosen) if all(map(_is_brief, chosen)) else 0.0
        utterances.append(CutUtterance(start, end, " ".join(word.text for word in chosen), sure))
    return utterances


def _matching(words: Sequence[Word], least: float) -> list[bool]:
    """Whether each word is what is said there: with its neighbours; no longer than a word can be; as most around it."""
    around = [slice(max(i - _NEIGHBOURS, 0), i + _NEIGHBOURS + 1) for i in range(len(words))]
    brief = [_is_brief(word) for word in words]
    alone = [short and confidence(words[near]) >= least for short, near in zip(brief, around, strict=True)]
    return [short and 2 * sum(alone[near]) > len(alone[near]) for short, near in zip(brief, around, strict=True)]


def _is_brief(word: Word) -> bool:
    return word.end - word.start <= _WORD + _LABEL * len(word.characters)


def _short(group: list[int], words: Sequence[Word], longest: float) -> Iterator[list[int]]:
    """Parts that last no longer, each cut at the widest pause of the middle half."""
    start, end = words[group[0]].start - _MARGIN, words[group[-1]].end + _MARGIN
    if end - start <= longest or len(group) == 1:
        yield group
        return

    def pause(at: int) -> tuple[bool, float]:
        middle = (words[group[at - 1]].end + words[group[at]].start) / 2
        share = (middle - start) / (end - start)
        return 0.25 <= share <= 0.75, words[group[at]].start - words[group[at - 1]].end

    at = max(range(1, len(group)), key=pause)
    yield from _short(group[:at], words, longest)
    yield from _short(group[at:], words, longest)


def cut_table(
    recognizer: Recognizer, key: str, source: Path, table: Path, config: PrepareConfig, show: Show = quiet
) -> Counter[str]:
    """Write a table of a source's recordings, in which those with a transcript that are long are cut.

    Long is above ``audit.max_seconds``. What has been aligned is kept beside the table and not done again. A recording
    that cannot be aligned is in the table whole, with a confidence of 0.

    Args:
        key: of its weights (``weights_key``).
        source: folder of audio or table.
        table: to write, JSONL; its paths are the source's own, relative to its folder.
        config: how the source is read; ``min_confidence`` tells which words match.

    Returns:
        How many recordings were cut, into how many utterances, how many could not be, and what of the source was
        passed over.

    Raises:
        UsageError: as of reading the source.
    """
    counts = Counter[str]()
    cache = table.with_name(f"{table.stem}.aligned.jsonl")
    known: dict[str, Any] = {}
    for line in cache.read_bytes().split(b"\n") if cache.exists() else ():
        with contextlib.suppress(ValueError):  # half a line, of a call that was killed
            known.update([json.loads(line)])
    root, rows = source_rows(source, config, counts)
    with whole(table) as partial, partial.open("w", encoding="utf-8") as out, cache.open("a", encoding="utf-8") as kept:
        for done, (row, stamp, _) in enumerate(stamped(root, rows)):
            location, cuts = locate(root, row.path), None
            if row.text and row.text.strip() and _seconds(location, row) > config.audit.max_seconds:
                what = (key, stamp, row, config.audit.max_seconds, config.min_confidence)
                name = hashlib.sha256(repr(what).encode()).hexdigest()
                if name not in known:
                    known[name] = _cut(recognizer, location, row, config)
                    kept.write("\n" + json.dumps((name, known[name]), ensure_ascii=False))
                    kept.flush()
                cuts = known[name]
                counts["could not be aligned" if len(cuts) == 1 and not cuts[0][3] else "cut"] += 1
                counts["utterances"] += len(cuts)
            for start, end, text, confidence in cuts or [(row.start, row.end, row.text, None)]:
                fields = {"path": row.path, "start": start, "end": end, "text": text, "speaker": row.speaker}
                fields |= {"split": row.split, "channel": row.channel, "confidence": confidence}
                out.write(json.dumps(fields, ensure_ascii=False) + "\n")
            show("cut", 1 - 0.99**done)
    return counts


def _seconds(location: str, row: Row) -> float:
    """Of a row; 0 where the file cannot be read, as the audit will say."""
    if row.end is not None:
        return row.end - (row.start or 0.0)
    try:
        with AudioFile(location) as file:
            return file.frames / file.rate - (row.start or 0.0)
    except (AudioError, OSError, UsageError):
        return 0.0


def _cut(recognizer: Recognizer, location: str, row: Row, config: PrepareConfig) -> list[tuple[Any, ...]]:
    """(start, end, text, confidence) of each utterance of a row."""
    offset = row.start or 0.0
    try:
        with _part(location, row) as source:
            result = align(recognizer, source, row.text or "", skip_unknown=True)
        if isinstance(result, Failure):
            raise UsageError(result.reason)
    except (UsageError, AudioError, OSError) as error:
        log.warning("%s: not cut: %s", location, error)
        return [(row.start, row.end, row.text, 0.0)]
    cuts = cut_words(result.words, result.seconds, config.audit.max_seconds, config.min_confidence)
    times = [(round(offset + cut.start, 3), round(offset + cut.end, 3)) for cut in cuts]
    return [(*time, cut.text, round(cut.confidence, 4)) for time, cut in zip(times, cuts, strict=True)]


@contextlib.contextmanager
def _part(location: str, row: Row) -> Iterator[Source]:
    """The recording of a row, or the part that it is of one, in a file of its own."""
    if row.start is None and row.end is None:
        yield Source(location, location, os.path.basename(location), row.channel)
        return
    with tempfile.TemporaryDirectory() as folder, AudioFile(location) as file:
        start, part = row.start or 0.0, os.path.join(folder, "part.wav")
        file.seek(round(start * file.rate))
        samples = file.read(-1 if row.end is None else round((row.end - start) * file.rate))
        soundfile.write(part, samples, file.rate, subtype="FLOAT")
        yield Source(part, location, os.path.basename(location), row.channel)
