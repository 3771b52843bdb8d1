"""A classifier of whole utterances: a learned mix of layers, pooled over time (SUPERB, arXiv:2105.01051)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from w2v2.model.head import Wav2Vec2WithHead
from w2v2.model.wav2vec2 import Wav2Vec2Config

WIDTH = 256
"""Of the projection (transformers' ``classifier_proj_size``)."""


class LayerMix(nn.Module):
    """A learned mix of the states of all layers, which a head begins with.

    Args:
        n_layers: of states, blocks and one.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(n_layers))

    def mix(self, states: Sequence[Tensor]) -> Tensor:
        """The weighted sum, in the shape of each state."""
        weights = self.layer_weights.softmax(0)
        return torch.stack([weight * state for weight, state in zip(weights, states, strict=True)]).sum(0)


class ClassificationHead(LayerMix):
    """Mix of layers, projection, pooling, output layer.

    Args:
        n_layers: as of the mix.
        n_embd: the width of states.
        n_classes: to tell apart.
        attention: pool by weights that are learned from the frames (arXiv:2008.01077); else by their mean.
    """

    def __init__(self, n_layers: int, n_embd: int, n_classes: int, *, attention: bool = False) -> None:
        super().__init__(n_layers)
        self.projector = nn.Linear(n_embd, WIDTH)
        self.attention = nn.Linear(WIDTH, 1) if attention else None
        self.output = nn.Linear(WIDTH, n_classes)

    def forward(self, states: Sequence[Tensor], packed: list[int] | None) -> Tensor:
        """Logits (B, classes) of states (B, T, D), or packed (1, sum of T, D) with the frames of each utterance."""
        x = self.projector(self.mix(states))  # D -> WIDTH
        pooled = self._pool(x) if packed is None else torch.stack([self._pool(row) for row in x[0].split(packed)])
        return self.output(pooled)  # type: ignore[no-any-return]

    def _pool(self, x: Tensor) -> Tensor:
        """(..., T, WIDTH) -> (..., WIDTH)"""
        return x.mean(-2) if self.attention is None else (x * self.attention(x).softmax(-2)).sum(-2)


class Wav2Vec2ForClassification(Wav2Vec2WithHead):
    """The encoder with a head that tells classes of utterances apart: speakers, languages, emotions, keywords."""

    HEAD = "classifier"
    MIXES_LAYERS = True

    def __init__(self, config: Wav2Vec2Config, n_classes: int, *, attention: bool = False) -> None:
        super().__init__(config)
        self.classifier = ClassificationHead(config.n_layer + 1, config.n_embd, n_classes, attention=attention)

    def logits(self, x: Tensor, packed: list[int] | None, states: list[Tensor]) -> Tensor:
        """(B, classes)"""
        return self.classifier([*states, x], packed)  # type: ignore[no-any-return]
