"""A Ray cluster as an executor for ``prepare``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from w2v2.errors import UsageError

T = TypeVar("T")


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
            raise UsageError("--ray needs Ray: pip install 'w2v2[ray]'") from None
        try:
            ray.init(address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
        self._remote: Callable[[Callable[..., Any]], Any] = functools.cache(ray.remote)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """A task; its exceptions are those of the call."""
        future: Future[T] = self._remote(fn).remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster."""
        import ray

        ray.shutdown()
