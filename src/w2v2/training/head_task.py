"""What tasks that train a head on labels share: batches, masks, frozen encoders, rates by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2v2.data.batch import Batch
from w2v2.model.head import Wav2Vec2WithHead
from w2v2.model.lora import merged_state
from w2v2.model.masking import Draws
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.training.config import FinetuneConfig
from w2v2.training.task import NormalizedTask, unequal_lengths


@dataclass
class LabelledBatch:
    """A batch on the device, with what was drawn for it on the host."""

    audio: Tensor
    lengths: list[int] | None
    targets: Tensor
    target_lengths: Tensor
    texts: list[str | None]
    """Transcripts as they are."""
    draws: Draws | None = None
    """What is masked or left out; None: nothing, in validation."""


class HeadTask(NormalizedTask):
    """A head, and the encoder below it, on labels of utterances."""

    model: Wav2Vec2WithHead

    def __init__(self, model: Wav2Vec2WithHead, config: FinetuneConfig) -> None:
        super().__init__(config.optim, config.train.seed)
        self.model, self.config = model, config
        if config.model.mask_prob == 0:
            model.mask_vector.requires_grad_(False)

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether only the head learns in this step."""
        return self.global_step < self.config.freeze_encoder_steps

    def parameter_groups(self) -> list[dict[str, Any]]:
        """With ``layer_decay`` a group for each learning rate."""
        if self.config.layer_decay == 1.0:
            return super().parameter_groups()
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                share = rate_share(name, self.config.model, self.config.layer_decay, self.model.HEAD)
                groups.setdefault(share, []).append(parameter)
        return [{"params": group, "lr_scale": share} for share, group in groups.items()]

    def draw(self, batch: Batch, *, training: bool) -> Draws | None:
        """Masks, channels and layers in training; nothing in validation."""
        if not training:
            return None
        return self.model.draw(
            batch,
            self.step_key(batch),
            channel_mask_prob=self.config.channel_mask_prob,
            channel_mask_length=self.config.channel_mask_length,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> LabelledBatch | None:
        """Send everything along; None for a batch without utterances."""
        if self.is_empty(batch):
            return None
        assert batch.targets is not None and batch.target_lengths is not None
        draws = self.drawn(batch)
        return LabelledBatch(
            audio=batch.audio.to(device, non_blocking=True),
            lengths=unequal_lengths(batch),
            targets=batch.targets.to(device, non_blocking=True),
            target_lengths=batch.target_lengths,
            texts=batch.texts,
            draws=None if draws is None else draws.to(device),
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave a frozen encoder to itself, beside what every task does."""
        if self.encoder_is_frozen:
            for parameter in self.model.encoder_parameters():
                parameter.grad = None  # weight decay would follow a gradient of zero
        super().on_before_optimizer_step(optimizer)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The weights, low-rank updates added to them."""
        super().save(folder, merged_state(self.model, weights))


def rate_share(name: str, config: Wav2Vec2Config, decay: float, head: str = "lm_head") -> float:
    """Share of the learning rate of a parameter of a model with a head (BEiT's and fairseq's ``layer_decay``).

    Block i of n, counted from 0, has ``decay ** (n - i)``, all before the blocks ``decay ** (n + 1)``, the head and a
    norm after the blocks 1.
    """
    part, _, rest = name.partition(".")
    if part == head or (part == "ln_f" and config.norm_first):
        return 1.0
    below = int(rest.partition(".")[0]) if part == "transformer" else -1
    return float(decay ** (config.n_layer - below))
