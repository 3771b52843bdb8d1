"""The CTC model: the encoder with an output layer (paper section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from w2v2.model.head import Wav2Vec2WithHead
from w2v2.model.packing import unpack
from w2v2.model.wav2vec2 import Wav2Vec2Config


class Wav2Vec2ForCTC(Wav2Vec2WithHead):
    """The encoder with a linear layer over the vocabulary."""

    HEAD = "lm_head"

    def __init__(self, config: Wav2Vec2Config, n_labels: int) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, n_labels)
        nn.init.xavier_uniform_(self.lm_head.weight)  # as fairseq
        nn.init.zeros_(self.lm_head.bias)

    def logits(self, x: Tensor, packed: list[int] | None, states: list[Tensor]) -> Tensor:
        """(B, T, labels)"""
        return self.lm_head(unpack(x, packed))  # type: ignore[no-any-return]
