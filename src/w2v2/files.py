"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w2v2.errors import UsageError, public


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


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; without what ``public`` leaves out."""
    with whole(path) as partial:
        partial.write_text(public(text), encoding="utf-8")


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
    # A hash, since a name may be as long as names can be.
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.partial{path.suffix}")
