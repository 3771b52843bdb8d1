"""An auxiliary regression beside the contrast: every frame tells what lies around it, masked or not.

Not in the paper. In a short run the context network learns little at masked frames, and nothing asks it to carry more
at the others than their own content; a target wider than the frame does, at each of them. Figures: LOG.md, "A start
that hears".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.model.packing import to_device


class Neighbourhood(nn.Module):
    """Predicts the whitened principal components of the conv features of the frames around each.

    Args:
        channels: of the features, C.
        width: of the context, D.
        frames: whose features are one target, odd; the frame itself is the middle one.
        components: that are kept, P.
    """

    basis: Tensor
    """(frames C, P) principal directions over their deviations; zeros until ``fit``."""
    mean: Tensor

    def __init__(self, channels: int, width: int, frames: int, components: int) -> None:
        super().__init__()
        self.frames = frames
        self.head = nn.Linear(width, components)
        self.register_buffer("mean", torch.zeros(frames * channels))
        self.register_buffer("basis", torch.zeros(frames * channels, components))

    def stack(self, features: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """(B, T, C) or packed -> (all frames, frames C); beyond an utterance its first or last frame is repeated."""
        rows = [features] if lengths is None else features.split(list(lengths), dim=1)
        beside = self.frames // 2
        padded = [F.pad(row.transpose(1, 2), (beside, beside), mode="replicate") for row in rows]
        return torch.cat([row.unfold(2, self.frames, 1).permute(0, 2, 3, 1).flatten(0, 1).flatten(1) for row in padded])

    @torch.no_grad()
    def fit(self, stacks: Tensor) -> None:
        """Take mean, directions and deviations from (N, frames C) stacks; where they are fewer, zeros fill up."""
        self.mean.copy_(stacks.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(stacks.double().T))
        kept = slice(-self.basis.shape[1], None)
        scale = values[kept].clamp(min=1e-6 * float(values[-1])).rsqrt()
        self.basis[:, : len(scale)] = (vectors[:, kept] * scale).flip(1).float()

    def forward(
        self,
        context: Tensor,
        features: Tensor,
        covered: Tensor,
        frames: Sequence[int],
        counts: Sequence[int],
        packed: Sequence[int] | None,
    ) -> Tensor:
        """Squared error, mean over components, summed over masked frames; of an utterance's others as much again.

        Args:
            context: (B, T, D), or packed.
            features: (B, T, C) normalised, or packed; no gradient flows into them.
            covered: (N,) masked frames among all.
            frames, counts: frames and masked frames of each utterance.
            packed: ``frames``, where the utterances are packed.
        """
        with torch.autocast(context.device.type, enabled=False):
            target = (self.stack(features.detach().float(), packed) - self.mean.float()) @ self.basis.float()
        error = (self.head(context).flatten(0, 1).float() - target).square().mean(1)
        ratios = [count / (n - count) for n, count in zip(frames, counts, strict=True)]
        seen = torch.tensor(ratios, dtype=torch.float32).repeat_interleave(torch.tensor(frames))
        weights = to_device(seen, error.device).index_fill(0, covered, 1.0)
        total: Tensor = error @ weights
        return total
