"""Where ``prepare`` does its work: in this process, in others on this machine, on a Ray cluster."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from w2v2.errors import JobError, UsageError

T = TypeVar("T")


def local_executor(jobs: int) -> Executor:
    """So many processes; for one job a thread of this one, which no script has to guard its main module for."""
    if jobs == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """Decoders write their own complaints to standard error; the audit tells them in its words."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a process that was killed would go on, write where the next preparation writes, and never end."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def in_order(executor: Executor, work: Callable[..., T], tasks: Iterator[tuple[Any, ...]], ahead: int) -> Iterator[T]:
    """Results of a function of each task's arguments, a bounded number of them under way.

    Raises:
        JobError: a worker died.
    """
    running: deque[Future[T]] = deque()
    try:
        running.extend(executor.submit(work, *task) for task in islice(tasks, ahead))
        while running:
            yield running.popleft().result()
            running.extend(executor.submit(work, *task) for task in islice(tasks, 1))
    except BrokenExecutor as error:
        raise JobError(
            f"a worker process died ({error}); what is done is kept, run it again with fewer `jobs`"
        ) from error
    finally:
        for future in running:
            future.cancel()


class RayExecutor(Executor):
    """Runs calls as Ray tasks. Every node must see the same files under the same paths.

    Args:
        address: of the cluster, ``auto`` for the one this machine belongs to, ``local`` to start one here.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("`ray` needs Ray: pip install ray") from None
        try:
            ray.init(address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
        self._remote: Callable[[Callable[..., Any]], Any] = functools.cache(ray.remote)
        self._leave: Callable[[], None] = ray.shutdown

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """A task; its exceptions are those of the call."""
        future: Future[T] = self._remote(fn).remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster."""
        self._leave()
