"""What is drawn at random before a step: spans to mask, distractors, layers to drop (paper sections 3.1, 3.2).

Everything here runs on the host, from a generator keyed by what it is for, and enters the model as index tensors. So
the shapes of a step are known without asking the device, a resumed run draws the same, and any other implementation can
be given the same draws.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

StepKey = tuple[int, ...]
"""The seed, and what tells an optimiser step from the others, such as (epoch, which step of it)."""


class Utterances(Protocol):
    """What a batch says of its utterances to a model that draws for it, on the host; ``data.batch.Batch`` does."""

    lengths: Tensor
    """(B,) int64 samples."""
    offsets: Tensor
    """(B,) int64 samples between the start of an utterance and that of its crop."""
    ids: list[str]
    epochs: list[int]
    """How many times each utterance has come before."""


def keyed_generator(*key: int | str) -> torch.Generator:
    """A host generator that depends on the key alone, such as (seed, epoch, utterance id)."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def utterance_generators(batch: Utterances, step_key: StepKey | None) -> list[torch.Generator]:
    """A host generator for each utterance: by (seed, epoch, id) in training, by the id alone in validation (None)."""
    if step_key is None:
        return [keyed_generator("valid", name) for name in batch.ids]
    return [keyed_generator(step_key[0], epoch, name) for epoch, name in zip(batch.epochs, batch.ids, strict=True)]


def sample_span_mask(length: int, prob: float, span: int, rng: torch.Generator, *, min_spans: int = 2) -> Tensor:
    """Draw the masked frames of one utterance (fairseq ``compute_mask_indices``, static length, overlap allowed).

    ``floor(prob * length / span + u)`` spans start at distinct frames of ``[0, length - span)``; they may overlap, so
    with 0.65 and 10 about 49 % of the frames are masked, not 65 %.

    Args:
        length: valid frames.
        prob: share of frames that would be masked if no spans overlapped (the paper's 0.065 starts, times span).
        span: frames per span.
        rng: host generator.
        min_spans: at least so many, however short the utterance.

    Returns:
        (length,) bool, True where masked. At least two frames are (with the default ``min_spans``), and never the last
        one, as in the published code (which below 13 frames of the defaults masks more).

    Raises:
        ValueError: the utterance has fewer than three frames, so that no target could have a distractor.
    """
    if length < 3:
        raise ValueError(f"masking needs utterances of at least 3 frames, got {length}; drop shorter audio")
    n_spans = int(prob * length / span + torch.rand((), generator=rng).item())
    return _place_spans(length, min(max(n_spans, min_spans), length - 1), span, rng)


def _place_spans(length: int, n_spans: int, span: int, rng: torch.Generator) -> Tensor:
    candidates = length - span if length - span > n_spans else max(length - n_spans - 1, n_spans)
    starts = torch.randperm(candidates, generator=rng)[:n_spans]
    covered = (starts[:, None] + torch.arange(span)).flatten()
    mask = torch.zeros(length, dtype=torch.bool)
    mask[covered[covered < length - 1]] = True
    return mask


def sample_channel_masks(
    width: int, prob: float, span: int, rngs: Sequence[torch.Generator], batch_rng: torch.Generator
) -> list[Tensor]:
    """Draw the channels of each utterance that are set to zero in fine-tuning (fairseq ``mask_channel_prob``).

    As published: the number of spans, ``floor(prob * width / span + u)``, is drawn once for the batch and may be 0, and
    rows with more channels masked than others lose some.

    Args:
        width: channels.
        prob: share of channels that would be masked if no spans overlapped.
        span: channels per span.
        rngs: a host generator for each utterance.
        batch_rng: for what the batch has in common.

    Returns:
        (width,) bool for each utterance.
    """
    n_spans = int(prob * width / span + torch.rand((), generator=batch_rng).item())
    return equalize_masks([_place_spans(width, n_spans, span, rng) for rng in rngs], rngs)


def equalize_masks(masks: Sequence[Tensor], rngs: Sequence[torch.Generator]) -> list[Tensor]:
    """Unmask frames at random until every row has as many masked as the row with fewest (``require_same_masks``)."""
    target = min(int(mask.sum()) for mask in masks)
    rows = []
    for mask, rng in zip(masks, rngs, strict=True):
        masked = mask.nonzero().flatten()
        kept = torch.zeros_like(mask)
        kept[masked[torch.randperm(len(masked), generator=rng)[:target]]] = True
        rows.append(kept)
    return rows


def sample_distractors(count: int, num_distractors: int, rng: torch.Generator) -> Tensor:
    """Draw, for each of an utterance's masked frames, distractors among its other masked frames, with replacement.

    Args:
        count: masked frames N of the utterance, at least 2.
        num_distractors: K.
        rng: host generator.

    Returns:
        (N, K) int32 indices into the utterance's masked frames; row t never holds t.
    """
    drawn = torch.randint(count - 1, (count, num_distractors), generator=rng, dtype=torch.int32)
    return drawn.add_(drawn >= torch.arange(count, dtype=torch.int32)[:, None])


def sample_layers(n_layer: int, layer_drop: float, step_key: StepKey | None) -> tuple[bool, ...] | None:
    """Which blocks of a training step run (LayerDrop); None for all: in validation, or when none is ever dropped."""
    if step_key is None or layer_drop == 0:
        return None
    rng = keyed_generator(*step_key, "layers")
    return tuple((torch.rand(n_layer, generator=rng) >= layer_drop).tolist())


def slices(counts: Sequence[int]) -> list[slice]:
    """Consecutive slices of so many elements each."""
    return [slice(start, end) for start, end in itertools.pairwise(itertools.accumulate(counts, initial=0))]


@dataclass(kw_only=True)
class Draws:
    """The random part of one step's input, as indices; an objective's own draws add fields."""

    covered: Tensor | None = None
    """(N,) int64: frames that the context network does not see, as positions in the batch's frames laid end to end."""
    channels: Tensor | None = None
    """(B, D) bool: channels set to zero throughout an utterance."""
    keep_layers: tuple[bool, ...] | None = None
    """Which transformer blocks run; None for all."""

    def to(self, device: torch.device | str) -> Self:
        """The same draws with their tensors on a device; a copy from pinned memory is not waited for."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same draws with their tensors in pinned memory."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """A tensor that stands for two things is moved once."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {key: move(tensor) for key, tensor in {id(tensor): tensor for tensor in tensors.values()}.items()}
        changes: dict[str, Any] = {name: moved[id(tensor)] for name, tensor in tensors.items()}
        return replace(self, **changes)


@dataclass(kw_only=True)
class ContrastiveDraws(Draws):
    """With targets and distractors. M is the number of masked frames of the whole batch."""

    masked: Tensor
    """(M,) int64: masked frames, whose targets are to be found, as positions like ``covered``; both are the same but in
    a baseline."""
    counts: tuple[int, ...]
    """Masked frames of each utterance, on the host; they sum to M."""
    distractors: Tensor
    """(M, K) int32: for each masked frame, positions among its own utterance's masked frames."""
    n_frames: int
    """All frames of the batch."""
    sub_batches: tuple[int, ...] = ()
    """Utterances of each part of the batch that the batch-wise losses are taken of; empty: of all together."""

    def parts(self) -> list[slice]:
        """Each sub-batch as a slice of the utterances."""
        return slices(self.sub_batches or (len(self.counts),))


def draw_targets(
    masks: Sequence[Tensor],
    rngs: Sequence[torch.Generator],
    num_distractors: int,
    keep_layers: tuple[bool, ...] | None = None,
    sub_batches: tuple[int, ...] = (),
) -> ContrastiveDraws:
    """Turn the masks of a batch's utterances into the index tensors of a step, drawing distractors on the way."""
    counts = tuple(int(mask.sum()) for mask in masks)
    masked = torch.cat(list(masks)).nonzero().flatten()
    distractors = [sample_distractors(n, num_distractors, rng) for n, rng in zip(counts, rngs, strict=True)]
    return ContrastiveDraws(
        masked=masked,
        counts=counts,
        distractors=torch.cat(distractors),
        covered=masked,
        n_frames=sum(len(mask) for mask in masks),
        keep_layers=keep_layers,
        sub_batches=sub_batches,
    )


def cut_batch(samples: Sequence[int], longest: int) -> tuple[int, ...]:
    """How many utterances, in their order, make up each part of a batch of at most so many samples, padding counted."""
    counts: list[int] = []
    widest = 0
    for length in samples:
        widest = max(widest, length)
        if counts and (counts[-1] + 1) * widest <= longest:
            counts[-1] += 1
        else:
            counts.append(1)
            widest = length
    return tuple(counts)
