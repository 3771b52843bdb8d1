"""Encoders of BASE's shape as other projects have them, with our quantizer and loss: for ``step.py --peers``.

torchaudio's; SpidR's modules put together as minimal-hubert does for HuBERT BASE; SpeechBrain's, which is another model
(LayerNorm after each convolution, sinusoids for positions) and here has our kernels. They are given the masks that ours
is given, pad, and mask padding out of attention as they ship.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2 import recipes
from w2v2.model.losses import contrastive_logits, contrastive_loss
from w2v2.model.masking import ContrastiveDraws

Hide = Callable[[Tensor], Tensor]
"""Puts the mask vector into projected features (B, T, D)."""
Encode = Callable[[Tensor, "list[int] | None", Hide], tuple[Tensor, Tensor, Tensor]]
"""Audio (B, S), frames of each where they differ -> features, normalised (B, T, C), contexts (B, T, D)."""
Side = tuple[nn.Module, Callable[[], Tensor]]


def torchaudio_encoder(attention_dropout: float, activation_dropout: float) -> tuple[nn.Module, Encode]:
    """``torchaudio.models.wav2vec2_base``."""
    from torchaudio.models import wav2vec2_base

    model = wav2vec2_base(0.1, attention_dropout, activation_dropout, 0.1, 0.0)

    def encode(audio: Tensor, frames: list[int] | None, hide: Hide) -> tuple[Tensor, Tensor, Tensor]:
        features, _ = model.feature_extractor(audio, None)
        normalised = model.encoder.feature_projection.layer_norm(features)
        x, attention = model.encoder._preprocess(features, None if frames is None else torch.tensor(frames))
        return features, normalised, model.encoder.transformer(hide(x), attention)

    return model, encode


def spidr_encoder(attention_dropout: float, activation_dropout: float) -> tuple[nn.Module, Encode]:
    """SpidR's modules, put together as minimal-hubert does."""
    from spidr.models import components as c

    shape = recipes.paper_base().model
    fan_in, blocks = 1, nn.ModuleList()
    for width, kernel, stride in zip(shape.conv_channels, shape.conv_kernel_sizes, shape.conv_strides, strict=True):
        norm = None if len(blocks) else nn.GroupNorm(width, width)
        blocks.append(c.ConvLayerBlock(fan_in, width, kernel, stride, norm, bias=False))
        fan_in = width
    stack, projection = c.FeatureExtractor(blocks), c.FeatureProjection(fan_in, shape.n_embd)
    positions = c.ConvPositionalEmbedding(shape.n_embd, shape.pos_conv_kernel, shape.pos_conv_groups, 1)
    positions.convs[0] = nn.utils.parametrizations.weight_norm(positions.convs[0], dim=2)
    positions.layer_norm = nn.Identity()
    layers = nn.ModuleList(
        c.TransformerLayer(
            c.SelfAttention(shape.n_embd, shape.n_head, qkv_bias=True, dropout=attention_dropout),
            0.1,
            c.FeedForward(shape.n_embd, shape.ffn_dim, activation_dropout),
            layer_norm_first=False,
        )
        for _ in range(shape.n_layer)
    )
    transformer = c.Transformer(layers, positions, 0.1, 0.0, layer_norm_first=True)

    def encode(audio: Tensor, frames: list[int] | None, hide: Hide) -> tuple[Tensor, Tensor, Tensor]:
        features = stack(audio)
        normalised = projection.layer_norm(features)
        x = hide(F.dropout(projection.projection(normalised), 0.1))
        attention = None if frames is None else padding(frames)[:, None, None].expand(-1, 1, x.shape[1], -1)
        return features, normalised, transformer(x, attention)

    return nn.ModuleList([stack, projection, transformer]), encode


def speechbrain_encoder(attention_dropout: float, activation_dropout: float) -> tuple[nn.Module, Encode]:
    """SpeechBrain's ``W2VLatentExtractor`` and ``EncoderWrapper``; it has one dropout for all, attention apart."""
    from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder
    from speechbrain.lobes.models.wav2vec import EncoderWrapper, W2VLatentExtractor

    shape = recipes.paper_base().model
    stack = W2VLatentExtractor(kernel_sizes=list(shape.conv_kernel_sizes), strides=list(shape.conv_strides))
    transformer = TransformerEncoder(
        shape.n_layer, shape.n_head, shape.ffn_dim, d_model=shape.n_embd, dropout=0.1, activation=nn.GELU
    )
    for layer in transformer.layers:
        layer.self_att.att.dropout = attention_dropout
    wrapper = EncoderWrapper(shape.conv_channels[-1], shape.n_embd, transformer, dropout_encoder_input=0.1)

    def encode(audio: Tensor, frames: list[int] | None, hide: Hide) -> tuple[Tensor, Tensor, Tensor]:
        normalised = stack(audio, normalize_signal=False)
        x = hide(wrapper.dropout_encoder_input(wrapper.input_projector(normalised)))
        x = x + wrapper.positional_encoding(x)
        contexts, _ = transformer(x, src_key_padding_mask=None if frames is None else ~padding(frames))
        return normalised, normalised, contexts

    return nn.ModuleList([stack, wrapper]), encode


ENCODERS = {"torchaudio": torchaudio_encoder, "spidr": spidr_encoder, "speechbrain": speechbrain_encoder}


def padding(frames: list[int]) -> Tensor:
    """(B, T) whether a frame is one."""
    return torch.arange(max(frames)) < torch.tensor(frames)[:, None]


def with_our_objective(
    encoder: nn.Module, encode: Encode, audio: Tensor, samples: list[int], draws: ContrastiveDraws
) -> Side:
    """A peer's encoder, and its loss on the masked frames."""
    config: Any = recipes.paper_base().model
    config.n_layer, config.layer_drop = 0, 0.0
    ours, frames = config.build(), config.frames(samples)
    del ours.feature_encoder, ours.positional_embedding
    masked = padding(frames).flatten().nonzero().flatten()[draws.masked.long()]  # among padded frames
    lengths = frames if min(frames) < max(frames) else None

    def hide(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_copy(0, masked, ours.mask_vector.expand(len(masked), -1)).view_as(x)

    def loss() -> Tensor:
        features, normalised, contexts = encode(audio, lengths, hide)
        context = ours.out_linear(contexts.flatten(0, 1)[masked])
        quantized = ours.quantizer(F.dropout(normalised.flatten(0, 1)[masked], 0.1), 2.0)
        targets = ours.project_q(quantized.quantized)
        logits = contrastive_logits(context, targets, quantized.codes, draws.distractors, draws.counts)
        return contrastive_loss(logits).loss / len(masked) + 10 * features.square().mean()

    return nn.ModuleList([encoder, ours]), loss
