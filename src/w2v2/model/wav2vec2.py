"""wav2vec 2.0: the encoder, the pretraining model and the CTC model around it, and their configuration.

A variant is a subclass of :class:`Wav2Vec2Config` with one method overridden, in your own recipe file.
Legend: B batch, S samples, T frames, C conv channels, D width, M masked frames, K distractors, G groups, V entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.losses import contrastive_logits, contrastive_loss, diversity_loss, feature_penalty
from w2v2.model.feature_encoder import ChannelLayerNorm, FeatureEncoder, frame_center, output_lengths
from w2v2.model.masking import (
    Draws,
    cut_batch,
    draw,
    equalize_masks,
    keyed_generator,
    sample_layers,
    sample_span_mask,
    slices,
)
from w2v2.model.quantizer import GumbelVectorQuantizer, gumbel_temperature, perplexity
from w2v2.model.packing import Rows, is_plain, repeat_rows, unpack
from w2v2.model.transformer import PositionalConvEmbedding, TransformerBlock, take, touch

SAMPLE_RATE = 16_000


@dataclass(kw_only=True)
class Wav2Vec2Config:
    """Everything that decides the shape and the objective of the model. Defaults are the page's BASE."""

    n_layer: int = 12
    """Transformer blocks (fairseq ``encoder_layers``)."""
    n_head: int = 8
    """Attention heads; the released BASE has 12 (``encoder_attention_heads``)."""
    n_embd: int = 768
    """Width of the context network (``encoder_embed_dim``)."""
    ffn_dim: int = 3072
    """Width of the feed-forward layers (``encoder_ffn_embed_dim``)."""
    max_seq_len: int = 1024
    """Frames in a training crop at most: 20.48 s. A guard; the model itself takes any length."""
    conv_channels: tuple[int, ...] = (512,) * 7
    """Channels of each convolution (``conv_feature_layers``)."""
    conv_kernel_sizes: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Kernels of the convolutions, in frames of their input."""
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Strides; their product is the hop of a frame, 320 samples: 20 ms."""
    conv_paddings: tuple[int, ...] = (4, 1, 1, 1, 1, 0, 0)
    """Zeros on each side of each convolution's input. The page pads, so 1 s gives 50 frames; the paper does not."""
    conv_bias: bool = False
    """Whether the convolutions have a bias."""
    conv_norm: str = "group:32"
    """``group:N``: GroupNorm of N groups after the first convolution; ``layer``: LayerNorm after each (fairseq
    ``extractor_mode``)."""
    normalize_audio: bool = False
    """Whether the waveform is given zero mean and unit variance over the whole utterance (``normalize``)."""
    utterance_norm: bool = False
    """Whether each feature channel gets zero mean and unit variance over the utterance, before the LayerNorm. Not in
    the paper: it takes away what tells speakers and rooms apart, which a short run would learn first."""
    conv_init_smoothing: float = 0.0
    """How far the initial kernels after the first are pulled towards equal taps, 0 to 1. 0: the paper's Kaiming normal.
    Smooth features can be predicted from their neighbours at once; from noisy ones a short run learns nothing."""
    conv_gradient_scale: float = 0.1
    """Factor on the gradient into the convolutions (``feature_grad_mult``)."""
    norm_first: bool = True
    """Norms before attention and MLP, and ``ln_f`` last; else after them, and ``ln_f`` first (``layer_norm_first``)."""
    dropout: float = 0.1
    """After the positional embedding and on each residual branch (``dropout``)."""
    attention_dropout: float = 0.1
    """On the attention probabilities (``attention_dropout``)."""
    activation_dropout: float = 0.0
    """Inside the feed-forward layers (``activation_dropout``)."""
    dropout_input: float = 0.1
    """On the projected features that the context network gets (``dropout_input``)."""
    dropout_features: float = 0.1
    """On the features that the quantizer gets (``dropout_features``)."""
    layer_drop: float = 0.05
    """Probability that a block is skipped in training (``encoder_layerdrop``)."""
    pos_conv_kernel: int = 128
    """Frames that the positional convolution sees (``conv_pos``)."""
    pos_conv_groups: int = 16
    """Its groups (``conv_pos_groups``)."""
    mask_prob: float = 0.65
    """Share of frames that would be masked if no spans overlapped (``mask_prob``); the paper's 0.065 times the span."""
    mask_length: int = 10
    """Frames of a span: 200 ms (``mask_length``)."""
    target_features: str = "projected"
    """What is quantised: ``projected``, D wide, as on the page; ``encoder``, the normalised C-wide features (paper)."""
    n_groups: int = 2
    """Codebooks G (``latent_groups``)."""
    n_entries: int = 320
    """Entries V of each codebook (``latent_vars``)."""
    codebook_dim: int = 384
    """Width of an entry (``latent_dim / latent_groups``)."""
    similarity_dim: int | None = None
    """Width of the space in which contexts and targets meet (``final_dim``); None: the quantizer's own, unprojected."""
    num_distractors: int = 100
    """Distractors K for each target (``num_negatives``)."""
    logit_temperature: float = 0.1
    """Cosine similarities are divided by it (``logit_temp``)."""
    gumbel_start: float = 2.0
    """Gumbel temperature at step 0 (``latent_temp[0]``)."""
    gumbel_end: float = 0.5
    """Its lower bound (``latent_temp[1]``)."""
    gumbel_decay: float = 0.999995
    """Its factor per optimiser step (``latent_temp[2]``)."""

    sub_batch_seconds: float | None = 87.5
    """Batches of more audio are cut into parts of at most this, of which the diversity loss and the equal numbers of
    masked frames are taken: a batch that fills a larger GPU has the objective of the published one (``max_tokens`` 1.4M
    samples). None: of the whole batch."""

    def build(self) -> Wav2Vec2ForPretraining:
        """The pretraining model, freshly initialised from torch's global generator."""
        return Wav2Vec2ForPretraining(self)

    def build_conv_norms(self) -> list[nn.Module]:
        """The norm after each convolution."""
        if self.conv_norm == "layer":
            return [ChannelLayerNorm(width) for width in self.conv_channels]
        groups = int(self.conv_norm.removeprefix("group:"))
        return [nn.GroupNorm(groups, self.conv_channels[0]), *(nn.Identity() for _ in self.conv_channels[1:])]

    def build_positional_embedding(self) -> nn.Module:
        """Module of (x (B, T, D) or packed, lengths) -> positions to add to x."""
        return PositionalConvEmbedding(self.n_embd, self.pos_conv_kernel, self.pos_conv_groups)

    def build_quantizer(self, input_dim: int) -> nn.Module:
        """Module of (x (M, input_dim), temperature) -> QuantizerOutput, with an ``output_dim``."""
        return GumbelVectorQuantizer(input_dim, self.n_groups, self.n_entries, self.codebook_dim)

    def sample_mask(self, n_frames: int, rng: torch.Generator) -> Tensor:
        """(n_frames,) bool on the host: which frames of one utterance are masked; at least two, not all."""
        return sample_span_mask(n_frames, self.mask_prob, self.mask_length, rng)

    def sub_batches(self, samples: Sequence[int]) -> tuple[int, ...]:
        """How many utterances, in their order, make up each sub-batch of a batch of these lengths."""
        if self.sub_batch_seconds is None:
            return (len(samples),)
        # Resampling leaves a sample more or less in some; that is no reason to cut a batch in two.
        return cut_batch(samples, round(self.sub_batch_seconds * SAMPLE_RATE * 1.001))

    def frames(self, samples: Sequence[int]) -> list[int]:
        """Frames for so many samples, per utterance."""
        return output_lengths(samples, self.conv_kernel_sizes, self.conv_strides, self.conv_paddings)

    def frame_seconds(self, frame: int) -> float:
        """When a frame is: the middle of what it sees, seconds from the start of the audio."""
        center = frame_center(frame, self.conv_kernel_sizes, self.conv_strides, self.conv_paddings)
        return center / SAMPLE_RATE


class FeatureProjection(nn.Module):
    """LayerNorm of the conv features, and their projection to the context network's width."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.utterance_norm = config.utterance_norm
        self.norm = nn.LayerNorm(config.conv_channels[-1])
        self.linear = nn.Linear(config.conv_channels[-1], config.n_embd)
        self.dropout = nn.Dropout(config.dropout_input)

    def forward(self, features: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """features (B, T, C) or packed -> normalised, same shape; projected (B, T, D), before dropout."""
        if self.utterance_norm:
            rows = features.split(list(lengths), dim=1) if lengths is not None else (features,)
            features = torch.cat([_normalize_over_time(row) for row in rows], dim=1)
        normalised = self.norm(features)
        return normalised, self.linear(normalised)


def _normalize_over_time(x: Tensor) -> Tensor:
    """(B, T, C) with zero mean and unit variance over T; fp32."""
    var, mean = torch.var_mean(x.float(), dim=1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5)


class Wav2Vec2(nn.Module):
    """The encoder: raw audio to one contextual vector every 20 ms."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        self.feature_encoder = FeatureEncoder(
            config.conv_channels,
            config.conv_kernel_sizes,
            config.conv_strides,
            config.conv_paddings,
            config.build_conv_norms(),
            bias=config.conv_bias,
            gradient_scale=config.conv_gradient_scale,
        )
        self.feature_projection = FeatureProjection(config)
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
            )
            for _ in range(config.n_layer)
        )
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        init_weights(self)

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
            n_layer + 1 tensors (B, T, D), zero after an utterance's end: [0] the input of the first block, [i] the
            output of block i, the last one after ``ln_f`` where norms come first, so that it is what ``encode`` returns
            (``hidden_states`` of transformers; 5.x has the last one before that norm, ``last_hidden_state`` after it);
            and the frames T of each utterance.

        Raises:
            ValueError: as ``encode``.
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
            raise ValueError(
                f"audio of {min(samples)} samples is shorter than one frame needs; drop utterances this short"
            )
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
            rows: the frames that are wanted, (1, N, D), when not all are: in training the last block computes no others.
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


@dataclass
class SSLOutput:
    """What a self-supervised model returns for a batch: sums, so that they add over batches and ranks."""

    losses: dict[str, Tensor]
    """Scalar float32 sums over the targets; weighted and divided by the number of targets by the task."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums of anything, without gradient; ``summarize`` makes figures of them."""
    num_targets: int = 0
    """Targets in the batch, known on the host."""


class Wav2Vec2ForPretraining(Wav2Vec2):
    """The encoder with quantizer and contrastive objective."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        target_dim = config.n_embd if config.target_features == "projected" else config.conv_channels[-1]
        self.quantizer = config.build_quantizer(target_dim)
        self.project_q: nn.Linear | None = None
        code_dim: int = self.quantizer.output_dim  # type: ignore[assignment]
        if config.similarity_dim is not None:
            self.project_q = nn.Linear(code_dim, config.similarity_dim)
        self.out_linear = nn.Linear(config.n_embd, config.similarity_dim or code_dim)
        init_weights(self.quantizer)

    def draw(
        self,
        samples: Sequence[int],
        keys: Sequence[Sequence[int | str]],
        *,
        step_key: Sequence[int | str] | None = None,
    ) -> Draws:
        """Draw masks, distractors and layers for a batch, on the host.

        Args:
            samples: length of each utterance.
            keys: for each utterance, what its draws depend on, such as (seed, epoch, id).
            step_key: what LayerDrop depends on, such as (seed, step). None: validation; no layer is dropped, and masks
                are left as drawn, so that an utterance's do not depend on its batch.
        """
        config = self.config
        rngs = [keyed_generator(*key) for key in keys]
        masks = [config.sample_mask(n, rng) for n, rng in zip(config.frames(samples), rngs, strict=True)]
        if step_key is None:
            return draw(masks, rngs, config.num_distractors)
        sub_batches = config.sub_batches(samples)
        masks = [mask for part in slices(sub_batches) for mask in equalize_masks(masks[part], rngs[part])]
        keep_layers = sample_layers(config.n_layer, config.layer_drop, keyed_generator(*step_key, "layers"))
        return draw(masks, rngs, config.num_distractors, keep_layers, sub_batches)

    def forward(  # type: ignore[override]
        self, audio: Tensor, draws: Draws, lengths: Sequence[int] | None = None, *, step: int = 0
    ) -> SSLOutput:
        """Losses and metrics of a batch.

        Args:
            audio: (B, S) float32; lengths as for the encoder.
            draws: on the audio's device.
            step: optimiser steps so far, for the Gumbel temperature.
        """
        config = self.config
        frames, packed = self.frame_lengths(audio, lengths)
        features = self.feature_encoder(audio, lengths if packed else None)
        normalised, projected = self.feature_projection(features, packed)
        x = self.contextualize(
            self.feature_projection.dropout(projected),
            packed,
            covered=draws.covered,
            keep_layers=draws.keep_layers,
            rows=Rows(draws.masked, draws.counts),
        )
        context = self.out_linear(x.squeeze(0))

        source = self._to_quantize(normalised, projected)[draws.masked]
        source = F.dropout(source, config.dropout_features, self.training)
        temperature = gumbel_temperature(step, config.gumbel_start, config.gumbel_end, config.gumbel_decay)
        masked = [sum(draws.counts[part]) for part in draws.parts()]
        quantized = [self.quantizer(part, temperature) for part in source.split(masked)]
        codes = torch.cat([q.codes for q in quantized])
        targets = torch.cat([q.quantized for q in quantized])
        targets = targets if self.project_q is None else self.project_q(targets)

        logits = contrastive_logits(context, targets, codes, draws.distractors, draws.counts, config.logit_temperature)
        contrastive = contrastive_loss(logits)
        diversity = [
            diversity_loss(q.prob_perplexity, q.probs_sum.numel(), n) for q, n in zip(quantized, masked, strict=True)
        ]
        ones = torch.ones((), device=audio.device)
        return SSLOutput(
            losses={
                "contrastive": contrastive.loss,
                "diversity": _total(diversity),
                "feature_penalty": feature_penalty(features, frames, draws.counts),
            },
            metrics={
                "contrastive": contrastive.loss.detach().double(),
                "correct": contrastive.correct.detach(),
                "identical": contrastive.identical.detach(),
                "probs": _total([q.probs_sum for q in quantized]),
                "codes": _total([q.code_counts for q in quantized]),
                "distinct_codes": _distinct_codes(codes, draws.counts),
                "utterances": len(frames) * ones,
                "frames": sum(frames) * ones,
                "masked": len(draws.masked) * ones,
                **({"temperature": temperature * len(draws.masked) * ones} if self.training else {}),
            },
            num_targets=len(draws.masked),
        )

    def _to_quantize(self, normalised: Tensor, projected: Tensor) -> Tensor:
        """(all frames laid end to end, width)."""
        source = projected if self.config.target_features == "projected" else normalised
        return source.flatten(0, 1)

    def codes(self, audio: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """The entry of each codebook for each frame, nothing masked: in evaluation mode the targets of ``forward``.

        Args:
            audio, lengths: as for ``encode``.

        Returns:
            (B, T, G) int64, zero after an utterance's end, and the frames T of each utterance.
        """
        frames, packed = self.frame_lengths(audio, lengths)
        features = self.feature_projection(self.feature_encoder(audio, lengths if packed else None), packed)
        codes = self.quantizer(self._to_quantize(*features), self.config.gumbel_end).codes
        rows = codes[None] if packed else codes.unflatten(0, (len(frames), -1))
        return unpack(rows, packed), frames

    def summarize(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Figures from metrics summed over batches and ranks; perplexities are of the whole, not means of parts.

        So is the diversity loss in evaluation, where it must not depend on how the utterances were batched.
        """
        total = {name: value.detach().cpu().double() for name, value in sums.items()}
        masked = total["masked"]
        probs, codes = total["probs"] / masked, total["codes"] / masked
        nats = (total["contrastive"] / masked).item()
        groups = {
            f"{kind}_perplexity_{group}": perplexity(rows[group : group + 1]).item()
            for kind, rows in (("prob", probs), ("code", codes))
            for group in range(len(rows))
        }
        return {
            "contrastive_bits": nats / math.log(2),
            "contrastive_of_chance": nats / math.log(1 + self.config.num_distractors),
            "accuracy": (total["correct"] / masked).item(),
            "identical_distractors": (total["identical"] / masked).item(),
            "prob_perplexity": perplexity(probs).item(),
            "code_perplexity": perplexity(codes).item(),
            **groups,
            "dead_codes": (codes == 0).sum().item(),
            "codes_per_utterance": (total["distinct_codes"] / total["utterances"]).item(),
            "masked_fraction": (masked / total["frames"]).item(),
            **(
                {"temperature": (total["temperature"] / masked).item()}
                if "temperature" in total
                else {"diversity": diversity_loss(perplexity(probs), probs.numel(), 1).item()}
            ),
        }


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _distinct_codes(codes: Tensor, counts: Sequence[int]) -> Tensor:
    """Number of distinct code tuples within each utterance, summed over utterances. codes (M, G)."""
    ids = repeat_rows(torch.arange(len(counts), device=codes.device), counts)
    for group in codes.unbind(-1):  # a hash that wraps around: unlike a mixed-radix number, it has room for any G
        ids = ids * 6364136223846793005 + group + 1
    ordered = ids.sort().values
    return 1.0 + (ordered[1:] != ordered[:-1]).sum()


class CTCHead(nn.Linear):
    """Linear layer from the context network to the vocabulary."""


class Wav2Vec2ForCTC(Wav2Vec2):
    """The encoder with a linear layer over the vocabulary."""

    def __init__(self, config: Wav2Vec2Config, n_labels: int) -> None:
        super().__init__(config)
        self.lm_head = CTCHead(config.n_embd, n_labels)
        init_weights(self.lm_head)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """All but the output layer's: what is frozen in the first updates of a fine-tuning."""
        return (p for name, p in self.named_parameters() if not name.startswith("lm_head."))

    def forward(
        self,
        audio: Tensor,
        lengths: Sequence[int] | None = None,
        *,
        covered: Tensor | None = None,
        channels: Tensor | None = None,
        keep_layers: Sequence[bool] | None = None,
        freeze_encoder: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """Log-probabilities (B, T, labels) in fp32, and the frames of each utterance.

        Args:
            audio, lengths: as for the encoder.
            covered, channels, keep_layers: as for ``contextualize``, in training.
            freeze_encoder: whether only ``lm_head`` gets a gradient.
        """
        frames, packed = self.frame_lengths(audio, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
            features = self.feature_encoder(audio, lengths if packed else None)
            _, x = self.feature_projection(features, packed)
            x = self.contextualize(
                self.feature_projection.dropout(x),
                packed,
                covered=covered,
                channels=channels,
                keep_layers=keep_layers,
            )
        if freeze_encoder and self.training:
            x = touch(x, self.encoder_parameters())
        logits = self.lm_head(unpack(x, packed))
        return logits.float().log_softmax(-1), frames


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Initialise whatever parts of a model are given.

    | part | init | source |
    |---|---|---|
    | convolutions | Kaiming normal, fan in; optionally smoothed | fairseq |
    | linear layers of the transformer | N(0, 0.02), bias 0 | fairseq `init_bert_params` |
    | positional convolution | N(0, sqrt(4 / (kernel D))), bias 0, at its construction | fairseq |
    | mask vector | U(0, 1) | fairseq |
    | quantizer | projector N(0, 1), bias 0; codebook U(0, 1) | fairseq |
    | CTC head | Xavier uniform, bias 0 | fairseq |
    | feature projection, out_linear, project_q, norms | PyTorch's default | fairseq |
    """
    for module in model.modules():
        if isinstance(module, Wav2Vec2):
            _init_convolutions(module)
            nn.init.uniform_(module.mask_vector)
        elif isinstance(module, TransformerBlock):
            for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, GumbelVectorQuantizer):
            nn.init.normal_(module.projector.weight)
            nn.init.zeros_(module.projector.bias)
            nn.init.uniform_(module.codebook)
        elif isinstance(module, CTCHead):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _init_convolutions(model: Wav2Vec2) -> None:
    smoothing = model.config.conv_init_smoothing
    for i, weight in enumerate(model.feature_encoder.conv_weights()):
        nn.init.kaiming_normal_(weight)
        if i > 0 and smoothing > 0:
            # Kernels of nearly equal taps: low-pass on the way down, so that untrained features already move slowly.
            # The response to a constant stays what it was.
            weight.copy_((1 - smoothing) * weight + smoothing * weight.mean(-1, keepdim=True))
