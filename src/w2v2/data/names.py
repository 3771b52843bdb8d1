"""What names of files and folders tell, in whichever Unicode form they are written."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from w2v2.data.splits import named_split
from w2v2.data.storage import is_remote
from w2v2.errors import UsageError, public

_NOBODY = {"audio", "clips", "data", "flac", "mp3", "recordings", "sounds", "speech", "wav", "wavs"}
"""Folders that are surely no speaker's."""


def nfc(text: str) -> str:
    """The composed form, in which names are compared: file systems and tables differ in it."""
    return unicodedata.normalize("NFC", text)


def existing(root: Path, path: str) -> str:
    """The path, in the Unicode form that its file has; as it is where there is none."""
    if not path.isascii() and not is_remote(path) and not os.path.exists(root / path):
        at = Path("")
        for part in Path(path).parts:
            forms = (part, nfc(part), unicodedata.normalize("NFD", part))
            at /= next((form for form in forms if os.path.exists(root / at / form)), part)
        return at.as_posix()
    return path


def compile_speaker(pattern: str | None) -> re.Pattern[str] | None:
    """A regular expression whose first group is the speaker.

    Raises:
        UsageError: it is none, or has no group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"`speaker` must be a regular expression, got {pattern!r}: {error}") from None
    if not compiled.groups:
        raise UsageError(f"`speaker` needs a group in parentheses that is the speaker, got {pattern!r}")
    return compiled


def speaker_of(path: str, pattern: re.Pattern[str] | None = None, *, numbered: bool = True) -> str | None:
    """The speaker that a relative path tells, or None; ``numbered`` as for ``named_split``."""
    if pattern is not None:
        match = pattern.search(nfc(path))
        return match and match.group(1)
    *folders, name = nfc(path).split("/")
    for first in (name.split("-")[0], name.split("_")[0]):  # LibriTTS and Multilingual LibriSpeech: 19_198_000000.wav
        if first in folders and named_split(first, numbered=numbered) is None:
            return first
    if not folders or folders[-1].lower() in _NOBODY or named_split(folders[-1], numbered=numbered) is not None:
        return None
    if re.fullmatch(r"(19|20)\d\d", folders[-1]) and re.match(rf"{folders[-1]}\d{{4}}", name):
        return None  # the year of a date, as in VoxPopuli's 2009/20090112-0900-PLENARY-en.ogg
    return folders[-1]


def split_of(path: str, *, numbered: bool = True) -> str | None:
    """The split that the first folder of a relative path names, or None; ``numbered`` as for ``named_split``."""
    first, _, rest = path.partition("/")
    return named_split(first, numbered=numbered) if rest else None


def utterance_id(path: str) -> str:
    """LibriSpeech's own ids stay; otherwise the relative path without its ending, in one word, in NFC, ``public``."""
    *folders, name = nfc(public(path)).split("/")
    stem = name.rsplit(".", 1)[0]
    if stem.split("-")[0] in folders:
        return stem
    return "_".join([*folders, stem]).replace(" ", "_")


def speaker_name(speaker: str | None) -> str | None:
    """One spelling for each: 1.0 is what becomes of 1 in a column with gaps."""
    return nfc(re.sub(r"^(\d+)\.0$", r"\1", (speaker or "").strip())) or None
