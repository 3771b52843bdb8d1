"""The context network: convolutional positions and transformer blocks (paper section 2).

Wherever utterances have unequal lengths their frames are *packed*: (1, sum of T, D) and the list of lengths. Only
attention and the positional convolution look across frames, so only they use the list; no work is done on padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from w2v2.model.attention import attend
from w2v2.model.packing import Rows, is_plain, pack, row_index, spread, starts_of, unpack
from w2v2.model.precision import low_precision


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

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None, rows: Rows | None = None) -> Tensor:
        """x (B, T, D), or packed (1, sum of T, D) with its lengths -> same shape; (1, N, D) if only rows are wanted."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if rows is None and x.dtype == torch.bfloat16 and not torch.is_autocast_enabled(x.device.type):
            # One product: the three weights are small beside the frames that would be read, and added up, thrice.
            weight, bias = (torch.cat([getattr(proj, name) for proj in projections]) for name in ("weight", "bias"))
            parts = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            parts = tuple(
                proj(t) for proj, t in zip(projections, (x if rows is None else take(x, rows), x, x), strict=True)
            )
        q, k, v = (part.unflatten(-1, (self.n_head, -1)) for part in parts)  # (B, T, D) -> (B, T, H, D / H)
        p = self.dropout.p if self.training else 0.0
        out: Tensor = self.out_proj(attend(q, k, v, lengths if rows is None else rows.counts, lengths, p).flatten(2))
        return out


def take(x: Tensor, rows: Rows) -> Tensor:
    """(B, T, D) or packed -> (1, N, D)."""
    return x.flatten(0, 1).index_select(0, rows.index)[None]


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
        self.adapter = Adapter(n_embd, adapter_dim) if adapter_dim else nn.Identity()

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None, rows: Rows | None = None) -> Tensor:
        """x (B, T, D), or packed with its lengths -> same shape; (1, N, D) if only rows are wanted."""
        modules = (self.attn, self.mlp, self.ln_1, self.ln_2, self.adapter)
        with low_precision(x, *modules) as (x, attn, mlp, ln_1, ln_2, adapter):
            asked: Tensor = x if rows is None else take(x, rows)
            if self.norm_first:
                asked = asked + self.dropout(attn(ln_1(x), lengths, rows))
                asked = asked + self.dropout(mlp(ln_2(asked)))
            else:
                asked = ln_1(asked + self.dropout(attn(x, lengths, rows)))
                asked = ln_2(asked + self.dropout(mlp(asked)))
            asked = adapter(asked)
        return asked

    def skip(self, x: Tensor) -> Tensor:
        """Identity, for a dropped layer."""
        return touch(x, self.parameters())
