"""MP4, Matroska, WebM, AVI, MPEG, ASF, AMR, ADTS: what libsndfile does not read, decoded by PyAV in another process."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from w2v2.data.child import child, rest
from w2v2.errors import AudioError

_BLOCK_BYTES = 1 << 22

FloatArray = npt.NDArray[np.float32]


def container_of(head: bytes) -> str | None:
    """The container that begins with these bytes (192 are enough), by its usual name; None: none of ours."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "M4A"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    for name, mark in _MARKS.items():
        if head.startswith(mark):
            return name
    if len(head) > 188 and head[0] == head[188] == 0x47:
        return "MPEG-TS"
    return "AAC" if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else None


_MARKS = {
    "Matroska": b"\x1a\x45\xdf\xa3",
    "ASF": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "AMR": b"#!AMR",
    "FLV": b"FLV\x01",
    "MPEG-PS": b"\x00\x00\x01\xba",
}


class ContainerFile:
    """An open file: what :class:`SndFile` is for those of libsndfile. Seeks by decoding.

    Time is that of its packets: where there are none, as before a late start, are zeros.

    Raises:
        AudioError: PyAV is not installed, or the file cannot be decoded.
    """

    def __init__(self, file: BinaryIO, container: str, rates: tuple[int, int], most_channels: int, name: str) -> None:
        if importlib.util.find_spec("av") is None:
            raise AudioError(f"{container} needs PyAV: pip install av")
        self.file, self.format = file, container
        self.process = child("w2v2.data.libav")
        size = file.seek(0, os.SEEK_END)
        description, _ = self._ask(do="open", size=size, name=name, rates=rates, channels=most_channels)
        self.samplerate: int = description["rate"]
        self.channels: int = description["channels"]
        self.subtype: str = description["codec"]
        # MP4 counts the encoder's padding; elsewhere packets tell how long they last, and not what is to be left out.
        self.slack = 4096 if container == "M4A" else self.samplerate // 4

    @functools.cached_property
    def length(self) -> tuple[int, str]:
        """Samples per channel that the container announces, or to the end of its last packet; and what is missing."""
        description, _ = self._ask(do="length")
        missing: str = description["missing"]
        if self.format == "AVI":  # FFmpeg takes for its length what there is
            self.file.seek(4)
            announced, there = int.from_bytes(self.file.read(4), "little") + 8, self.file.seek(0, os.SEEK_END)
            if there < announced < 0x7FFF_0000:
                missing = f"{there} bytes of {announced}"
        return description["frames"], missing

    def seek(self, start: int) -> None:
        """Go to a sample, or to the end if there are fewer."""
        self._ask(do="seek", start=start)

    def read(self, count: int) -> FloatArray:
        """Up to ``count`` samples, (samples, channels); fewer at the end."""
        block = _BLOCK_BYTES // (4 * self.channels)
        parts: list[FloatArray] = []
        while count > 0:
            _, data = self._ask(do="read", count=min(count, block))
            parts.append(np.frombuffer(data, np.float32).reshape(-1, self.channels))
            if len(parts[-1]) < min(count, block):
                break
            count -= len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros((0, self.channels), np.float32)

    def close(self) -> None:
        """Let go of the process."""
        with contextlib.suppress(AudioError):  # it is no longer there
            self._ask(do="close")
            rest(self.process)

    def _ask(self, **command: Any) -> tuple[dict[str, Any], bytes]:
        answer, data = self.process.ask(command, self.file)
        if "error" in answer:
            if command["do"] == "open":  # nobody will close it
                rest(self.process)
            raise AudioError(answer["error"].strip() or "it cannot be decoded")
        return answer, data
