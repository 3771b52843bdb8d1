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
    """An encoder with one further module, ``HEAD``, whose ``forward`` gives log-probabilities of labels."""

    HEAD: ClassVar[str]

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

    def context(
        self,
        audio: Tensor,
        lengths: Sequence[int] | None,
        draws: Draws | None,
        *,
        freeze_encoder: bool,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[int], list[int] | None]:
        """Frames of the encoder, (B, T, D) or packed (1, sum of T, D); how many of each utterance; the same if packed.

        Args:
            audio, lengths: as for the encoder.
            draws: what is masked or left out, in training.
            freeze_encoder: whether nothing here gets a gradient.
            states: gets what each block is given appended, as the frames are.
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
                inputs=states,
            )
        if freeze_encoder and self.training:
            x = touch(x, self.encoder_parameters())
        return x, frames, packed
