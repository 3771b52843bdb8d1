"""Utterances of unequal lengths laid end to end so that one strided convolution serves all of them.

Each has a slot of whole output frames, so that windows begin at multiples of the strides in every layer. What windows
that cross an end would give is dropped; where a convolution pads, the rows between utterances are zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2v2.model.packing import row_index, to_device, unpack

WINDOW = 16
"""Columns of a first window: its taps, a one for the bias, and zeros up to the alignment that bf16 products want."""


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
        """Taps of a convolution that lie in one row of ``stride`` input frames.

        Yields:
            The row's distance from the output's own, the first of its frames that is seen, and the taps.
        """
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

    def lay(self, rows: Sequence[Tensor], layer: int, before: int = 0, after: int = 0) -> Tensor:
        """Rows of each utterance -> all slots, zero in between, and so many zeros before and after them."""
        widths = [n * self.hops[layer] - len(row) for n, row in zip(self.frames, rows, strict=True)]
        zeros = rows[0].new_zeros(max(*widths, before, after), *rows[0].shape[1:])
        parts = [part for row, n in zip(rows, widths, strict=True) for part in (row, zeros[:n])]
        return torch.cat([zeros[:before], *parts, zeros[:after]])

    def valid(self, x: Tensor, layer: int) -> list[Tensor]:
        """(all rows, ...) -> the valid ones of each utterance."""
        return [x[span.start : span.start + n] for span, n in zip(self.spans(layer), self.lengths[layer], strict=True)]

    def clear(self, x: Tensor, layer: int) -> Tensor:
        """Zero, in place, what lies between the utterances before a convolution that pads."""
        return x.index_fill_(0, self.gaps[layer], 0.0) if len(self.gaps[layer]) else x

    def windows(self, audio: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S) -> (rows, WINDOW) what the first convolution sees."""
        kernel, stride, padding = self.geometry.kernels[0], self.geometry.strides[0], self.geometry.paddings[0]
        flat = self.lay([row[:n] for row, n in zip(audio, self.lengths[0], strict=True)], 0, padding, kernel)
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
        # The variance is a difference, and loud offsets must not eat it up: float64.
        rows = unpack(torch.cat(self.valid(windows.double(), 1))[None], self.lengths[1])
        counts = to_device(torch.tensor(self.lengths[1], dtype=torch.float64), windows.device)
        return torch.bmm(rows.mT, rows) / counts[:, None, None]
