"""wav2vec 2.0: the encoder, the pretraining model and the CTC model around it, and their configuration.

A variant is a subclass of :class:`Wav2Vec2Config` with one method overridden, in your own recipe file.
Legend: B batch, S samples, T frames, C conv channels, D width, M masked frames, K distractors, G groups, V entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from w2v2.errors import (
    Count,
    NotNegative,
    Positive,
    Range,
    Share,
    ShareBelowOne,
    UsageError,
    Whole,
    Width,
    check_ranges,
)
from w2v2.model.feature_encoder import ChannelLayerNorm, FeatureEncoder, FeatureProjection, frame_center, output_lengths
from w2v2.model.initialization import init_weights
from w2v2.model.masking import sample_span_mask
from w2v2.model.packing import Rows, is_plain, repeat_rows, unpack
from w2v2.model.transformer import PositionalConvEmbedding, TransformerBlock, take

SAMPLE_RATE = 16_000


@dataclass(kw_only=True)
class Wav2Vec2Config:
    """Everything that decides the shape of the encoder, and what is masked. Defaults are those of `base`."""

    n_layer: Annotated[int, Range(1, 1_000)] = 12
    """Transformer blocks (fairseq ``encoder_layers``)."""
    n_head: Width = 8
    """Attention heads; the released BASE has 12 (``encoder_attention_heads``)."""
    n_embd: Width = 768
    """Width of the context network (``encoder_embed_dim``)."""
    ffn_dim: Width = 3072
    """Width of the feed-forward layers (``encoder_ffn_embed_dim``)."""
    max_seq_len: Count = 1024
    """Frames in a training crop at most: 20.48 s. A guard; the model itself takes any length."""
    conv_channels: tuple[Width, ...] = (512,) * 7
    """Channels of each convolution (``conv_feature_layers``)."""
    conv_kernel_sizes: tuple[Width, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Kernels of the convolutions, in frames of their input."""
    conv_strides: tuple[Width, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Strides; their product is the hop of a frame, 320 samples: 20 ms."""
    conv_paddings: tuple[Annotated[int, Range(0, 100_000)], ...] = (4, 1, 1, 1, 1, 0, 0)
    """Zeros on each side of each convolution's input. `base` pads, so 1 s gives 50 frames; the paper does not."""
    conv_bias: bool = False
    """Whether the convolutions have a bias."""
    conv_norm: str = "group:32"
    """``group:N``: GroupNorm of N groups after the first convolution; ``layer``: LayerNorm after each (fairseq
    ``extractor_mode``)."""
    normalize_audio: bool = False
    """Whether the waveform is given zero mean and unit variance over the whole utterance (``normalize``)."""
    audio_epsilon: Positive = 1e-5
    """Added to that variance: 1e-5 in fairseq, 1e-7 in transformers' feature extractor."""
    utterance_norm: bool = False
    """Whether each feature channel gets zero mean and unit variance over the utterance, before the LayerNorm. Not in
    the paper: it takes away what tells speakers and rooms apart, which a short run would learn first."""
    conv_init_smoothing: Share = 0.0
    """How far the initial kernels after the first are pulled towards equal taps, 0 to 1. 0: the paper's Kaiming normal.
    Smooth features can be predicted from their neighbours at once; from noisy ones a short run learns nothing."""
    conv_gradient_scale: NotNegative = 0.1
    """Factor on the gradient into the convolutions (``feature_grad_mult``)."""
    norm_first: bool = True
    """Norms before attention and MLP, and ``ln_f`` last; else after them, and ``ln_f`` first (``layer_norm_first``)."""
    dropout: ShareBelowOne = 0.1
    """After the positional embedding and on each residual branch (``dropout``)."""
    attention_dropout: ShareBelowOne = 0.1
    """On the attention probabilities (``attention_dropout``)."""
    activation_dropout: ShareBelowOne = 0.0
    """Inside the feed-forward layers (``activation_dropout``)."""
    dropout_input: ShareBelowOne = 0.1
    """On the projected features that the context network gets (``dropout_input``)."""
    layer_drop: ShareBelowOne = 0.05
    """Probability that a block is skipped in training (``encoder_layerdrop``)."""
    pos_conv_kernel: Width = 128
    """Frames that the positional convolution sees (``conv_pos``)."""
    pos_conv_groups: Width = 16
    """Its groups (``conv_pos_groups``)."""
    mask_prob: Share = 0.65
    """Share of frames that would be masked if no spans overlapped (``mask_prob``); the paper's 0.065 times the span."""
    mask_length: Width = 10
    """Frames of a span: 200 ms (``mask_length``)."""
    adapter_dim: Whole = 0
    """Width of the adapter after each block, as MMS has one for each language (``adapter_attn_dim`` of transformers);
    0: none."""

    def check(self) -> None:
        """Refuse a model that cannot be built or trained; :class:`UsageError` names the field."""
        check_ranges(self, "model")
        shape = [self.conv_kernel_sizes, self.conv_strides, self.conv_paddings]
        if not 1 <= len(self.conv_channels) <= 100:
            raise UsageError(f"`model.conv_channels` needs 1 to 100 numbers, got {len(self.conv_channels)}")
        if any(len(part) != len(self.conv_channels) for part in shape):
            raise UsageError(
                f"`model.conv_kernel_sizes`, `model.conv_strides` and `model.conv_paddings` need one number for "
                f"each of the {len(self.conv_channels)} `model.conv_channels`, got "
                f"{', '.join(str(len(part)) for part in shape)}"
            )
        for name, parts in (("n_head", self.n_head), ("pos_conv_groups", self.pos_conv_groups)):
            if self.n_embd % parts:
                raise UsageError(f"`model.n_embd` must be a multiple of `model.{name}` ({parts}), got {self.n_embd}")
        norm = re.fullmatch("layer|group:([1-9][0-9]{0,5})", self.conv_norm)
        if not norm:
            raise UsageError(f"`model.conv_norm` must be 'layer' or 'group:N', as 'group:32', got {self.conv_norm!r}")
        if norm[1] and self.conv_channels[0] % int(norm[1]):
            first = self.conv_channels[0]
            raise UsageError(f"`model.conv_norm` needs groups that divide `model.conv_channels` {first}, got {norm[1]}")

    def build(self) -> Wav2Vec2:
        """The model, freshly initialised from torch's global generator: of this configuration an encoder."""
        return Wav2Vec2(self)

    def build_conv_norms(self) -> list[nn.Module]:
        """The norm after each convolution."""
        if self.conv_norm == "layer":
            return [ChannelLayerNorm(width) for width in self.conv_channels]
        groups = int(self.conv_norm.removeprefix("group:"))
        return [nn.GroupNorm(groups, self.conv_channels[0]), *(nn.Identity() for _ in self.conv_channels[1:])]

    def build_positional_embedding(self) -> nn.Module:
        """Module of (x (B, T, D) or packed, lengths) -> positions to add to x."""
        return PositionalConvEmbedding(self.n_embd, self.pos_conv_kernel, self.pos_conv_groups)

    def sample_mask(self, n_frames: int, rng: torch.Generator) -> Tensor:
        """(n_frames,) bool on the host: which frames of one utterance are masked; at least two, not all."""
        return sample_span_mask(n_frames, self.mask_prob, self.mask_length, rng)

    def sample_masks(self, samples: Sequence[int], rngs: Sequence[torch.Generator]) -> list[Tensor]:
        """A mask for each utterance of so many samples."""
        return [self.sample_mask(n, rng) for n, rng in zip(self.frames(samples), rngs, strict=True)]

    @property
    def normalize(self) -> float:
        """``audio_epsilon`` where audio is normalised, else 0: what a dataset is told."""
        return self.audio_epsilon if self.normalize_audio else 0.0

    def normalized(self, audio: Tensor) -> Tensor:
        """(..., S) audio as the model takes it: with zero mean and unit variance over S, where it wants that."""
        if not self.normalize_audio or not audio.shape[-1]:
            return audio
        mean, var = audio.mean(-1, keepdim=True), audio.var(-1, correction=0, keepdim=True)
        return (audio - mean) / torch.sqrt(var + self.audio_epsilon)

    def frames(self, samples: Sequence[int]) -> list[int]:
        """Frames for so many samples, per utterance."""
        return output_lengths(samples, self.conv_kernel_sizes, self.conv_strides, self.conv_paddings)

    def frame_seconds(self, frame: int) -> float:
        """When a frame is: the middle of what it sees, seconds from the start of the audio."""
        center = frame_center(frame, self.conv_kernel_sizes, self.conv_strides, self.conv_paddings)
        return center / SAMPLE_RATE


class Wav2Vec2(nn.Module):
    """The encoder: raw audio to one contextual vector every 20 ms."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        shape = (config.conv_channels, config.conv_kernel_sizes, config.conv_strides, config.conv_paddings)
        self.feature_encoder = FeatureEncoder(
            *shape, config.build_conv_norms(), bias=config.conv_bias, gradient_scale=config.conv_gradient_scale
        )
        self.feature_projection = FeatureProjection(
            config.conv_channels[-1], config.n_embd, config.dropout_input, utterance_norm=config.utterance_norm
        )
        self.mask_vector = nn.Parameter(torch.empty(config.n_embd))
        self.positional_embedding = config.build_positional_embedding()
        self.transformer = nn.ModuleList(
            TransformerBlock(
                config.n_embd,
                config.n_head,
                config.ffn_dim,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                norm_first=config.norm_first,
                adapter_dim=config.adapter_dim,
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mask_vector.device

    def forward(self, audio: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """``encode``."""
        return self.encode(audio, lengths)

    def encode(self, audio: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Encode audio, also with the models that have this one inside.

        Args:
            audio: (B, S) float32 at 16 kHz, padded with anything where lengths differ.
            lengths: valid samples of each utterance; None when all are S.

        Returns:
            (B, T, D) contextual vectors, zero after an utterance's end, and the frames T of each utterance.

        Raises:
            ValueError: lengths that do not fit the audio, or an utterance shorter than one frame.
        """
        frames, packed = self.frame_lengths(audio, lengths)
        features = self.feature_encoder(audio, lengths if packed else None)
        _, x = self.feature_projection(features, packed)
        return unpack(self.contextualize(self.feature_projection.dropout(x), packed), packed), frames

    def hidden_states(self, audio: Tensor, lengths: Sequence[int] | None = None) -> tuple[list[Tensor], list[int]]:
        """What each block is given and makes of it.

        Args:
            audio, lengths: as for ``encode``.

        Returns:
            n_layer + 1 tensors (B, T, D), zero after an utterance's end, and the frames T of each utterance: [0] is the
            input of the first block, [i] the output of block i, the last one what ``encode`` returns (``hidden_states``
            of transformers, whose 5.x has the last one before ``ln_f``). Raises as ``encode``.
        """
        frames, packed = self.frame_lengths(audio, lengths)
        _, x = self.feature_projection(self.feature_encoder(audio, lengths if packed else None), packed)
        states: list[Tensor] = []
        states.append(self.contextualize(self.feature_projection.dropout(x), packed, inputs=states))
        return [unpack(state, packed) for state in states], frames

    def frame_lengths(self, audio: Tensor, lengths: Sequence[int] | None) -> tuple[list[int], list[int] | None]:
        """Frames of each utterance of (B, S) audio, and the same again if they must be packed, else None."""
        samples = [audio.shape[1]] * audio.shape[0] if lengths is None else list(lengths)
        if len(samples) != audio.shape[0] or max(samples) > audio.shape[1]:
            raise ValueError(
                f"lengths must be {audio.shape[0]} numbers of samples, at most {audio.shape[1]} each, got {samples}"
            )
        frames = self.feature_encoder.output_lengths(samples)
        if 0 in frames:
            raise ValueError(f"audio of {min(samples)} samples is shorter than one frame; drop utterances this short")
        return frames, None if min(samples) == audio.shape[1] else frames

    def contextualize(
        self,
        x: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        covered: Tensor | None = None,
        channels: Tensor | None = None,
        keep_layers: Sequence[bool] | None = None,
        inputs: list[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Run the context network.

        Args:
            x: (B, T, D) projected features, or packed (1, sum of T, D) with ``lengths``.
            lengths: frames of each utterance, when packed.
            covered: (N,) positions among all frames laid end to end, to be replaced by the mask vector. Before the
                positional convolution, which would otherwise carry 64 frames of content into each of them.
            channels: (B, D) bool, True where a channel is set to zero for the whole utterance, after the time mask.
            keep_layers: which blocks run; None for all.
            inputs: gets the input of each block appended, as x is.
            rows: what frames are wanted, as (1, N, D), when not all are: in training the last block computes no more.
        """
        if covered is not None:
            vector = self.mask_vector.to(x.dtype).expand(len(covered), -1)
            x = x.flatten(0, 1).index_copy(0, covered, vector).view_as(x)
        if channels is not None:
            zeroed = channels[:, None] if lengths is None else repeat_rows(channels, lengths)[None]
            x = x.masked_fill(zeroed, 0.0)
        x = x + self.positional_embedding(x, lengths)
        if not self.config.norm_first:
            x = self.ln_f(x)
        x = self.dropout(x)
        for i, block in enumerate(self.transformer):
            assert isinstance(block, TransformerBlock)
            if inputs is not None:
                inputs.append(x)
            if keep_layers is not None and not keep_layers[i]:
                x = block.skip(x)
            elif rows is None or not self.training or is_plain() or i < len(self.transformer) - 1:
                x = block(x, lengths)
            else:
                x, rows = block(x, lengths, rows), None
        x = x if rows is None else take(x, rows)
        return self.ln_f(x) if self.config.norm_first else x
