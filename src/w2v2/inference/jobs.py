"""Recordings shared out over processes, each with a model of its own, on a GPU of its own where there are several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import torch

from w2v2.errors import JobError, UsageError
from w2v2.inference.recordings import STDIN, Failure, Source
from w2v2.inference.transcripts import Transcript

Work = Callable[..., Iterator[Transcript | Failure]]
"""``transcribe`` with all arguments given but ``sources`` and ``show``."""
Load = Callable[[str | None], Work]
"""From the device to the work, in the process that does it; can be pickled."""


def in_processes(
    jobs: int, load: Load, sources: Sequence[Source], device: str | None, show: Callable[[float], None]
) -> Iterator[Transcript | Failure]:
    """Transcribe recordings in several processes; results in the order of the recordings, texts as of one process.

    Args:
        jobs: processes; this one's threads are shared out among them.
        load: called once in each.
        device: where all work; None: the GPUs in turn, if there are any.
        show: is told the share of the recordings that are done.

    Raises:
        UsageError: standard input is among the recordings, or what ``load`` raises.
        JobError: a process was ended.
    """
    if any(source.path == STDIN for source in sources):
        raise UsageError(f"`jobs` {jobs} are for files, got - for standard input; leave `jobs` out")
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for job in range(jobs):
        numbers.put(job)
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, context, _begin, (load, device, numbers, threads))
    try:
        for done, result in enumerate(pool.map(_work, sources), 1):
            yield result
            show(done / len(sources))
    except BrokenProcessPool as error:
        raise JobError(f"one of {jobs} processes was ended, perhaps for want of memory; lower `jobs`") from error
    finally:
        pool.shutdown(cancel_futures=True)


_loaded: Work | UsageError
"""In a process of ours: its work, or why there can be none."""


def _begin(load: Load, device: str | None, numbers: SimpleQueue[int], threads: int) -> None:
    global _loaded
    torch.set_num_threads(threads)
    number = numbers.get()
    if device is None and torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        _loaded = load(device)
    except UsageError as error:  # raised by the first recording: a pool only knows that a process has ended
        _loaded = error


def _work(source: Source) -> Transcript | Failure:
    if isinstance(_loaded, UsageError):
        raise _loaded
    [result] = _loaded([source])
    return result
