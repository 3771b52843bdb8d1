"""Cuts to batches: bucketed by duration, shared out over ranks, cropped, decoded, resampled, collated."""

from __future__ import annotations

import atexit
import itertools
import logging
import random
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lhotse import MonoCut
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from w2v2.config import DataConfig, bad_share
from w2v2.data.audio import SAMPLE_RATE, AudioError, FloatArray, load_audio
from w2v2.data.corpora import Split, Splits
from w2v2.data.storage import UnreachableError, read_ranges
from w2v2.errors import JobError, UsageError

log = logging.getLogger(__name__)

Encode = Callable[[str], list[int]]
Fits = Callable[[float, str], bool]
"""(seconds, transcript): whether CTC can emit the transcript's labels in the frames of so much audio."""
_BINS_FROM = 10_000


@dataclass
class Batch:
    """Some utterances. B of them, S samples of the longest, U labels of the longest."""

    audio: Tensor
    """(B, S) float32 at 16 kHz, padded with zeros."""
    lengths: Tensor
    """(B,) int64 samples; stays on the host."""
    ids: list[str]
    """Utterance ids."""
    passes: list[int]
    """How many times each utterance has come before: what crops and masks are drawn by."""
    targets: Tensor | None = None
    """(B, U) int64 labels, padded with zeros."""
    target_lengths: Tensor | None = None
    """(B,) int64 labels of each utterance."""
    texts: list[str | None] = field(default_factory=list)
    """Transcripts as they are; None: there is none."""
    speakers: list[str | None] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Utterances that could not be read and are left out: what was wrong, by id. B may be 0."""


class SpeechDataset(Dataset[Batch]):
    """Turns (epoch, cuts), which a sampler chose, into a :class:`Batch`.

    Args:
        seed: of the crops.
        max_seconds: crop longer utterances to this; None: never crop.
        same_length: crop all to the shortest of the batch, at an own random place each, as pretraining wants.
        normalize: whether each whole utterance gets zero mean and unit variance, before it is cropped.
        encode: transcript -> labels, for targets.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        max_seconds: float | None = None,
        same_length: bool = False,
        normalize: bool = False,
        encode: Encode | None = None,
    ) -> None:
        self.seed, self.max_seconds, self.same_length = seed, max_seconds, same_length
        self.normalize, self.encode = normalize, encode

    def __getitem__(self, item: tuple[int, list[MonoCut]]) -> Batch:
        epoch, cuts = item
        limit = self.max_seconds or float("inf")
        if self.same_length:
            limit = min(limit, min(cut.duration for cut in cuts))
        passes = [(cut.custom or {}).get("pass", epoch) for cut in cuts]
        rows: list[FloatArray] = []
        good: list[int] = []
        bad = {}
        encoded = _shard_bytes(cuts)
        for i, cut in enumerate(cuts):
            try:
                data = encoded.get(i)
                if isinstance(data, OSError):
                    raise AudioError(f"{cut.recording.sources[0].source} ({cut.id}): {data}")
                rows.append(self._load(cut, passes[i], limit, data))
                good.append(i)
            except AudioError as error:
                bad[cut.id] = str(error)
        if self.same_length and rows:  # rounding at other rates may leave one sample more in some
            shortest = min(len(row) for row in rows)
            rows = [row[:shortest] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        audio = torch.zeros(len(rows), max((len(row) for row in rows), default=0))
        for i, row in enumerate(rows):
            audio[i, : len(row)] = torch.from_numpy(row)
        said = [cuts[i].supervisions[0] for i in good]
        batch = Batch(
            audio=audio,
            lengths=lengths,
            ids=[cuts[i].id for i in good],
            passes=[passes[i] for i in good],
            texts=[supervision.text for supervision in said],
            speakers=[supervision.speaker for supervision in said],
            bad=bad,
        )
        if self.encode is not None:
            labels = [torch.tensor(self.encode(text or ""), dtype=torch.long) for text in batch.texts]
            batch.targets = torch.nn.utils.rnn.pad_sequence(labels or [lengths], batch_first=True)[: len(labels)]
            batch.target_lengths = torch.tensor([len(row) for row in labels], dtype=torch.long)
        return batch

    def _load(self, cut: MonoCut, number: int, limit: float, data: bytes | None) -> FloatArray:
        if fault := _fault(cut):
            raise AudioError(fault)
        duration = min(cut.duration, limit)
        # Same-length batches are for training, so crops move with the pass; elsewhere they depend on the id alone.
        key = f"{self.seed}/{number}/{cut.id}" if self.same_length else cut.id
        offset = random.Random(key).uniform(0, cut.duration - duration)
        if not self.normalize:
            return load_audio(cut, offset, duration, data)
        samples = load_audio(cut, data=data)
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-5)
        start = round(offset * SAMPLE_RATE)
        part: FloatArray = samples[start : start + round(duration * SAMPLE_RATE)]
        return part


def _fault(cut: MonoCut) -> str:
    """What was wrong with its file's header, if anything (``read_corpus``)."""
    found: str = (cut.custom or {}).get("unreadable", "")
    return found


def _shard_bytes(cuts: list[MonoCut]) -> dict[int, bytes | OSError]:
    """Encoded audio of the cuts that lie in shards, by place in the list; fetched together where they are remote."""
    places = {
        i: (cut.recording.sources[0].source, cut.custom["shard_offset"], cut.custom["shard_bytes"])
        for i, cut in enumerate(cuts)
        if cut.custom and "shard_offset" in cut.custom
    }
    if not places:
        return {}
    try:
        return dict(zip(places, read_ranges(list(places.values())), strict=True))
    except UnreachableError:
        raise
    except OSError as error:
        if len(places) == 1:
            return dict.fromkeys(places, error)
        return {i: _shard_bytes([cuts[i]])[0] for i in places}  # each by itself tells which it is


@dataclass
class _CropConstraint(TimeConstraint):
    """Batch size in seconds, where no utterance counts for more than its crop; a longer one is alone."""

    max_seconds: float | None = None
    same_length: bool = False
    """Whether all are cropped to the shortest, so that a batch is never too large."""

    def measure_length(self, example: Cut) -> float:
        limit = float("inf") if self.max_seconds is None else self.max_seconds
        return min(float(example.duration), limit)

    def add(self, example: Cut) -> None:
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


class _Passes:
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
            if cut.duration < self.config.min_seconds and not _fault(cut):
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
class _Every:
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
        cuts: _Passes | _Every,
        constraint: _CropConstraint,
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


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a job; the run still needs its workers to save itself.

    A worker ends when it is told to, when its parent is gone, or a minute after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


@atexit.register
def stop_workers() -> None:
    """End the workers of all loaders; at the latest before Python asks them to end, by SIGTERM, and waits for them."""
    for loader in list(_loaders):
        iterator: Any = loader._iterator
        loader._iterator = None
        if iterator is not None:  # whoever else may hold it
            iterator._shutdown_workers()


_loaders: weakref.WeakSet[SpeechLoader] = weakref.WeakSet()


class SpeechLoader(DataLoader[Batch]):
    """Batches, with an account of the utterances that could not be read. Over the passes, each rank meets all of them.

    Raises:
        JobError: while iterating, when there are more of them than ``allowed``.
    """

    def __init__(self, *args: Any, allowed: int, said: str, **kwargs: Any) -> None:
        # Workers are forked once, before the first backward pass: in a process whose other threads come and go, as
        # autograd's do, a fork now and then gives a child that waits for a lock for ever (seen with CPython 3.11).
        kwargs |= {"persistent_workers": kwargs["num_workers"] > 0, "worker_init_fn": _leave_signals_to_the_run}
        super().__init__(*args, **kwargs)
        _loaders.add(self)
        self.allowed, self.said = allowed, said
        self.bad: dict[str, str] = {}
        self.waited = 0.0
        """Seconds that whoever iterates has waited for batches, the first of a pass not counted."""

    def start_workers(self) -> None:
        """Fork the workers now rather than at the first batch."""
        if self.num_workers:
            super().__iter__()

    def __iter__(self) -> Any:
        bad = self.bad
        batches = super().__iter__()
        first = True
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += 0.0 if first else time.perf_counter() - asked
            first = False
            if batch is None:
                return
            for name, why in batch.bad.items():
                if name not in bad:
                    bad[name] = why
                    log.warning("left out, %d so far, at most %d are allowed: %s", len(bad), self.allowed, why)
            if len(bad) > self.allowed:
                raise JobError(
                    f"{len(bad)} utterances cannot be read, {self.said}: {'; '.join(bad.values())}; repair or remove "
                    "them, or prepare the corpus again"
                )
            yield batch


class SpeechDataModule(pl.LightningDataModule):
    """Loaders of a corpus for pretraining (``encode`` None: crops of one length) or fine-tuning (whole utterances).

    Args:
        splits: cuts by name.
        config: how to batch.
        seed: of order and crops.
        normalize: as for :class:`SpeechDataset`.
        encode: transcript -> labels.
        fits: whether a transcript's labels fit; those that do not are left out.
        skip: batches that a resumed run has already had of its first pass.
    """

    def __init__(
        self,
        splits: Splits,
        config: DataConfig,
        *,
        seed: int = 0,
        normalize: bool = False,
        encode: Encode | None = None,
        fits: Fits | None = None,
        skip: int = 0,
    ) -> None:
        super().__init__()
        self.fits = fits
        self.config, self.seed, self.normalize, self.encode = config, seed, normalize, encode
        self.skip = skip
        self.splits = splits
        for name in ("train", "valid"):
            if name in splits:
                self._passes(name)

    def _passes(self, name: str, *, shuffle: bool = False) -> _Passes:
        labelled = self.encode is not None
        return _Passes(
            name, self.splits[name], self.config, labelled=labelled, shuffle=shuffle, seed=self.seed, fits=self.fits
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, bucketed, without the last partial batches of an epoch's end being lost."""
        pretraining = self.encode is None
        max_seconds = self.config.max_seconds if pretraining else None
        dataset = SpeechDataset(
            seed=self.seed,
            max_seconds=max_seconds,
            same_length=pretraining,
            normalize=self.normalize,
            encode=self.encode,
        )
        # Lightning takes the first batches of a resumed run before it says which pass that is in.
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        passes = self._passes("train", shuffle=True)
        return _loader(
            dataset, passes, self.config, max_seconds, shuffle=True, seed=self.seed, skip=self.skip, epoch=epoch
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The valid split in a fixed order; its workers start at once, before training does."""
        loader = self.eval_dataloader("valid")
        loader.start_workers()
        return loader

    def eval_dataloader(self, split: str) -> SpeechLoader:
        """Any split in a fixed order; for pretraining, crops that depend on the utterance id alone."""
        max_seconds = self.config.max_seconds if self.encode is None else None
        dataset = SpeechDataset(max_seconds=max_seconds, normalize=self.normalize, encode=self.encode)
        return _loader(dataset, self._passes(split), self.config, max_seconds, seed=self.seed)


def whole_utterances(name: str, split: Split, config: DataConfig) -> SpeechLoader:
    """Every utterance of a split exactly once, as it is: for evaluation and features.

    Nothing is left out for its length or its transcript, nothing cropped or normalised, and there are no targets. Only
    recordings that cannot be read are missing, named in ``bad``, as far as ``max_bad`` allows.
    """
    return _loader(SpeechDataset(), _Every(name, split), config, None, option="--max-bad")


def _loader(
    dataset: SpeechDataset,
    cuts: _Passes | _Every,
    config: DataConfig,
    max_seconds: float | None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    skip: int = 0,
    epoch: int = 0,
    option: str = "--data.max-bad",
) -> SpeechLoader:
    rank, world_size = _ranks()
    sampler = EpochSampler(
        cuts,
        _CropConstraint(max_duration=config.batch_seconds, max_seconds=max_seconds, same_length=dataset.same_length),
        num_buckets=config.num_buckets,
        buffer=config.shuffle_buffer,
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        skip=skip,
    )
    sampler.set_epoch(epoch)
    count = len(cuts.split)
    return SpeechLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        allowed=int(bad_share(config.max_bad) * count),
        said=f"more than {option} {config.max_bad} of {count} allows",
    )


def _ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
