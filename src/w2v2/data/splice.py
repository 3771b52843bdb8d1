"""Parts of a file, each with a header that is put right, as files of their own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from w2v2.files import Positioned


@dataclass(frozen=True)
class Span:
    """What a decoder is to read as one file: some bytes, a part of the file, some bytes."""

    prefix: bytes
    start: int
    end: int
    suffix: bytes = b""
    claim: int = 0
    """Bytes that it seems to have, for a decoder that would guess too short a length from those that it has."""


@dataclass(frozen=True)
class Layout:
    """What is where in a file of audio."""

    spans: tuple[Span, ...] = ()
    """One after the other; none: the file is read as it is."""
    missing: str = ""
    """What it lacks at its end."""
    frames: int | None = None
    """Samples per channel, where no header of these tells."""
    slack: int = 0
    """Samples that a decoder may find too few at the end."""


class _Spliced(Positioned):
    def __init__(self, file: BinaryIO, span: Span) -> None:
        self.file, self.span = file, span
        self.middle = len(span.prefix) + span.end - span.start
        self.size = self.middle + len(span.suffix)
        super().__init__(max(self.size, span.claim))

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and (data := self._bytes(len(view) - filled)):  # libsndfile asks but once
            view[filled : filled + len(data)] = data
            self.position += len(data)
            filled += len(data)
        return filled

    def _bytes(self, count: int) -> bytes:
        prefix, place = self.span.prefix, self.position
        if place > self.size:  # where a decoder looks for a tag, at the end that the span claims to have
            return bytes(max(0, min(count, self.span.claim - place)))
        if place >= self.middle:
            return self.span.suffix[place - self.middle :][:count]
        if place >= len(prefix):
            return read_at(self.file, self.span.start + place - len(prefix), min(count, self.middle - place))
        return prefix[place : place + count]


def spliced(file: BinaryIO, span: Span) -> BinaryIO:
    """A span of an open file, which is read and moved in, as a file."""
    return cast(BinaryIO, _Spliced(file, span))


def read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """``count`` bytes of a file from ``start`` on; fewer at its end."""
    file.seek(start)
    return file.read(count)


@functools.cache
def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        crc = value << bits - 8
        for _ in range(8):
            crc = (crc << 1 ^ (polynomial if crc >> bits - 1 else 0)) & (1 << bits) - 1
        table.append(crc)
    return table


def cyclic_check(data: bytes, bits: int, polynomial: int) -> int:
    """The check sum of FLAC and Ogg: most significant bit first, from zero; zero for data that ends with its own."""
    table, crc, mask = _crc_table(bits, polynomial), 0, (1 << bits) - 1
    for byte in data:
        crc = (crc << 8 & mask) ^ table[crc >> bits - 8 ^ byte]
    return crc


def find(file: BinaryIO, mark: bytes, start: int, end: int) -> int:
    """The first place of a mark from ``start`` on, or ``end``. What is read is about as much as is passed over."""
    size = 1 << 12
    while start < end:
        block = read_at(file, start, min(size, end - start))
        values = np.frombuffer(block, np.uint8)  # several times as fast as bytes.find
        places = np.flatnonzero(values[: max(len(block) - len(mark) + 1, 0)] == mark[0])
        for i, byte in enumerate(mark):
            places = places[values[places + i] == byte]
        if len(places):
            return start + int(places[0])
        if len(block) < len(mark):
            break
        start += len(block) - len(mark) + 1
        size = min(8 * size, 1 << 20)
    return end
