"""Files and folders that are written whole or not at all, and read only where they are regular files."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from w2v2.errors import UsageError, public

MOST_BYTES = 1 << 29
"""Of a text that is read as a whole."""
MOST_CHARACTERS = 1 << 24
"""Of a line."""


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file to read. A pipe would keep us waiting, and a device may never end.

    Raises:
        OSError: none, something else, or one that may not be read.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        folder = os.path.isdir(path)
        raise OSError(
            errno.EISDIR if folder else errno.EINVAL, "Is a directory" if folder else "not a regular file", str(path)
        )
    return os.fdopen(number, "rb")


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[Iterator[str]]:
    """The lines of a regular file of UTF-8 text, gzipped if its name ends in .gz, without a byte order mark.

    Raises:
        UsageError: no such file, something else in it, or a line that nobody would want in memory.
    """
    try:
        with open_file(path) as file:
            content = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
            yield _lines(io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline), path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot read {path}: {what}; expected a file of UTF-8 text, gzipped if it ends in .gz"
        ) from error


def _lines(text: TextIO, path: Path) -> Iterator[str]:
    while line := text.readline(MOST_CHARACTERS):
        if len(line) == MOST_CHARACTERS:
            raise UsageError(f"{path} has a line of more than {MOST_CHARACTERS:,} characters; check what it is")
        yield line


class Positioned(io.RawIOBase):
    """A file to read and seek in, of bytes that a subclass knows how to get; ``end`` is where its last one is."""

    def __init__(self, end: int) -> None:
        self.end, self.position = end, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.end}[whence])
        return self.position


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with whole(target) as partial:
        shutil.copyfile(source, partial)


def read_most(file: BinaryIO) -> bytes:
    """Return what a file holds, ``MOST_BYTES`` and one at most, in memory for what there is."""
    content = bytearray()
    while part := file.read(min(1 << 20, MOST_BYTES + 1 - len(content))):
        content += part
    return bytes(content)


def read_bytes(path: Path) -> bytes:
    """Return what a regular file holds.

    Raises:
        UsageError: it cannot be read, or is too large to be read as a whole.
    """
    try:
        with open_file(path) as file:
            content = read_most(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"cannot read {path}: expected at most {MOST_BYTES >> 20} MB; check what it is")
    return content


def read_text(path: Path) -> str:
    """Return the text of a regular file, without its byte order mark and the carriage returns of its lines.

    Raises:
        UsageError: as ``read_bytes``, and something else than UTF-8 in it.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; convert it") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside ``path``, of the same ending, to write to; it takes that place when all went well, or is removed.

    What was at ``path`` stays until then. One writer of a file at a time: it overwrites what a killed one has left.
    """
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, as_said: bool = False) -> None:
    """Write a file in UTF-8, whole or not at all; without what ``public`` leaves out, unless it is what was said."""
    with whole(path) as partial:
        partial.write_text(text if as_said else public(text), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; in ASCII, so that no path or text is beyond it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` when all went well and is gone otherwise.

    Raises:
        UsageError: there is something in ``out``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder; choose another one, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    if not path.name:
        raise UsageError(f"{path} has no name of its own; name a new folder")
    # A hash, since a name may be as long as names can be.
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.partial{path.suffix}")
