"""The conv stack as matrix products over utterances laid end to end, for training and for GPUs.

Each utterance has a slot of whole output frames, so that one convolution with stride s, and windows that begin at
multiples of s, serves all of them whatever their lengths: with frames as rows, s rows side by side are one row of a view,
and taps are products of slices of it. What windows that cross an end would give is dropped; where a convolution pads,
the rows between utterances are zero. GroupNorm after the first convolution is folded into its weights: mean and variance
of a convolution's output are the kernel's products with mean and covariance of its windows. For the backward pass only
the convolutions' outputs are kept, and of the first nothing: norms and the first convolution are computed again, and GELU where
memory is worth more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.model.packing import row_index, to_device

WINDOW = 16
"""Columns of a first window: its taps, a one for the bias, zeros up to what bf16 products want rows to be aligned to."""


@dataclass(frozen=True)
class Geometry:
    """Of the stack's convolutions."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]

    @property
    def hops(self) -> list[int]:
        """Rows of each convolution's input, and of the last one's output, that make one output frame."""
        return list(itertools.accumulate(reversed(self.strides), lambda hop, stride: hop * stride, initial=1))[::-1]

    def blocks(self, layer: int) -> Iterator[tuple[int, int, slice]]:
        """What a convolution takes of rows of ``stride`` input frames each: the row's distance, and which taps, from
        which of the row's frames on."""
        kernel, stride, padding = self.kernels[layer], self.strides[layer], self.paddings[layer]
        rows = range(-padding // stride, (kernel - 1 - padding) // stride + 1)
        for row in sorted(rows, key=abs):  # row 0 first: it has something for every output
            start, end = max(row * stride, -padding), min((row + 1) * stride, kernel - padding)
            yield row, start - row * stride, slice(start + padding, end + padding)


class Slots:
    """Where each utterance lies, and what lies between.

    Args:
        geometry: of the stack.
        lengths: samples of each utterance.
        device: of the tensors that hold rows.
    """

    def __init__(self, geometry: Geometry, lengths: Sequence[int], device: torch.device) -> None:
        self.geometry, self.hops = geometry, geometry.hops
        self.lengths = [list(lengths)]
        """Valid rows of each utterance: in samples, then after each convolution."""
        for kernel, stride, padding in zip(geometry.kernels, geometry.strides, geometry.paddings, strict=True):
            self.lengths.append([(n + 2 * padding - kernel) // stride + 1 for n in self.lengths[-1]])
        room = [[-(-(n + p) // hop) for n in rows] for rows, p, hop in self._padded()]
        self.frames = [max(column) for column in zip(*room, strict=True)]
        """Output frames that each utterance's slot is wide."""
        self.equal = len(set(lengths)) == 1
        gaps = [self._gaps(layer) for layer in range(len(geometry.kernels))]
        starts, counts = ([n for layer in gaps for n in layer[part]] for part in (0, 1))
        self.gaps = row_index(starts, counts, device).split([sum(layer[1]) for layer in gaps])
        """Rows that must be zero before each convolution that pads."""

    def _padded(self) -> Iterator[tuple[list[int], int, int]]:
        return zip(self.lengths, (*self.geometry.paddings, 0), self.hops, strict=True)

    def _gaps(self, layer: int) -> tuple[list[int], list[int]]:
        """Starts and lengths; none where nobody reads them, or where the audio is laid out with zeros."""
        if layer == 0 or self.geometry.paddings[layer] == 0:
            return [], []
        gaps = [span[n:] for span, n in zip(self.spans(layer), self.lengths[layer], strict=True)]
        return [gap.start for gap in gaps], [len(gap) for gap in gaps]

    def spans(self, layer: int) -> list[range]:
        """Rows of each utterance's slot before convolution ``layer``."""
        ends = itertools.accumulate((n * self.hops[layer] for n in self.frames), initial=0)
        return [range(start, end) for start, end in itertools.pairwise(ends)]

    def lay(self, rows: Sequence[Tensor], layer: int) -> Tensor:
        """Rows of each utterance -> all slots, zero in between."""
        widths = [n * self.hops[layer] - len(row) for n, row in zip(self.frames, rows, strict=True)]
        zeros = rows[0].new_zeros(max(widths), *rows[0].shape[1:])
        return torch.cat([part for row, n in zip(rows, widths, strict=True) for part in (row, zeros[:n])])

    def valid(self, x: Tensor, layer: int) -> list[Tensor]:
        """(all rows, ...) -> the valid ones of each utterance."""
        return [x[span.start : span.start + n] for span, n in zip(self.spans(layer), self.lengths[layer], strict=True)]

    def clear(self, x: Tensor, layer: int) -> Tensor:
        """Zero, in place, what lies between the utterances before a convolution that pads."""
        return x.index_fill_(0, self.gaps[layer], 0.0) if len(self.gaps[layer]) else x

    def windows(self, audio: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S) -> (rows, WINDOW) what the first convolution sees."""
        kernel, stride, padding = self.geometry.kernels[0], self.geometry.strides[0], self.geometry.paddings[0]
        flat = F.pad(self.lay([row[:n] for row, n in zip(audio, self.lengths[0], strict=True)], 0), (padding, kernel))
        rows = sum(self.frames) * self.hops[1]
        windows = torch.zeros(rows, WINDOW, dtype=dtype, device=audio.device)
        windows[:, :kernel] = flat.unfold(0, kernel, stride)[:rows]
        windows[:, kernel] = 1.0
        return windows

    def first(self, windows: Tensor, weights: Tensor) -> Tensor:
        """The first convolution, with weights (1 or B, WINDOW, C): (rows, WINDOW) -> (rows, C)."""
        if len(weights) == 1:
            return windows @ weights[0]
        if self.equal:
            return torch.bmm(windows.unflatten(0, (len(weights), -1)), weights).flatten(0, 1)
        out = windows.new_empty(len(windows), weights.shape[2])
        for span, weight in zip(self.spans(1), weights, strict=True):
            torch.mm(windows[span.start : span.stop], weight, out=out[span.start : span.stop])
        return out

    def first_gradient(self, windows: Tensor, grad: Tensor, count: int) -> Tensor:
        """Of ``first`` for its ``count`` weights: (rows, C) -> (count, WINDOW, C)."""
        if count == 1:
            return (windows.mT @ grad)[None]
        if self.equal:
            return torch.bmm(windows.unflatten(0, (count, -1)).mT, grad.unflatten(0, (count, -1)))
        out = windows.new_empty(count, WINDOW, grad.shape[1])
        for span, row in zip(self.spans(1), out, strict=True):
            torch.mm(windows[span.start : span.stop].mT, grad[span.start : span.stop], out=row)
        return out

    def moments(self, windows: Tensor) -> Tensor:
        """(B, WINDOW, WINDOW) float64: mean products of each utterance's windows, the one of the bias among them."""
        rows = windows.double()  # the variance is a difference, and loud offsets must not eat it up
        if self.equal:
            block = rows.unflatten(0, (len(self.frames), -1))[:, : self.lengths[1][0]]
            return torch.bmm(block.mT, block) / block.shape[1]
        counts = to_device(torch.tensor(self.lengths[1], dtype=torch.float64), windows.device)
        return torch.stack([part.mT @ part for part in self.valid(rows, 1)]) / counts[:, None, None]


def folded_weights(conv: nn.Conv1d, norm: nn.GroupNorm | None, moments: Tensor | None) -> Tensor:
    """Weights (B, WINDOW, C) float32 of a first convolution with its GroupNorm, for each utterance's window moments.

    Without norm the one of all utterances, (1, WINDOW, C).
    """
    kernel = conv.kernel_size[0]
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    columns = torch.cat([conv.weight[:, 0], bias[:, None]], dim=1)  # (C, 1, K) -> (C, K + 1)
    weight = F.pad(columns, (0, WINDOW - 1 - kernel)).t()[None]  # (1, WINDOW, C)
    if norm is None:
        return weight
    assert moments is not None
    weight = weight.double()
    products = moments @ weight  # (B, WINDOW, C); the window's one has given the means
    groups = (norm.num_groups, -1)
    mean = products[:, kernel].unflatten(1, groups).mean(-1, keepdim=True)  # (B, G, 1)
    square = (products * weight).sum(1).unflatten(1, groups).mean(-1, keepdim=True)
    scale = torch.rsqrt(square - mean.square() + norm.eps) * norm.weight.view(*groups)  # (B, G, C / G)
    shift = norm.bias.view(*groups) - mean * scale
    return (weight * scale.flatten(1)[:, None] + F.pad(shift.flatten(1)[:, None], (0, 0, kernel, WINDOW - 1 - kernel))).float()


@dataclass
class Layers:
    """Parameters from the first norm on; a norm or bias that is not there is None."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    norms: Sequence[nn.LayerNorm | None]

    def flat(self) -> list[Tensor | None]:
        """All of them in a row."""
        gains = [None if norm is None else norm.weight for norm in self.norms]
        shifts = [None if norm is None else norm.bias for norm in self.norms]
        return [*self.weights, *self.biases, *gains, *shifts]


class ConvStack(torch.autograd.Function):
    """(windows, first weights, slots, eps, whether to keep GELU's outputs, Layers.flat()) -> (all frames, C) features."""

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
            a = kept[layer - 1] if kept else slots.clear(_activate(x, gains[layer - 1], shifts[layer - 1], ctx.eps), layer)
            weights[layer - 1] = _weight_gradient(a, grad, slots.geometry, layer)
            if ctx.needs_input_grad[5 + n - 1 + layer - 1]:
                biases[layer - 1] = grad.sum(0, dtype=torch.float32)
            grad = slots.clear(_input_gradient(grad, matrices[layer - 1], a, slots.geometry, layer), layer)
            grad, gain_grads[layer - 1], shift_grads[layer - 1] = _activate_backward(
                grad, x, gains[layer - 1], shifts[layer - 1], ctx.eps
            )
        first_grad = slots.first_gradient(windows, grad, len(first)).float()
        return None, first_grad, None, None, None, *weights, *biases, *gain_grads, *shift_grads


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
