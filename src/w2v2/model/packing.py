"""Utterances of unequal lengths laid end to end: (1, sum of T, D) and the list of lengths, and nothing done on padding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

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


def host_tensor(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that the host knows, on a device that is not waited for."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def repeat_rows(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, ...), a row per utterance -> (sum of T, ...), a row per frame."""
    return torch.cat([row.expand(n, *row.shape) for row, n in zip(x, lengths, strict=True)])
