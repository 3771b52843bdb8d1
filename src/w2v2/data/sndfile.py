"""What libsndfile reads, to its real end, in one piece, from any sample on."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from w2v2.data.splice import Layout, Span, read_at, spliced
from w2v2.errors import AudioError, TruncatedError

FloatArray = npt.NDArray[np.float32]


class _Silence:
    """Keeps the process's standard error shut: the MP3 decoder writes a line there for every frame that it dislikes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.kept = -1

    def __enter__(self) -> None:
        self.lock.acquire()
        self.depth += 1
        if self.depth == 1:
            try:
                self.kept = os.dup(2)
            except OSError:  # there is none
                self.kept = -1
                return
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0 and self.kept >= 0:
            os.dup2(self.kept, 2)
            os.close(self.kept)
        self.lock.release()


_silence = _Silence()


class SndFile:
    """An open file, with the lengths that its layout tells.

    Args:
        stream: its bytes.
        layout: where its audio is in them.
        path: of a local file; None: it is read from ``stream`` alone.

    Raises:
        AudioError: it cannot be read.
    """

    def __init__(self, stream: BinaryIO, layout: Layout, path: str | None) -> None:
        self.stream, self.layout, self.path = stream, layout, path
        try:
            self.file = self._open()
        except soundfile.LibsndfileError as error:
            raise _refusal(error, stream) from error
        self.format: str = self.file.format
        self.subtype: str = self.file.subtype
        self.samplerate: int = self.file.samplerate
        self.channels: int = self.file.channels
        self.slack = layout.slack
        self.position = 0

    def _open(self) -> Any:
        spans: Sequence[Span] = self.layout.spans
        with _silence:
            # soundfile wants to be told all about a file that is named so, even where it has a header.
            if self.path is not None and not spans and not self.path.lower().endswith(".raw"):
                # As bytes, since a name need not be UTF-8 on a POSIX system, whatever soundfile thinks.
                return soundfile.SoundFile(os.fsencode(self.path) if os.name == "posix" else self.path)
            spans = spans or (Span(b"", 0, self.stream.seek(0, os.SEEK_END)),)
            files = [soundfile.SoundFile(spliced(self.stream, span)) for span in spans]
            return files[0] if len(files) == 1 else _Chain(files)

    def _calm(self) -> Any:
        return _silence if self.format == "MP3" else nullcontext()

    @functools.cached_property
    def length(self) -> tuple[int, str]:
        """Samples per channel, and what is missing at the end where libsndfile takes what there is for the whole."""
        frames: int = self.file.frames if self.layout.frames is None else self.layout.frames
        return frames, self.layout.missing or _cut_off(self.file, self.stream)

    def seek(self, start: int) -> None:
        """Go to a sample; in a format that cannot seek (GSM 6.10, G.721), by decoding what is before it."""
        try:
            if self.file.seekable():
                with self._calm():
                    self.file.seek(start)
                self.position = start
                return
            if start < self.position:
                self.file.close()
                self.file, self.position = self._open(), 0
            while self.position < start and len(self.read(min(start - self.position, 1 << 20))):
                pass
        except soundfile.LibsndfileError as error:
            raise AudioError(_reason(error)) from error

    def read(self, count: int) -> FloatArray:
        """Up to ``count`` samples, (samples, channels); fewer at the end."""
        try:
            with self._calm():
                samples: FloatArray = self.file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(_reason(error)) from error
        self.position += len(samples)
        return samples

    def close(self) -> None:
        """Let go of the file, but not of the stream."""
        self.file.close()


class _Chain:
    """Several files as one: the part of ``soundfile.SoundFile`` that :class:`SndFile` uses."""

    def __init__(self, files: Sequence[Any]) -> None:
        self.files, self.at = files, 0
        self.format, self.subtype = files[0].format, files[0].subtype
        self.samplerate, self.channels = files[0].samplerate, files[0].channels
        self.frames = sum(file.frames for file in files)
        self.extra_info = ""
        for file in files:
            if (file.samplerate, file.channels) != (self.samplerate, self.channels):
                raise AudioError(
                    f"joined of parts that differ: {self.samplerate} Hz with {self.channels} channels, then "
                    f"{file.samplerate} Hz with {file.channels}"
                )

    def seekable(self) -> bool:
        return all(file.seekable() for file in self.files)

    def seek(self, start: int) -> None:
        for at, file in enumerate(self.files):
            if start < file.frames or file is self.files[-1]:
                file.seek(start)
                self.at = at
                break
            start -= file.frames
        for file in self.files[self.at + 1 :]:
            file.seek(0)

    def read(self, count: int, dtype: str = "float32", always_2d: bool = True) -> FloatArray:
        parts = [np.zeros((0, self.channels), np.float32)]
        while count > 0 and self.at < len(self.files):
            parts.append(self.files[self.at].read(count, dtype=dtype, always_2d=always_2d))
            count -= len(parts[-1])
            self.at += count > 0
        return np.concatenate(parts)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _cut_off(file: Any, stream: BinaryIO) -> str:
    """What an AIFF, AU, RF64, W64, CAF or SPH file lacks, of which libsndfile reads what there is; its log tells."""
    if file.format == "NIST":
        count = re.search(rb"sample_count -i (\d+)", read_at(stream, 0, 1024))
        return f"{file.frames} samples of {int(count[1])}" if count and int(count[1]) > file.frames else ""
    if file.format == "CAF":
        return _caf_missing(stream)
    if file.format not in ("AIFF", "AU", "RF64", "W64"):
        return ""
    for line in file.extra_info.splitlines():
        numbers = re.search(
            r": (\d+) \(should be (\d+)\)|count (\d+) does not match value from 'ds64' chunk of (\d+)", line
        )
        if numbers is None:
            continue
        announced, there = int(numbers[1] or numbers[4]), int(numbers[2] or numbers[3])
        open_ended = 0x7FFF_0000 <= announced <= 0x8000_0100 or 0xFFFF_0000 <= announced <= 0xFFFF_FFFF
        if there + 8 < announced < 1 << 48 and not open_ended:  # writers differ in whether they count a padding byte
            return f"{there} of {announced}"
    return ""


def _caf_missing(stream: BinaryIO) -> str:
    size, at = stream.seek(0, os.SEEK_END), 8
    while len(chunk := read_at(stream, at, 12)) == 12:
        length = int.from_bytes(chunk[4:], "big", signed=True)  # -1: to the end
        at = size if length < 0 else at + 12 + length
    return f"{size} bytes of {at}" if at > size else ""


def _refusal(error: soundfile.LibsndfileError, stream: BinaryIO) -> AudioError:
    """Why a file is not read, where libsndfile's own reason would mislead."""
    head = read_at(stream, 0, 192)
    if head[:4] == b"caff" and (missing := _caf_missing(stream)):
        return TruncatedError(f"it breaks off: {missing}")
    if head and all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        start = head[:20].decode("utf-8", "replace").split("\n")[0]
        return AudioError(f"it is no audio but text, which begins with {start!r}")
    reason = _reason(error)
    if "SF_INFO" in reason:
        return AudioError("its header announces a rate or a number of channels that cannot be")
    if "does not exist" in reason or "not recognised" in reason:
        return AudioError("no kind of audio that is known (samples without a header have to be converted to WAV)")
    return AudioError(reason)


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).strip().rstrip(".").removeprefix("Error : ")
