"""Where audio comes from, as rows: the audio files of a folder, with their transcripts."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from w2v2.data.audio import FORMATS
from w2v2.data.names import compile_speaker, nfc, speaker_of, split_of
from w2v2.data.splits import named_split
from w2v2.data.storage import is_remote
from w2v2.data.transcripts import EXPECTED, LIKELY, Transcripts, folder_transcripts
from w2v2.errors import UsageError

log = logging.getLogger(__name__)

_ABOUT = {"splits.tsv", "README", "README.md", "README.txt", "README.TXT", "LICENSE", "LICENSE.TXT", "LICENSE.txt",
          "SPEAKERS.TXT", "speakers.tsv", "BOOKS.TXT", "CHAPTERS.TXT"}  # fmt: skip
"""What LibriSpeech and others say of themselves."""


@dataclass(frozen=True)
class Row:
    """A recording, or a part of one, and what is known about it."""

    path: str
    """Relative to the source's root, ``/`` between folders; or absolute, or a URL."""
    line: int = 0
    """Row number in a table, from 1; 0 in a folder."""
    start: float | None = None
    """Seconds; None: from the beginning."""
    end: float | None = None
    """Seconds; None: to the end."""
    text: str | None = None
    """Transcript; None: none."""
    speaker: str | None = None
    split: str | None = None
    """train, valid or test; None: to be decided."""
    channel: int | None = None
    """Of the recording, from 1; None: the mean over all."""


def folder_rows(root: Path, speaker: str | None = None, passed_over: Counter[str] | None = None) -> Iterator[Row]:
    """A row for every audio file of a tree, in the order of their names.

    Transcripts are taken from ``*.trans.txt`` in the same folder (lines of utterance id and text), from a ``.txt`` of
    the same name beside the audio, or from ``transcripts.txt``, ``metadata.csv`` or ``metadata.jsonl`` there or above.
    A first folder named ``train*``, ``dev*``, ``valid*`` or ``test*`` decides the split; one such as ``test01`` only
    where all are named so. The speaker is that part of the path that begins the file's name, as in LibriSpeech's
    ``SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``, otherwise the file's own folder.

    Args:
        root: folder; symbolic links are followed.
        speaker: regular expression whose first group, matched in the relative path, is the speaker instead.
        passed_over: where files are counted, by their endings, that are neither audio nor its transcripts,
            and transcripts that have no audio.

    Raises:
        UsageError: a loop of links, a name that is not UTF-8, a folder or a transcript that cannot be read.
    """
    pattern = compile_speaker(speaker)
    tops = [name for name in os.listdir(root) if name[0] != "." and os.path.isdir(os.path.join(root, name))]
    numbered = all(named_split(name) for name in tops)
    for path, text in folder_texts(root, passed_over):
        if isinstance(text, UsageError):
            raise text
        speaker_here = speaker_of(path, pattern, numbered=numbered)
        yield Row(path, text=text, speaker=speaker_here, split=split_of(path, numbered=numbered))


def folder_texts(root: Path, passed_over: Counter[str] | None = None) -> Iterator[tuple[str, str | UsageError | None]]:
    """Every audio file of a tree, relative to it, in the order of their names, and its transcript.

    Instead of that, what is wrong with the file that it should be in; None: there is no such file. Where some audio has
    no transcript, what looks like transcripts and is not read is named once, at the end.

    Raises:
        UsageError: as for ``audio_paths``.
    """
    above: list[Transcripts] = []
    below: list[Transcripts] = []
    passed_over = Counter() if passed_over is None else passed_over
    unread: list[str] = []
    without = 0
    for folder, names in _walk(str(root), ()):
        above = [other for other in above if Path(folder).is_relative_to(other.folder)]
        here = folder_transcripts(Path(folder), names)
        for name, path in _audio_in(root, folder, names):
            here.unread.pop(nfc(name), None)
            text: str | UsageError | None = here[name]
            if text is None:
                text = here.beside(name)
            for other in reversed(above):
                text = other[os.path.relpath(os.path.join(folder, name), other.folder)] if text is None else text
            without += text is None
            yield path, text if text is not None else here.fault
        if here.below:
            above.append(here)
            below.append(here)
        else:
            passed_over["transcripts without audio"] += len(here.texts.keys() - here.used)
        for name in here.unread.values():
            if name not in _ABOUT:
                ending = os.path.splitext(name)[1]
                passed_over[ending or name] += 1
                if ending.lower() in LIKELY:
                    unread.append(os.path.join(folder, name))
    passed_over["transcripts without audio"] += sum(len(each.texts.keys() - each.used) for each in below)
    if unread and without:
        log.warning(
            "%d files look like transcripts and are not read, such as %s: expected %s; or prepare a table",
            len(unread), unread[0], EXPECTED,
        )  # fmt: skip


def audio_paths(root: Path) -> Iterator[str]:
    """Every audio file of a tree, relative to it, in the order of their names.

    Raises:
        UsageError: a loop of links, a name that is not UTF-8, a folder that may not be read.
    """
    for folder, names in _walk(str(root), ()):
        for _, path in _audio_in(root, folder, names):
            yield path


def _audio_in(root: Path, folder: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name, and path relative to the root, of a folder's audio files."""
    relative = os.path.relpath(folder, root).replace(os.sep, "/")
    for name in names:
        if os.path.splitext(name)[1].lower() in FORMATS:
            yield name, name if relative == "." else f"{relative}/{name}"


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files, sorted; links followed, but not in a circle."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UsageError(f"symbolic link loop: {folder} leads back to a folder that contains it; remove the link")
    folders: list[str] = []
    files: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(entry.path).decode(errors="backslashreplace")
            raise UsageError(f"file name that is not UTF-8: {shown}; rename it") from None
        if entry.name.startswith("."):
            continue
        try:
            (folders if entry.is_dir() else files).append(entry.name)
        except OSError:  # a link to itself: whoever opens it says so
            files.append(entry.name)
    if files:
        yield folder, files
    for name in folders:
        yield from _walk(os.path.join(folder, name), (*above, here))


def locate(root: Path, path: str) -> str:
    """Path or URL of a row's audio."""
    return path if is_remote(path) else str(root / path)
