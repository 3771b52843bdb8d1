"""A classifier of frames: a linear layer on a learned mix of layers (SUPERB, arXiv:2105.01051)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from w2v2.model.classifier import LayerMix
from w2v2.model.head import Wav2Vec2WithHead
from w2v2.model.packing import unpack
from w2v2.model.wav2vec2 import Wav2Vec2Config


class FrameHead(LayerMix):
    """Mix of layers, output layer."""

    def __init__(self, n_layers: int, n_embd: int, n_classes: int) -> None:
        super().__init__(n_layers)
        self.output = nn.Linear(n_embd, n_classes)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Logits (..., T, classes) of states (..., T, D)."""
        return self.output(self.mix(states))  # type: ignore[no-any-return]


class Wav2Vec2ForFrames(Wav2Vec2WithHead):
    """The encoder with a head that tells a class of each frame: phones, speech and noise, who speaks."""

    HEAD = "classifier"
    MIXES_LAYERS = True

    def __init__(self, config: Wav2Vec2Config, n_classes: int) -> None:
        super().__init__(config)
        self.classifier = FrameHead(config.n_layer + 1, config.n_embd, n_classes)

    def logits(self, x: Tensor, packed: list[int] | None, states: list[Tensor]) -> Tensor:
        """(B, T, classes)"""
        return unpack(self.classifier([*states, x]), packed)
