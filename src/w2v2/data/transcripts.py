"""Transcripts beside audio, in the layouts that corpora have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from w2v2.data.names import nfc
from w2v2.data.records import as_text, records, say_once
from w2v2.errors import UsageError
from w2v2.files import read_text

LIKELY = {
    ".csv",
    ".ctm",
    ".eaf",
    ".jsonl",
    ".json",
    ".lab",
    ".srt",
    ".stm",
    ".textgrid",
    ".trn",
    ".tsv",
    ".txt",
    ".vtt",
}
"""Endings of what may be transcripts."""
EXPECTED = "NAME.txt beside NAME.wav, *.trans.txt, transcripts.txt, metadata.csv, metadata.jsonl"
_BESIDE = (".txt", ".normalized.txt")
"""Endings of a recording's own transcript, LibriTTS's last."""


@dataclass
class Transcripts:
    """Of a folder: those in files for many recordings, and its files that may hold one."""

    folder: Path
    texts: dict[str, str] = field(default_factory=dict)
    """By the name of a recording without its ending, or by its path from here."""
    used: set[str] = field(default_factory=set)
    """Those that were asked for."""
    below: bool = False
    """Whether recordings of deeper folders are meant, too."""
    fault: UsageError | None = None
    """What is wrong with a file that cannot be read."""
    files: dict[str, str] = field(default_factory=dict)
    """Names of all files by their composed form."""
    unread: dict[str, str] = field(default_factory=dict)
    """Those that have not been read yet."""

    def __getitem__(self, path: str) -> str | None:
        """The text of a recording, by its path from this folder."""
        path = nfc(path)
        name = path if path in self.texts else os.path.splitext(os.path.basename(path))[0]
        self.used.add(name)
        return self.texts.get(name)

    def beside(self, name: str) -> str | UsageError | None:
        """The text in a recording's own file, if there is one."""
        for ending in _BESIDE:
            if (other := self.files.get(nfc(os.path.splitext(name)[0]) + ending)) is not None:
                self.unread.pop(nfc(other), None)
                return transcript_in(self.folder / other)
        return None


def folder_transcripts(folder: Path, names: list[str]) -> Transcripts:
    """What the files of a folder say."""
    files = {nfc(name): name for name in names}
    transcripts = Transcripts(folder, files=files, unread=dict(files))
    for name in names:
        try:
            here = name.endswith(".trans.txt")
            if not here and name not in ("transcripts.txt", "metadata.csv", "metadata.jsonl"):  # the first: MLS
                continue
            transcripts.below |= not here
            read = _ids if name.endswith(".txt") else _metadata
            say_once(folder / name, read(folder / name), transcripts.texts)
        except UsageError as error:
            transcripts.fault = error
        transcripts.unread.pop(nfc(name))
    return transcripts


def _ids(path: Path) -> Iterator[tuple[str, str]]:
    """Lines of an id and a text, which end at no other character that Unicode lets end one."""
    text = transcript_in(path)
    if isinstance(text, UsageError):
        raise text
    for line in text.split("\n"):
        name, *rest = re.split(r"[ \t]+", line.strip(), maxsplit=1)
        if name:
            yield nfc(name), "".join(rest)


def _metadata(path: Path) -> Iterator[tuple[str, str]]:
    """LJSpeech's lines of ``ID|text|text as it is spoken``; or a table of Hugging Face, with ``file_name``."""
    text = transcript_in(path)
    if isinstance(text, UsageError):
        raise text
    head = text.partition("\n")[0]
    if path.suffix == ".csv" and "|" in head:
        names = [name.strip().lower() for name in head.split("|")]
        said = names.index("text") if "text" in names[1:] else None  # as Coqui's tables, which begin with names
        for row in [line.split("|") for line in text.split("\n")][said is not None :]:
            if len(row) > (said or 1):
                yield nfc(row[0]), row[said] if said else row[2] if len(row) > 2 and row[2].strip() else row[1]
        return
    for line, record in records(path):
        column = next((name for name in ("transcription", "text", "sentence", "transcript") if name in record), None)
        if column is None or not isinstance(record.get("file_name"), str):
            raise UsageError(f"{path}, row {line}: expected columns file_name and text, got {', '.join(record)}")
        try:
            value = as_text(record[column])
            f"{value}".encode()  # half a character cannot be
        except ValueError as error:
            raise UsageError(f"{path}, row {line}: {error}") from None
        if value is not None:
            yield nfc(record["file_name"]), value


def transcript_in(path: Path) -> str | UsageError:
    """A file of UTF-8 text, without what is around it, or what is wrong with it."""
    try:
        return read_text(path).strip()
    except UsageError as error:
        return error
