"""Rooms and microphones, and speech as it is recorded in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from w2v2.data.augment import draw_room
from w2v2.synthetic.espeak import ESPEAK_RATE, Phone, Speech, Word

SAMPLE_RATE = 16_000
"""Rate of the written audio, samples per second."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Room and microphone of one chapter."""

    impulse: NDArray[np.float64]
    delay: float
    noise_slope: float
    snr_db: float
    tilt_db: float
    low_cut_hz: float
    level_db: float


def draw_session(rng: np.random.Generator) -> Session:
    """A room of 0.1 to 0.4 s reverberation (RT60), a background noise and a microphone."""
    impulse, delay = draw_room(rng)
    return Session(
        impulse=impulse,
        delay=delay / SAMPLE_RATE,
        noise_slope=rng.uniform(0, 2),
        snr_db=rng.uniform(11, 29),
        tilt_db=rng.uniform(-3, 3),
        low_cut_hz=rng.uniform(40, 150),
        level_db=rng.uniform(-32, -20),
    )


def record(
    speech: Speech, session: Session, rng: np.random.Generator, lead: float, tail: float
) -> tuple[NDArray[np.int16], list[Word], list[Phone]]:
    """Speech as the session's microphone hears it, with `lead` and `tail` seconds of background around it."""
    clean = soxr.resample(speech.audio.astype(np.float64), ESPEAK_RATE, SAMPLE_RATE)
    before, after = round(lead * SAMPLE_RATE), round(tail * SAMPLE_RATE)
    dry = np.pad(clean, (before, after))
    size = -(-(len(dry) + len(session.impulse)) // 2048) * 2048
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 20.0)
    # dB per octave around 1 kHz, and a low cut as of any small microphone.
    microphone = (frequency / 1000) ** (session.tilt_db / 6.02) / (1 + (session.low_cut_hz / frequency) ** 2)
    voice = np.fft.rfft(dry, size) * np.fft.rfft(session.impulse, size) * microphone
    noise = rng.standard_normal(len(frequency)) + 1j * rng.standard_normal(len(frequency))
    noise *= frequency ** (-session.noise_slope / 2) * microphone

    # Parseval: power of the voice while somebody speaks, and of the noise all the time.
    spoken = sum(end - start for _, start, end in speech.words) * SAMPLE_RATE
    voice_power = 2 * np.sum(np.abs(voice) ** 2) / size / spoken
    noise_power = 2 * np.sum(np.abs(noise) ** 2) / size**2
    noise *= np.sqrt(voice_power / noise_power) * 10 ** (-(session.snr_db + rng.uniform(-1, 1)) / 20)
    audio = np.fft.irfft(voice + noise, size)[: len(dry)]
    gain = 10 ** ((session.level_db + rng.uniform(-2, 2)) / 20) / np.sqrt(voice_power)
    audio *= min(gain, 0.95 / np.max(np.abs(audio)))
    shift = before / SAMPLE_RATE + session.delay
    words, phones = (
        [(label, round(start + shift, 4), round(end + shift, 4)) for label, start, end in labels]
        for labels in (speech.words, speech.phones)
    )
    return np.round(audio * 32767).astype(np.int16), words, phones
