"""The CTC model: the encoder with an output layer (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from w2v2.model.packing import unpack
from w2v2.model.transformer import touch
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config


class Wav2Vec2ForCTC(Wav2Vec2):
    """The encoder with a linear layer over the vocabulary."""

    def __init__(self, config: Wav2Vec2Config, n_labels: int) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, n_labels)
        nn.init.xavier_uniform_(self.lm_head.weight)  # as fairseq
        nn.init.zeros_(self.lm_head.bias)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """All but the output layer's: what is frozen in the first updates of a fine-tuning."""
        return (p for name, p in self.named_parameters() if not name.startswith("lm_head."))

    def forward(
        self,
        audio: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        covered: Tensor | None = None,
        channels: Tensor | None = None,
        keep_layers: Sequence[bool] | None = None,
        freeze_encoder: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """Log-probabilities (B, T, labels) in fp32, and the frames of each utterance.

        Args:
            audio, lengths: as for the encoder.
            covered, channels, keep_layers: as for ``contextualize``, in training.
            freeze_encoder: whether only ``lm_head`` gets a gradient.
        """
        frames, packed = self.frame_lengths(audio, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
            features = self.feature_encoder(audio, lengths if packed else None)
            _, x = self.feature_projection(features, packed)
            x = self.contextualize(
                self.feature_projection.dropout(x),
                packed,
                covered=covered,
                channels=channels,
                keep_layers=keep_layers,
            )
        if freeze_encoder and self.training:
            x = touch(x, self.encoder_parameters())
        logits = self.lm_head(unpack(x, packed))
        return logits.float().log_softmax(-1), frames
