"""Recognition while one speaks: windows that end at what was heard last, text that is final behind a look-ahead.

Every ``step`` the last seconds go through the model. Attention is bidirectional: a frame near the end of a window has
not seen what follows it, so it counts for text that may still change; once it lies ``look_ahead`` behind the end, it
is final. Windows end at multiples of the step whatever pieces the audio comes in, so the text does not depend on these.
Decoding is greedy: a search would hold back words for as long as it doubts.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, BinaryIO

import numpy as np
import soxr
import torch
from torch import Tensor

from w2v2.data.audio import RATES, SAMPLE_RATE, FloatArray
from w2v2.data.vad import THRESHOLD, WINDOW, Vad
from w2v2.decoding.greedy import Greedy, Hypothesis
from w2v2.errors import Positive, Range, UsageError, check_ranges
from w2v2.inference.recognizer import NOT_FINITE, Recognizer
from w2v2.inference.transcribe import Window
from w2v2.inference.transcripts import word_fields
from w2v2.inference.words import Word, label_scores, word_times

log = logging.getLogger(__name__)

MICROPHONE = "mic"
LONGEST_WORD = 10.0
"""Seconds after which a word ends, whether its end has been heard or not: memory is bounded."""


@dataclass(frozen=True)
class LiveLayout:
    """How a stream is heard, in seconds."""

    look_ahead: Annotated[float, Range(0, 10, above=True)] = 0.64
    """What follows a frame before its label is final."""
    step: Positive = 0.16
    """Between two windows."""
    context: Positive = 8.0
    """Heard before the frames that become final."""
    pause: Positive = 0.5
    """Without speech ends an utterance, where voice activity is listened for."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Update:
    """What a window has brought."""

    words: tuple[Word, ...]
    """That are final now, after those of earlier updates."""
    partial: str
    """What follows them, so far; the next update replaces it."""
    ended: bool
    """Whether an utterance ends here."""
    seconds: float
    """Audio that was heard up to here."""

    def fields(self) -> dict[str, Any]:
        """What JSON has of it: ``words`` as in a transcript, ``partial``, ``ended``, ``seconds``."""
        words = [word_fields(word) for word in self.words]
        return {"words": words, "partial": self.partial, "ended": self.ended, "seconds": round(self.seconds, 3)}


class Live:
    """A stream that is being recognised, in bounded memory.

    ``hear`` yields windows; whoever runs the model gives ``take`` the log-probabilities of each before the next::

        for window in live.hear(samples):
            update = live.take(window, recognizer.emissions([window.audio])[0])

    Args:
        recognizer: whose vocabulary and frames these are.
        layout: of windows; None: the default.
        vad: what tells where utterances end, and spares the model what is silent; None: the stream is one utterance.
    """

    def __init__(self, recognizer: Recognizer, layout: LiveLayout | None = None, vad: Vad | None = None) -> None:
        layout = layout or LiveLayout()
        self.config, self.vocabulary, self.vad = recognizer.model.config, recognizer.vocabulary, vad
        self.greedy = Greedy(self.vocabulary)
        self.hop = math.prod(self.config.conv_strides)
        self.step, self.look_ahead, self.context, self.pause = (
            max(round(seconds * SAMPLE_RATE / self.hop), 1)
            for seconds in (layout.step, layout.look_ahead, layout.context, layout.pause)
        )
        self.held = np.zeros(0, np.float32)
        self.start = 0  # frame that ``held`` starts with
        self.final = 0  # frames that are final
        self.heard = 0  # samples
        self.speaking = vad is None
        self.quiet = math.inf  # samples since somebody spoke
        self.tail = torch.zeros(0, len(self.vocabulary.labels))  # final log-probabilities of a word that has not ended
        self.tail_start = 0  # its first frame
        self.word_end = 0.0  # of the last word, seconds

    def hear(self, samples: FloatArray) -> Iterator[Window]:
        """Windows that are due with these (S,) samples at 16 kHz.

        Raises:
            UsageError: samples that are not finite.
        """
        if not np.isfinite(samples).all():
            raise UsageError(f"samples that are not finite after {self.heard / SAMPLE_RATE:g} s; check the source")
        size = self.step * self.hop
        while len(samples):
            part = samples[: size - self.heard % size]
            samples = samples[len(part) :]
            self.held = np.concatenate([self.held, part])
            self.heard += len(part)
            for probability in [] if self.vad is None else self.vad(part):
                self.quiet = 0 if probability >= THRESHOLD else self.quiet + WINDOW
            if self.heard % size == 0:
                yield from self._due()

    def finish(self) -> Iterator[Window]:
        """The last window of the stream, which makes final what it has heard; none after silence."""
        if self._goes_on() or self.speaking:  # a pause may have begun since the last step
            yield self._window(last=True)

    def _due(self) -> Iterator[Window]:
        goes_on = self._goes_on()
        if self.speaking:
            yield self._window(last=not goes_on)
            self.speaking = goes_on
        if not self.speaking:  # what is silent is final, but the beginning of what may be a word
            self.final = max(self.final, self.heard // self.hop - self.pause)
        start = max(self.final - self.context, self.start)
        self.held, self.start = self.held[(start - self.start) * self.hop :].copy(), start

    def _goes_on(self) -> bool:
        """Whether an utterance does; one that has begun starts to count."""
        goes_on = self.vad is None or self.quiet < self.pause * self.hop
        self.speaking |= goes_on
        return goes_on

    def _window(self, last: bool) -> Window:
        skip, frames = self.final - self.start, self.config.frames([len(self.held)])[0]
        end = frames if last else self.heard // self.hop - self.start - self.look_ahead
        return Window(torch.from_numpy(self.held), skip, max(end - skip, 0), last)

    def take(self, window: Window, log_probs: Tensor) -> Update:
        """What the (T, labels) log-probabilities of a window say.

        Raises:
            UsageError: they are not finite.
        """
        if log_probs.isnan().any():
            raise UsageError(NOT_FINITE)
        if not len(self.tail):
            self.tail_start = self.final
        self.final += window.keep
        known = torch.cat([self.tail, log_probs[window.skip : window.skip + window.keep]])
        hypothesis = self.greedy(known)
        ids, places = hypothesis.ids, self.vocabulary.words(hypothesis.ids)
        open_ended = len(known) < LONGEST_WORD * SAMPLE_RATE / self.hop and not window.last
        complete = places[:-1] if open_ended else places
        words = tuple(self._word(hypothesis, place, known) for place in complete if self.vocabulary.decode(ids[place]))
        rest = ids[places[-1]] if open_ended and places else ()
        cut = hypothesis.starts[len(ids) - len(rest)] if rest else len(known)
        self.tail, self.tail_start = known[cut:], self.tail_start + cut
        partial = (
            "" if window.last else self.greedy(torch.cat([self.tail, log_probs[window.skip + window.keep :]])).text
        )
        return Update(words, partial, window.last, self.heard / SAMPLE_RATE)

    def _word(self, hypothesis: Hypothesis, place: slice, log_probs: Tensor) -> Word:
        ids, starts, ends = hypothesis.ids[place], hypothesis.starts[place], hypothesis.ends[place]
        alone = Hypothesis(self.vocabulary.decode(ids), ids, starts, ends, 0.0)
        (word,) = word_times(
            alone,
            self.vocabulary,
            lambda frame: self.config.frame_seconds(self.tail_start + frame),
            label_scores(alone, log_probs),
        )
        word = replace(word, start=max(word.start, self.word_end), characters=())
        self.word_end = word.end
        return word


class Pcm:
    """16-bit little-endian PCM of one channel, which comes in pieces of any number of bytes.

    Args:
        rate: Hz.

    Raises:
        UsageError: no rate of a recording.
    """

    def __init__(self, rate: int) -> None:
        if not RATES[0] <= rate <= RATES[1]:
            raise UsageError(f"`rate` of PCM must be {RATES[0]} to {RATES[1]} Hz, got {rate}")
        self.rest = b""
        self.stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None

    def __call__(self, data: bytes, last: bool = False) -> FloatArray:
        """(S,) samples at 16 kHz, full scale at 1; half a sample waits for its other half.

        Raises:
            UsageError: the last piece ends with half a sample.
        """
        data = self.rest + data
        whole = len(data) // 2 * 2
        self.rest = data[whole:]
        if last and self.rest:
            raise UsageError("PCM ends with half a sample: expected 16 bits each; check the sample format")
        samples: FloatArray = np.frombuffer(data[:whole], "<i2").astype(np.float32) / np.float32(32768)
        return samples if self.stream is None else self.stream.resample_chunk(samples, last=last)


def listen(live: Live, recognizer: Recognizer, pieces: Iterable[bytes], rate: int) -> Iterator[Update]:
    """Updates of a stream of PCM, to its end.

    Args:
        pieces: of any length, as they come.
        rate: of the samples, Hz.

    Raises:
        UsageError: as of ``Pcm``, ``Live.hear`` and ``Live.take``.
    """
    pcm = Pcm(rate)
    for data in pieces:
        for window in live.hear(pcm(data)):
            yield live.take(window, recognizer.emissions([window.audio])[0])
    for window in itertools.chain(live.hear(pcm(b"", last=True)), live.finish()):
        yield live.take(window, recognizer.emissions([window.audio])[0])


def stream_pieces(stream: BinaryIO) -> Iterator[bytes]:
    """Bytes of a pipe as they come."""
    read = getattr(stream, "read1", stream.read)
    while data := read(1 << 14):
        yield data


def until_interrupted(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces to their end or to the first Ctrl-C, after which what has been heard is told; a second one ends all."""
    reading, stopped = False, False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)
        if reading:
            raise KeyboardInterrupt

    before, rest = signal.signal(signal.SIGINT, stop), iter(pieces)
    try:
        while not stopped:
            reading = True
            piece = next(rest, None)
            reading = False
            if piece is None:
                return
            yield piece
    except KeyboardInterrupt:
        if not reading:
            raise
    finally:
        signal.signal(signal.SIGINT, before)


def microphone_pieces(rate: int) -> Iterator[bytes]:
    """PCM of the default microphone, without end.

    Raises:
        UsageError: no sounddevice, PortAudio or microphone.
    """
    try:
        import sounddevice

        stream = sounddevice.RawInputStream(samplerate=rate, channels=1, dtype="int16")
    except (ModuleNotFoundError, OSError) as error:  # OSError: PortAudio is missing
        raise UsageError(f"a microphone needs sounddevice and PortAudio ({error}): pip install sounddevice") from error
    except Exception as error:  # PortAudioError, which only exists where it is
        raise UsageError(f"no microphone can be used: {error}; pipe PCM into - instead") from error
    with stream:
        while True:
            data, overflowed = stream.read(rate // 20)
            if overflowed:
                log.warning("the microphone was not read in time: some of what was said is lost; use a smaller model")
            yield bytes(data)
