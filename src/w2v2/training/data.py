"""The data module: loaders of a corpus for pretraining or fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from multiprocessing import get_start_method
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from w2v2.data.augment import Augmentation
from w2v2.data.batch import Batch, Encode, Fits, SpeechDataset
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Splits
from w2v2.data.loader import SpeechLoader, make_loader
from w2v2.data.passes import Passes
from w2v2.data.sampler import EpochSampler, Position
from w2v2.model.masking import Draws
from w2v2.training.task import NormalizedTask


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
        normalize: float = 0.0,
        encode: Encode | None = None,
        fits: Fits | None = None,
        skip: int = 0,
    ) -> None:
        super().__init__()
        self.fits = fits
        self.config, self.seed, self.normalize, self.encode = config, seed, normalize, encode
        self.skip = skip
        self.start: Position | None = None
        self.sampler: EpochSampler | None = None
        self.splits = splits
        for name in ("train", "valid"):
            if name in splits:
                self._passes(name)

    def _passes(self, name: str, *, shuffle: bool = False) -> Passes:
        labelled = self.encode is not None
        return Passes(
            name, self.splits[name], self.config, labelled=labelled, shuffle=shuffle, seed=self.seed, fits=self.fits
        )

    def _draw(self, *, training: bool) -> Callable[[Batch], Draws | None] | None:
        """What the task draws for a batch, in the worker that reads it; None: the task draws when the batch comes."""
        task = self.trainer.lightning_module if self.trainer is not None else None
        forked = get_start_method() == "fork"  # elsewhere a worker would get a copy of the whole model
        return partial(task.draw, training=training) if forked and isinstance(task, NormalizedTask) else None

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
            draw=self._draw(training=True),
            augmentation=Augmentation(self.config.augment) if self.config.augment.active else None,
            fits=self.fits,
        )
        # Lightning takes the first batches of a resumed run before it says which pass that is in.
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        loader = make_loader(
            dataset,
            self._passes("train", shuffle=True),
            self.config,
            max_seconds,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer is not None else 1,
            skip=self.skip,
            start=self.start,
            epoch=epoch,
        )
        assert isinstance(loader.sampler, EpochSampler)
        self.sampler = loader.sampler
        self.sampler.fill_updates()
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where the window of the next batch begins: a resumed run plans from there, not from the pass's beginning."""
        assert self.trainer is not None
        if self.sampler is None:
            return {}
        return asdict(self.sampler.position(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that up, before the loader is made."""
        self.start = Position(**state) if state else None

    def val_dataloader(self) -> DataLoader[Batch]:
        """The valid split in a fixed order; its workers start at once, before training does."""
        loader = self.eval_dataloader("valid")
        loader.start_workers()
        return loader

    def eval_dataloader(self, split: str) -> SpeechLoader:
        """Any split in a fixed order; for pretraining, crops that depend on the utterance id alone."""
        max_seconds = self.config.max_seconds if self.encode is None else None
        dataset = SpeechDataset(
            max_seconds=max_seconds, normalize=self.normalize, encode=self.encode, draw=self._draw(training=False)
        )
        return make_loader(dataset, self._passes(split), self.config, max_seconds)
