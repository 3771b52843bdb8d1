"""The CTC model: the encoder with an output layer (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from w2v2.model.masking import (
    Draws,
    StepKey,
    Utterances,
    equalize_masks,
    keyed_generator,
    sample_channel_masks,
    sample_layers,
    utterance_generators,
)
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

    def draw(
        self, batch: Utterances, step_key: StepKey, *, channel_mask_prob: float = 0.0, channel_mask_length: int = 64
    ) -> Draws:
        """Draw masked frames, zeroed channels and layers for a training batch, on the host.

        Args:
            batch: by whose ids and epochs frames and channels are drawn.
            step_key: by which LayerDrop is.
            channel_mask_prob, channel_mask_length: as for ``sample_channel_masks``; 0: none.
        """
        config, rngs = self.config, utterance_generators(batch, step_key)
        draws = Draws(keep_layers=sample_layers(config.n_layer, config.layer_drop, step_key))
        if config.mask_prob > 0:
            masks = equalize_masks(config.sample_masks(batch.lengths.tolist(), rngs), rngs)
            draws.covered = torch.cat(masks).nonzero().flatten()
        if channel_mask_prob > 0:
            batch_rng = keyed_generator(step_key[0], batch.epochs[0], batch.ids[0], "channels")
            rows = sample_channel_masks(config.n_embd, channel_mask_prob, channel_mask_length, rngs, batch_rng)
            draws.channels = torch.stack(rows)
        return draws

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
        draws = draws or Draws()
        frames, packed = self.frame_lengths(audio, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
            features = self.feature_encoder(audio, lengths if packed else None)  # (B, T, C), or packed (1, sum of T, C)
            _, x = self.feature_projection(features, packed)  # C -> D
            x = self.contextualize(
                self.feature_projection.dropout(x),
                packed,
                covered=draws.covered,
                channels=draws.channels,
                keep_layers=draws.keep_layers,
            )
        if freeze_encoder and self.training:
            x = touch(x, self.encoder_parameters())
        logits = self.lm_head(unpack(x, packed))  # (B, T, D) -> (B, T, labels)
        return logits.float().log_softmax(-1), frames
