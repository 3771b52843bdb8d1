"""What an audio file's header should say: lengths that its bytes prove wrong are put right before a decoder reads it.

libsndfile believes headers. Writers to a pipe leave lengths open or at a placeholder, 32 bits end at 4 GiB, files that
are joined announce the first of them alone, and MP3 of variable bit rate may announce nothing. What is wrong is not
decoded in some other way: the decoder is shown the same bytes with a header that is right.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from w2v2.data.frames import flac_layout, id3_end, mp3_frame, mp3_layout
from w2v2.data.splice import Layout, Span, cyclic_check, find, read_at
from w2v2.data.storage import is_remote

_PLACEHOLDER = 1_900_000_000  # bytes: what writers to a pipe announce is 2e9, near 2^31 (SoX, arecord), or near 2^32
_NO_AUDIO, _PADDING = 1 << 10, 1 << 16  # bytes after the samples that may be anything; that may be zeros
_REMEMBERED = 4096
_layouts: dict[tuple[str, int, int], Layout] = {}


def examine(file: BinaryIO, location: str | None = None) -> Layout:
    """Where a file's audio is, and what its headers should say.

    Args:
        file: read and moved in.
        location: path or URL, whose layout is remembered until the file's size or time changes. Of a remote file that
            is joined of equal parts, and whose ends fit each other, the first part is taken for the whole: no more than
            the ends of FLAC and Ogg are fetched.
    """
    size = file.seek(0, os.SEEK_END)
    if location is None:
        return _examine(file, size)
    changed = 0 if is_remote(location) else os.stat(location).st_mtime_ns
    key = (location, size, changed)
    if key not in _layouts:
        while len(_layouts) >= _REMEMBERED:
            _layouts.pop(next(iter(_layouts)), None)
        _layouts[key] = _examine(file, size, thrifty=is_remote(location))
    return _layouts[key]


def _examine(file: BinaryIO, size: int, *, thrifty: bool = False) -> Layout:
    head = read_at(file, 0, 12)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _wav(file, size)
    if head[:4] == b"OggS":
        return Layout() if thrifty and _one_stream(file, size) else _ogg(file, size)
    tag = id3_end(file, 0)
    if read_at(file, tag, 4) == b"fLaC":
        return flac_layout(file, tag, size, thrifty=thrifty)
    if mp3_frame(read_at(file, tag, 4)) is not None:
        return mp3_layout(file, tag, size)
    return Layout()


# --- WAV --------------------------------------------------------------------------------------------------------------


def _wav(file: BinaryIO, size: int) -> Layout:
    """Each RIFF of a file, with the length that its samples have."""
    spans: list[Span] = []
    start, changed, missing = 0, False, ""
    while start < size:
        chunks = {name: (at, length) for name, at, length in _chunks(file, start + 12, size)}
        if b"data" not in chunks:
            break
        at, announced = chunks[b"data"]
        left = size - at
        end, following = _wav_end(file, at, announced, size)
        length = end - at
        if left < announced and length == left and not _is_placeholder(announced, left):
            missing = f"{left} bytes of {announced}"
        elif length != announced:
            changed = True
        if missing or length == announced:
            spans.append(Span(b"", start, following))
        else:
            spans.append(Span(_wav_header(file, start, at, length, chunks), at, end))
        start = following
    return Layout(tuple(spans) if changed or len(spans) > 1 else (), missing)


def _is_placeholder(announced: int, left: int) -> bool:
    return announced == 0 or announced >= 0x7FFF_0000 or (announced >= _PLACEHOLDER and left < announced // 2)


def _chunks(file: BinaryIO, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, length) of the chunks of a RIFF up to its samples."""
    while len(head := read_at(file, at, 8)) == 8:
        name, length = struct.unpack("<4sI", head)
        yield name, at + 8, length
        if name == b"data":
            return
        at += 8 + length + length % 2
    if len(head) >= 4 and head[:4] == b"data":  # cut off within the length
        yield b"data", at + 8, 1


def _wav_end(file: BinaryIO, at: int, announced: int, size: int) -> tuple[int, int]:
    """Where the samples end, and where the next RIFF starts or the file ends."""
    if at + announced > size or (_is_placeholder(announced, size - at) and announced):
        return max(size, at), size
    for padded in (at + announced + announced % 2, at + announced):
        place = padded
        while place < size:
            head = read_at(file, place, 12)
            name, length = head[:4], int.from_bytes(head[4:8], "little")
            if name == b"RIFF" and head[8:] == b"WAVE":
                return at + announced, place
            if len(head) < 8 or not all(32 <= byte < 127 for byte in name) or place + 8 + length > size:
                break
            place += 8 + length + length % 2
        rest = read_at(file, place, _PADDING)
        tag = rest.startswith((b"TAG", b"ID3", b"APETAG"))
        if tag or len(rest) < _NO_AUDIO or (len(rest) < _PADDING and not any(rest)):
            return at + announced, size
    return size, size


def _wav_header(file: BinaryIO, start: int, at: int, length: int, chunks: dict[bytes, tuple[int, int]]) -> bytes:
    """All before the samples, with their true length; RF64 (EBU Tech 3306) where 32 bits do not hold it."""
    head = read_at(file, start, at - start)
    if length + len(head) < 1 << 32:
        return b"RIFF" + struct.pack("<I", length + len(head) - 8) + head[8:-4] + struct.pack("<I", length)
    place, size = chunks.get(b"fmt ", (0, 0))
    form = b"fmt " + struct.pack("<I", size) + read_at(file, place, size)
    sizes = b"ds64" + struct.pack("<IQQQI", 28, length + len(form) + 48, length, 0, 0)
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + form + b"data\xff\xff\xff\xff"


# --- Ogg --------------------------------------------------------------------------------------------------------------


def _ogg(file: BinaryIO, size: int) -> Layout:
    """Each link of a chain (RFC 3533), with the mark of its end: pages that begin streams start one, but together."""
    links: list[list[int]] = []  # where each begins, where its last page does, and that page's flags
    at, begins, missing, table = 0, False, "", b""
    while at < size:
        head = read_at(file, at, 27)
        if head[:4] != b"OggS"[: len(head)]:  # lost bytes, or something after the audio
            at = find(file, b"OggS", at + 1, size)
            continue
        table = file.read(head[26]) if len(head) == 27 else b""
        end = at + len(head) + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or end > size:
            missing = "the last page is cut off"
            break
        if not links or (head[5] & 2 and not begins):
            links.append([at, at, 0])
        links[-1][1:] = at, head[5]
        begins, at = bool(head[5] & 2), end
    if links and not missing and not links[-1][2] & 4 and table[-1:] == b"\xff":
        missing = "its last packet goes on in a page that is not there"
    if missing or (len(links) == 1 and links[0][2] & 4):
        return Layout(missing=missing)
    ends = [start for start, _, _ in links[1:]] + [size]
    return Layout(tuple(_link(file, link[0], link[1], link[2], end) for link, end in zip(links, ends, strict=True)))


def _one_stream(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg ends, with the file, the stream that the first page begins."""
    tail = read_at(file, max(0, size - 65_307), 65_307)  # the largest page
    at = tail.rfind(b"OggS")
    page = tail[at:] if at >= 0 else b""
    if len(page) < 27 or not page[5] & 4 or page[14:18] != read_at(file, 14, 4):
        return False
    return len(page) == 27 + page[26] + sum(page[27 : 27 + page[26]])


def _link(file: BinaryIO, start: int, last: int, flags: int, end: int) -> Span:
    if flags & 4:
        return Span(b"", start, end)
    page = bytearray(read_at(file, last, end - last))
    del page[27 + page[26] + sum(page[27 : 27 + page[26]]) :]
    page[5] |= 4
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", cyclic_check(bytes(page), 32, 0x04C1_1DB7))
    return Span(b"", start, last, suffix=bytes(page))
