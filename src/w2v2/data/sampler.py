"""Which cuts make up which batch of which rank, from metadata alone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lhotse import MonoCut
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

from w2v2.data.batch import Fits, unreadable_reason
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Split
from w2v2.errors import UsageError

log = logging.getLogger(__name__)


_BINS_FROM = 10_000


@dataclass
class CropConstraint(TimeConstraint):
    """Batch size in seconds, where no utterance counts for more than its crop; a longer one is alone."""

    max_seconds: float | None = None
    same_length: bool = False
    """Whether all are cropped to the shortest, so that a batch is never too large."""

    def measure_length(self, example: Cut) -> float:
        """Seconds of a cut that a batch gets."""
        limit = float("inf") if self.max_seconds is None else self.max_seconds
        return min(float(example.duration), limit)

    def add(self, example: Cut) -> None:
        """Count a cut in."""
        self.longest_seen: float = max(self.longest_seen, self.measure_length(example))
        self.num_cuts += 1

    def exceeded(self) -> bool:
        """Never by one utterance alone, of which lhotse would warn."""
        return self.num_cuts > 1 and bool(super().exceeded())

    def too_large(self, batch: list[MonoCut]) -> bool:
        """Whether some cuts, padded to the longest, are more than a batch may hold; one alone never is."""
        if self.same_length or len(batch) < 2:
            return False
        return bool(len(batch) * max(map(self.measure_length, batch)) > self.max_duration)


class Passes:
    """The usable cuts of a split, in the order of a pass; says once how many are not usable."""

    def __init__(
        self,
        name: str,
        split: Split,
        config: DataConfig,
        *,
        labelled: bool,
        shuffle: bool,
        seed: int = 0,
        fits: Fits | None = None,
    ) -> None:
        self.name, self.split, self.config = name, split, config
        self.labelled, self.shuffle, self.seed = labelled, shuffle, seed
        self.fits = fits
        self.epoch = 0
        self.told = False
        if next(iter(self.usable(split, {})), None) is None:
            kind = "with a transcript " if labelled else ""
            raise UsageError(
                f"no utterance {kind}of the {name} split is as long as --data.min-seconds {config.min_seconds:g}; "
                "lower it, or add audio"
            )

    def usable(self, cuts: Iterable[MonoCut], left_out: dict[str, int]) -> Iterator[MonoCut]:
        """Cuts that are long enough and, for fine-tuning, have a transcript that fits."""
        for cut in cuts:
            if cut.duration < self.config.min_seconds and not unreadable_reason(cut):
                why = f"shorter than {self.config.min_seconds:g} s"
            elif self.labelled and not (cut.supervisions[0].text or "").strip():
                why = "without a transcript"
            elif self.labelled and not self._fits(cut):
                why = "with more labels than CTC can emit in their frames"
            else:
                yield cut
                continue
            left_out[why] = left_out.get(why, 0) + 1

    def _fits(self, cut: MonoCut) -> bool:
        """By the labels themselves, or else by what was found for characters when the corpus was prepared."""
        if self.fits is None:
            return not (cut.custom or {}).get("ctc_infeasible")
        return self.fits(cut.duration, cut.supervisions[0].text)

    def __iter__(self) -> Iterator[MonoCut]:
        left_out: dict[str, int] = {}
        yield from self.usable(self.split.shuffled(self.seed, self.epoch) if self.shuffle else self.split, left_out)
        if not self.told:
            for why, count in left_out.items():
                log.info("%s: %d utterances %s left out", self.name, count, why)
        self.told = True


@dataclass
class Every:
    """All cuts of a split, in its order."""

    name: str
    split: Split
    epoch: int = 0

    def __iter__(self) -> Iterator[MonoCut]:
        return iter(self.split)


class _Steps(DynamicBucketingSampler):
    """Yields the batches of one step of all ranks together, not yet shared out; fewer than ranks at the end."""

    def __iter__(self) -> _Steps:
        self.late: list[MonoCut] = []
        self.full: list[list[MonoCut]] = []
        super().__iter__()
        return self

    def _next_batch(self) -> list[MonoCut]:
        """lhotse's batch, but for the last cut where that one is so long that the batch is too large with it.

        It reckons with cuts no longer than those before. Those taken out make batches of their own.
        """
        if self.full:
            return self.full.pop()
        try:
            batch = list(super()._next_batch())
        except StopIteration:
            batch, self.late = self.late, []
            if not batch:
                raise
            return batch
        if self.constraint.too_large(batch):
            cut = batch.pop()
            if self.constraint.too_large([*self.late, cut]):
                self.full.append(self.late)
                self.late = []
            self.late.append(cut)
        return batch

    def __next__(self) -> list[list[MonoCut]]:
        batches: list[list[MonoCut]] = []
        for _ in range(self.world_size):
            try:
                batches.append(self._next_batch())
            except StopIteration:
                break
        if not batches:
            raise StopIteration
        return batches


class EpochSampler:
    """Yields (epoch, cuts) of one rank's batches; the epoch travels beside the cuts to any worker.

    What is in a batch, and when it comes, depends on the split, the seed, the epoch and the number of ranks, not on the
    number of workers. Every cut of a pass goes to exactly one rank, and all ranks get the same number of batches.

    Args:
        cuts: of a pass; their ``epoch`` is set before each.
        constraint: when a batch is full.
        num_buckets: groups of similar duration.
        buffer: cuts held in the buckets: what shuffling can reach, and what bounds memory.
        shuffle, seed: of the order.
        rank, world_size: this process and how many there are.
        skip: batches of the first pass that a run had before it was resumed; nothing is decoded for them.
    """

    def __init__(
        self,
        cuts: Passes | Every,
        constraint: CropConstraint,
        *,
        num_buckets: int = 10,
        buffer: int = 10_000,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
    ) -> None:
        self.cuts, self.rank, self.world_size, self.skip = cuts, rank, world_size, skip
        self.epoch = 0
        sample = list(itertools.islice(cuts, _BINS_FROM))
        if len(sample) < world_size:
            raise UsageError(
                f"the {cuts.name} split has {len(sample)} utterances for {world_size} processes; use fewer processes"
            )
        buckets = min(num_buckets, len(sample))
        self.sampler = _Steps(
            cuts,
            constraint=constraint,
            duration_bins=estimate_duration_buckets(sample, buckets, constraint) if buckets > 1 else [],
            buffer_size=buffer,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, list[MonoCut]]]:
        skip, self.skip = self.skip, 0
        self.cuts.epoch = self.epoch
        self.sampler.set_epoch(self.epoch)
        for step in itertools.islice(whole_steps(self.sampler, self.world_size), skip, None):
            yield self.epoch, step[self.rank]


def whole_steps(steps: Iterable[list[list[MonoCut]]], world_size: int) -> Iterator[list[list[MonoCut]]]:
    """Steps with a batch for each rank, where the last one may have come with fewer.

    The missing batches are split off the last ones, a cut each, so that no batch grows. Only where the last full step
    has no cut to spare are the left-over cuts added to its batches.

    lhotse's own samplers repeat cuts there.

    Raises:
        UsageError: when there are fewer cuts than ranks.
    """
    last: list[list[MonoCut]] = []
    for step in steps:
        if len(step) == world_size:
            if last:
                yield last
            last = step
            continue
        while len(step) < world_size and (donor := max([*step, *last], key=len)) and len(donor) > 1:
            step.append([donor.pop()])
        if len(step) < world_size:
            if not last:  # weights below 1 may leave so few
                raise UsageError(
                    f"a pass has {len(step)} utterances for {world_size} processes; use fewer, or larger --data.weights"
                )
            for rest, batch in zip(itertools.chain.from_iterable(step), last, strict=False):
                batch.append(rest)
        else:
            if last:
                yield last
            last = step
    if last:
        yield last
