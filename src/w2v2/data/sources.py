"""Where audio comes from, as rows: the audio files of a folder, with their transcripts."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from w2v2.data.audio import FORMATS
from w2v2.data.splits import named_split
from w2v2.data.storage import is_remote
from w2v2.errors import UsageError

_NOBODY = {"audio", "clips", "data", "flac", "mp3", "recordings", "sounds", "speech", "wav", "wavs"}
"""Folders that are surely no speaker's."""


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


def folder_rows(root: Path, speaker: str | None = None) -> Iterator[Row]:
    """A row for every audio file of a tree, in the order of their names.

    Transcripts are taken from ``*.trans.txt`` in the same folder (lines of utterance id and text), or from a ``.txt``
    of the same name beside the audio. A first folder named ``train*``, ``dev*``, ``valid*`` or ``test*`` decides the
    split. The speaker is that part of the path that begins the file's name, as in LibriSpeech's
    ``SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``, otherwise the file's own folder.

    Args:
        root: folder; symbolic links are followed.
        speaker: regular expression whose first group, matched in the relative path, is the speaker instead.

    Raises:
        UsageError: a loop of links, a name that is not UTF-8, a folder or a transcript that cannot be read.
    """
    pattern = _compile(speaker)
    for path, text in folder_texts(root):
        if isinstance(text, UsageError):
            raise text
        yield Row(path, text=text, speaker=speaker_of(path, pattern), split=split_of(path))


def folder_texts(root: Path) -> Iterator[tuple[str, str | UsageError | None]]:
    """Every audio file of a tree, relative to it, in the order of their names, and its transcript.

    Instead of that, what is wrong with the file that it should be in; None: there is no such file.

    Raises:
        UsageError: as for ``audio_paths``.
    """
    for folder, names in _walk(str(root), ()):
        texts, fault = _folder_transcripts(Path(folder), names)
        files = {nfc(name): name for name in names}
        for name, path in _audio_in(root, folder, names):
            stem = nfc(os.path.splitext(name)[0])
            text: str | UsageError | None = texts.get(stem)
            if text is None:
                text = _read_text(Path(folder, files[f"{stem}.txt"])) if f"{stem}.txt" in files else fault
            yield path, text


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


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"`speaker` must be a regular expression, got {pattern!r}: {error}") from None
    if not compiled.groups:
        raise UsageError(f"`speaker` needs a group in parentheses that is the speaker, got {pattern!r}")
    return compiled


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
        except OSError as error:  # a link to itself
            raise UsageError(f"symbolic link loop: {entry.path} ({error.strerror}); remove the link") from None
    if files:
        yield folder, files
    for name in folders:
        yield from _walk(os.path.join(folder, name), (*above, here))


def _folder_transcripts(folder: Path, names: list[str]) -> tuple[dict[str, str], UsageError | None]:
    """Texts by utterance id from ``*.trans.txt``, and what is wrong with one that cannot be read."""
    texts: dict[str, str] = {}
    fault: UsageError | None = None
    for name in names:
        if name.endswith(".trans.txt"):
            lines = _read_text(folder / name)
            if isinstance(lines, UsageError):
                fault = lines
                continue
            for line in lines.split("\n"):  # and at no other character that Unicode lets end one
                utterance, *text = re.split(r"[ \t]+", line.strip(), maxsplit=1)
                texts[nfc(utterance)] = "".join(text)
    return texts, fault


def _read_text(path: Path) -> str | UsageError:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return UsageError(f"{path} is not UTF-8 text; convert it")
    except OSError as error:
        return UsageError(f"{path} cannot be read: {error.strerror}")


def speaker_of(path: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The speaker that a relative path tells, or None."""
    if pattern is not None:
        match = pattern.search(nfc(path))
        return match and match.group(1)
    *folders, name = nfc(path).split("/")
    first = name.split("-")[0]
    if first in folders:
        return first
    if not folders or folders[-1].lower() in _NOBODY or named_split(folders[-1]) is not None:
        return None
    return folders[-1]


def split_of(path: str) -> str | None:
    """The split that the first folder of a relative path names, or None."""
    first, _, rest = path.partition("/")
    return named_split(first) if rest else None


def utterance_id(path: str) -> str:
    """LibriSpeech's own ids stay; otherwise the relative path without its ending, in one word, in NFC."""
    *folders, name = nfc(path).split("/")
    stem = name.rsplit(".", 1)[0]
    if stem.split("-")[0] in folders:
        return stem
    return "_".join([*folders, stem]).replace(" ", "_")


def locate(root: Path, path: str) -> str:
    """Path or URL of a row's audio."""
    return path if is_remote(path) else str(root / path)


def existing(root: Path, path: str) -> str:
    """The path, in the Unicode form that its file has; as it is where there is none."""
    if not path.isascii() and not is_remote(path) and not (root / path).exists():
        at = Path("")
        for part in Path(path).parts:
            forms = (part, nfc(part), unicodedata.normalize("NFD", part))
            at /= next((form for form in forms if (root / at / form).exists()), part)
        return at.as_posix()
    return path


def nfc(text: str) -> str:
    """The composed form, in which names are compared: file systems and tables differ in it."""
    return unicodedata.normalize("NFC", text)
