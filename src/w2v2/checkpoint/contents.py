"""A model as it lies on disk, whatever the format: configuration, tensors by our names, vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from w2v2.errors import UsageError
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.frame_classifier import Wav2Vec2ForFrames
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config

if TYPE_CHECKING:
    from w2v2.text.classes import ClassNames
    from w2v2.text.vocabulary import Vocabulary


@dataclass(kw_only=True)
class Checkpoint:
    """A whole model, with all that other formats keep beside it."""

    source: Path
    """Folder or file that it was read from."""
    config: Wav2Vec2Config
    state: dict[str, Tensor]
    """Tensors by our names, on the host; floats are float32."""
    vocabulary: Vocabulary | None = None
    """Of a CTC model, and only of one."""
    classes: ClassNames | None = None
    """Of a classifier, and only of one."""
    channel_mask_prob: float = 0.0
    channel_mask_length: int = 64
    """Of fine-tuning, as in ``FinetuneConfig``: other formats keep them with the model."""
    notes: list[str] = field(default_factory=list)
    """What the file left open and how it was settled."""

    @property
    def names(self) -> Vocabulary | ClassNames | None:
        """Of the model's outputs; None: it has no labels."""
        return self.vocabulary or self.classes

    @cached_property
    def kind(self) -> type[Wav2Vec2]:
        """The class of the model: encoder, CTC, or whatever the configuration builds for pretraining."""
        return type(self._blank())

    def build(self) -> Wav2Vec2:
        """Return the model, in evaluation mode; it shares the tensors."""
        model = self._blank()
        model.load_state_dict(self.state, assign=True)
        return model.eval()

    def fill(self, model: nn.Module) -> None:
        """Copy all tensors into a model that has the same ones.

        Raises:
            UsageError: tensors missing, left over or of another shape; all are listed.
        """
        check_fit(self.state, model.state_dict(), self.source)
        model.load_state_dict(self.state)

    def fill_encoder(self, model: Wav2Vec2) -> None:
        """Copy the encoder's tensors into a model; heads on either side are left out, nothing else is.

        Raises:
            UsageError: as ``fill``, of the encoder.
        """
        heads = head_names(self.config, self.state), head_names(model.config, model.state_dict())
        state = {name: tensor for name, tensor in self.state.items() if _part(name) not in heads[0]}
        check_fit(state, {n: t for n, t in model.state_dict().items() if _part(n) not in heads[1]}, self.source)
        model.load_state_dict(state, strict=False)

    def _blank(self) -> Wav2Vec2:
        return blank_model(self.config, self.state, len(self.names.labels) if self.names else 0)


def check_config(config: Wav2Vec2Config, where: Path) -> None:
    """Refuse a configuration that no model can have; :class:`UsageError` names the file and the field."""
    try:
        config.check()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def blank_model(config: Wav2Vec2Config, names: Collection[str], n_labels: int = 0) -> Wav2Vec2:
    """Return the model that tensors of these names belong to, for its shapes.

    With ``lm_head`` it is a CTC model, with ``classifier`` one, of frames if it projects nothing; without heads the
    encoder; else what the checked configuration builds.
    """
    heads = head_names(config, names)
    with _without_memory(config):
        if "lm_head" in heads:
            return Wav2Vec2ForCTC(config, n_labels)
        if "classifier" in heads:
            if "classifier.projector.weight" not in names:
                return Wav2Vec2ForFrames(config, n_labels)
            attention = "classifier.attention.weight" in names
            return Wav2Vec2ForClassification(config, n_labels, attention=attention)
        return config.build() if heads else Wav2Vec2(config)


def head_names(config: Wav2Vec2Config, names: Iterable[str]) -> set[str]:
    """Return the modules, of those which tensors of these names are in, that are not the encoder's."""
    with _without_memory(config):
        encoder = Wav2Vec2(config)
    return {_part(name) for name in names} - {_part(name) for name in encoder.state_dict()}


def _part(name: str) -> str:
    return name.partition(".")[0]


def _without_memory(config: Wav2Vec2Config) -> torch.device:
    # A user's modules may compute tensors that no file holds, and for them need memory.
    return torch.device("meta" if type(config) in (Wav2Vec2Config, ContrastiveConfig) else "cpu")


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path) -> None:
    """Refuse tensors that are not, by name and shape, exactly those of a model.

    Raises:
        UsageError: some missing, left over or of another shape; all are listed.
    """
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in expected]
    faults += [
        f"{name} has {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        rest = f"; and {len(faults) - 100} more" if len(faults) > 100 else ""
        raise UsageError(f"{where} does not fit the model: {'; '.join(faults[:100])}{rest}")


def check_finite(state: Mapping[str, Tensor], where: Path) -> None:
    """Refuse tensors with NaN or infinite values; :class:`UsageError` lists all."""
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UsageError(f"{where} has NaN or infinite weights: {', '.join(bad)}; use another checkpoint")
