"""Cuts to batches: bucketed by duration, cropped, decoded, resampled, collated."""

from __future__ import annotations

import itertools
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import soundfile
import soxr
import torch
from lhotse import CutSet, MonoCut
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.base import TimeConstraint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from w2v2.config import DataConfig
from w2v2.data.corpora import Splits
from w2v2.errors import UsageError

SAMPLE_RATE = 16_000
log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
Encode = Callable[[str], list[int]]


@dataclass
class Batch:
    """Some utterances. B of them, S samples of the longest, U labels of the longest."""

    audio: Tensor
    """(B, S) float32 at 16 kHz, padded with zeros."""
    lengths: Tensor
    """(B,) int64 samples; stays on the host."""
    ids: list[str]
    """Utterance ids."""
    epoch: int = 0
    """Passes over the data before this one."""
    targets: Tensor | None = None
    """(B, U) int64 labels, padded with zeros."""
    target_lengths: Tensor | None = None
    """(B,) int64 labels of each utterance."""


def load_audio(cut: MonoCut, offset: float = 0.0, duration: float | None = None) -> FloatArray:
    """Decode part of a cut: channels averaged, 16 kHz, float32. Only that part is read where the format can seek.

    Args:
        cut: of one recording in one file.
        offset: seconds after the cut's start.
        duration: seconds; None: to the cut's end.

    Raises:
        UsageError: the file cannot be decoded.
    """
    rate = cut.recording.sampling_rate
    start = round((cut.start + offset) * rate)
    count = round((cut.duration - offset if duration is None else duration) * rate)
    path = cut.recording.sources[0].source
    try:
        samples, got = soundfile.read(path, start=start, frames=count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UsageError(f"cannot decode {path}: {error}; repair it, remove it, or prepare the corpus again") from error
    if got != rate:
        raise UsageError(f"{path} has {got} Hz, the manifest says {rate}; prepare the corpus again")
    mono: FloatArray = samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)


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

    def __getitem__(self, item: tuple[int, CutSet]) -> Batch:
        epoch, cuts = item
        limit = self.max_seconds or float("inf")
        if self.same_length:
            limit = min(limit, min(cut.duration for cut in cuts))
        rows = [self._load(cut, epoch, limit) for cut in cuts]
        if self.same_length:  # rounding at other rates may leave one sample more in some
            shortest = min(len(row) for row in rows)
            rows = [row[:shortest] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        audio = torch.zeros(len(rows), int(lengths.max()))
        for i, row in enumerate(rows):
            audio[i, : len(row)] = torch.from_numpy(row)
        batch = Batch(audio=audio, lengths=lengths, ids=[cut.id for cut in cuts], epoch=epoch)
        if self.encode is not None:
            labels = [torch.tensor(self.encode(cut.supervisions[0].text or ""), dtype=torch.long) for cut in cuts]
            batch.targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
            batch.target_lengths = torch.tensor([len(row) for row in labels])
        return batch

    def _load(self, cut: MonoCut, epoch: int, limit: float) -> FloatArray:
        duration = min(cut.duration, limit)
        # Same-length batches are for training, so crops move with the epoch; elsewhere they depend on the id alone.
        key = f"{self.seed}/{epoch}/{cut.id}" if self.same_length else cut.id
        offset = random.Random(key).uniform(0, cut.duration - duration)
        if not self.normalize:
            return load_audio(cut, offset, duration)
        samples = load_audio(cut)
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-5)
        start = round(offset * SAMPLE_RATE)
        part: FloatArray = samples[start : start + round(duration * SAMPLE_RATE)]
        return part


@dataclass
class _CropConstraint(TimeConstraint):
    """Batch size in seconds, where no utterance counts for more than its crop."""

    max_seconds: float | None = None

    def measure_length(self, example: Cut) -> float:
        limit = float("inf") if self.max_seconds is None else self.max_seconds
        return min(float(example.duration), limit)

    def add(self, example: Cut) -> None:
        self.longest_seen: float = max(self.longest_seen, self.measure_length(example))
        self.num_cuts += 1


class EpochSampler:
    """Yields (epoch, cuts): lhotse's bucketing sampler, with the epoch travelling beside the cuts to any worker."""

    def __init__(self, sampler: DynamicBucketingSampler, skip: int = 0) -> None:
        self.sampler = sampler
        self.skip = skip  # batches of the first pass that a run had before it was resumed; nothing is decoded for them
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each pass."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, CutSet]]:
        skip, self.skip = self.skip, 0
        for cuts in itertools.islice(self.sampler, skip, None):
            yield self.epoch, cuts


class SpeechDataModule(pl.LightningDataModule):
    """Loaders of a corpus for pretraining (``encode`` None: crops of one length) or fine-tuning (whole utterances).

    Args:
        splits: cuts by name.
        config: how to batch.
        seed: of order and crops.
        normalize: as for :class:`SpeechDataset`.
        encode: transcript -> labels.
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
        skip: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.normalize, self.encode = config, seed, normalize, encode
        self.skip = skip
        self.splits = {name: self._long_enough(name, cuts) for name, cuts in splits.items()}

    def _long_enough(self, name: str, cuts: CutSet) -> CutSet:
        kept = [cut for cut in cuts if cut.duration >= self.config.min_seconds]
        if len(kept) < len(cuts):
            dropped = len(cuts) - len(kept)
            log.info("%s: %d utterances shorter than %g s left out", name, dropped, self.config.min_seconds)
        if not kept:
            raise UsageError(
                f"no utterance of the {name} split is as long as --data.min-seconds {self.config.min_seconds:g}; "
                "lower it, or add audio"
            )
        return CutSet.from_cuts(kept)

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
        return self._loader(dataset, self.splits["train"], max_seconds, shuffle=True, skip=self.skip)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The valid split in a fixed order."""
        return self.eval_dataloader("valid")

    def eval_dataloader(self, split: str) -> DataLoader[Batch]:
        """Any split in a fixed order; for pretraining, crops that depend on the utterance id alone."""
        max_seconds = self.config.max_seconds if self.encode is None else None
        dataset = SpeechDataset(max_seconds=max_seconds, normalize=self.normalize, encode=self.encode)
        return self._loader(dataset, self.splits[split], max_seconds, shuffle=False)

    def _loader(
        self, dataset: SpeechDataset, cuts: CutSet, max_seconds: float | None, *, shuffle: bool, skip: int = 0
    ) -> DataLoader[Batch]:
        constraint = _CropConstraint(max_duration=self.config.batch_seconds, max_seconds=max_seconds)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*with an eagerly read CutSet.*")  # small manifests are, on purpose
            bucketing = DynamicBucketingSampler(
                cuts,
                constraint=constraint,
                num_buckets=max(2, min(self.config.num_buckets, len(cuts))),
                shuffle=shuffle,
                seed=self.seed,
                **_ranks(),
            )
        sampler = EpochSampler(bucketing, skip)
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def _ranks() -> dict[str, Any]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()}
    return {"rank": 0, "world_size": 1}
