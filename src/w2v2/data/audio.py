"""Audio files of any kind as float32 samples: opened anywhere, read in part, mixed down and resampled."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt
import soxr

from w2v2.data.containers import ContainerFile, container_of
from w2v2.data.headers import examine
from w2v2.data.sndfile import SndFile
from w2v2.data.splice import read_at
from w2v2.data.storage import UnreachableError, is_remote, open_binary
from w2v2.errors import AudioError as AudioError
from w2v2.errors import TruncatedError as TruncatedError

if TYPE_CHECKING:
    from lhotse import MonoCut

SAMPLE_RATE = 16_000
RATES = (1_000, 768_000)
"""Hz: what else a header announces is no recording, and would cost any time to resample."""
MOST_CHANNELS = 64
FORMATS = {
    ".wav": {"WAV", "WAVEX", "RF64", "W64"},
    ".rf64": {"RF64"},
    ".w64": {"W64"},
    ".flac": {"FLAC"},
    ".mp3": {"MP3"},
    ".ogg": {"OGG"},
    ".oga": {"OGG"},
    ".opus": {"OGG"},
    ".aiff": {"AIFF"},
    ".aif": {"AIFF"},
    ".aifc": {"AIFF"},
    ".au": {"AU"},
    ".sph": {"NIST"},
    ".caf": {"CAF"},
    ".m4a": {"M4A"},
    ".m4b": {"M4A"},
    ".mp4": {"M4A"},
    ".mov": {"M4A"},
    ".3gp": {"M4A"},
    ".aac": {"AAC", "M4A"},
    ".mkv": {"Matroska"},
    ".mka": {"Matroska"},
    ".webm": {"Matroska"},
    ".avi": {"AVI"},
    ".ts": {"MPEG-TS"},
    ".wma": {"ASF"},
    ".amr": {"AMR"},
}
"""File name endings that count as audio, and the containers that may be behind them."""
_BY_LIBSNDFILE = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "MP3", "OGG", "AIFF", "AU", "NIST", "CAF"}
_STEPS = {"PCM_U8": 2**-7, "PCM_S8": 2**-7, "ULAW": 2**-5, "ALAW": 2**-5}

FloatArray = npt.NDArray[np.float32]


class AudioFile:
    """An open audio file, read from its current position on, to where its bytes end, whatever its header says.

    By libsndfile (WAV, FLAC, MP3, Ogg, Opus, AIFF, AU, CAF, SPH, ...); what that does not know, by PyAV.

    Args:
        source: path, URL, or a binary file object.

    Raises:
        AudioError: it cannot be opened as audio.
        OSError: it cannot be read at all.
    """

    def __init__(self, source: str | BinaryIO) -> None:
        self.source = source
        self.position = 0
        self.stream = open_binary(source) if isinstance(source, str) else source
        try:
            self.file = self._open()
            self.rate: int = self.file.samplerate
            self.channels: int = self.file.channels
            if not RATES[0] <= self.rate <= RATES[1]:
                raise AudioError(f"{self.rate} Hz, expected {RATES[0]} to {RATES[1]}")
            if not 1 <= self.channels <= MOST_CHANNELS:
                raise AudioError(f"{self.channels} channels, expected 1 to {MOST_CHANNELS}")
        except BaseException:
            self._let_go()
            raise
        self.format: str = self.file.format
        self.step: float = _STEPS.get(self.file.subtype, 2**-15)
        """Distance between two neighbouring values near full scale; 16 bits also where it is less."""
        self.floats = self.file.subtype in ("FLOAT", "DOUBLE", "pcm_f32le", "pcm_f64le")
        """Whether it holds floating-point numbers, which may be beyond full scale."""
        self.slack: int = self.file.slack
        """So many samples fewer than announced are no loss."""

    def _open(self) -> SndFile | ContainerFile:
        path = self.source if isinstance(self.source, str) else None
        kind = container_of(read_at(self.stream, 0, 192))
        ending = "" if path is None else PurePosixPath(path).suffix.lower()
        if kind is None:
            try:
                layout = examine(self.stream, path)
                return SndFile(self.stream, layout, None if path is None or is_remote(path) else path)
            except TruncatedError:
                raise
            except AudioError:
                kinds = FORMATS.get(ending, set()) - _BY_LIBSNDFILE
                if not kinds:
                    raise
                kind = min(kinds)
        return ContainerFile(self.stream, kind, RATES, MOST_CHANNELS, f"audio{ending}")

    @property
    def frames(self) -> int:
        """Samples per channel, by the header where its bytes do not prove it wrong."""
        return self.file.length[0]

    @property
    def missing(self) -> str:
        """What the file lacks at its end, where a decoder takes the shorter file for the whole; or nothing."""
        return self.file.length[1]

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._let_go()

    def _let_go(self) -> None:
        if isinstance(self.source, str):
            self.stream.close()

    def seek(self, start: int) -> None:
        """Go to a sample; in a format that cannot seek, by decoding what is before it."""
        if start != self.position:
            self.file.seek(start)
            self.position = start

    def read(self, count: int = -1) -> FloatArray:
        """Up to ``count`` samples, (samples, channels) float32; fewer at the end."""
        if count < 0:
            parts = [np.zeros((0, self.channels), np.float32)]
            while len(part := self.read(1 << 20)):
                parts.append(part)
            return np.concatenate(parts)
        samples = self.file.read(count)
        self.position += len(samples)
        return samples

    def check_end(self) -> None:
        """Refuse a file that lacks its end, once all of it has been read.

        Raises:
            TruncatedError: it announces more than it holds.
        """
        if self.position < self.frames - self.slack:
            raise TruncatedError(f"it breaks off: {self.position} samples of {self.frames}")
        if self.missing:
            raise TruncatedError(f"it breaks off: {self.missing}")


def mix_down(samples: FloatArray, channel: int | None = None) -> FloatArray:
    """(samples, channels) to (samples,): one channel, counted from 1, or the mean over all.

    Raises:
        AudioError: there is no such channel.
    """
    if channel is not None:
        if channel > samples.shape[1]:
            raise AudioError(f"it has no channel {channel}, only {samples.shape[1]}")
        return samples[:, channel - 1]
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)


class Mixer:
    """``mix_down`` of block after block, which finds out whether the channels cancel each other out."""

    def __init__(self, channel: int | None = None) -> None:
        self.channel = channel
        self.mixed = self.apart = 0.0  # energy of the mean, and the mean of the channels' energies
        self.channels = 1

    def __call__(self, samples: FloatArray) -> FloatArray:
        """(samples, channels) to (samples,); errors as for ``mix_down``."""
        mono = mix_down(samples, self.channel)
        if self.channel is None and samples.shape[1] > 1:
            self.channels = samples.shape[1]
            with np.errstate(over="ignore", invalid="ignore"):
                self.mixed += float(np.dot(mono, mono))
                self.apart += float(np.einsum("sc,sc->", samples, samples)) / self.channels
        return mono

    @property
    def cancels(self) -> bool:
        """Whether the mean has less than a tenth of the energy that it has of unrelated channels."""
        return self.channels > 1 and self.mixed * self.channels < 0.1 * self.apart


def resample(samples: FloatArray, rate: int) -> FloatArray:
    """(samples,) at some rate to 16 kHz (soxr, high quality)."""
    return samples if rate == SAMPLE_RATE else soxr.resample(samples, rate, SAMPLE_RATE)


def stream_audio(file: AudioFile, seconds: float = 10.0, mix: Mixer | None = None) -> Iterator[FloatArray]:
    """The rest of a file in blocks of (samples,), mono, at 16 kHz; laid end to end they are what ``resample`` gives.

    Args:
        file: read from its current position on.
        seconds: of a block; what is in memory at a time.
        mix: takes it down to one channel; None: the mean over all.

    Raises:
        AudioError: it cannot be decoded, has no such channel, lacks its end, or holds samples that are not finite.
    """
    stream = soxr.ResampleStream(file.rate, SAMPLE_RATE, 1) if file.rate != SAMPLE_RATE else None
    count = max(1, round(seconds * file.rate))
    mix, ended = mix or Mixer(), False
    while not ended:
        samples = mix(file.read(count))
        ended = len(samples) < count
        if not np.isfinite(samples).all():
            raise AudioError(f"samples that are not finite within {seconds:g} s before {file.position / file.rate:g} s")
        if ended:
            file.check_end()
        yield samples if stream is None else stream.resample_chunk(samples, last=ended)


def load_audio(
    cut: MonoCut, offset: float = 0.0, duration: float | None = None, data: bytes | None = None
) -> FloatArray:
    """Decode part of a cut: its channel, or the mean over all, 16 kHz, float32.

    Only that part is decoded where the format can seek.

    Args:
        cut: of one recording in one file. Of its custom fields, ``channel`` is the one that is heard, from 1, and
            ``gain`` what its samples were multiplied by to fit into the integers of a shard.
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
            samples = mix_down(file.read(count), (cut.custom or {}).get("channel"))
    except UnreachableError:
        raise
    except (AudioError, OSError) as error:
        raise AudioError(f"{path} ({cut.id}): {error}") from error
    # Decoders' versions differ in how they count the last samples of compressed formats; a rounding is no loss.
    if len(samples) < count - max(1, rate // 1000):
        raise AudioError(f"{path} ({cut.id}): it ends early, {len(samples)} samples of {count} from {start}")
    return resample(samples, rate) / np.float32((cut.custom or {}).get("gain", 1.0))
