"""Attention of each utterance to its own frames, whatever their lengths, with dropout of its probabilities.

On a GPU one kernel serves utterances of unequal lengths. On a CPU torch's fused kernel has no dropout: with it torch
writes all probabilities to memory, thrice, and keeps them; here a few heads at a time stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2v2.model.packing import is_plain, starts_of, to_device

CHUNK = 2**20
"""Probabilities that are worked on at once, 4 MB."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int] | None, lengths: Sequence[int] | None, dropout: float
) -> Tensor:
    """Attention of each utterance's queries to its frames.

    Args:
        q, k, v: (B, T, H, D / H), or packed (1, sum of T, H, D / H) with the lengths.
        queries: lengths of q, when packed.
        lengths: of k and v, when packed.
        dropout: of the probabilities.

    Returns:
        As q.
    """
    if lengths is None and queries is not None:
        if min(queries) == max(queries):
            dense = attend(q.view(len(queries), -1, *q.shape[2:]), k, v, None, None, dropout)
            return dense.flatten(0, 1)[None]
        lengths = [k.shape[1]] * k.shape[0]
        k, v = k.flatten(0, 1)[None], v.flatten(0, 1)[None]
    if lengths is None:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, T, H, D / H) -> (B, H, T, D / H)
        if dropout and q.device.type == "cpu" and not is_plain():
            out: Tensor = _DroppedAttention.apply(q, k, v, dropout)
            return out.transpose(1, 2)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch's backward pass in bf16 takes twice the time
            attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout)
            return attended.transpose(1, 2).bfloat16()
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
    assert queries is not None
    if q.is_cuda and not is_plain():  # one kernel
        jagged = (_jagged(q, queries), _jagged(k, lengths), _jagged(v, lengths))
        return F.scaled_dot_product_attention(*jagged, dropout_p=dropout).transpose(1, 2).values()[None]
    parts = zip(q.split(list(queries), 1), k.split(list(lengths), 1), v.split(list(lengths), 1), strict=True)
    return torch.cat([attend(*part, None, None, dropout) for part in parts], dim=1)


def _jagged(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed (1, sum of T, H, D / H) -> nested (B, H, T, D / H)."""
    offsets = to_device(torch.tensor([*starts_of(lengths), sum(lengths)], dtype=torch.int32), x.device)
    nested = torch.nested.nested_tensor_from_jagged(
        x.squeeze(0), offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
    )
    return nested.transpose(1, 2)


class _DroppedAttention(torch.autograd.Function):
    """``scaled_dot_product_attention`` of (B, H, T, D / H) with dropout; probabilities are computed twice, not kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        # One of 2**16 numbers for each probability: four of them cost as much as one draw of a Bernoulli variable.
        share = max(round((1 - dropout) * 2**16), 1)
        shape, (queries, keys), scale = q.shape, (q.shape[2], k.shape[2]), q.shape[3] ** -0.5
        count = queries * keys * shape[0] * shape[1]
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=q.device).random_(-(2**63), None)
        keep = (bits.view(torch.int16)[:count] < share - 2**15).view(-1, queries, keys)
        q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = torch.empty_like(q)
        for part in _parts(keep):
            torch.bmm(_probabilities(q[part], k[part]).mul_(keep[part]), v[part], out=out[part])
        out *= 2**16 / share
        ctx.save_for_backward(q, k, v, out, keep)
        ctx.shape, ctx.scale, ctx.share = shape, scale, share
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, keep = ctx.saved_tensors
        grad = grads[0].flatten(0, 1)
        mean = (grad * out).sum(-1, keepdim=True)
        grad = grad * (2**16 / ctx.share)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(keep):
            probs = _probabilities(q[part], k[part])
            kept = probs * keep[part]
            torch.bmm(kept.mT, grad[part], out=grad_v[part])
            scores = torch.bmm(grad[part], v[part].mT).mul_(kept).addcmul_(probs, mean[part], value=-1.0)
            torch.bmm(scores, k[part], out=grad_q[part])
            torch.bmm(scores.mT, q[part], out=grad_k[part])
        grad_q *= ctx.scale
        rows = ctx.shape[:2]
        return grad_q.unflatten(0, rows), grad_k.unflatten(0, rows), grad_v.unflatten(0, rows), None


def _parts(keep: Tensor) -> list[slice]:
    n = max(CHUNK // keep[0].numel(), 1)
    return [slice(start, start + n) for start in range(0, len(keep), n)]


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.bmm(q, k.mT)
    return torch.softmax(scores, -1, out=scores)
