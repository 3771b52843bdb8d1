"""Product quantisation of the targets by Gumbel-softmax (paper section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class QuantizerOutput:
    """What a quantizer makes of (N, D_in) features; figures that it does not have stay None."""

    quantized: Tensor
    """(N, output_dim) float32: the chosen entries of all groups, concatenated."""
    codes: Tensor
    """(N, G) int64: the entry each group chose."""
    code_counts: Tensor | None = None
    """(G, V) float32: how often each entry is the noise-free choice."""
    probs_sum: Tensor | None = None
    """(G, V) float32, no gradient: noise-free probabilities summed over the frames; of a quantizer that has such."""
    prob_perplexity: Tensor | None = None
    """Scalar, with gradient: sum over groups of exp(entropy) of their mean, G to G * V. There is a diversity loss only
    with it."""


def perplexity(probs: Tensor) -> Tensor:
    """Sum over groups of exp(entropy), from (G, V) distributions; fp32."""
    return torch.exp((probs * torch.log(probs + 1e-7)).sum(-1).neg()).sum()


def gumbel_temperature(step: int, start: float, end: float, decay: float) -> float:
    """Temperature after ``step`` optimiser updates: ``max(start * decay**step, end)`` (fairseq ``latent_temp``)."""
    return max(start * decay**step, end)


class _StraightThroughLookup(torch.autograd.Function):
    """Looks the chosen entries up; backward is that of ``one_hot @ codebook`` with the gradient of the soft choice."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codebook, codes)
        group = torch.arange(codebook.shape[0], device=codes.device)
        return codebook[group, codes]  # (G, V, D), (N, G) -> (N, G, D)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        codebook, codes = ctx.saved_tensors
        grad_soft = torch.einsum("ngd,gvd->ngv", grad, codebook)
        groups, entries, dim = codebook.shape
        flat = codes + entries * torch.arange(groups, device=codes.device)
        grad_codebook = codebook.new_zeros(groups * entries, dim).index_add_(0, flat.flatten(), grad.flatten(0, 1))
        return grad_soft, grad_codebook.view_as(codebook), None


class GumbelVectorQuantizer(nn.Module):
    """G codebooks of V entries each, one entry of each chosen per frame.

    Args:
        input_dim: width of the features.
        n_groups, n_entries: G and V (fairseq ``latent_groups``, ``latent_vars``).
        codebook_dim: width of one entry (fairseq: ``latent_dim / latent_groups``).
    """

    def __init__(self, input_dim: int, n_groups: int, n_entries: int, codebook_dim: int) -> None:
        super().__init__()
        self.n_groups, self.n_entries = n_groups, n_entries
        self.output_dim = n_groups * codebook_dim
        self.projector = nn.Linear(input_dim, n_groups * n_entries)
        self.codebook = nn.Parameter(torch.empty(n_groups, n_entries, codebook_dim))

    def forward(self, x: Tensor, temperature: float) -> QuantizerOutput:
        """Quantise (N, input_dim) features; in training with Gumbel noise, else by the largest logit. All in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            # The projector takes part: choices between 320 near-equal logits need more than bf16's eight bits.
            logits = F.linear(x.float(), self.projector.weight.float(), self.projector.bias.float())
            logits = logits.unflatten(-1, (self.n_groups, self.n_entries))  # (N, G, V)
            probs = logits.softmax(-1)
            best = logits.argmax(-1)
            if self.training:
                noise = torch.empty_like(logits).exponential_().log()  # minus a Gumbel variable
                soft = ((logits - noise) / temperature).softmax(-1)
                codes = soft.argmax(-1)
            else:
                soft, codes = probs.detach(), best
            quantized = _StraightThroughLookup.apply(soft, self.codebook.float(), codes)
            probs_sum = probs.sum(0)  # (N, G, V) -> (G, V)
            counts = torch.zeros_like(probs_sum).scatter_add_(
                1, best.t(), torch.ones_like(best.t(), dtype=probs_sum.dtype)
            )
            return QuantizerOutput(
                quantized=quantized.flatten(1),
                codes=codes,
                code_counts=counts,
                probs_sum=probs_sum.detach(),
                prob_perplexity=perplexity(probs_sum / len(x)),
            )
