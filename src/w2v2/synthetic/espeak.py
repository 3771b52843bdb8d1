"""Clean speech with the times of words and phones from espeak-ng.

espeak-ng is GPL-3: it is an optional extra (`pip install espeakng-loader`), called through ctypes only.
"""

from __future__ import annotations

import _ctypes
import bisect
import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2v2.errors import UsageError
from w2v2.synthetic.grammar import WORD

Word = tuple[str, float, float]
"""A word in upper case, its start and its end in seconds."""
Phone = tuple[str, float, float]
"""espeak-ng's mnemonic of a phone without stress mark, such as ``oU``; its start and its end in seconds."""
ESPEAK_RATE = 22_050
"""Rate of espeak-ng's audio, samples per second."""


@dataclass(frozen=True, kw_only=True)
class Speech:
    """What espeak-ng said: clean, at 22.05 kHz."""

    audio: NDArray[np.float32]
    """Samples in [-1, 1]."""
    words: list[Word]
    """Words with their times in `audio`."""
    phones: list[Phone]
    """Phones with their times in `audio`; pauses are left out."""


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_TimedEvent = tuple[int, int, str]
"""Position in the text of a word, or -1 for a phone; sample of its start; the phone's mnemonic, "" for a word."""
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_EVENT_WORD, _EVENT_PHONEME = 1, 7
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT, _UTF8 = 2, 0x0001, 0x8000, 1
_RATE, _VOLUME, _PITCH = 1, 2, 3


def espeak_paths() -> tuple[str, str]:
    """The shared library and its data folder; :class:`UsageError` where they are not installed."""
    try:
        import espeakng_loader
    except ImportError:
        raise UsageError("synthetic speech needs espeak-ng: pip install espeakng-loader") from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _load_espeak(library: str, data: str) -> ctypes.CDLL:
    espeak = ctypes.CDLL(library)
    espeak.espeak_SetSynthCallback.argtypes = [_CALLBACK]
    espeak.espeak_SetSynthCallback.restype = None
    espeak.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    rate = espeak.espeak_Initialize(_SYNCHRONOUS, 1000, os.fsencode(data), _DONT_EXIT | _PHONEME_EVENTS)
    if rate != ESPEAK_RATE:
        raise RuntimeError(
            f"espeak-ng did not start: expected {ESPEAK_RATE} Hz, got {rate}; its data folder must be readable and "
            f"its path shorter than 160 characters: {data}"
        )
    return espeak


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"espeak-ng: {what}: expected status 0, got {status}; try espeakng-loader 0.2.4")


def _unload(handle: int) -> None:
    if sys.platform == "win32":
        _ctypes.FreeLibrary(handle)
    else:
        _ctypes.dlclose(handle)


def speak(text: str, *, voice: str, accent: str = "en-us", pitch: int = 50, rate: int = 175, seed: int = 0) -> Speech:
    """Say `text` (ordinary spelling) with an espeak-ng `voice` variant and `accent`, without room or noise.

    `pitch` is 0 to 99 (50 is the voice's own), `rate` words per minute, `seed` that of breath noise. Not thread-safe.
    """
    blocks: list[bytes] = []
    events: list[_TimedEvent] = []

    def receive(audio: Any, length: int, event: Any) -> int:
        if audio and length > 0:
            blocks.append(ctypes.string_at(audio, 2 * length))
        index = 0
        while (kind := event[index].type) != 0:
            if kind in (_EVENT_WORD, _EVENT_PHONEME):
                is_word = kind == _EVENT_WORD
                phone = "" if is_word else event[index].id.string.decode()
                events.append((event[index].text_position - 1 if is_word else -1, event[index].sample, phone))
            index += 1
        return 0

    # espeak carries noise, flutter, gain and echo from one utterance into the next, in variables that nothing
    # resets. Only loading the library anew (0.2 ms) makes an utterance depend on its own arguments alone.
    callback = _CALLBACK(receive)
    espeak = _load_espeak(*espeak_paths())
    try:
        espeak.espeak_SetSynthCallback(callback)
        name = f"{accent}+{voice}"
        _check(espeak.espeak_SetVoiceByName(name.encode()), f"voice {name}")
        espeak.espeak_ng_SetRandSeed(seed)
        # Some voices clip at half the default volume of 100.
        for parameter, value in ((_RATE, rate), (_VOLUME, 20), (_PITCH, pitch)):
            _check(espeak.espeak_SetParameter(parameter, value, 0), f"parameter {parameter} = {value}")
        encoded = text.encode() + b"\0"
        _check(espeak.espeak_Synth(encoded, len(encoded), 0, 1, 0, _UTF8, None, None), f"text {text!r}")
    finally:
        espeak.espeak_Terminate()
        _unload(espeak._handle)
    _check(0 if blocks else 1, f"no sound for {text!r}")
    audio = np.frombuffer(b"".join(blocks), np.int16).astype(np.float32) / np.float32(32768)
    words, phones = _word_times(text, events, len(audio)), _phone_times(events, len(audio))
    return Speech(audio=audio, words=words, phones=phones)


def _phone_times(events: list[_TimedEvent], length: int) -> list[Phone]:
    """Phones from espeak's events; each lasts until the next one or a pause begins."""
    starts = [(phone, sample) for position, sample, phone in events if position < 0]
    ends = [sample for _, sample in starts[1:]] + [length]
    return [
        (phone.lstrip("',"), start / ESPEAK_RATE, end / ESPEAK_RATE)
        for (phone, start), end in zip(starts, ends, strict=True)
        if not phone.startswith("_") and end > start
    ]


def _word_times(text: str, events: list[_TimedEvent], length: int) -> list[Word]:
    """Words of `text` from espeak's events."""
    matches = list(WORD.finditer(text))
    offsets = [match.start() for match in matches]
    starts: list[tuple[int, int]] = []
    ends: list[int] = []
    speech_end: int | None = None
    for position, sample, phone in events:
        if position < 0:
            if not phone.startswith("_"):
                speech_end = None
            elif speech_end is None:
                speech_end = sample
            continue
        word = bisect.bisect_right(offsets, position) - 1
        if not starts or word > starts[-1][0]:
            if starts:
                ends.append(sample if speech_end is None else speech_end)
            starts.append((word if starts else 0, sample))
            speech_end = None
    ends.append(length if speech_end is None else speech_end)
    words: list[Word] = []
    for (first, start), end, last in zip(starts, ends, [w for w, _ in starts[1:]] + [len(matches)], strict=True):
        # espeak says a few word pairs ("of the") as one: their time is shared out by letters.
        bounds = np.cumsum([0] + [len(match[0]) for match in matches[first:last]])
        times = (start + (end - start) * bounds / bounds[-1]) / ESPEAK_RATE
        texts = [match[0].upper() for match in matches[first:last]]
        words += zip(texts, times[:-1].tolist(), times[1:].tolist(), strict=True)
    return words
