"""Audio, changed each time that it is read for training: speed, room, microphone, noise, codec, level.

All is drawn from a key, the run's seed with the utterance and how often it has come, so that a resumed run, and any
number of workers, hears the same. Of lhotse's transforms only the codecs are taken: its ``Speed`` keeps a filter for
each factor, its generated rooms need torchaudio.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from w2v2.data.audio import FORMATS, SAMPLE_RATE, AudioError, AudioFile, FloatArray, mix_down, resample
from w2v2.data.config import AugmentConfig
from w2v2.errors import UsageError


def keyed_rng(seed: int, *key: object) -> np.random.Generator:
    """Random numbers that depend on a seed and a key alone."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def draw_room(rng: np.random.Generator) -> tuple[NDArray[np.float64], int]:
    """A room's impulse response, RT60 of 0.1 to 0.4 s, and the samples before the direct sound, which is 1."""
    rt60, direct_to_reverberant_db = rng.uniform(0.1, 0.4), rng.uniform(3, 12)
    delay = int(rng.uniform(0.3, 3.0) / 343 * SAMPLE_RATE)  # the speaker is 0.3 to 3 m from the microphone
    first_echo = delay + int(rng.uniform(0.001, 0.006) * SAMPLE_RATE)
    impulse = np.zeros(first_echo + int(rt60 * SAMPLE_RATE))
    echoes = rng.standard_normal(len(impulse) - first_echo)
    echoes *= 10 ** (-3 * np.arange(len(echoes)) / len(echoes))
    impulse[first_echo:] = echoes * 10 ** (-direct_to_reverberant_db / 20) / np.sqrt(np.sum(echoes**2))
    impulse[delay] = 1.0
    return impulse, delay


class Augmentation:
    """What a configuration does to audio.

    Raises:
        UsageError: a folder without audio.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.noises, self.rooms = _files("noise_folder", config.noise_folder), _files("room_folder", config.room_folder)

    def draw_stretch(self, rng: np.random.Generator) -> float:
        """A factor of duration: less than 1 is faster and higher."""
        return float((1 + self.config.speed) ** rng.uniform(-1, 1))

    def __call__(self, samples: FloatArray, stretch: float, rng: np.random.Generator) -> FloatArray:
        """(S,) at 16 kHz, -> (S times ``stretch``, rounded,)."""
        c = self.config
        if stretch != 1.0:
            samples = soxr.resample(samples, SAMPLE_RATE, SAMPLE_RATE * stretch)
        if not len(samples):
            return samples
        impulse = self._room(rng) if rng.random() < c.room else np.ones(1)
        size = -(-(len(samples) + len(impulse)) // 2048) * 2048
        frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 50.0)
        voice = np.fft.rfft(samples, size)
        if len(impulse) > 1:
            voice *= np.fft.rfft(impulse, size)
        if rng.random() < c.noise:
            noise = self._noise(rng, frequency)
            power = float(np.vdot(voice, voice).real) / max(float(np.vdot(noise, noise).real), 1e-30)
            power *= size / len(samples)
            voice += noise * (np.sqrt(power) * 10 ** (-rng.uniform(min(c.snr_db), max(c.snr_db)) / 20))
        voice *= (frequency / 1000) ** (rng.uniform(-1, 1) * c.tilt_db / 6.02)
        if rng.random() < c.low_pass:
            voice /= np.sqrt(1 + (frequency / rng.uniform(2_500, 7_000)) ** 16)
        changed = np.fft.irfft(voice, size)[: len(samples)].astype(np.float32)
        if rng.random() < c.codec:
            level = max(1.0, float(np.abs(changed).max()))
            from lhotse.augmentation import Compress  # late: it needs torch, which the synthetic corpus does without

            codec = Compress(("opus", "mp3", "vorbis")[rng.integers(3)], float(rng.uniform(0.3, 1.0)))
            changed = _as_long(codec(changed[None] / level, SAMPLE_RATE)[0] * level, len(changed))
        return changed * np.float32(10 ** (rng.uniform(-1, 1) * c.gain_db / 20))

    def _room(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """An impulse response from its direct sound on, which is 1."""
        if not self.rooms:
            impulse, start = draw_room(rng)
            return impulse[start:]
        impulse = _read(self.rooms, rng).astype(np.float64)
        start = int(np.abs(impulse).argmax())
        return impulse[start:] / (impulse[start] or 1.0)

    def _noise(self, rng: np.random.Generator, frequency: NDArray[np.float64]) -> NDArray[np.complex128]:
        """Spectrum of a recording, from anywhere in it and again from its start, or made: white to pink."""
        if self.noises:
            noise, count = _read(self.noises, rng), 2 * (len(frequency) - 1)
            return np.fft.rfft(np.resize(np.roll(noise, -int(rng.integers(max(len(noise), 1)))), count))
        parts = rng.standard_normal((2, len(frequency)))
        coloured: NDArray[np.complex128] = (parts[0] + 1j * parts[1]) * frequency ** (-rng.uniform(0, 1))
        return coloured


def _files(field: str, folder: str) -> list[Path]:
    if not folder:
        return []
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in FORMATS)
    if not files:
        raise UsageError(f"`data.augment.{field}`: expected a folder with audio files, got {folder}")
    for path in files:
        try:
            with AudioFile(str(path)):
                pass
        except (AudioError, OSError) as error:
            raise UsageError(f"`data.augment.{field}`: cannot read {path}: {error}; repair or remove it") from None
    return files


def _read(files: list[Path], rng: np.random.Generator) -> FloatArray:
    with AudioFile(str(files[rng.integers(len(files))])) as file:
        return resample(mix_down(file.read()), file.rate)


def _as_long(samples: FloatArray, count: int) -> FloatArray:
    """So many samples: a codec may add some at the end, or lose some."""
    return np.pad(samples, (0, max(0, count - len(samples))))[:count]
