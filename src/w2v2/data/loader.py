"""Batches from worker processes, with an account of what could not be read."""

from __future__ import annotations

import atexit
import contextlib
import logging
import signal
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from w2v2.data.batch import Batch, SpeechDataset
from w2v2.data.config import DataConfig, bad_share
from w2v2.data.corpora import Split
from w2v2.data.passes import Passes
from w2v2.data.sampler import EpochSampler, Position
from w2v2.errors import JobError

log = logging.getLogger(__name__)


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a job; the run still needs its workers to save itself.

    A worker ends when it is told to, when its parent is gone, or a minute after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # else nobody sends these
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """A worker that was ended from without, which torch finds out wherever the process is just then, as one line.

    Raises:
        JobError: there is one.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:  # TensorBoard's logger makes a ValueError of whatever comes to it
        lines = f"{error.__cause__}\n{error}".splitlines()
        line = next((line for line in reversed(lines) if line.startswith("DataLoader worker")), "")
        if not line:
            raise
        raise _died(line) from error


def _died(how: str) -> JobError:
    return JobError(
        f"a process that reads audio has died ({how}), often of too little memory: lower `data.num_workers`; what was "
        "saved is whole"
    )


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

    def __init__(self, *args: Any, allowed: int, limit: str, **kwargs: Any) -> None:
        # Workers are forked once, before the first backward pass: in a process whose other threads come and go, as
        # autograd's do, a fork now and then gives a child that waits for a lock for ever (seen with CPython 3.11).
        kwargs |= {"persistent_workers": kwargs["num_workers"] > 0, "worker_init_fn": _leave_signals_to_the_run}
        super().__init__(*args, **kwargs)
        _loaders.add(self)
        self.allowed, self.limit = allowed, limit
        self.bad: dict[str, str] = {}
        self.waited = 0.0
        """Seconds that whoever iterates has waited for batches, the first of a pass not counted."""

    def _get_iterator(self) -> Any:
        iterator: Any = super()._get_iterator()
        if self.num_workers:
            # Not as garbage: there the queues by which workers are told to end may be closed before they are told.
            weakref.finalize(self, iterator._shutdown_workers).atexit = False
        return iterator

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
            try:
                with dead_workers_named():
                    batch = next(batches, None)
            except (ConnectionError, EOFError) as error:
                if not self.num_workers or "DataLoader worker" in str(error):  # where it was the worker's own reading
                    raise
                raise _died(f"while it handed over a batch: {error}") from error
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
                    f"{len(bad)} utterances cannot be read, {self.limit}: {'; '.join(bad.values())}; repair or remove "
                    "them, or prepare the corpus again"
                )
            yield batch


def whole_utterances(name: str, split: Split, config: DataConfig) -> SpeechLoader:
    """Every utterance of a split exactly once, as it is: for evaluation and features.

    Nothing is left out for its length or its transcript, nothing cropped or normalised, and there are no targets. Only
    recordings that cannot be read are missing, named in ``bad``, as far as ``max_bad`` allows.
    """
    passes = Passes(name, split, replace(config, min_seconds=0.0))
    return make_loader(SpeechDataset(), passes, config, None)


def make_loader(
    dataset: SpeechDataset,
    passes: Passes,
    config: DataConfig,
    max_seconds: float | None,
    *,
    accumulate: int = 1,
    skip: int = 0,
    start: Position | None = None,
    epoch: int = 0,
) -> SpeechLoader:
    """Loader of a rank's batches of some utterances; the others as for :class:`EpochSampler`."""
    rank, world_size = _ranks()
    sampler = EpochSampler(
        passes,
        batch_seconds=config.batch_seconds,
        max_seconds=max_seconds,
        num_buckets=config.num_buckets,
        buffer=config.shuffle_buffer,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        skip=skip,
        start=start,
    )
    sampler.set_epoch(epoch)
    count = len(passes.split)
    return SpeechLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        allowed=int(bad_share(config.max_bad) * count),
        limit=f"more than `data.max_bad` {config.max_bad} of {count} allows",
    )


def _ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
