"""Audio files of any kind as float32 samples: opened anywhere, read in part, mixed down and resampled."""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from w2v2.data.storage import UnreachableError, is_remote, open_binary
from w2v2.errors import UsageError

if TYPE_CHECKING:
    from lhotse import MonoCut

SAMPLE_RATE = 16_000
FORMATS = {
    ".wav": {"WAV", "WAVEX", "RF64", "W64"},
    ".flac": {"FLAC"},
    ".mp3": {"MP3"},
    ".ogg": {"OGG"},
    ".oga": {"OGG"},
    ".opus": {"OGG"},
    ".aiff": {"AIFF"},
    ".aif": {"AIFF"},
    ".au": {"AU"},
    ".sph": {"NIST"},
    ".caf": {"CAF"},
    ".m4a": {"M4A"},
    ".mp4": {"M4A"},
    ".aac": {"M4A"},
}
"""File name endings that count as audio, and the containers that may be behind them."""
_STEPS = {"PCM_U8": 2**-7, "PCM_S8": 2**-7, "ULAW": 2**-5, "ALAW": 2**-5}

FloatArray = npt.NDArray[np.float32]


class AudioError(Exception):
    """Audio that cannot be had; the message says which and why."""


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


class AudioFile:
    """An open audio file, read from its current position on. WAV, FLAC, MP3, Ogg, Opus by libsndfile; M4A by PyAV.

    Args:
        source: path, URL, or a binary file object.

    Raises:
        AudioError: it cannot be opened as audio.
        OSError: it cannot be read at all.
    """

    def __init__(self, source: str | BinaryIO) -> None:
        opened = open_binary(source) if isinstance(source, str) and is_remote(source) else source
        # As bytes, since a name need not be UTF-8 on a POSIX system, whatever soundfile thinks.
        named = os.fsencode(opened) if isinstance(opened, str) and os.name == "posix" else opened
        self.source = source
        try:
            with _silence:
                self.file: Any = soundfile.SoundFile(named)
            self.format: str = self.file.format
        except soundfile.LibsndfileError as error:
            if not isinstance(opened, str):
                opened.seek(0)
            if not _is_mp4(opened):
                if isinstance(opened, str):
                    open(opened, "rb").close()  # a missing file or permission is said by the system's own words
                raise AudioError(_reason(error)) from error
            self.file = _Mp4(opened)
            self.format = "M4A"
        self.rate: int = self.file.samplerate
        self.channels: int = self.file.channels
        self.frames: int = self.file.frames
        """Samples per channel that the header announces."""
        self.padding = 4096 if self.format == "M4A" else 0
        """So many of these may never come."""
        self.step: float = _STEPS.get(self.file.subtype, 2**-15)
        """Distance between two neighbouring values near full scale; 16 bits also where it is less."""
        self.position = 0

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def seek(self, start: int) -> None:
        """Go to a sample."""
        if start == self.position:
            return
        try:
            with _silence if self.format == "MP3" else nullcontext():
                self.file.seek(start)
        except soundfile.LibsndfileError as error:
            raise AudioError(_reason(error)) from error
        self.position = start

    def read(self, count: int = -1) -> FloatArray:
        """Up to ``count`` samples, (samples, channels) float32; fewer at the end."""
        try:
            with _silence if self.format == "MP3" else nullcontext():
                samples: FloatArray = self.file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(_reason(error)) from error
        self.position += len(samples)
        return samples

    def check_end(self) -> None:
        """Refuse a file that lacks its end, once all of it has been read.

        Raises:
            AudioError: it announces more than it holds.
        """
        if self.position < self.frames - self.padding and says_length(self.source, self.format):
            raise AudioError(f"it breaks off: {self.position} samples of {self.frames}")
        if missing := announced_but_missing(self.source, self.format):
            raise AudioError(f"it breaks off: {missing}")


def mix_down(samples: FloatArray) -> FloatArray:
    """(samples, channels) to (samples,): the mean over channels."""
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)


def resample(samples: FloatArray, rate: int) -> FloatArray:
    """(samples,) at some rate to 16 kHz (soxr, high quality)."""
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def stream_audio(file: AudioFile, seconds: float = 10.0) -> Iterator[FloatArray]:
    """The rest of a file in blocks of (samples,), mono, at 16 kHz; laid end to end they are what ``resample`` gives.

    Args:
        file: read from its current position on.
        seconds: of a block; what is in memory at a time.

    Raises:
        AudioError: it cannot be decoded, lacks its end, or holds samples that are not finite.
    """
    stream = soxr.ResampleStream(file.rate, SAMPLE_RATE, 1) if file.rate != SAMPLE_RATE else None
    count = max(1, round(seconds * file.rate))
    ended = False
    while not ended:
        samples = mix_down(file.read(count))
        ended = len(samples) < count
        if not np.isfinite(samples).all():
            raise AudioError(f"samples that are not finite within {seconds:g} s before {file.position / file.rate:g} s")
        if ended:
            file.check_end()
        yield samples if stream is None else stream.resample_chunk(samples, last=ended)


def load_audio(
    cut: MonoCut, offset: float = 0.0, duration: float | None = None, data: bytes | None = None
) -> FloatArray:
    """Decode part of a cut: channels averaged, 16 kHz, float32. Only that part is decoded where the format can seek.

    Args:
        cut: of one recording in one file.
        offset: seconds after the cut's start.
        duration: seconds; None: to the cut's end.
        data: the encoded file, where it has been read already, as of a shard.

    Raises:
        AudioError: it cannot be read, or is not what the manifest says.
        UnreachableError: its server does not answer.
    """
    rate = cut.recording.sampling_rate
    start = round((cut.start + offset) * rate)
    count = round((cut.duration - offset if duration is None else duration) * rate)
    path: str = cut.recording.sources[0].source
    try:
        with AudioFile(path if data is None else io.BytesIO(data)) as file:
            if file.rate != rate:
                raise AudioError(f"it has {file.rate} Hz, the manifest says {rate}")
            file.seek(start)
            samples = file.read(count)
    except UnreachableError:
        raise
    except (AudioError, OSError) as error:
        raise AudioError(f"{path} ({cut.id}): {error}") from error
    # Decoders' versions differ in how they count the last samples of compressed formats; a rounding is no loss.
    if len(samples) < count - max(1, rate // 1000):
        raise AudioError(f"{path} ({cut.id}): it ends early, {len(samples)} samples of {count} from {start}")
    return resample(mix_down(samples), rate)


def says_length(source: str | BinaryIO, container: str) -> bool:
    """Whether a file says how long it is; of MP3 without a Xing header the decoder guesses it."""
    if container != "MP3":
        return True
    with _bytes_of(source) as file:
        head = file.read(10)
        tag = head[:3] == b"ID3"  # its size has seven bits in each byte
        file.seek(10 + sum((byte & 127) << 7 * i for i, byte in enumerate(head[:5:-1])) if tag else 0)
        first = file.read(2048)
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def announced_but_missing(source: str | BinaryIO, container: str) -> str:
    """What a WAV or Ogg file lacks at its end, where the decoder takes the shorter file for the whole; or nothing."""
    if isinstance(source, str) and is_remote(source):
        return ""
    with _bytes_of(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if container in ("WAV", "WAVEX"):
            head = file.read(12)
            while len(head) >= 8 and (chunk := file.read(8)):
                name, length = chunk[:4], struct.unpack("<I", chunk[4:].ljust(4, b"\0"))[0]
                if name == b"data":  # writers to a pipe leave a length near 2^31 (SoX) or 2^32, or of 0
                    left = size - file.tell()
                    return f"{left} bytes of {length}" if left < length < 0x7FFF_0000 else ""
                file.seek(length + length % 2, os.SEEK_CUR)
        elif container == "OGG":
            file.seek(max(0, size - 65_307))  # the largest page
            tail = file.read()
            at = tail.rfind(b"OggS")
            if at < 0 or len(tail) < at + 27 or not tail[at + 5] & 4:
                return "the last page does not end the stream"
            sizes = tail[at + 27 : at + 27 + tail[at + 26]]
            if len(tail) < at + 27 + len(sizes) + sum(sizes):
                return "the last page is cut off"
    return ""


def _bytes_of(source: str | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """The encoded file from its start; one that was given open stays open."""
    if isinstance(source, str):
        return open_binary(source)
    source.seek(0)
    return nullcontext(source)


def _reason(error: soundfile.LibsndfileError) -> str:
    text = str(error.error_string).strip().rstrip(".")
    return text.removeprefix("Error : ")


def _is_mp4(source: str | BinaryIO) -> bool:
    if isinstance(source, str):
        if PurePosixPath(source).suffix.lower() == ".aac":
            return True
        try:
            with open(source, "rb") as file:
                head = file.read(12)
        except OSError:
            return False
    else:
        head = source.read(12)
        source.seek(0)
    return head[4:8] == b"ftyp"


class _Mp4:
    """The part of ``soundfile.SoundFile`` that :class:`AudioFile` uses, for AAC and ALAC in MP4. Seeks by decoding."""

    def __init__(self, source: str | BinaryIO) -> None:
        try:
            import av
        except ImportError:
            raise UsageError("M4A audio needs PyAV: pip install 'w2v2[m4a]'") from None
        self.errors = av.error.FFmpegError
        self.source = source
        self._open: Any = av.open
        self._start()
        stream = self.container.streams.audio[0]
        self.samplerate: int = stream.rate
        self.channels: int = stream.channels
        self.subtype = stream.codec_context.name
        ticks, unit = stream.duration or 0, stream.time_base
        if self.container.format.name == "aac":  # no header announces anything, and the duration is a guess
            ticks = sum(packet.duration or 0 for packet in self._demuxed())
            self._start()
        self.frames = round(float(ticks * unit) * self.samplerate)

    def _start(self) -> None:
        if not isinstance(self.source, str):
            self.source.seek(0)
        try:
            self.container = self._open(self.source)
            if not self.container.streams.audio:
                raise AudioError("no audio stream in it")
            self.packets = self.container.decode(audio=0)
        except self.errors as error:
            raise AudioError(error.strerror or str(error)) from error
        self.rest = np.zeros((0, 1), np.float32)
        self.position = 0

    def _demuxed(self) -> Iterator[Any]:
        try:
            yield from self.container.demux(audio=0)
        except self.errors as error:
            raise AudioError(error.strerror or str(error)) from error
        finally:
            self.container.close()

    def seek(self, start: int) -> None:
        if start < self.position:
            self.container.close()
            self._start()
        while self.position < start and len(self.read(min(start - self.position, 1 << 16))):
            pass

    def read(self, count: int, dtype: str = "float32", always_2d: bool = True) -> FloatArray:
        parts, have = [self.rest], len(self.rest)
        while count < 0 or have < count:
            try:
                frame = next(self.packets, None)
            except self.errors as error:
                raise AudioError(error.strerror or str(error)) from error
            if frame is None:
                break
            part = self._samples(frame)
            parts.append(part)
            have += len(part)
        samples = np.concatenate([part for part in parts if len(part)] or [np.zeros((0, self.channels), np.float32)])
        taken = samples if count < 0 else samples[:count]
        self.rest = samples[len(taken) :]
        self.position += len(taken)
        return taken

    @staticmethod
    def _samples(frame: Any) -> FloatArray:
        values: npt.NDArray[Any] = frame.to_ndarray()
        if not frame.format.is_planar:
            values = values.reshape(-1, len(frame.layout.channels)).T
        if values.dtype.kind == "i":
            values = values / float(-np.iinfo(values.dtype).min)
        return np.ascontiguousarray(values.T, dtype=np.float32)

    def close(self) -> None:
        self.container.close()
