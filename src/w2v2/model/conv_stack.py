"""The conv stack as matrix products over utterances laid end to end, for training and for GPUs.

With frames as rows, s rows side by side are one row of a view, so a convolution of stride s is a product or two of such
views, and nothing is copied. GroupNorm after the first convolution is folded into its weights: mean and variance of a
convolution's output are products of its kernel with mean and covariance of its windows. For the backward pass only the
convolutions' outputs are kept, and of the first nothing: norms and the first convolution are computed again, and GELU
where memory is worth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.model.slots import WINDOW, Geometry, Slots


def first_weights(conv: nn.Conv1d) -> Tensor:
    """(1, WINDOW, C) of a first convolution, its bias the weight of the window's one."""
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    columns = torch.cat([conv.weight[:, 0], bias[:, None]], dim=1)  # (C, 1, K) -> (C, K + 1)
    return F.pad(columns, (0, WINDOW - columns.shape[1])).t()[None]


def folded_weights(conv: nn.Conv1d, norm: nn.GroupNorm, moments: Tensor) -> Tensor:
    """(B, WINDOW, C) of a first convolution with its GroupNorm, for each utterance's window moments."""
    weight, one = first_weights(conv).double(), conv.kernel_size[0]
    products = moments @ weight  # (B, WINDOW, C); the window's one has given the means
    groups = (norm.num_groups, -1)
    mean = products[:, one].unflatten(1, groups).mean(-1, keepdim=True)  # (B, G, 1)
    square = (products * weight).sum(1).unflatten(1, groups).mean(-1, keepdim=True)
    scale = torch.rsqrt(square - mean.square() + norm.eps) * norm.weight.view(*groups)  # (B, G, C / G)
    shift = F.pad((norm.bias.view(*groups) - mean * scale).flatten(1)[:, None], (0, 0, one, WINDOW - 1 - one))
    return (weight * scale.flatten(1)[:, None] + shift).float()


@dataclass
class Layers:
    """Parameters from the first norm on; a norm or bias that is not there is None."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    norms: Sequence[nn.Module | None]

    def flat(self) -> list[Tensor | None]:
        """All of them in a row."""
        gains, shifts = ([getattr(norm, name, None) for norm in self.norms] for name in ("weight", "bias"))
        return [*self.weights, *self.biases, *gains, *shifts]

    def matrices(self, dtype: torch.dtype) -> list[Tensor]:
        """(taps * C, C') of each, its columns in a row, which on a CPU takes half the time of ``_matrix``."""
        return [torch.stack(weight.unbind(2), 1).to(dtype).flatten(1).t() for weight in self.weights]


class _ConvStack(torch.autograd.Function):
    """(windows, first weights, slots, eps, whether to keep GELU's outputs, Layers.flat()) -> (all frames, C)."""

    @staticmethod
    def forward(
        ctx: Any, windows: Tensor, first: Tensor, slots: Slots, eps: float, keep: bool, *flat: Tensor | None
    ) -> Tensor:
        n = len(slots.geometry.kernels)
        weights, biases = flat[: n - 1], flat[n - 1 : 2 * n - 2]
        gains, shifts = flat[2 * n - 2 : 3 * n - 2], flat[3 * n - 2 :]
        dtype = windows.dtype
        first = first.to(dtype)
        matrices = [_matrix(w, dtype) for w in weights if w is not None]
        x, outputs, kept = slots.first(windows, first), [], []
        for layer in range(1, n):
            a = slots.clear(_activate(x, gains[layer - 1], shifts[layer - 1], eps), layer)
            x = _convolve(a, matrices[layer - 1], biases[layer - 1], slots.geometry, layer)
            outputs.append(x)
            kept += [a] if keep else []
        outputs[-1] = x = torch.cat(slots.valid(x, n))
        if any(ctx.needs_input_grad):
            ctx.slots, ctx.eps = slots, eps
            ctx.save_for_backward(windows, first, *outputs, *matrices, *gains, *shifts, *kept)
        return _activate(x, gains[-1], shifts[-1], eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slots: Slots = ctx.slots
        n = len(slots.geometry.kernels)
        windows, first, *saved = ctx.saved_tensors
        outputs, matrices = saved[: n - 1], saved[n - 1 : 2 * n - 2]
        gains, shifts, kept = saved[2 * n - 2 : 3 * n - 2], saved[3 * n - 2 : 4 * n - 2], saved[4 * n - 2 :]
        weights: list[Tensor | None] = [None] * (n - 1)
        biases: list[Tensor | None] = [None] * (n - 1)
        gain_grads: list[Tensor | None] = [None] * n
        shift_grads: list[Tensor | None] = [None] * n
        grad, gain_grads[-1], shift_grads[-1] = _activate_backward(
            grads[0], outputs[-1], gains[-1], shifts[-1], ctx.eps
        )
        grad = slots.lay(grad.split(slots.lengths[n]), n)
        for layer in reversed(range(1, n)):
            x = slots.first(windows, first) if layer == 1 else outputs[layer - 2]
            a = (
                kept[layer - 1]
                if kept
                else slots.clear(_activate(x, gains[layer - 1], shifts[layer - 1], ctx.eps), layer)
            )
            weights[layer - 1] = _weight_gradient(a, grad, slots.geometry, layer)
            if ctx.needs_input_grad[5 + n - 1 + layer - 1]:
                biases[layer - 1] = grad.sum(0, dtype=torch.float32)
            grad = slots.clear(_input_gradient(grad, matrices[layer - 1], a, slots.geometry, layer), layer)
            grad, gain_grads[layer - 1], shift_grads[layer - 1] = _activate_backward(
                grad, x, gains[layer - 1], shifts[layer - 1], ctx.eps
            )
        first_grad = slots.first_gradient(windows, grad, len(first)).float()
        return None, first_grad, None, None, None, *weights, *biases, *gain_grads, *shift_grads


def conv_stack(windows: Tensor, first: Tensor, slots: Slots, layers: Layers, eps: float, *, keep: bool) -> Tensor:
    """Features of all utterances laid end to end.

    Args:
        windows: ``slots.windows(audio)``, in the type to compute in.
        first: weights of the first convolution.
        slots: where the utterances lie.
        layers: all other parameters.
        eps: of the norms.
        keep: GELU's outputs for the backward pass, rather than computing them again.

    Returns:
        (sum of T, C), valid frames alone.
    """
    out: Tensor = _ConvStack.apply(windows, first, slots, eps, keep, *layers.flat())
    return out


_FRAMES = 64
"""Worked on at once where nothing learns: 8 MB between the first two convolutions."""


def conv_stack_in_parts(
    windows: Tensor, first: Tensor, slots: Slots, layers: Layers, matrices: Sequence[Tensor], eps: float
) -> Tensor:
    """(T, C) of one utterance where nothing learns: some frames at a time, whose rows stay in a processor's cache."""
    geometry, rows, frames = slots.geometry, slots.lengths[1][0], slots.lengths[-1][0]
    parts = list(zip(geometry.kernels, geometry.strides, geometry.paddings, strict=True))[1:]
    hop, field = slots.hops[1], 1  # rows of the first convolution from frame to frame, and that a frame sees
    for kernel, stride, _ in reversed(parts):
        field = (field - 1) * stride + kernel
    margin = -(-field // hop) if any(geometry.paddings[1:]) else 0  # frames that see the zeros around a part
    out = []
    for start in range(0, frames, _FRAMES):
        stop, before = min(start + _FRAMES, frames), max(start - margin, 0)
        x = windows[before * hop : min((stop + margin - 1) * hop + field, rows)] @ first[0]
        x = _activate_(x, layers.norms[0], eps)
        for (kernel, stride, padding), matrix, bias, norm in zip(
            parts, matrices, layers.biases, layers.norms[1:], strict=True
        ):
            x = F.pad(x, (0, 0, padding, padding)) if padding else x
            x = _activate_(_unpadded(x, matrix, bias, kernel, stride), norm, eps)
        out.append(x[start - before : stop - before])
    return torch.cat(out)


def _unpadded(x: Tensor, matrix: Tensor, bias: Tensor | None, kernel: int, stride: int) -> Tensor:
    """(rows, C) with the weights (taps * C, C') of a convolution: taps of one stride at a time lie side by side."""
    n, width = (len(x) - kernel) // stride + 1, x.shape[1]
    out = x.new_zeros(0)
    for tap in range(0, kernel, stride):
        taps = min(stride, kernel - tap)
        seen = x[tap:].as_strided((n, taps * width), (stride * width, 1))
        weight = matrix[tap * width : (tap + taps) * width]
        if tap:
            out.addmm_(seen, weight)
        else:
            out = seen @ weight if bias is None else torch.addmm(bias.to(x.dtype), seen, weight)
    return out


def _activate_(x: Tensor, norm: nn.Module | None, eps: float) -> Tensor:
    """The norm if there is one, and GELU in place."""
    x = x if norm is None else _normalize(x, norm.weight, norm.bias, eps)[0]  # type: ignore[arg-type]
    out: Tensor = torch.ops.aten.gelu_(x)
    return out


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C', C, taps) -> (taps * C, C')."""
    taps = weight.permute(2, 1, 0)
    return torch.empty(taps.shape, dtype=dtype, device=weight.device).copy_(taps).flatten(0, 1)


def _activate(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    return F.gelu(x if gain is None else _normalize(x, gain, shift, eps)[0])


def _normalize(x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    assert shift is not None
    return torch.native_layer_norm(x, gain.shape, gain.to(x.dtype), shift.to(x.dtype), eps)


def _activate_backward(
    grad: Tensor, x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients for x, gain and shift."""
    if gain is None or shift is None:
        return torch.ops.aten.gelu_backward(grad, x), None, None
    y, mean, rstd = _normalize(x, gain, shift, eps)
    grad = torch.ops.aten.gelu_backward(grad, y)
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad, x, gain.shape, mean, rstd, gain.to(x.dtype), shift.to(x.dtype), [True] * 3
    )
    return out[0], out[1].float(), out[2].float()


def _rows(x: Tensor, row: int, start: int, taps: slice, stride: int) -> tuple[Tensor, slice]:
    """What of (rows, C) a block of taps sees, (N, taps * C), and which outputs it belongs to."""
    n, width = len(x) // stride, x.shape[1]
    columns = slice(start * width, (start + taps.stop - taps.start) * width)
    seen = x.view(n, stride * width)[max(row, 0) : n + min(row, 0), columns]
    return seen, slice(max(-row, 0), n - max(row, 0))


def _convolve(a: Tensor, matrix: Tensor, bias: Tensor | None, geometry: Geometry, layer: int) -> Tensor:
    """(rows, C) with the weights (taps * C, C') of convolution ``layer`` -> (rows / stride, C')."""
    stride, width = geometry.strides[layer], a.shape[1]
    out = a.new_empty(len(a) // stride, matrix.shape[1])
    for row, start, taps in geometry.blocks(layer):
        seen, to = _rows(a, row, start, taps, stride)
        weight = matrix[taps.start * width : taps.stop * width]
        if row:
            out[to].addmm_(seen, weight)
        elif bias is None:
            torch.mm(seen, weight, out=out)
        else:
            torch.addmm(bias.to(a.dtype), seen, weight, out=out)
    return out


def _weight_gradient(a: Tensor, grad: Tensor, geometry: Geometry, layer: int) -> Tensor:
    """(C', C, taps) float32."""
    stride, width = geometry.strides[layer], a.shape[1]
    out = a.new_empty(geometry.kernels[layer] * width, grad.shape[1])
    for row, start, taps in geometry.blocks(layer):
        seen, to = _rows(a, row, start, taps, stride)
        torch.mm(seen.mT, grad[to], out=out[taps.start * width : taps.stop * width])
    weight = out.unflatten(0, (-1, width)).permute(2, 1, 0)  # (taps * C, C') -> (C', C, taps)
    return torch.empty(weight.shape, device=out.device).copy_(weight)


def _input_gradient(grad: Tensor, matrix: Tensor, like: Tensor, geometry: Geometry, layer: int) -> Tensor:
    """(rows / stride, C') -> (rows, C)."""
    stride, width = geometry.strides[layer], like.shape[1]
    whole = geometry.kernels[layer] - geometry.paddings[layer] >= stride  # row 0 has a gradient for all its frames
    out = torch.empty_like(like) if whole else torch.zeros_like(like)
    for row, start, taps in geometry.blocks(layer):
        seen, to = _rows(out, row, start, taps, stride)
        weight = matrix[taps.start * width : taps.stop * width].mT
        if row:
            seen.addmm_(grad[to], weight)
        else:
            torch.mm(grad, weight, out=seen)
    return out
