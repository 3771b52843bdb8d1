"""The contrastive objective around the encoder: quantizer, losses and metrics (paper section 3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.errors import Positive, Range, ShareBelowOne, UsageError, Width
from w2v2.model.initialization import init_weights
from w2v2.model.losses import contrastive_logits, contrastive_loss, diversity_loss, feature_penalty
from w2v2.model.masking import (
    ContrastiveDraws,
    StepKey,
    Utterances,
    cut_batch,
    draw_targets,
    equalize_masks,
    sample_layers,
    slices,
    utterance_generators,
)
from w2v2.model.neighbourhood import Neighbourhood
from w2v2.model.objective import SSLOutput
from w2v2.model.packing import Rows, repeat_rows, to_device, unpack
from w2v2.model.precision import low_precision
from w2v2.model.quantizer import GumbelVectorQuantizer, QuantizerOutput, gumbel_temperature, perplexity
from w2v2.model.transformer import take
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2, Wav2Vec2Config


class Wav2Vec2ForPretraining(Wav2Vec2):
    """The encoder with quantizer and contrastive objective."""

    config: ContrastiveConfig

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config)
        target_dim = config.n_embd if config.target_features == "projected" else config.conv_channels[-1]
        self.quantizer = config.build_quantizer(target_dim)
        self.project_q: nn.Linear | None = None
        code_dim: int = self.quantizer.output_dim  # type: ignore[assignment]
        if config.similarity_dim is not None:
            self.project_q = nn.Linear(code_dim, config.similarity_dim)
        self.out_linear = nn.Linear(config.n_embd, config.similarity_dim or code_dim)
        init_weights(self.quantizer)
        self.neighbourhood: Neighbourhood | None = None
        if config.neighbourhood:
            shape = config.conv_channels[-1], config.n_embd, config.neighbourhood, config.neighbourhood_dim
            self.neighbourhood = Neighbourhood(*shape)
            self.feature_projection.norm.requires_grad_(False)  # as the convolutions: the targets are made of both

    def draw(self, batch: Utterances, step_key: StepKey | None = None) -> ContrastiveDraws:
        """Draw masks, distractors and layers for a batch, on the host.

        In training each utterance of a sub-batch gets as many masked frames as the others, and blocks are dropped; in
        validation masks are left as drawn, so that an utterance's do not depend on its batch.
        """
        config, samples, rngs = self.config, batch.lengths.tolist(), utterance_generators(batch, step_key)
        masks = config.sample_masks(samples, rngs)
        if step_key is None:
            return draw_targets(masks, rngs, config.num_distractors)
        sub_batches = config.sub_batches(samples)
        masks = [mask for part in slices(sub_batches) for mask in equalize_masks(masks[part], rngs[part])]
        keep_layers = sample_layers(config.n_layer, config.layer_drop, step_key)
        return draw_targets(masks, rngs, config.num_distractors, keep_layers, sub_batches)

    def baseline(self, draws: ContrastiveDraws) -> ContrastiveDraws:
        """The same targets and distractors with every frame covered: what can be told without any context."""
        return replace(draws, covered=torch.arange(draws.n_frames, device=draws.masked.device))

    def forward(  # type: ignore[override]
        self, audio: Tensor, draws: ContrastiveDraws, lengths: Sequence[int] | None = None, *, step: int = 0
    ) -> SSLOutput:
        """Losses and metrics of a batch.

        Args:
            audio: (B, S) float32; lengths as for the encoder.
            draws: on the audio's device.
            step: optimiser steps so far, for the Gumbel temperature.
        """
        config = self.config
        frames, packed = self.frame_lengths(audio, lengths)
        features = self.feature_encoder(audio, lengths if packed else None)  # (B, T, C), or packed (1, sum of T, C)
        normalised, projected = self.feature_projection(features, packed)  # C, D wide
        rows, beside = Rows(draws.masked, draws.counts), {}
        x = self.feature_projection.dropout(projected)
        wanted = None if self.neighbourhood else rows
        x = self.contextualize(x, packed, covered=draws.covered, keep_layers=draws.keep_layers, rows=wanted)
        if self.neighbourhood is not None:
            error = self.neighbourhood(x, normalised, draws.masked, frames, draws.counts, packed)
            beside["neighbourhood"], x = error, take(x, rows)
        with low_precision(x, self.out_linear) as (x, out_linear):
            context = out_linear(x.squeeze(0))  # (1, M, D) -> (M, P)

        source = self._to_quantize(normalised, projected)[draws.masked]  # (M, C or D)
        source = F.dropout(source, config.dropout_features, self.training)
        temperature = gumbel_temperature(step, config.gumbel_start, config.gumbel_end, config.gumbel_decay)
        masked = [sum(draws.counts[part]) for part in draws.parts()]
        quantized = [self.quantizer(part, temperature) for part in source.split(masked)]
        codes = _laid([q.codes for q in quantized])  # (M, G)
        targets = _laid([q.quantized for q in quantized])
        targets = targets if self.project_q is None else self.project_q(targets.to(context.dtype))  # (M, P)

        logits = contrastive_logits(context, targets, codes, draws.distractors, draws.counts, config.logit_temperature)
        contrastive = contrastive_loss(logits)
        diversity = [
            diversity_loss(q.prob_perplexity, q.probs_sum.numel(), n)
            for q, n in zip(quantized, masked, strict=True)
            if q.prob_perplexity is not None and q.probs_sum is not None
        ]
        return SSLOutput(
            losses={
                "contrastive": contrastive.loss,
                **({"diversity": _total(diversity)} if diversity else {}),
                "feature_penalty": feature_penalty(features, frames, draws.counts),
                **beside,
            },
            metrics={
                "contrastive": contrastive.loss.detach().double(),
                "correct": contrastive.correct.detach(),
                "identical": contrastive.identical.detach(),
                "distinct_codes": _distinct_codes(codes, draws.counts),
                **_code_sums(quantized),
                **self._sizes(frames, len(draws.masked), temperature, audio.device),
            },
            num_targets=len(draws.masked),
        )

    def _sizes(self, frames: list[int], masked: int, temperature: float, device: torch.device) -> dict[str, Tensor]:
        """What the host knows already, as sums on the device, in one copy."""
        sizes: dict[str, float] = {"utterances": len(frames), "frames": sum(frames), "masked": masked}
        if self.training:
            sizes["temperature"] = temperature * masked
        on_device = to_device(torch.tensor(list(sizes.values()), dtype=torch.float32), device)
        return dict(zip(sizes, on_device.unbind(), strict=True))

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
        nats = (total["contrastive"] / masked).item()
        figures = {
            "contrastive_bits": nats / math.log(2),
            "contrastive_of_chance": nats / math.log(1 + self.config.num_distractors),
            "accuracy": (total["correct"] / masked).item(),
            "identical_distractors": (total["identical"] / masked).item(),
        }
        used = {kind: total[f"{kind}s"] / masked for kind in ("prob", "code") if f"{kind}s" in total}  # (G, V)
        figures |= {f"{kind}_perplexity": perplexity(rows).item() for kind, rows in used.items()}
        for kind, rows in used.items():
            figures |= {f"{kind}_perplexity_{i}": perplexity(row[None]).item() for i, row in enumerate(rows)}
        if "code" in used:
            figures["dead_codes"] = (used["code"] == 0).sum().item()
        figures["codes_per_utterance"] = (total["distinct_codes"] / total["utterances"]).item()
        figures["masked_fraction"] = (masked / total["frames"]).item()
        if "temperature" in total:
            figures["temperature"] = (total["temperature"] / masked).item()
        elif "prob" in used:
            figures["diversity"] = diversity_loss(perplexity(used["prob"]), used["prob"].numel(), 1).item()
        if "baseline/correct" in total:
            figures["accuracy_all_masked"] = (total["baseline/correct"] / total["baseline/masked"]).item()
        return figures


def _laid(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _code_sums(quantized: Sequence[QuantizerOutput]) -> dict[str, Tensor]:
    """Use of the codes, by whatever the quantizer tells of it."""
    parts = {"probs": [q.probs_sum for q in quantized], "codes": [q.code_counts for q in quantized]}
    return {name: _total([t for t in sums if t is not None]) for name, sums in parts.items() if sums[0] is not None}


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _distinct_codes(codes: Tensor, counts: Sequence[int]) -> Tensor:
    """Number of distinct code tuples within each utterance, summed over utterances. codes (M, G)."""
    ids = repeat_rows(torch.arange(len(counts), device=codes.device), counts)
    for group in codes.unbind(-1):  # a hash that wraps around: unlike a mixed-radix number, it has room for any G
        ids = torch.add(group, ids, alpha=6364136223846793005)
    ordered = ids.sort().values
    return 1.0 + (ordered[1:] != ordered[:-1]).sum()


@dataclass(kw_only=True)
class ContrastiveConfig(Wav2Vec2Config):
    """The encoder's, and everything that decides the contrastive objective. Defaults are those of `base`."""

    dropout_features: ShareBelowOne = 0.1
    """On the features that the quantizer gets (``dropout_features``)."""
    target_features: str = "projected"
    """What is quantised: ``projected``, D wide, as in `base`; ``encoder``, the normalised C-wide features (paper)."""
    n_groups: Width = 2
    """Codebooks G (``latent_groups``)."""
    n_entries: Width = 320
    """Entries V of each codebook (``latent_vars``)."""
    codebook_dim: Width = 384
    """Width of an entry (``latent_dim / latent_groups``)."""
    similarity_dim: Width | None = None
    """Width of the space in which contexts and targets meet (``final_dim``); None: the quantizer's own, unprojected."""
    num_distractors: Width = 100
    """Distractors K for each target (``num_negatives``)."""
    logit_temperature: Positive = 0.1
    """Cosine similarities are divided by it (``logit_temp``)."""
    gumbel_start: Positive = 2.0
    """Gumbel temperature at step 0 (``latent_temp[0]``)."""
    gumbel_end: Positive = 0.5
    """Its lower bound (``latent_temp[1]``)."""
    gumbel_decay: Annotated[float, Range(0, 1, above=True)] = 0.999995
    """Its factor per optimiser step (``latent_temp[2]``)."""
    neighbourhood: Annotated[int, Range(0, 100_000)] = 0
    """Frames around each, itself among them, whose conv features it has to tell: odd, 9 in ``tiny``; 0: none, as in the
    paper. For convolutions that are warm and frozen (``model/neighbourhood.py``)."""
    neighbourhood_dim: Width = 120
    """Principal components of these features that are told."""
    sub_batch_seconds: Positive | None = 87.5
    """Batches of more audio are cut into parts of at most this, of which the diversity loss and the equal numbers of
    masked frames are taken: a batch that fills a larger GPU has the objective of the published one (``max_tokens`` 1.4M
    samples). None: of the whole batch."""

    def check(self) -> None:
        """Refuse a model that cannot be built or trained; :class:`UsageError` names the field."""
        super().check()
        if self.target_features not in ("projected", "encoder"):
            raise UsageError(f"`model.target_features` must be 'projected' or 'encoder', got {self.target_features!r}")
        if self.neighbourhood and self.neighbourhood % 2 == 0:
            raise UsageError(f"`model.neighbourhood` must be odd, or 0, got {self.neighbourhood}")

    def build(self) -> Wav2Vec2ForPretraining:
        """The pretraining model, freshly initialised from torch's global generator."""
        return Wav2Vec2ForPretraining(self)

    def build_quantizer(self, input_dim: int) -> nn.Module:
        """Module of (x (M, input_dim), temperature) -> QuantizerOutput, with an ``output_dim``."""
        return GumbelVectorQuantizer(input_dim, self.n_groups, self.n_entries, self.codebook_dim)

    def sub_batches(self, samples: Sequence[int]) -> tuple[int, ...]:
        """How many utterances, in their order, make up each sub-batch of a batch of these lengths."""
        if self.sub_batch_seconds is None:
            return (len(samples),)
        # Resampling leaves a sample more or less in some; that is no reason to cut a batch in two.
        return cut_batch(samples, round(self.sub_batch_seconds * SAMPLE_RATE * 1.001))
