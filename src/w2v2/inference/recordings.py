"""The recordings that a call is about: files, URLs, folders of them, standard input; and the channels of each."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from w2v2.data.audio import AudioError, AudioFile
from w2v2.data.sources import audio_paths
from w2v2.data.storage import is_remote
from w2v2.errors import UsageError, public

STDIN = "-"


@dataclass(frozen=True)
class Source:
    """A recording to transcribe."""

    path: str
    """File, URL, or ``-`` for standard input."""
    name: str
    """What people know it by."""
    place: str
    """Relative path; of one that was found in a folder, from there."""
    channel: int | None = None
    """That is heard, from 1; None: the mean over all."""

    def size(self) -> int:
        """Bytes, to judge how far the work is; 1 where that is unknown."""
        return max(os.path.getsize(self.path), 1) if os.path.isfile(self.path) else 1

    def open(self) -> AudioFile:
        """Open the audio; standard input goes through a temporary file, because decoders seek.

        Raises:
            AudioError, OSError, UsageError: it cannot be had.
        """
        if os.path.isdir(self.path):
            raise AudioError("it is a folder, expected an audio file")
        return AudioFile(_spooled(sys.stdin.buffer) if self.path == STDIN else self.path)


def _spooled(stream: BinaryIO) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115 -- it is gone when AudioFile lets go of it
    shutil.copyfileobj(stream, file)
    file.seek(0)
    return file


@dataclass(frozen=True)
class Failure:
    """A recording that could not be transcribed."""

    name: str
    reason: str


def source_of(path: str) -> Source:
    """A file, a URL, or ``-``."""
    name = "stdin" if path == STDIN else public(path)
    return Source(path, name, os.path.basename(name))


def find_sources(inputs: Sequence[str | os.PathLike[str]]) -> tuple[list[Source], list[Failure]]:
    """Recordings that arguments stand for: files and URLs as they are, folders with all audio below them.

    Files are not opened here. A folder that cannot be used is a failure, and the rest goes on.
    """
    sources: list[Source] = []
    failures: list[Failure] = []
    for path in (os.fspath(given) for given in inputs):
        if path == STDIN or is_remote(path) or not os.path.isdir(path):
            sources.append(source_of(path))
            continue
        try:
            names = ((os.path.join(path, place), place) for place in audio_paths(Path(path)))
            members = [Source(name, name, place) for name, place in names]
        except (UsageError, OSError) as error:
            failures.append(Failure(path, why(error)))
            continue
        sources += members
        if not members:
            failures.append(Failure(path, "no audio files in this folder"))
    paths: dict[str, str] = {}
    for source in sources:
        if paths.setdefault(source.name, source.path) != source.path:
            raise UsageError(f"several addresses of {source.name}, with other queries; transcribe them one by one")
    return sources, failures


def choose_channel(sources: Sequence[Source], channel: int | None) -> list[Source]:
    """The same recordings, of which one channel is heard; None: each channel as a recording of its own.

    Raises:
        UsageError: each channel of standard input, which can be read but once.
    """
    chosen: list[Source] = []
    for source in sources:
        channels = [channel or 1]
        if channel is None:
            if source.path == STDIN:
                raise UsageError("each channel of standard input cannot be heard: it is read but once; give a file")
            with (
                contextlib.suppress(AudioError, OSError, UsageError),
                source.open() as file,
            ):  # whoever hears it says so
                channels = list(range(1, file.channels + 1))
        stem, ending = os.path.splitext(source.place)
        place = "{0}.{1}{2}" if channel is None else "{0}{2}"
        chosen += [replace(source, place=place.format(stem, number, ending), channel=number) for number in channels]
    return chosen


def why(error: Exception) -> str:
    """What went wrong, without the path, which is said beside it."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
