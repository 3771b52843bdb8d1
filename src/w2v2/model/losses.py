"""The losses as pure fp32 functions that return sums over the targets: masked frames (paper 3.2), utterances for CTC.

The caller divides once, by the number of targets of the whole optimiser step: see ``training/task.py``.
Legend: B utterances, M masked frames of all of them, N of one, K distractors, P similarity space, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from w2v2.model.packing import pack, to_device, unpack


def contrastive_logits(
    context: Tensor,
    targets: Tensor,
    codes: Tensor,
    distractors: Tensor,
    counts: Sequence[int],
    temperature: float = 0.1,
) -> Tensor:
    """Similarity of each masked frame's context with its target and its distractors.

    All cosines of an utterance come from one matrix product, from which the distractors' are picked: N * N scalars
    rather than N * K gathered vectors.

    Args:
        context: (M, P) context vectors at the masked frames.
        targets: (M, P) quantised targets of the same frames.
        codes: (M, G) code indices the targets were made of, as sampled.
        distractors: (M, K) positions among the utterance's own masked frames.
        counts: masked frames of each utterance.
        temperature: of the softmax (kappa; fairseq ``logit_temp``).

    Returns:
        (M, 1 + K) float32, the target at 0. Distractors made of the target's own codes are -inf.
    """
    with torch.autocast(context.device.type, enabled=False):
        vectors = F.normalize(torch.cat([context, targets]).float(), dim=-1, eps=1e-8)
        c, q = (unpack(x[None], counts) for x in vectors.chunk(2))
        cosine = torch.bmm(c, q.mT) / temperature  # (B, N, P), (B, P, N) -> (B, N, N)
        others = unpack(distractors[None], counts).long()  # (B, N, K)
        positive = cosine.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        negatives = cosine.gather(2, others)
        row_codes = unpack(codes[None], counts)  # (B, N, G)
        same = [
            group.gather(1, others.flatten(1)).view_as(others) == group.unsqueeze(-1) for group in row_codes.unbind(-1)
        ]
        negatives = negatives.masked_fill(functools.reduce(torch.logical_and, same), float("-inf"))
        return pack(torch.cat([positive, negatives], dim=-1), counts).squeeze(0)


@dataclass
class ContrastiveOutput:
    """Sums over the M masked frames."""

    loss: Tensor
    """Cross-entropy in nats, with gradient."""
    correct: Tensor
    """Frames whose target scores higher than every distractor that is not identical to it, and has at least one such.

    Ties are no hits, so neither a constant model nor one whose targets are all the same scores any.
    """
    identical: Tensor
    """Share of distractors identical to the target, summed over frames."""


def contrastive_loss(logits: Tensor) -> ContrastiveOutput:
    """Cross-entropy of (M, 1 + K) logits with the target at 0; a frame whose distractors are all identical costs 0."""
    logits = logits.float()
    hardest = logits[:, 1:].amax(-1)
    return ContrastiveOutput(
        loss=(torch.logsumexp(logits, -1) - logits[:, 0]).sum(),
        correct=((logits[:, 0] > hardest) & (hardest > -torch.inf)).sum(),
        identical=logits[:, 1:].isneginf().sum() / (logits.shape[1] - 1),
    )


def diversity_loss(prob_perplexity: Tensor, n_codes: int, num_targets: int) -> Tensor:
    """``(G V - perplexity) / (G V)`` times the number of targets: minimised, so perplexity is maximised.

    Args:
        prob_perplexity: scalar, summed over groups, in [G, G V].
        n_codes: G V.
        num_targets: M of this micro-batch.
    """
    return (n_codes - prob_perplexity.float()) * (num_targets / n_codes)


def feature_penalty(features: Tensor, frames: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Mean square of the conv stack's raw output over all frames, times the number of targets (``features_pen``).

    Of each utterance on its own, so that it does not depend on the batch; for crops of one length with equal numbers of
    masked frames, as in training, that is the mean over the batch.

    Args:
        features: (B, T, C), or packed.
        frames, counts: frames and targets of each utterance.
    """
    weights = torch.cat(
        [torch.full((n,), count / n, dtype=torch.float32) for count, n in zip(counts, frames, strict=True)]
    )
    with torch.autocast(features.device.type, enabled=False):
        return features.float().square().mean(-1).flatten() @ to_device(weights, features.device)


def ctc_loss(
    log_probs: Tensor, frames: Sequence[int], targets: Tensor, target_lengths: Tensor, *, blank: int
) -> Tensor:
    """CTC in nats, summed over utterances (fairseq ``ctc``, ``zero_infinity``).

    Args:
        log_probs: (B, T, labels) float32.
        frames: of each utterance.
        targets: (B, U) int64: with this type torch takes its own kernel, as published, not cuDNN's.
        target_lengths: (B,) int64, on the host.
        blank: id of the blank.

    Returns:
        Scalar; utterances whose labels do not fit in their frames cost nothing.
    """
    return F.ctc_loss(
        log_probs.float().transpose(0, 1),  # (B, T, labels) -> (T, B, labels)
        targets,
        torch.tensor(frames),
        target_lengths,
        blank=blank,
        reduction="sum",
        zero_infinity=True,
    )
