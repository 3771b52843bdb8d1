"""Forced alignment: when each label of a known text is said, by the most probable CTC path (Graves et al. 2006)."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from w2v2.data.audio import SAMPLE_RATE, AudioError
from w2v2.data.layouts import refuse_layout
from w2v2.data.sources import folder_texts
from w2v2.decoding.greedy import Greedy, Hypothesis, path_hypothesis
from w2v2.errors import UsageError
from w2v2.files import read_text
from w2v2.inference.recognizer import Recognizer
from w2v2.inference.recordings import Failure, Source, source_of
from w2v2.inference.transcribe import Layout, transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.inference.words import Word
from w2v2.text.vocabulary import Vocabulary

MOST_STEPS = 10**10
"""Frames times labels that are aligned at most: an hour of speech, some minutes of a CPU core."""


STRETCHED = 3.0
"""Seconds, and a second for each label: a word that lasts longer was not said where it was put."""


def forced_align(log_probs: Tensor, ids: Sequence[int], blank: int) -> Tensor:
    """The most probable path that says these labels.

    Viterbi over the 2 U + 1 states blank, label, blank, ..., blank, all of a frame at once, in float64. Time is
    O(T U), memory O(sqrt(T) U): scores are kept at every sqrt(T)-th frame, and the choices in between are made again on
    the way back.

    Args:
        log_probs: (T, labels) on the host.
        ids: U labels without blanks.
        blank: its id.

    Returns:
        (T,) int64: for each frame the place in ``ids`` of its label, or -1 where it is blank.

    Raises:
        UsageError: fewer frames than the labels need, labels that the model rules out, or more than ``MOST_STEPS``.
    """
    frames, needed = len(log_probs), len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
    if frames < needed:
        raise UsageError(
            f"a text of {len(ids)} labels needs at least {needed} frames, the audio has {frames}; "
            "check that text and audio belong together"
        )
    _refuse_endless(frames, len(ids))
    if not ids:
        return torch.full((frames,), -1)
    trellis = _Trellis(log_probs, ids, blank)
    block = math.isqrt(frames - 1) + 1
    score = trellis.start()
    kept = []  # before each block of frames
    for first in range(1, frames, block):
        kept.append(score)
        for frame in range(first, min(first + block, frames)):
            score, _ = trellis.step(score, frame)
    state = len(score) - 1 - int(score[-2] > score[-1])
    if score[state] == -math.inf:
        raise UsageError("the model gives the text no probability at all: it has labels that were never trained")
    path = [state]
    for first in reversed(range(1, frames, block)):
        score, steps = kept.pop(), []
        for frame in range(first, min(first + block, frames)):
            score, step = trellis.step(score, frame)
            steps.append(step.to(torch.int8))
        for row in reversed(torch.stack(steps).numpy()):
            path.append(path[-1] - int(row[path[-1]]))
    states = torch.tensor(path[::-1])
    return torch.where(states % 2 == 1, states // 2, -1)


def _refuse_endless(frames: int, labels: int) -> None:
    if frames * labels > MOST_STEPS:
        raise UsageError(
            f"{frames} frames times {labels} labels would take too long to align, expected {MOST_STEPS:.0e} at most; "
            "cut recording and text into parts of an hour or less"
        )


class _Trellis:
    """States blank, label, blank, label, ..., blank."""

    def __init__(self, log_probs: Tensor, ids: Sequence[int], blank: int) -> None:
        labels = torch.tensor(ids)
        self.log_probs = log_probs
        self.states = torch.full((2 * len(ids) + 1,), blank)
        self.states[1::2] = labels
        # A label may follow another without a blank between them, unless it is the same one.
        self.barred = torch.ones(len(self.states), dtype=torch.bool)
        self.barred[3::2] = labels[1:] == labels[:-1]

    def start(self) -> Tensor:
        """(states,) scores after the first frame."""
        score = torch.full((len(self.states),), -math.inf, dtype=torch.float64)
        score[:2] = self.log_probs[0, self.states[:2]].double()
        return score

    def step(self, score: Tensor, frame: int) -> tuple[Tensor, Tensor]:
        """Scores after a frame, and how many states each best path has come up."""
        ways = (
            score,
            F.pad(score[:-1], (1, 0), value=-math.inf),
            F.pad(score[:-2], (2, 0), value=-math.inf).masked_fill(self.barred, -math.inf),
        )
        best, step = torch.stack(ways).max(0)
        return best + self.log_probs[frame, self.states].double(), step


def spell(text: str, vocabulary: Vocabulary) -> list[int]:
    """Labels of a text that is to be aligned.

    Raises:
        UsageError: no text, or characters without a label.
    """
    words = vocabulary.normalize(text).split()
    if not words:
        raise UsageError("no text to align: expected words; check the transcript")
    ids = vocabulary.encode(" ".join(words))  # refuses strange characters itself, where there is no unknown label
    if vocabulary.unknown in ids:
        # Where labels are more than characters, these may all be known, and still not make up the word.
        strange = vocabulary.strange(text) or sorted({w for w in words if vocabulary.unknown in vocabulary.encode(w)})
        known = " ".join(vocabulary.ids)
        raise UsageError(f"no label for {' '.join(strange)}: the model knows {known}; spell the text in these")
    return ids


def align_labels(log_probs: Tensor, ids: Sequence[int], vocabulary: Vocabulary) -> Hypothesis:
    """Known labels as a decoder would have found them, with their frames.

    Args:
        log_probs: (T, labels) on the host.

    Raises:
        UsageError: as for ``forced_align``.
    """
    places = forced_align(log_probs, ids, vocabulary.blank)
    path = torch.where(places >= 0, torch.tensor(ids)[places], vocabulary.blank)
    score = log_probs[torch.arange(len(path)), path].double().sum()
    return path_hypothesis(path, vocabulary, float(score))


def align(
    recognizer: Recognizer,
    source: Source,
    text: str,
    *,
    layout: Layout | None = None,
    batch_size: int = 1,
    skip_unknown: bool = False,
) -> Transcript | Failure:
    """When each word of a known text is said in a recording of any length, which is aligned as a whole.

    Args:
        skip_unknown: what has no label, such as digits and punctuation, is left out of the matching and kept in the
            words, which are then as they were written; a word without any label lasts from the one before to the next.

    Returns:
        With a ``doubt`` where the recording is hardly of this text.

    Raises:
        UsageError: a text that cannot be aligned with it.
    """
    vocabulary = recognizer.vocabulary
    written = known_parts(text, vocabulary) if skip_unknown else []
    ids = spell(" ".join(known for _, known in written) if skip_unknown else text, vocabulary)
    if os.path.isfile(source.path):  # what else there is may be read but once
        with contextlib.suppress(AudioError, OSError), source.open() as file:  # transcribe says what is wrong with it
            if file.frames < 2**62:  # more where the header of a stream leaves it open
                samples = round(file.frames * SAMPLE_RATE / file.rate)
                _refuse_endless(recognizer.model.config.frames([samples])[0], len(ids))
    heard = 0

    def decoder(log_probs: Tensor) -> Hypothesis:
        nonlocal heard
        heard = len(Greedy(vocabulary)(log_probs).ids)
        return align_labels(log_probs, ids, vocabulary)

    result = next(transcribe(recognizer, [source], decoder, layout=layout, batch_size=batch_size, stretch=math.inf))
    if isinstance(result, Failure):
        return result
    result = replace(result, doubt=_doubt(result, len(ids), heard))
    if sum(bool(known) for _, known in written) != len(result.words):
        return result  # the labels do not say where words end
    texts = [word for word, _ in written]
    return replace(result, text=" ".join(texts), words=tuple(_as_written(written, result.words, result.seconds)))


def known_parts(text: str, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Each word of a text as it is written, and what of it has labels, as these spell it; "": nothing."""
    pairs = []
    for word in text.split():
        known = vocabulary.normalize(word)
        for sign in vocabulary.strange(word):
            known = known.replace(sign, "")
        pairs.append((word, known))
    return pairs


def _as_written(written: Sequence[tuple[str, str]], words: Sequence[Word], seconds: float) -> list[Word]:
    """Words as they are written; those without labels share the time between their neighbours, 20 ms each at least."""
    result: list[Word] = []
    place = 0
    for spelled, group in itertools.groupby(written, key=lambda pair: bool(pair[1])):
        texts = [text for text, _ in group]
        if spelled:
            result += [replace(word, text=text) for text, word in zip(texts, words[place:], strict=False)]
            place += len(texts)
            continue
        end = words[place].start if place < len(words) else seconds
        start = min(result[-1].end if result else 0.0, max(end - 0.02 * len(texts), 0.0))
        if place == 0 < len(words) and end < 0.02 * len(texts):  # of the first word's time, as they have none
            end = min(0.02 * len(texts), (words[0].start + words[0].end) / 2)
            words = [replace(words[0], start=end), *words[1:]]
        if result:
            start = max(start, (result[-1].start + result[-1].end) / 2)
            result[-1] = replace(result[-1], end=start)
        step = max(end - start, 0.0) / len(texts)
        result += [Word(text, start + i * step, start + (i + 1) * step) for i, text in enumerate(texts)]
    return result


def _doubt(transcript: Transcript, labels: int, heard: int) -> str:
    """Why a recording is hardly of the text that it was aligned with; empty: it may be."""
    if 2 * labels < transcript.seconds and heard > 2 * labels:
        return f"the model hears {heard} labels in {transcript.seconds:.0f} s, the text has {labels}"
    for word in transcript.words:
        if word.end - word.start > STRETCHED + len(word.characters):
            return f"{word.text} lasts {word.end - word.start:.0f} s, the audio is hardly of this text"
    return ""


def find_texts(audio: str, text: str | None) -> list[tuple[Source, str | UsageError]]:
    """Recordings and what is said in them, or why that is not known.

    Args:
        audio: a file, URL or ``-``; or a folder with transcripts, as ``prepare`` reads it.
        text: words that are said in a file, or a file of them; None for a folder.
    """
    if not os.path.isdir(audio):
        if text is None:
            raise UsageError(f"name the text of {audio}: the words, or a file of them")
        return [(source_of(audio), _read_text(text))]
    if text is not None:
        raise UsageError(
            f"{audio} is a folder, whose transcripts lie beside the audio; name a file, or leave the text out"
        )
    refuse_layout(Path(audio))
    transcripts = list(folder_texts(Path(audio)))
    expected = "expected *.trans.txt, or a .txt beside each recording"
    if not any(words is not None for _, words in transcripts):
        raise UsageError(f"no transcripts in {audio}: {expected}")
    pairs: list[tuple[Source, str | UsageError]] = []
    for below, words in transcripts:
        path = os.path.join(audio, below)
        pairs.append((Source(path, path, below), UsageError(f"no transcript: {expected}") if words is None else words))
    return pairs


def _read_text(text: str) -> str:
    """The words themselves, or what a file of that name holds."""
    expected = "expected the words that are said, or a file of them"
    if os.path.isdir(text):
        raise UsageError(f"{text} is a folder; {expected}")
    if not os.path.isfile(text):
        if text.endswith(".txt") or (os.sep in text and len(text.split()) == 1):
            raise UsageError(f"no such file: {text}; {expected}")
        return text
    return read_text(Path(text))
