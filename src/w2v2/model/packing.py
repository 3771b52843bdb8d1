"""Utterances of unequal lengths laid end to end: (1, sum of T, D) and the list of lengths, and nothing done on padding.

Lengths stay on the host; where rows have to be found on a device, their numbers are copied without waiting for it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

_plain = ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Have everything inside computed by torch's own modules, an utterance at a time: for export and comparison."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether the code runs inside of ``plain_path``."""
    return _plain.get()


@dataclass(frozen=True)
class Rows:
    """Some of a batch's frames, in order."""

    index: Tensor
    """(N,) int64: their positions among all frames laid end to end."""
    counts: Sequence[int]
    """How many of each utterance."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else x


def starts_of(lengths: Iterable[int]) -> list[int]:
    """Where each of consecutive parts begins."""
    return list(itertools.accumulate(lengths, initial=0))[:-1]


def row_index(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """(sum of lengths,) int64: so many consecutive rows from each start."""
    index = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    return to_device(torch.cat(index) if index else torch.empty(0, dtype=torch.int64), device)


def spread(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """(N, ...) -> (rows, ...) with x's rows at the index, and zeros elsewhere."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, index, x)


def unpack(x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(1, sum of T, ...) packed frames -> (B, T, ...) padded with zeros; unchanged when ``lengths`` is None."""
    if lengths is None:
        return x
    if min(lengths) == max(lengths):
        return x.view(len(lengths), -1, *x.shape[2:])
    longest = max(lengths)
    index = row_index(range(0, len(lengths) * longest, longest), lengths, x.device)
    return spread(x.squeeze(0), index, len(lengths) * longest).view(len(lengths), longest, *x.shape[2:])


def pack(x: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(B, T, ...) padded -> (1, sum of T, ...) packed; unchanged when ``lengths`` is None."""
    if lengths is None:
        return x
    if min(lengths) == x.shape[1]:
        return x.flatten(0, 1)[None]
    index = row_index(range(0, x.shape[0] * x.shape[1], x.shape[1]), lengths, x.device)
    return x.flatten(0, 1).index_select(0, index)[None]


def repeat_rows(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, ...), a row per utterance -> (sum of T, ...), a row per frame."""
    return torch.cat([row.expand(n, *row.shape) for row, n in zip(x, lengths, strict=True)])
