"""Corpora whose own files say where each utterance lies: Kaldi's folders, and STM as in TED-LIUM."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from w2v2.data.names import existing, nfc, speaker_name, split_of
from w2v2.data.records import say_once, seconds_of
from w2v2.data.sources import Row, audio_paths
from w2v2.data.transcripts import transcript_in
from w2v2.errors import UsageError

_CHANNELS = {"1": 1, "A": 1, "2": 2, "B": 2}


def layout_rows(root: Path, passed_over: Counter[str] | None = None) -> Iterator[Row] | None:
    """Rows of a folder with Kaldi's ``wav.scp``, or with ``*.stm`` beside or below it; None: it is neither.

    What they do not name, recordings and transcripts, is counted in ``passed_over``.
    """
    passed_over = Counter() if passed_over is None else passed_over
    if (root / "wav.scp").is_file():
        return _kaldi_rows(root, passed_over)
    tables = sorted(path for path in root.rglob("*.stm") if path.is_file())
    return _stm_rows(root, tables, passed_over) if tables else None


def refuse_layout(root: Path) -> None:
    """Refuse one of Kaldi's or TED-LIUM's layout (:class:`UsageError`) where only files as they are can be taken."""
    if layout_rows(root) is not None:
        raise UsageError(
            f"{root} says in wav.scp or *.stm what its utterances are, which only 'w2v2 prepare' reads: prepare it, "
            "then name the corpus"
        )


def _lines(path: Path, fields: int) -> Iterator[tuple[int, list[str]]]:
    """Row number, from 1, and so many fields at most of each line that has any, blanks between."""
    text = transcript_in(path)
    if isinstance(text, UsageError):
        raise text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip().split(None, fields - 1)


def _seconds(where: str, values: list[str]) -> list[float]:
    try:
        return [seconds_of(value) for value in values]
    except ValueError:
        raise UsageError(f"{where}: expected seconds, got {' '.join(values)}") from None


def _kaldi_rows(root: Path, passed_over: Counter[str]) -> Iterator[Row]:
    """Of ``segments``, or else of ``wav.scp``, with what ``text`` and ``utt2spk`` say. Commands are not run."""

    def read(name: str) -> dict[str, str]:
        lines = _lines(root / name, 2) if (root / name).is_file() else ()
        return say_once(root / name, ((key, rest[0] if rest else "") for _, (key, *rest) in lines), {})

    texts, speakers, paths, segments = map(read, ("text", "utt2spk", "wav.scp", "segments"))
    for recording, said in paths.items():
        if not said or said.endswith("|") or "\0" in said:
            what = "a command, which is not run: write its output to a file" if "|" in said else "no path"
            raise UsageError(f"{root / 'wav.scp'}, {recording}: {what}, and name that")
        here = existing(root, said)
        elsewhere = not os.path.exists(root / here) and os.path.exists(here)  # Kaldi's: from where it was called
        paths[recording] = os.path.abspath(here) if elsewhere else here
    cut = (root / "segments").is_file()
    passed_over["transcripts without audio"] += len(texts.keys() - (segments if cut else paths).keys())
    for line, name in enumerate(segments if cut else paths, 1):
        where = f"{root / 'segments'}, {name}"
        recording, *place = (segments[name].split() or [""]) if cut else [name]
        if cut and (len(place) < 2 or recording not in paths):
            raise UsageError(f"{where}: expected a recording of wav.scp, start and end, got {segments[name]}")
        start, end = _seconds(where, place[:2]) if cut else (None, None)
        stop = None if end == -1 else end  # Kaldi's "to the end"
        yield Row(paths[recording], line, start, stop, texts.get(name), speaker_name(speakers.get(name)))


def _stm_rows(root: Path, tables: list[Path], passed_over: Counter[str]) -> Iterator[Row]:
    """Of each line ``RECORDING CHANNEL SPEAKER START END <LABELS> TEXT`` that is to be scored.

    Lines of several tables are counted on. A channel, 1 or A, 2 or B, is taken where a recording's lines name two.
    """
    audio: dict[str, list[str]] = {}
    for path in audio_paths(root):
        audio.setdefault(nfc(os.path.splitext(os.path.basename(path))[0]), []).append(path)
    lines = [(table, *each) for table in tables for each in _lines(table, 6) if not each[1][0].startswith(";;")]
    sides: dict[str, set[str]] = {}
    for table, line, fields in lines:
        if len(fields) < 5:
            raise UsageError(f"{table}, row {line}: expected RECORDING CHANNEL SPEAKER START END TEXT")
        sides.setdefault(nfc(fields[0]), set()).add(fields[1].upper())
    passed_over["recordings without a line"] += sum(len(audio[name]) for name in audio.keys() - sides.keys())
    for number, (table, line, fields) in enumerate(lines, 1):
        where, name = f"{table}, row {line}", nfc(fields[0])
        paths = audio.get(name, [])
        if len(paths) != 1:
            raise UsageError(f"{table}: {'no' if not paths else 'more than one'} audio of that name: {fields[0]}")
        channel = _CHANNELS.get(fields[1].upper()) if len(sides[name]) > 1 else None
        if channel is None and len(sides[name]) > 1:
            raise UsageError(f"{where}: expected 1, 2, A or B as one of several channels, got {fields[1]}")
        start, end = _seconds(where, fields[3:5])
        text = re.sub(r"^<[^ >]*,[^ >]*>|^<NA>", "", fields[5] if len(fields) > 5 else "").strip()
        if text.lower() != "ignore_time_segment_in_scoring":
            at = number if len(tables) > 1 else line
            yield Row(paths[0], at, start, end, text, speaker_name(fields[2]), split_of(paths[0]), channel)
