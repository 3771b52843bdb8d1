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


def unpack(x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(1, sum of T, D) packed frames -> (B, T, D) padded with zeros; unchanged when ``lengths`` is None."""
    if lengths is None:
        return x
    return nn.utils.rnn.pad_sequence(list(x[0].split(list(lengths))), batch_first=True)


def pack(x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(B, T, D) padded -> (1, sum of T, D) packed; unchanged when ``lengths`` is None."""
    if lengths is None:
        return x
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])[None]


def repeat_rows(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, D), a row per utterance -> (sum of T, D), a row per frame."""
    return torch.cat([row.expand(n, -1) for row, n in zip(x, lengths, strict=True)])


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
        y = self.conv(unpack(x, lengths).transpose(1, 2))  # (B, D, T + trim)
        y = F.gelu(y[..., : y.shape[-1] - self.trim])
        return pack(y.transpose(1, 2), lengths)


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

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """x (B, T, D), or packed (1, sum of T, D) with its lengths -> same shape."""
        q, k, v = (
            proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, T, D) -> (B, H, T, D / H)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        p = self.dropout.p if self.training else 0.0
        if lengths is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            parts = zip(*(t.split(list(lengths), dim=2) for t in (q, k, v)), strict=True)
            y = torch.cat([F.scaled_dot_product_attention(*qkv, dropout_p=p) for qkv in parts], dim=2)  # type: ignore[misc]
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D / H) -> (B, T, D)
        return out


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


class TransformerBlock(nn.Module):
    """Attention and MLP, each with one residual dropout; norms before (``norm_first``) or after them."""

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
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(n_embd, n_head, attention_dropout)
        self.mlp = MLP(n_embd, ffn_dim, activation_dropout)
        self.ln_1 = nn.LayerNorm(n_embd)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(dropout)
        self.norm_first = norm_first

    def forward(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """x (B, T, D), or packed with its lengths -> same shape."""
        if self.norm_first:
            x = x + self.dropout(self.attn(self.ln_1(x), lengths))
            x = x + self.dropout(self.mlp(self.ln_2(x)))
        else:
            x = self.ln_1(x + self.dropout(self.attn(x, lengths)))
            x = self.ln_2(x + self.dropout(self.mlp(x)))
        return x

    def skip(self, x: Tensor) -> Tensor:
        """Identity, for a dropped layer."""
        return touch(x, self.parameters())
