"""A CTC model with its vocabulary: audio to log-probabilities of labels. Needs neither Lightning nor lhotse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from w2v2.checkpoint.formats import read
from w2v2.decoding.greedy import Greedy
from w2v2.errors import UsageError
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2
from w2v2.text.classes import ClassNames
from w2v2.text.vocabulary import Vocabulary

NOT_FINITE = "the model's output is not finite: is the recording far beyond full scale?"
"""Said of a recording; a model that has diverged does this to every one."""


@dataclass
class Recognizer:
    """What is needed to turn audio into text."""

    model: Wav2Vec2ForCTC
    vocabulary: Vocabulary

    def __call__(self, audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> str:
        """Text of one recording in one piece, greedily decoded; ``transcribe.py`` is for long ones.

        Args:
            audio: (S,) samples of one channel.
            rate: of the samples, Hz; resampled to 16 kHz if it is another.
        """
        return Greedy(self.vocabulary)(self.emissions([_samples(audio, rate)])[0]).text

    @torch.no_grad()
    def emissions(self, audio: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities of waveforms, together in one batch; the same as of each alone.

        Args:
            audio: (S,) float32 each, 16 kHz, as decoded: normalised here, if the model wants that.

        Returns:
            (T, labels) float32 on the host for each; T is 0 where there is less audio than a frame needs.
        """
        config = self.model.config
        device = next(self.model.parameters()).device
        rows = [normalize_waveform(row) if config.normalize_audio and len(row) else row for row in audio]
        frames = config.frames([len(row) for row in rows])
        usable = [row for row, count in zip(rows, frames, strict=True) if count]
        found: list[Tensor] = []
        if usable:
            batch = torch.nn.utils.rnn.pad_sequence(usable, batch_first=True).to(device)
            found = self.batch_emissions(batch, [len(row) for row in usable])
        rest = iter(found)
        return [next(rest) if count else torch.zeros(0, len(self.vocabulary.labels)) for count in frames]

    @torch.no_grad()
    def batch_emissions(self, audio: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """The same of a padded batch (B, S) that is normalised already, every row at least a frame long."""
        log_probs, frames = self.model.eval()(audio, lengths)
        return [row[:count].cpu() for row, count in zip(log_probs, frames, strict=True)]


def normalize_waveform(audio: Tensor) -> Tensor:
    """(..., S) with zero mean and unit variance over S, as in training."""
    mean, var = audio.mean(-1, keepdim=True), audio.var(-1, correction=0, keepdim=True)
    return (audio - mean) / torch.sqrt(var + 1e-5)


@dataclass
class Classifier:
    """What is needed to tell the class of an utterance."""

    model: Wav2Vec2ForClassification
    classes: ClassNames

    def __call__(self, audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> dict[str, float]:
        """Probability of each class of one recording, the most probable first; arguments as of :class:`Recognizer`."""
        (log_probs,) = self.log_probs([_samples(audio, rate)])
        order = log_probs.argsort(descending=True).tolist()
        return {self.classes.labels[i]: log_probs[i].exp().item() for i in order}

    @torch.no_grad()
    def log_probs(self, audio: Sequence[Tensor]) -> Tensor:
        """Log-probabilities (B, classes) on the host of waveforms as for ``Recognizer.emissions``.

        Raises:
            UsageError: audio that is shorter than a frame.
        """
        config, lengths = self.model.config, [len(row) for row in audio]
        if 0 in config.frames(lengths):
            raise UsageError(f"audio of {min(lengths)} samples is shorter than one frame: it has no class")
        rows = [normalize_waveform(row) if config.normalize_audio else row for row in audio]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(next(self.model.parameters()).device)
        log_probs: Tensor = self.model.eval()(batch, lengths)[0].cpu()
        return log_probs


def _samples(audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> Tensor:
    """(S,) float32 at 16 kHz."""
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1:
        raise UsageError(f"audio must be (samples,) of one channel, got {samples.shape}; take the mean of channels")
    if rate != SAMPLE_RATE:
        from w2v2.data.audio import resample

        samples = resample(samples, rate)
    return torch.from_numpy(samples)


def load(path: str | PathLike[str]) -> Recognizer | Classifier | Wav2Vec2:
    """Load a run folder, a folder of weights, or a checkpoint of another format that ``w2v2 convert`` reads.

    Returns:
        On the CPU, in evaluation mode: of a CTC model a ``Recognizer``, the model with its vocabulary; of a classifier
        a ``Classifier``, with its classes; of a pretraining run its model; of an encoder alone a ``Wav2Vec2``.

    Raises:
        UsageError: nothing there, something else, or weights that do not fit.
    """
    checkpoint = read(Path(path))
    model = checkpoint.build()
    if isinstance(model, Wav2Vec2ForClassification):
        assert checkpoint.classes is not None
        return Classifier(model, checkpoint.classes)
    if not isinstance(model, Wav2Vec2ForCTC):
        return model
    assert checkpoint.vocabulary is not None
    return Recognizer(model, checkpoint.vocabulary)


def load_recognizer(path: str | PathLike[str]) -> Recognizer:
    """Load a model as ``load`` does, if it is one that writes.

    Raises:
        UsageError: as ``load``, or a model without a CTC head.
    """
    recognizer = load(path)
    if not isinstance(recognizer, Recognizer):
        raise UsageError(
            f"{path} has no CTC head: expected a run of 'w2v2 finetune'; "
            "a pretrained encoder has to be fine-tuned first"
        )
    return recognizer


def place(model: nn.Module, device: str | None) -> None:
    """Move a model to a device; None: to a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UsageError(f"`device` {name} cannot be used: {reason}; expected cpu, or what is there") from None
