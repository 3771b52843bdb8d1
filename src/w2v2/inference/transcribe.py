"""Recordings of any length to text, in bounded memory: overlapping windows, log-probabilities stitched.

Audio is decoded, mixed down and resampled as it is needed. A window starts at a whole number of frames; the frames near
its edges, which see too little, are thrown away, and those that the next window starts with lie beside those that this
one ends with. Neither the audio nor the log-probabilities of a long recording are ever in memory as a whole.
While the model works on a batch, a thread reads the next one, and another makes text of the one before.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from w2v2.data.audio import SAMPLE_RATE, AudioError, FloatArray, Mixer, stream_audio
from w2v2.data.vad import MARGIN, WINDOW, Vad, near_speech
from w2v2.decoding.greedy import Decoder, Hypothesis
from w2v2.errors import UsageError
from w2v2.inference.batches import ahead, one_late, together
from w2v2.inference.recognizer import NOT_FINITE, Recognizer
from w2v2.inference.recordings import Failure, Source, why
from w2v2.inference.transcripts import Transcript
from w2v2.inference.words import label_scores, word_times
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)


STRETCH_SECONDS = 60.0
"""Decoders get at most this, and at least half of it, of a longer recording: a beam keeps something of every frame."""


@dataclass(frozen=True)
class Layout:
    """How long recordings are cut into windows."""

    seconds: float = 30.0
    """Length of a window; a recording that is no longer is taken whole."""
    context: float = 3.0
    """At each inner edge, so much is heard and thrown away."""

    def __post_init__(self) -> None:
        if self.seconds * SAMPLE_RATE == math.inf:
            raise UsageError(f"a window must be a finite number of seconds, got {self.seconds:g}; choose fewer")
        if not (self.context >= 0.1 and self.seconds >= 2 * self.context + 0.1):
            raise UsageError(
                "a window must be at least 0.1 s longer than its two contexts, each of at least 0.1 s: "
                f"got {self.seconds:g} s with {self.context:g} s"
            )


@dataclass(frozen=True)
class Window:
    """A part of a recording, and which of its frames count."""

    audio: Tensor
    """(S,) float32 at 16 kHz."""
    skip: int
    """Leading frames that do not count."""
    keep: int
    """Frames that do, after those."""
    last: bool
    """Whether the recording ends with it."""
    speech: Tensor | None = None
    """(keep,) whether somebody speaks in each frame that counts; None: nobody has listened for that."""


def cut_windows(blocks: Iterable[FloatArray], config: Wav2Vec2Config, layout: Layout) -> Iterator[Window]:
    """Windows of audio that comes in blocks; together they keep exactly the frames that the whole would have.

    Args:
        blocks: (samples,) at 16 kHz each; no more of them is taken than the next window needs.
    """
    hop = math.prod(config.conv_strides)
    size, context = (round(seconds * SAMPLE_RATE / hop) for seconds in (layout.seconds, layout.context))
    step, skip = size - 2 * context, 0
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > size * hop:
            yield Window(torch.from_numpy(held[: size * hop]), skip, size - context - skip, last=False)
            # The next starts so much earlier that its own context is heard before its first frame that counts.
            held, skip = held[step * hop :].copy(), context
    yield Window(torch.from_numpy(held), skip, max(config.frames([len(held)])[0] - skip, 0), last=True)


class _Recording:
    """A recording whose windows are coming in. Decodes what it holds, up to a pause, whenever that is long enough."""

    def __init__(
        self, source: Source, recognizer: Recognizer, decoder: Decoder, longest: float, vad: Vad | None
    ) -> None:
        self.source, self.recognizer, self.decoder, self.longest = source, recognizer, decoder, longest
        self.failure: Failure | None = None
        self.samples = self.expected = 0
        self.parts: list[Tensor] = []
        self.first = 0  # frame of the recording that ``parts`` start with
        self.texts: list[str] = []
        self.labels: list[tuple[int, int, int, float]] = []  # id, first and last frame, score
        self.vad, self.speech, self.cut = vad, array("f"), 0  # of 32 ms each; frames that windows have been cut of

    def windows(self, layout: Layout) -> Iterator[tuple[_Recording, Window | None]]:
        """Itself with each window; with None in the end if it cannot be read (further), and ``failure`` says why."""
        config, mix = self.recognizer.model.config, Mixer(self.source.channel)
        try:
            with self.source.open() as file:
                self.expected = round(file.frames * SAMPLE_RATE / file.rate)
                blocks = self._counted(stream_audio(file, mix=mix))
                for window in map(self._listened, cut_windows(blocks, config, layout)):
                    if window.last and mix.cancels:
                        log.warning("%s: its channels cancel each other out; choose one of them", self.source.name)
                    yield self, window
        except (AudioError, OSError, UsageError) as error:
            self.failure = Failure(self.source.name, why(error))
            yield self, None

    def _counted(self, blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
        for block in blocks:
            self.samples += len(block)
            if self.vad is not None:
                self.speech.extend(self.vad(block))
            yield block

    def _listened(self, window: Window) -> Window:
        """The window, with what is speech in it; without any it need not be heard."""
        if self.vad is None:
            return window
        hop = math.prod(self.recognizer.model.config.conv_strides)
        places = (np.arange(self.cut, self.cut + window.keep) * hop + hop // 2) // WINDOW
        self.cut += window.keep
        first = max(places[0] - MARGIN, 0) if len(places) else 0
        near = np.append(near_speech(self.speech[first:]), False)  # the last windows may not be whole
        speech = torch.from_numpy(near[np.minimum(places - first, len(near) - 1)])
        return replace(window, speech=speech, audio=window.audio if speech.any() else window.audio[:0])

    def share(self) -> float:
        """How much of it has been read, 0 to 1."""
        return min(self.samples / self.expected, 1.0) if self.expected else 1.0

    def add(self, window: Window, log_probs: Tensor) -> None:
        """Take the (T, labels) of a window; of a recording that has failed already, nothing."""
        log_probs = log_probs[window.skip : window.skip + window.keep]
        if window.speech is not None:
            log_probs = silenced(log_probs, window.speech, self.recognizer.vocabulary)
        if log_probs.isnan().any():
            self.failure = Failure(self.source.name, NOT_FINITE)
        if self.failure is not None:
            return
        self.parts.append(log_probs)
        while sum(map(len, self.parts)) > self.longest:
            held = torch.cat(self.parts)
            cut = find_pause(held[: round(self.longest)], self.recognizer.vocabulary)
            self._decode(held[:cut])
            self.parts = [held[cut:].clone()]

    def finish(self) -> Transcript:
        """What is said in all of it."""
        self._decode(torch.cat(self.parts))
        ids, starts, ends, scores = zip(*self.labels, strict=True) if self.labels else ((),) * 4
        whole = Hypothesis(" ".join(text for text in self.texts if text), ids, starts, ends, sum(scores))
        words = word_times(whole, self.recognizer.vocabulary, self.recognizer.model.config.frame_seconds, scores)
        return Transcript(self.source.name, self.samples / SAMPLE_RATE, whole.text, tuple(words), self.source.channel)

    def _decode(self, log_probs: Tensor) -> None:
        hypothesis, first, boundary = self.decoder(log_probs), self.first, self.recognizer.vocabulary.boundary
        if self.labels and boundary is not None and self.labels[-1][0] != boundary:
            self.labels.append((boundary, first - 1, first - 1, 0.0))  # a decoder need not end the last word
        starts, ends = ([first + frame for frame in frames] for frames in (hypothesis.starts, hypothesis.ends))
        self.labels += zip(hypothesis.ids, starts, ends, label_scores(hypothesis, log_probs), strict=True)
        self.texts.append(hypothesis.text)
        self.first += len(log_probs)


def silenced(log_probs: Tensor, speech: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Log-probabilities (T, labels), or none of all T, with blanks where nobody speaks, and a word's end before these.

    Args:
        speech: (T,) bool.
    """
    filled = torch.full((len(speech), len(vocabulary.labels)), -100.0)
    filled[:, vocabulary.blank] = 0.0
    if vocabulary.boundary is not None:
        ends = torch.cat([torch.ones(1, dtype=torch.bool), speech[:-1]])[: len(speech)] & ~speech
        filled[ends] = -100.0
        filled[ends, vocabulary.boundary] = 0.0
    if len(log_probs):
        filled[speech] = log_probs[speech]
    return filled


def find_pause(log_probs: Tensor, vocabulary: Vocabulary) -> int:
    """Where to cut log-probabilities (T, labels) so that no word is cut: inside the longest pause of their second half.

    A pause is a run of frames without letters between two words. If nobody pauses there, the longest run within a word
    has to do; if there is none either, the end.
    """
    best = log_probs.argmax(-1)
    nothing = torch.tensor([vocabulary.blank, *vocabulary.silent])
    between = (
        best == vocabulary.boundary if vocabulary.boundary is not None else torch.zeros_like(best, dtype=torch.bool)
    )
    quiet, counts = (torch.isin(best, nothing) | between).unique_consecutive(return_counts=True)
    place = (False, 0, len(log_probs))  # ends a word, length, where
    for silent, end, count in zip(quiet.tolist(), counts.cumsum(0).tolist(), counts.tolist(), strict=True):
        marks = between[end - count : end].nonzero().flatten().tolist()
        start = end - count + (marks[-1] + 1 if marks else 0)  # a word keeps the label that ends it
        middle = (start + end + 1) // 2
        if silent and middle >= len(log_probs) // 2:
            place = max(place, (bool(marks) or vocabulary.boundary is None, count, middle))
    return place[2]


_Item = tuple[_Recording, Window | None]
_SHORT = 16
"""So many short windows in the place of a whole one at most: they are padded before they are packed."""


def transcribe(
    recognizer: Recognizer,
    sources: Sequence[Source],
    decoder: Decoder,
    *,
    layout: Layout | None = None,
    batch_size: int = 1,
    stretch: float = STRETCH_SECONDS,
    vad: bool = False,
    show: Callable[[float], None] | None = None,
) -> Iterator[Transcript | Failure]:
    """Transcribe recordings, in their order; what cannot be read is a failure, and the rest goes on.

    Args:
        layout: of windows; None: 30 s with 3 s of context.
        batch_size: windows that go through the model together, or shorter ones, also of several recordings, that are
            no more audio. The text does not depend on it.
        stretch: seconds that the decoder gets at most; infinite: always whole recordings.
        vad: whether what is no speech is left out, by ``data/vad.py``.
        show: is told the share of the work that is done, by size of files.
    """
    layout, hop = layout or Layout(), math.prod(recognizer.model.config.conv_strides)
    sizes = [source.size() for source in sources]
    longest = stretch * SAMPLE_RATE / hop
    listeners = (Vad() if vad else None for _ in sources)
    recordings = (_Recording(source, recognizer, decoder, longest, next(listeners)) for source in sources)
    done = 0
    windows = (item for recording in recordings for item in recording.windows(layout))
    samples = batch_size * round(layout.seconds * SAMPLE_RATE / hop) * hop
    batches = together(windows, lambda item: len(item[1].audio) if item[1] else 0, samples, batch_size * _SHORT)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        heard = (
            (batch, writer.submit(_texts, batch, recognizer.emissions([w.audio for _, w in batch if w is not None])))
            for batch in ahead(reader, batches)
        )
        for batch, texts in one_late(heard):
            for text in texts.result():
                done += sizes.pop(0)
                yield text
            if show is not None:
                rest = sizes[0] * batch[-1][0].share() if sizes and batch[-1][1] and not batch[-1][1].last else 0.0
                show((done + rest) / (done + sum(sizes)))


def _texts(batch: Sequence[_Item], log_probs: Iterable[Tensor]) -> list[Transcript | Failure]:
    """What is said in the recordings that end in a batch, once it has been added to them."""
    rest, ended = iter(log_probs), []
    for recording, window in batch:
        if window is not None:
            recording.add(window, next(rest))
        if window is None or window.last:
            ended.append(recording.failure or recording.finish())
    return ended
