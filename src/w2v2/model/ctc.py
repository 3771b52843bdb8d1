"""The CTC model: the encoder with an output layer (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from w2v2.model.head import Wav2Vec2WithHead
from w2v2.model.masking import Draws
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

    def forward(
        self,
        audio: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        draws: Draws | None = None,
        freeze_encoder: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """Log-probabilities (B, T, labels) in fp32, and the frames of each utterance.

        Args:
            audio, lengths: as for the encoder.
            draws: what is masked or left out, in training.
            freeze_encoder: whether only ``lm_head`` gets a gradient.
        """
        x, frames, packed = self.context(audio, lengths, draws, freeze_encoder=freeze_encoder)
        logits = self.lm_head(unpack(x, packed))  # (B, T, D) -> (B, T, labels)
        return logits.float().log_softmax(-1), frames
