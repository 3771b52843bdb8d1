"""The encoder under a head that is trained on labels: what is masked and left out, and what may stay frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

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
from w2v2.model.transformer import touch
from w2v2.model.wav2vec2 import Wav2Vec2


class Wav2Vec2WithHead(Wav2Vec2):
    """An encoder with one further module, ``HEAD``, that gives logits of labels."""

    HEAD: ClassVar[str]
    MIXES_LAYERS: ClassVar[bool] = False
    """Whether the head is given the states of all layers."""

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """All but the head's: what is frozen in the first updates of a fine-tuning."""
        return (p for name, p in self.named_parameters() if not name.startswith(f"{self.HEAD}."))

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

    def logits(self, x: Tensor, packed: list[int] | None, states: list[Tensor]) -> Tensor:
        """What the head makes of the encoder's frames.

        Args:
            x: (B, T, D), or (1, sum of T, D) with the frames of each utterance in ``packed``.
            states: what each block was given, in the shape of x, if the head ``MIXES_LAYERS``.
        """
        raise NotImplementedError

    def forward(
        self,
        audio: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        draws: Draws | None = None,
        freeze_encoder: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """Log-probabilities (B, ..., labels) in fp32, and the frames of each utterance.

        Args:
            audio, lengths: as for the encoder.
            draws: what is masked or left out, in training.
            freeze_encoder: whether only the head gets a gradient.
        """
        draws = draws or Draws()
        states: list[Tensor] = []
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
                inputs=states if self.MIXES_LAYERS else None,
            )
        if freeze_encoder and self.training:
            x = touch(x, self.encoder_parameters())
        return self.logits(x, packed, states).float().log_softmax(-1), frames
