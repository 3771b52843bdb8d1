"""The wide grouped convolution over frames as products of a few taps at a time, for training on a CPU.

Torch's own runs there at a quarter of the speed of products, and computes what lies between utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = 4
"""That are laid side by side for one product: of more, the copies take longer than the products gain."""


class _WideConv(torch.autograd.Function):
    """(packed frames (N, D), weight (D, C, K), lengths) -> (N, D); each frame sees K // 2 before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.lengths = lengths
        taps, before = _by_taps(weight), weight.shape[2] // 2
        return torch.cat([_correlate(part, taps, before) for part in x.split(list(lengths))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        taps, before = _by_taps(weight), weight.shape[2] // 2
        groups, blocks, _, width = taps.shape
        turned = taps.unflatten(2, (TAPS, -1)).flatten(1, 2).flip(1).mT  # (G, K, C', C), the last tap first
        turned = turned.reshape(groups, blocks, TAPS * width, -1)
        parts = [(part, grad) for part, grad in zip(x.split(ctx.lengths), grads[0].split(ctx.lengths), strict=True)]
        grad_x = torch.cat([_correlate(grad, turned, blocks * TAPS - 1 - before) for _, grad in parts])
        grad_taps = torch.zeros_like(taps)
        for part, grad in parts:
            windows, rows = _windows(part, taps, before), _grouped(grad, groups)
            for i in range(blocks):
                grad_taps[:, i].baddbmm_(windows[:, i * TAPS :][:, : len(part)].mT, rows)
        by_tap = grad_taps.unflatten(2, (TAPS, -1)).flatten(1, 2)[:, : weight.shape[2]]  # (G, K, C, C')
        return grad_x, by_tap.permute(0, 3, 2, 1).reshape(weight.shape), None


def wide_conv(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """``F.conv1d`` of each utterance on its own, with as many frames out as in.

    Args:
        x: (N, D) float32, utterances laid end to end.
        weight: (D, C, K) for D / C groups.
        lengths: frames of each utterance.

    Returns:
        (N, D): frame t of what sees K // 2 frames before it and K - 1 - K // 2 after it, zeros beyond the ends.
    """
    out: Tensor = _WideConv.apply(x, weight, list(lengths))
    return out


def _by_taps(weight: Tensor) -> Tensor:
    """(D, C, K) -> (G, K / TAPS, TAPS * C, C'), filled up by taps of zero."""
    width = weight.shape[1]
    taps = F.pad(weight, (0, -weight.shape[2] % TAPS)).unflatten(0, (-1, width)).permute(0, 3, 2, 1)  # (G, K, C, C')
    filled: Tensor = taps.reshape(len(taps), -1, TAPS * width, width)
    return filled


def _grouped(x: Tensor, groups: int) -> Tensor:
    grouped: Tensor = x.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()  # (N, D) -> (G, N, C)
    return grouped


def _windows(x: Tensor, taps: Tensor, before: int) -> Tensor:
    """(N, D) -> (G, N + K - TAPS, TAPS * C): TAPS frames side by side, from each frame on."""
    groups, blocks, _, width = taps.shape
    rows = F.pad(_grouped(x, groups), (0, 0, before, blocks * TAPS - 1 - before))
    count = rows.shape[1]
    return rows.as_strided((groups, count - TAPS + 1, TAPS * width), (count * width, width, 1)).contiguous()


def _correlate(x: Tensor, taps: Tensor, before: int) -> Tensor:
    windows = _windows(x, taps, before)
    out = x.new_zeros(len(taps), len(x), taps.shape[3])
    for i in range(taps.shape[1]):
        out.baddbmm_(windows[:, i * TAPS :][:, : len(x)], taps[:, i])
    return out.transpose(0, 1).flatten(1)
