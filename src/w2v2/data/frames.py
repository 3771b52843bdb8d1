"""Where the frames of FLAC and MP3 files say that the audio ends, and headers that say the same."""

from __future__ import annotations

import functools
import re
import struct
from typing import BinaryIO, NamedTuple

from w2v2.data.splice import Layout, Span, cyclic_check, find, read_at

_TAIL = 1 << 17  # bytes that hold the last frame of a FLAC stream

# --- FLAC (RFC 9639) --------------------------------------------------------------------------------------------------


def flac_layout(file: BinaryIO, start: int, size: int, *, thrifty: bool = False) -> Layout:
    """Each stream of a file, with the number of samples that its last frame tells; ``start`` is where the first is.

    Args:
        thrifty: look no further if the file ends as its first header says.
    """
    announced = _announced(read_at(file, start, 26))
    if thrifty and announced and _last_sample(file, start, size, announced) == announced:
        return Layout()
    starts, at = [start], start
    while (at := find(file, b"fLaC", at + 4, size)) < size:
        if read_at(file, at + 4, 4) in (b"\x00\x00\x00\x22", b"\x80\x00\x00\x22"):
            starts.append(at)
    spans, same = [], len(starts) == 1
    for at, end in zip(starts, [*starts[1:], size], strict=True):
        head = bytearray(read_at(file, at, 26))
        announced = _announced(head)
        total = _last_sample(file, at, end, announced)
        if total > announced and len(head) == 26:
            head[21:26] = (int.from_bytes(head[21:26], "big") >> 36 << 36 | total).to_bytes(5, "big")
            same = False
        spans.append(Span(bytes(head), at + len(head), end))
    return Layout(() if same else tuple(spans))


def _announced(head: bytes | bytearray) -> int:
    return int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF


def _last_sample(file: BinaryIO, start: int, end: int, announced: int) -> int:
    """The sample after the last frame, or what is announced, if no frame proves anything else.

    A frame that ends where the header says is believed, any other by its check sum, or, where it is cut off, by the one
    before it.
    """
    nominal = int.from_bytes(read_at(file, start + 8, 2), "big")
    first = max(start + 42, end - _TAIL)
    tail = read_at(file, first, max(end - first, 0))
    last, at, following = 0, len(tail), len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        sample = _frame_end(tail[at : at + 17], nominal)
        if sample is None:
            continue
        if sample == announced:
            return sample
        if cyclic_check(tail[at:following], 16, 0x8005) == 0:
            return last or sample
        last, following = sample, at
    return announced or last


def _frame_end(head: bytes, nominal: int) -> int | None:
    """The sample after the frame that has this header; None: it is no header."""
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or not head[2] >> 4 or head[2] & 15 == 15:
        return None
    width = 8 - (head[4] ^ 0xFF).bit_length()  # the frame's or sample's number is written as in UTF-8
    if head[3] & 1 or head[3] >> 4 > 10 or width in (1, 8):
        return None
    number = head[4] & 0x7F >> width
    at, code = 4 + max(width, 1), head[2] >> 4
    for byte in head[5:at]:
        number = number << 6 | byte & 0x3F
    if code in (6, 7):  # the block's size follows, in one byte or two
        block = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        block = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)  # so does the rate
    if len(head) <= at or cyclic_check(head[: at + 1], 8, 0x07) != 0:
        return None
    return (number if head[1] & 1 else number * nominal) + block


# --- MP3 (ISO 11172-3, 13818-3) ---------------------------------------------------------------------------------------

_RESYNC = 1 << 16  # bytes
_SYNC = re.compile(rb"\xff[\xe0-\xff]")
_RATES = ((11_025, 12_000, 8_000), (0, 0, 0), (22_050, 24_000, 16_000), (44_100, 48_000, 32_000))  # 2.5, none, 2, 1
_KBITS = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""By version and layer."""


class Mp3Frame(NamedTuple):
    """What a frame's header says."""

    size: int
    """Bytes."""
    samples: int
    rate: int
    side: int
    """Bytes between the header and what an encoder may write into a first frame."""


@functools.lru_cache(4096)
def mp3_frame(head: bytes) -> Mp3Frame | None:
    """The frame that begins with these four bytes; None: none does, or one of a size that is not said."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, code = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 2 & 3
    if version == 1 or layer == 4 or code == 3 or head[2] >> 4 in (0, 15):
        return None
    rate, first = _RATES[version][code], version == 3
    bits = 1000 * _KBITS[1 if first else 2, layer][head[2] >> 4]
    padding = head[2] >> 1 & 1
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    mono = head[3] >> 6 == 3
    return Mp3Frame(size, samples, rate, (17 if mono else 32) if first else (9 if mono else 17))


def id3_end(file: BinaryIO, at: int) -> int:
    """Where an ID3v2 tag that begins at a place ends; the place itself, if there is none."""
    head = read_at(file, at, 10)
    if len(head) < 10 or head[:3] != b"ID3":
        return at
    footer = 10 if head[5] & 0x10 else 0
    return id3_end(file, at + 10 + footer + sum((byte & 127) << 7 * i for i, byte in enumerate(head[:5:-1])))


def mp3_layout(file: BinaryIO, start: int, size: int) -> Layout:
    """An MP3 file with a first frame (Xing's, LAME's) that announces as many frames as there are."""
    head = read_at(file, start, 4)
    frame = mp3_frame(head)
    assert frame is not None
    first = bytearray(read_at(file, start, frame.size))
    tag = 4 + frame.side
    if bytes(first[tag : tag + 4]) in (b"Xing", b"Info"):
        flags = int.from_bytes(first[tag + 4 : tag + 8], "big")
        frames, length = (int.from_bytes(first[tag + at : tag + at + 4], "big") for at in (8, 12))
        if flags & 3 == 3 and length and -512 <= size - start - length <= 512:  # a tag may follow
            return Layout()
        if flags & 3 == 3 and length > size - start:
            return Layout()  # and the decoder finds that it is cut off
        count = _count(file, start + frame.size, size, frame)
        if flags & 1 and count <= frames + 1:
            return Layout()
        if flags & 1:
            first[tag + 8 : tag + 12] = struct.pack(">I", count)
            # The padding that LAME announces is not at the end of what follows; it stands after count, bytes,
            # table and quality, and 21 bytes of its own.
            padding = tag + 8 + 4 * (1 + (flags >> 1 & 1) + (flags >> 3 & 1)) + 100 * (flags >> 2 & 1) + 22
            if len(first) > padding + 1:
                first[padding] &= 0xF0
                first[padding + 1] = 0
            return Layout((Span(bytes(first), start + frame.size, size),), slack=2 * frame.samples)
        start += frame.size
    elif first[36:40] == b"VBRI":
        start += frame.size
    count = _count(file, start, size, frame)
    # Without a header, decoders guess from the size and the first frame's, 50 times too short at worst.
    span = Span(b"", start, size, claim=64 * (size - start))
    return Layout((span,), frames=count * frame.samples, slack=2 * frame.samples)


def _count(file: BinaryIO, at: int, size: int, like: Mp3Frame) -> int:
    """Frames from a place to the end of a file; what lies between them and is none, such as a tag, is passed over."""
    count, base, block = 0, at, b""
    while at + 4 <= size:
        if not base <= at <= base + len(block) - 4:
            base, block = at, read_at(file, at, 1 << 20)
            if len(block) < 4:
                break
        frame = mp3_frame(block[at - base : at - base + 4])
        if frame is not None and frame.rate == like.rate:
            count += at + frame.size <= size
            at += frame.size
        else:
            tag_end = id3_end(file, at)
            at = tag_end if tag_end > at else _resynced(file, at + 1, size, like)
    return count


def _resynced(file: BinaryIO, at: int, size: int, like: Mp3Frame) -> int:
    """The next place where two frames follow each other, if it is not far; otherwise the end."""
    block = read_at(file, at, _RESYNC)
    for match in _SYNC.finditer(block):
        frame = mp3_frame(block[match.start() : match.start() + 4])
        if frame is not None and frame.rate == like.rate:
            after = mp3_frame(read_at(file, at + match.start() + frame.size, 4))
            if after is not None and after.rate == like.rate:
                return at + match.start()
    return size
