"""Transcripts with times, and how they are written: text, JSON, SubRip, WebVTT, CTM, Praat's TextGrid."""

from __future__ import annotations

import itertools
import json
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePosixPath
from typing import Any

from w2v2.errors import printable
from w2v2.inference.words import Word, confidence

LINE, LINES = 42, 2
"""Characters of a subtitle's line, and its lines: what broadcasters use."""


CUE_SECONDS, MIN_CUE_SECONDS = 7.0, 1.0
"""How long a cue may last, and should last at least, if the next one lets it."""


PAUSE_SECONDS = 0.6
"""Silence that ends a cue."""


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording, and when."""

    name: str
    """Path or URL; ``stdin``."""
    seconds: float
    """Duration of the audio."""
    text: str
    words: tuple[Word, ...]
    """In their order; none overlaps the next."""
    channel: int | None = None
    """That was heard, from 1; None: the mean over all."""
    doubt: str = ""
    """Of an alignment: why the recording is hardly of the text."""


@dataclass(frozen=True)
class Cue:
    """A subtitle."""

    start: float
    """Seconds from the start of the audio."""
    end: float
    lines: tuple[str, ...]


def cues(words: Sequence[Word]) -> list[Cue]:
    """Subtitles of at most two lines and seven seconds, split at pauses.

    Each word is in exactly one; but one that is longer than a line or than seven seconds, as where a script has no
    spaces, is cut between its characters.
    """
    groups: list[list[Word]] = []
    for word in itertools.chain.from_iterable(map(_pieces, words)):
        if groups and _fits(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    shown: list[Cue] = []
    for i, group in enumerate(groups):
        start = group[0].start
        following = groups[i + 1][0].start if i + 1 < len(groups) else float("inf")
        end = max(group[-1].end, min(start + MIN_CUE_SECONDS, following))
        shown.append(Cue(start, end, tuple(_wrap(group))))
    return shown


def _pieces(word: Word) -> Iterator[Word]:
    """A word in as few pieces as fit a line and the time of a cue: no two of them ever share a line, or a space."""
    if len(word.text) <= LINE and word.end - word.start <= CUE_SECONDS:
        yield word
        return
    text, start, end = "", word.start, word.start
    for character in _characters(word):
        if text and (len(text) + len(character.text) > LINE or character.end - start > CUE_SECONDS):
            yield Word(text, start, end)
            text, start = "", end
        text, end = text + character.text, character.end
    yield Word(text, start, word.end)


def _characters(word: Word) -> list[Word]:
    """What a word can be cut between: its labels, or, where these spell something else, characters of equal length."""
    parts = word.characters
    if "".join(part.text for part in parts) != word.text:
        step = (word.end - word.start) / len(word.text)
        parts = tuple(Word(c, word.start + i * step, word.start + (i + 1) * step) for i, c in enumerate(word.text))
    whole: list[Word] = []
    for part in parts:
        if whole and unicodedata.category(part.text[:1] or " ").startswith("M"):  # a mark stays on its letter
            whole[-1] = Word(whole[-1].text + part.text, whole[-1].start, part.end)
        else:
            whole.append(part)
    return whole


def _fits(group: Sequence[Word], word: Word) -> bool:
    pause = word.start - group[-1].end >= PAUSE_SECONDS
    return not pause and word.end - group[0].start <= CUE_SECONDS and len(_wrap([*group, word])) <= LINES


def _wrap(group: Sequence[Word]) -> list[str]:
    return textwrap.wrap(" ".join(word.text for word in group), LINE, break_long_words=False, break_on_hyphens=False)


def to_text(transcript: Transcript, timestamps: str) -> str:
    """The text in a line; with times a line for each word or character: start, end, text, tabs between (Audacity)."""
    if timestamps == "none":
        return transcript.text + "\n"
    return "".join(f"{w.start:.3f}\t{w.end:.3f}\t{w.text}\n" for w in _units(transcript, timestamps))


def to_json(transcript: Transcript, timestamps: str) -> str:
    """An object in one line: ``path``, ``seconds``, ``text``, ``confidence``, ``words`` with times and ``score``."""
    fields: dict[str, Any] = {
        "path": transcript.name,
        **({} if transcript.channel is None else {"channel": transcript.channel}),
        "seconds": round(transcript.seconds, 3),
        "text": transcript.text,
        "confidence": round(confidence(transcript.words), 4),
    }
    if timestamps != "none":
        fields["words"] = [
            word_fields(word)
            | ({"characters": [word_fields(c) for c in word.characters]} if timestamps == "char" else {})
            for word in transcript.words
        ]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def word_fields(word: Word) -> dict[str, Any]:
    """``text``, ``start`` and ``end`` in seconds, ``score`` where there is one."""
    score = {} if word.score is None else {"score": round(word.score, 4)}
    return {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3), **score}


def to_srt(transcript: Transcript, timestamps: str) -> str:
    """SubRip."""
    blocks = (
        f"{i}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n" + "\n".join(cue.lines) + "\n"
        for i, cue in enumerate(cues(transcript.words), 1)
    )
    return "\n".join(blocks)


def to_vtt(transcript: Transcript, timestamps: str) -> str:
    """WebVTT (W3C)."""
    blocks = (
        f"\n{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{escape(chr(10).join(cue.lines), quote=False)}\n"
        for cue in cues(transcript.words)
    )
    return "WEBVTT\n" + "".join(blocks)


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"


def to_ctm(transcript: Transcript, timestamps: str, recording: str | None = None) -> str:
    """NIST's CTM: recording, channel, start, duration, word, and how probable its labels are, 0 to 1.

    Args:
        recording: its name in the CTM, of ``ctm_names``; None: the stem of its file.
    """
    recording = recording or ctm_names([transcript.name])[transcript.name]
    return "".join(
        f"{recording} {transcript.channel or 1} {w.start:.3f} {max(w.end - w.start, 0):.3f} {w.text}{_confidence(w)}\n"
        for w in _units(transcript, timestamps)
    )


def ctm_names(names: Sequence[str]) -> dict[str, str]:
    """A word for each recording: the stem of its file, with as many folders before it as tell all of them apart.

    Files of one folder that differ in nothing but their endings keep these.
    """
    paths = {name: PurePosixPath(name) for name in names}
    stems: dict[str, str] = {}
    for ending in (False, True):
        for above in range(1, max((len(path.parts) for path in paths.values()), default=1) + 1):
            for name, path in paths.items():
                parts = (*path.parts[:-1], path.name if ending else path.stem)[-above:]
                stems[name] = printable("_".join("_".join(parts).replace("/", "").split()))
            if len(set(stems.values())) == len(stems):
                return stems
    return stems


def _confidence(word: Word) -> str:
    probability = word.probability()
    return "" if probability is None else f" {probability:.4f}"


def to_textgrid(transcript: Transcript, timestamps: str) -> str:
    """Praat's TextGrid, long form: a tier of words and, with ``char``, one of characters; silence is an empty label."""
    seconds = max(transcript.seconds, 1e-6)  # Praat knows no empty time: an empty file gets the least we can write
    tiers = [("words", list(_spread(transcript.words, seconds)))]
    if timestamps == "char":
        tiers.append(("characters", list(_spread(list(_units(transcript, "char")), seconds))))
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {seconds:.6f}",
    ]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for i, (name, intervals) in enumerate(tiers, 1):
        lines += [f"    item [{i}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", f"        xmax = {seconds:.6f}"]
        lines += [f"        intervals: size = {len(intervals)}"]
        for j, word in enumerate(intervals, 1):
            text = word.text.replace('"', '""')
            lines += [f"        intervals [{j}]:", f"            xmin = {word.start:.6f}"]
            lines += [f"            xmax = {word.end:.6f}", f'            text = "{text}"']
    return "\n".join(lines) + "\n"


def _spread(words: Sequence[Word], seconds: float) -> Iterator[Word]:
    """Intervals from 0 to the end without a gap, each longer than nothing: Praat accepts no others."""
    at, seconds = 0.0, round(seconds, 6)
    for word in words:
        start, end = round(max(word.start, at), 6), round(min(word.end, seconds), 6)
        if end <= start:
            continue
        if start > at:
            yield Word("", at, start)
        yield Word(word.text, start, end)
        at = end
    if at < seconds:
        yield Word("", at, seconds)


def _units(transcript: Transcript, timestamps: str) -> Iterator[Word]:
    for word in transcript.words:
        yield from (word.characters or (word,)) if timestamps == "char" else (word,)


Write = Callable[[Transcript, str], str]
"""(transcript, ``none``, ``word`` or ``char``) -> what goes into a file."""


FORMATS: dict[str, Write] = {
    "txt": to_text,
    "json": to_json,
    "jsonl": to_json,  # a line each, of many recordings in a stream: a table that `w2v2 prepare` takes
    "srt": to_srt,
    "vtt": to_vtt,
    "ctm": to_ctm,
    "TextGrid": to_textgrid,
}
"""By the ending of the file's name."""
