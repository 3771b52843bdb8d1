"""Forced alignment: when each label of a known text is said, by the most probable CTC path (Graves et al. 2006)."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from w2v2.data.audio import SAMPLE_RATE, AudioError
from w2v2.data.sources import folder_texts
from w2v2.decoding.greedy import Hypothesis, path_hypothesis
from w2v2.errors import UsageError
from w2v2.files import read_text
from w2v2.inference.recognizer import Recognizer
from w2v2.inference.recordings import Failure, Source, source_of
from w2v2.inference.transcribe import Layout, transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.text.vocabulary import Vocabulary

MOST_STEPS = 10**10
"""Frames times labels that are aligned at most: an hour of speech, some minutes of a CPU core."""


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
    recognizer: Recognizer, source: Source, text: str, *, layout: Layout | None = None, batch_size: int = 1
) -> Transcript | Failure:
    """When each word of a known text is said in a recording of any length, which is aligned as a whole.

    Raises:
        UsageError: a text that cannot be aligned with it.
    """
    ids = spell(text, recognizer.vocabulary)
    if os.path.isfile(source.path):  # what else there is may be read but once
        with contextlib.suppress(AudioError, OSError), source.open() as file:  # transcribe says what is wrong with it
            if file.frames < 2**62:  # more where the header of a stream leaves it open
                samples = round(file.frames * SAMPLE_RATE / file.rate)
                _refuse_endless(recognizer.model.config.frames([samples])[0], len(ids))

    def decoder(log_probs: Tensor) -> Hypothesis:
        return align_labels(log_probs, ids, recognizer.vocabulary)

    return next(transcribe(recognizer, [source], decoder, layout=layout, batch_size=batch_size, stretch=math.inf))


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
