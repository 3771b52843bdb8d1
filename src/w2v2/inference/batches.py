"""What comes in a row, several at a time and in other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


def together(items: Iterable[T], size: Callable[[T], int], most: int, count: int) -> Iterator[list[T]]:
    """The items in batches of at most so many, whose sizes add up to ``most`` at most unless there is one."""
    batch: list[T] = []
    held = 0
    for item in items:
        if batch and (held + size(item) > most or len(batch) == count):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += size(item)
    if batch:
        yield batch


def ahead(thread: Executor, items: Iterator[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before is in use."""
    coming = thread.submit(next, items, None)
    while (current := coming.result()) is not None:
        coming = thread.submit(next, items, None)
        yield current


def one_late(items: Iterable[T]) -> Iterator[T]:
    """The items, each when the next one is there."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before
