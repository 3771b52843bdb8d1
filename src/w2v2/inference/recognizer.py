"""A CTC model with its vocabulary: audio to log-probabilities of labels. Needs neither Lightning nor lhotse."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from w2v2.checkpoint.formats import file_hashes, onnx_file, read, recognize
from w2v2.checkpoint.hub import locate
from w2v2.checkpoint.native import WEIGHTS
from w2v2.decoding.greedy import Greedy
from w2v2.errors import UsageError
from w2v2.inference.onnx import OnnxModel, load_onnx
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.frame_classifier import Wav2Vec2ForFrames
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2, Wav2Vec2Config
from w2v2.text.classes import ClassNames
from w2v2.text.vocabulary import Vocabulary

NOT_FINITE = "the model's output is not finite: is the recording far beyond full scale?"
"""Said of a recording; a model that has diverged does this to every one."""


class CTCModel(Protocol):
    """What gives log-probabilities of labels: a ``Wav2Vec2ForCTC``, or an ``OnnxModel`` that was exported from one."""

    @property
    def config(self) -> Wav2Vec2Config:
        """The shape of it, and whether it is to be given normalised audio."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def eval(self) -> Self:
        """Itself, in evaluation mode."""

    def __call__(self, audio: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Padded audio (B, S) on its device -> (B, T, labels) float32, and the frames of each row."""


@dataclass
class Recognizer:
    """What is needed to turn audio into text."""

    model: CTCModel
    vocabulary: Vocabulary

    def __call__(self, audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> str:
        """Text of one recording in one piece, greedily decoded; ``transcribe.py`` is for long ones.

        Args:
            audio: (S,) samples of one channel.
            rate: of the samples, Hz; resampled to 16 kHz if it is another.
        """
        return Greedy(self.vocabulary)(self.emissions([resampled(audio, rate)])[0]).text

    @torch.no_grad()
    def emissions(self, audio: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities of waveforms, together in one batch; the same as of each alone.

        Args:
            audio: (S,) float32 each, 16 kHz, as decoded: normalised here, if the model wants that.

        Returns:
            (T, labels) float32 on the host for each; T is 0 where there is less audio than a frame needs.
        """
        return _emissions(self.model, len(self.vocabulary.labels), audio)


def _emissions(model: CTCModel, n_labels: int, audio: Sequence[Tensor]) -> list[Tensor]:
    config, emissions = model.config, [torch.zeros(0, n_labels)] * len(audio)
    places = [i for i, count in enumerate(config.frames([len(row) for row in audio])) if count]
    if places:
        rows = [config.normalized(audio[i]) for i in places]
        batch = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        log_probs, frames = model.eval()(batch, [len(row) for row in rows])
        for i, row, count in zip(places, log_probs, frames, strict=True):
            emissions[i] = row[:count].cpu()
    return emissions


def resampled(audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> Tensor:
    """(S,) samples of one channel -> (S,) float32 at 16 kHz."""
    samples = np.asarray(audio)
    if samples.dtype.kind != "f":
        raise UsageError(f"audio must be floating-point, full scale 1, got {samples.dtype}; divide int16 by 32768")
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim != 1:
        raise UsageError(f"audio must be (samples,) of one channel, got {samples.shape}; take the mean of channels")
    if rate != SAMPLE_RATE:
        from w2v2.data.audio import resample

        samples = resample(samples, rate)
    return torch.from_numpy(samples)


@dataclass
class Classifier:
    """What is needed to tell the class of an utterance."""

    model: Wav2Vec2ForClassification
    classes: ClassNames

    def __call__(self, audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> dict[str, float]:
        """Probability of each class of one recording, the most probable first; arguments as of :class:`Recognizer`."""
        (log_probs,) = self.log_probs([resampled(audio, rate)])
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
        rows = [config.normalized(row) for row in audio]
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.model.device)
        log_probs: Tensor = self.model.eval()(batch, lengths)[0].cpu()
        return log_probs


@dataclass
class FrameClassifier:
    """What is needed to tell the class of each frame."""

    model: Wav2Vec2ForFrames
    classes: ClassNames

    def __call__(self, audio: npt.NDArray[np.floating[Any]] | Tensor, rate: int) -> list[tuple[str, float, float]]:
        """The most probable class of each stretch of one recording, its start and end in seconds.

        Arguments are as of :class:`Recognizer`.
        """
        best = self.emissions([resampled(audio, rate)])[0].argmax(-1)
        runs, lengths = best.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0).tolist()
        middle, half = self.model.config.frame_seconds, math.prod(self.model.config.conv_strides) / SAMPLE_RATE / 2
        return [
            (self.classes.labels[number], max(middle(end - length) - half, 0.0), middle(end - 1) + half)
            for number, length, end in zip(runs.tolist(), lengths.tolist(), ends, strict=True)
        ]

    @torch.no_grad()
    def emissions(self, audio: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities (T, classes) of each waveform, as ``Recognizer.emissions``."""
        return _emissions(self.model, len(self.classes.labels), audio)


def network_of(loaded: Recognizer | Classifier | FrameClassifier | Wav2Vec2 | OnnxModel) -> CTCModel | nn.Module:
    """The model in what ``load`` returns."""
    return loaded if isinstance(loaded, Wav2Vec2 | OnnxModel) else loaded.model


def load(
    name: str | PathLike[str], language: str | None = None
) -> Recognizer | Classifier | FrameClassifier | Wav2Vec2 | OnnxModel:
    """Load a model by name.

    Args:
        name: anything that ``locate`` finds: what ``formats.read`` reads, or an exported ONNX model.
        language: as for ``formats.read``.

    Returns:
        On the CPU, in evaluation mode: of a CTC model a ``Recognizer``, the model with its vocabulary; of a classifier
        a ``Classifier``, of frames a ``FrameClassifier``, with its classes; of a pretraining run its model; of an
        encoder alone a ``Wav2Vec2``, of an exported one an ``OnnxModel``.

    Raises:
        UsageError: nothing there, something else, or weights that do not fit.
    """
    path = locate(name, language)
    if graph := onnx_file(path):
        if language is not None:
            raise UsageError(f"{name} is an export of one model; leave `language` out")
        model, vocabulary = load_onnx(graph)
        return model if vocabulary is None else Recognizer(model, vocabulary)
    checkpoint = read(path, language)
    network = checkpoint.build()
    if isinstance(network, Wav2Vec2ForClassification | Wav2Vec2ForFrames):
        assert checkpoint.classes is not None
        if isinstance(network, Wav2Vec2ForFrames):
            return FrameClassifier(network, checkpoint.classes)
        return Classifier(network, checkpoint.classes)
    if not isinstance(network, Wav2Vec2ForCTC):
        return network
    assert checkpoint.vocabulary is not None
    return Recognizer(network, checkpoint.vocabulary)


def load_recognizer(name: str | PathLike[str], language: str | None = None) -> Recognizer:
    """Load a model as ``load`` does, if it is one that writes.

    Raises:
        UsageError: as ``load``, or a model without a CTC head.
    """
    recognizer = load(name, language)
    if not isinstance(recognizer, Recognizer):
        raise UsageError(
            f"{name} has no CTC head: expected a run of 'w2v2 finetune'; "
            "a pretrained encoder has to be fine-tuned first"
        )
    return recognizer


def weights_key(name: str | PathLike[str], language: str | None = None) -> str:
    """Return a hash of the weights of a model, as ``load`` finds it; :class:`UsageError` where there are none."""
    path = locate(name, language)
    if (path / WEIGHTS).is_file() and language is None:
        with (path / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    hashes = file_hashes(onnx_file(path) or recognize(path)[1])
    return hashlib.sha256(f"{hashes} {language}".encode()).hexdigest()


def place(model: CTCModel | nn.Module, device: str | None) -> None:
    """Move a model to a device; None: to a GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if isinstance(model, OnnxModel):
        if device not in (None, "cpu"):
            raise UsageError(f"`device` {device} cannot be used by an ONNX model; expected cpu")
        return
    assert isinstance(model, nn.Module)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UsageError(f"`device` {name} cannot be used: {reason}; expected cpu, or what is there") from None
