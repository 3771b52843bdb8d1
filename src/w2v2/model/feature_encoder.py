"""The convolutional feature encoder: raw audio to one feature vector every 20 ms (paper section 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from w2v2.model.conv_stack import Layers, conv_stack, conv_stack_in_parts, first_weights, folded_weights
from w2v2.model.packing import is_plain
from w2v2.model.precision import low_precision
from w2v2.model.slots import WINDOW, Geometry, Slots


def output_lengths(
    samples: Sequence[int], kernel_sizes: Sequence[int], strides: Sequence[int], paddings: Sequence[int]
) -> list[int]:
    """Frames that the conv stack makes of so many samples, per utterance; 0 when it is shorter than one frame needs."""
    lengths = []
    for length in samples:
        for kernel, stride, padding in zip(kernel_sizes, strides, paddings, strict=True):
            length = max((length + 2 * padding - kernel) // stride + 1, 0)
        lengths.append(length)
    return lengths


def receptive_field(kernel_sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that one frame sees: 400 (25 ms at 16 kHz) for the standard stack."""
    field = 1
    for kernel, stride in zip(reversed(kernel_sizes), reversed(strides), strict=True):
        field = (field - 1) * stride + kernel
    return field


def frame_center(frame: int, kernel_sizes: Sequence[int], strides: Sequence[int], paddings: Sequence[int]) -> float:
    """Sample at the middle of what a frame sees; half samples where that is even, negative ones lie in the padding.

    199.5 + 320 t for the standard stack without padding.
    """
    hop, start = 1, 0
    for stride, padding in zip(strides, paddings, strict=True):
        start -= padding * hop
        hop *= stride
    return start + frame * hop + (receptive_field(kernel_sizes, strides) - 1) / 2


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Identity whose gradient is multiplied by ``scale`` (fairseq: ``GradMultiply``)."""
    out: Tensor = _ScaleGradient.apply(x, scale)
    return out


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T), each frame on its own (fairseq extractor mode ``layer_norm``)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> same shape."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class FeatureEncoder(nn.Module):
    """Seven (by default) convolution blocks of Conv1d, norm and GELU.

    Args:
        channels: output channels of each block.
        kernel_sizes, strides, paddings: of each block, in frames of its input.
        norms: the norm after each convolution; ``nn.Identity()`` for none.
        bias: whether the convolutions have one (paper BASE: no; LARGE LV-60k: yes).
        gradient_scale: factor on the gradient that enters the stack (fairseq ``feature_grad_mult``); 0 freezes it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernel_sizes: Sequence[int],
        strides: Sequence[int],
        paddings: Sequence[int],
        norms: Sequence[nn.Module],
        *,
        bias: bool = False,
        gradient_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.kernel_sizes, self.strides, self.paddings = tuple(kernel_sizes), tuple(strides), tuple(paddings)
        self.gradient_scale = gradient_scale
        self.recompute = False
        """Whether the backward pass computes GELU again."""
        self.conv_layers = nn.ModuleList()
        fan_in = 1
        for width, kernel, stride, padding, norm in zip(channels, kernel_sizes, strides, paddings, norms, strict=True):
            conv = nn.Conv1d(fan_in, width, kernel, stride, padding, bias=bias)
            self.conv_layers.append(nn.Sequential(conv, norm, nn.GELU()))
            fan_in = width
        self.requires_grad_(gradient_scale > 0)

    def conv_weights(self) -> list[Tensor]:
        """(C_out, C_in, kernel) weight of each convolution."""
        return [m.weight for m in self.modules() if isinstance(m, nn.Conv1d)]

    def output_lengths(self, samples: Sequence[int]) -> list[int]:
        """Frames for so many samples, per utterance."""
        return output_lengths(samples, self.kernel_sizes, self.strides, self.paddings)

    def forward(self, audio: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Encode a batch.

        Args:
            audio: (B, S) float32.
            lengths: valid samples of each utterance, when they differ. Norm statistics are then of its valid frames
                alone, and there is no work on padding.

        Returns:
            (B, T, C), or (1, sum of T, C) packed when ``lengths`` is given.
        """
        layers = None if is_plain() or audio.requires_grad else self._layers()
        learns = torch.is_grad_enabled()
        with torch.set_grad_enabled(learns and self.gradient_scale > 0):
            if layers is not None and (learns or audio.is_cuda):
                x = self._joined(audio, lengths, layers)
            elif layers is not None and audio.device.type == "cpu" and not torch.compiler.is_compiling():
                counts = [audio.shape[1]] * len(audio) if lengths is None else lengths
                matrices = layers.matrices(self._dtype("cpu"))
                rows = [self._in_parts(row[None, :n], layers, matrices) for row, n in zip(audio, counts, strict=True)]
                x = torch.stack(rows) if lengths is None else torch.cat(rows)[None]
            elif lengths is None:
                x = self._stack(audio)
            else:
                x = torch.cat([self._stack(row[None, :n]) for row, n in zip(audio, lengths, strict=True)], dim=1)
        return scale_gradient(x, self.gradient_scale) if x.requires_grad else x

    def _layers(self) -> Layers | None:
        """The parameters after the first convolution; None where norms or shape are none that ``conv_stack`` knows."""
        layers = cast(list[nn.Sequential], list(self.conv_layers))
        only_padding = any(p >= k for p, k in zip(self.paddings, self.kernel_sizes, strict=True))
        if len(layers) == 1 or self.kernel_sizes[0] >= WINDOW or only_padding:
            return None
        norms: list[nn.Module | None] = [layer[1] for layer in layers]
        if isinstance(norms[0], nn.GroupNorm) and norms[0].affine and all(type(n) is nn.Identity for n in norms[1:]):
            norms = [None] * len(norms)
        elif any(type(norm) is not ChannelLayerNorm for norm in norms):
            return None
        convs = [cast(nn.Conv1d, layer[0]) for layer in layers[1:]]
        return Layers([conv.weight for conv in convs], [conv.bias for conv in convs], norms)

    def _joined(self, audio: Tensor, lengths: Sequence[int] | None, layers: Layers) -> Tensor:
        """All utterances in one go."""
        rows = list(lengths) if lengths is not None else [audio.shape[1]] * len(audio)
        with self._first(audio, rows) as (windows, first, slots, eps):
            x = conv_stack(windows, first, slots, layers, eps, keep=not self.recompute)
        return x.view(len(audio), -1, x.shape[1]) if lengths is None else x[None]

    def _in_parts(self, audio: Tensor, layers: Layers, matrices: Sequence[Tensor]) -> Tensor:
        """(1, S) -> (T, C), some frames at a time."""
        with self._first(audio, [audio.shape[1]]) as (windows, first, slots, eps):
            return conv_stack_in_parts(windows, first.to(windows.dtype), slots, layers, matrices, eps)

    def _dtype(self, device: str) -> torch.dtype:
        """What is computed in."""
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.conv_weights()[0].dtype

    @contextlib.contextmanager
    def _first(self, audio: Tensor, lengths: list[int]) -> Iterator[tuple[Tensor, Tensor, Slots, float]]:
        """Windows, weights of the first convolution with its norm, where utterances lie, eps; without autocast."""
        conv, norm, _ = cast(tuple[nn.Conv1d, nn.Module, nn.Module], self.conv_layers[0])
        device = audio.device.type
        dtype = self._dtype(device)
        with torch.autocast(device, enabled=False):
            slots = Slots(Geometry(self.kernel_sizes, self.strides, self.paddings), lengths, audio.device)
            windows = slots.windows(audio, dtype)
            if isinstance(norm, nn.GroupNorm):
                first = folded_weights(conv, norm, slots.moments(windows))
            else:
                first = first_weights(conv)
            yield windows, first, slots, cast(float, norm.eps)

    def _stack(self, audio: Tensor) -> Tensor:
        x = audio.unsqueeze(1)  # (B, S) -> (B, 1, S)
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)  # (B, C, T) -> (B, T, C)


class FeatureProjection(nn.Module):
    """LayerNorm of the conv features, and their projection to the context network's width."""

    def __init__(self, channels: int, width: int, dropout: float, *, utterance_norm: bool) -> None:
        super().__init__()
        self.utterance_norm = utterance_norm
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """features (B, T, C) or packed -> normalised, same shape; projected (B, T, D), before dropout."""
        if self.utterance_norm:
            rows = features.split(list(lengths), dim=1) if lengths is not None else (features,)
            features = torch.cat([_normalize_over_time(row) for row in rows], dim=1)
        normalised = self.norm(features.to(self.norm.weight.dtype))  # bf16 in bf16-true
        with low_precision(normalised, self.linear) as (x, linear):
            return normalised, linear(x)


def _normalize_over_time(x: Tensor) -> Tensor:
    """(B, T, C) with zero mean and unit variance over T; fp32."""
    var, mean = torch.var_mean(x.float(), dim=1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5)
