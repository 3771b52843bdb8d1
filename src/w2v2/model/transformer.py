"""The context network: convolutional positions and transformer blocks (paper section 2).

Wherever utterances have unequal lengths their frames are *packed*: (1, sum of T, D) and the list of lengths. Only
attention and the positional convolution look across frames, so only they use the list; no work is done on padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from w2v2.model.attention import attend
from w2v2.model.packing import Rows, is_plain, pack, row_index, spread, starts_of, unpack
from w2v2.model.precision import Methods, low_precision
from w2v2.model.wide_conv import wide_conv


def touch(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """x, with a gradient of zero for parameters that had no part in it.

    So the set of parameters with a gradient never changes, and DDP needs no search for unused ones.
    """
    touched: Tensor = torch.stack([p.reshape(-1)[0] for p in parameters if p.requires_grad]).sum()
    out: Tensor = x + 0.0 * touched.to(x.dtype)
    return out


class PositionalConvEmbedding(nn.Module):
    """Relative positions from a wide grouped convolution over the frames (fairseq ``pos_conv``).

    Weight-normed with one gain per kernel tap (``dim=2``). An even kernel makes one frame too many: the last one goes.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        # Before weight_norm: afterwards the weight is recomputed from its parts, and setting it has no effect.
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * width)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv, dim=2)
        self.trim = 1 - kernel % 2

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """x (B, T, D), or packed with its lengths -> positions, same shape. They are to be added to x."""
        fast = not is_plain() and x.device.type == "cpu" and torch.is_grad_enabled()
        if fast and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            y = wide_conv(x.flatten(0, 1), self.conv.weight, lengths or [x.shape[1]] * x.shape[0])
            return F.gelu(y + self.conv.bias).view_as(x)
        if lengths is None or is_plain():
            y = self.conv(unpack(x, lengths).transpose(1, 2))  # (B, D, T + trim)
            y = F.gelu(y[..., : y.shape[-1] - self.trim])
            return pack(y.transpose(1, 2), lengths)
        # One convolution over all utterances, with as many zeros between them as it pads: its own padding is the last.
        pad = self.conv.padding[0]
        index = row_index(starts_of(n + pad for n in lengths), lengths, x.device)
        y = self.conv(
            spread(x.squeeze(0), index, sum(lengths) + pad * (len(lengths) - 1)).t()[None]
        )  # (1, D, rows + trim)
        return F.gelu(y.squeeze(0).t().index_select(0, index))[None]


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention through ``scaled_dot_product_attention``."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd)
        self.k_proj = nn.Linear(n_embd, n_embd)
        self.v_proj = nn.Linear(n_embd, n_embd)
        self.out_proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)  # on the attention probabilities; read by the fused kernel

    def project(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) frames -> queries, of all or of those at the index, keys and values: (N, H, D / H)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if index is None and x.dtype == torch.bfloat16 and not torch.is_autocast_enabled(x.device.type):
            # One product: the three weights are small beside the frames that would be read, and added up, thrice.
            weight, bias = (torch.cat([getattr(proj, name) for proj in projections]) for name in ("weight", "bias"))
            q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            asked = x if index is None else x.index_select(0, index)
            q, k, v = self.q_proj(asked), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)) for part in (q, k, v))
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None, rows: Rows | None = None
    ) -> Tensor:
        """What is projected, as (B, T, H, D / H) or packed -> (B, T, D) or packed, before the output projection."""
        p = self.dropout.p if self.training else 0.0
        return attend(q, k, v, lengths if rows is None else rows.counts, lengths, p).flatten(2)


def take(x: Tensor, rows: Rows) -> Tensor:
    """(B, T, D) or packed -> (1, N, D)."""
    return x.flatten(0, 1).index_select(0, rows.index)[None]


def _frames(x: Tensor) -> Tensor:
    """(B, T, D) -> (N, D), for autograd no view: ``torch.compile`` makes a graph for each kind of them."""
    frames: Tensor = torch.ops.aten._unsafe_view(x.contiguous(), (x.shape[0] * x.shape[1], x.shape[2]))
    return frames


class MLP(nn.Module):
    """Position-wise feed-forward network."""

    def __init__(self, n_embd: int, ffn_dim: int, activation_dropout: float) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(n_embd, ffn_dim)
        self.gelu = nn.GELU()
        self.dropout = nn.Dropout(activation_dropout)
        self.fc_2 = nn.Linear(ffn_dim, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.fc_2(self.dropout(self.gelu(self.fc_1(x))))
        return out


class Adapter(nn.Module):
    """A narrow MLP with a residual, which is all that a language has of its own in MMS (arXiv:2305.13516)."""

    def __init__(self, n_embd: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_embd)
        self.linear_1, self.linear_2 = nn.Linear(n_embd, width), nn.Linear(width, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = x + self.linear_2(F.relu(self.linear_1(self.norm(x))))
        return out


class TransformerBlock(nn.Module):
    """Attention and MLP, each with one residual dropout; norms before (``norm_first``) or after; perhaps an adapter."""

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        ffn_dim: int,
        *,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        norm_first: bool,
        adapter_dim: int = 0,
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(n_embd, n_head, attention_dropout)
        self.mlp = MLP(n_embd, ffn_dim, activation_dropout)
        self.ln_1 = nn.LayerNorm(n_embd)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(dropout)
        self.norm_first = norm_first
        self.adapter = Adapter(n_embd, adapter_dim) if adapter_dim else None
        self.methods = (Methods(self),)  # no child of its own child

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None, rows: Rows | None = None) -> Tensor:
        """x (B, T, D), or packed with its lengths -> same shape; (1, N, D) if only rows are wanted."""
        with low_precision(x, *self.methods) as (x, call):
            q, k, v = call("project", _frames(x), None if rows is None else rows.index)
            asked: Tensor = x if rows is None else take(x, rows)
            q, k, v = q.unflatten(0, asked.shape[:2]), k.unflatten(0, x.shape[:2]), v.unflatten(0, x.shape[:2])
            attended = self.attn.attend(q, k, v, lengths, rows)
            return cast(Tensor, call("finish", _frames(asked), _frames(attended)).view_as(asked))

    def project(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention, of all utterances' frames (N, D); as :meth:`SelfAttention.project`."""
        return self.attn.project(self.ln_1(x) if self.norm_first else x, index)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes after it, (N, D) each -> (N, D)."""
        if self.norm_first:
            x = x + self.dropout(self.attn.out_proj(attended))
            x = x + self.dropout(self.mlp(self.ln_2(x)))
        else:
            x = self.ln_1(x + self.dropout(self.attn.out_proj(attended)))
            x = self.ln_2(x + self.dropout(self.mlp(x)))
        return x if self.adapter is None else cast(Tensor, self.adapter(x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` what is around attention, which is a kernel of its own: no graph depends on utterances."""
        self.project = torch.compile(self.project, *args, **kwargs)  # type: ignore[method-assign]
        self.finish = torch.compile(self.finish, *args, **kwargs)  # type: ignore[method-assign]

    def skip(self, x: Tensor) -> Tensor:
        """Identity, for a dropped layer."""
        return touch(x, self.parameters())
