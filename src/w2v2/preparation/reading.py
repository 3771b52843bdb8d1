"""Rows of whatever source is prepared, each with what changes when its file does."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from w2v2.data.layouts import layout_rows
from w2v2.data.sources import Row, folder_rows, locate
from w2v2.data.storage import is_remote
from w2v2.data.tables import table_rows
from w2v2.errors import UsageError
from w2v2.preparation.config import PrepareConfig

TABLES = (".csv", ".tsv", ".jsonl")


def source_rows(source: Path, config: PrepareConfig, passed_over: Counter[str]) -> tuple[Path, Iterable[Row]]:
    """Return the folder that paths start from, and the rows of a folder or table.

    Args:
        source: folder of audio (Kaldi's, with STM, or any), or table.
        passed_over: where is counted, as rows are read, what is not taken.

    Raises:
        UsageError: neither; or what is wrong in it, as rows are read.
    """
    if source.is_dir():
        if rows := layout_rows(source, passed_over):
            refuse_unused(config, ("speaker", "columns", "audio_folder"), "a folder of Kaldi or with STM")
            return source, rows
        refuse_unused(config, ("columns", "audio_folder"), "a folder of audio")
        return source, folder_rows(source, config.speaker or None, passed_over)
    if source.suffix.lower() in TABLES and source.exists():
        refuse_unused(config, ("speaker",), "a table, whose column speaker tells it")
        columns = dict(pair.split("=", 1) for pair in config.columns)
        audio = Path(config.audio_folder).absolute() if config.audio_folder else None
        least = config.min_confidence
        return audio or source.parent, table_rows(source, columns, audio, min_confidence=least, passed_over=passed_over)
    if source.exists():
        raise UsageError(f"cannot read {source}: expected a folder, or a table ending in {', '.join(TABLES)}")
    raise UsageError(f"no folder or table {source}: expected audio, a table of it, or hf:NAME")


def refuse_unused(config: PrepareConfig, names: tuple[str, ...], source: str) -> None:
    """Refuse settings that are of another kind of source (:class:`UsageError`)."""
    if given := [name for name in names if getattr(config, name)]:
        raise UsageError(f"`{given[0]}` is not for {source}; leave it out")


def stamped(root: Path, rows: Iterable[Row]) -> Iterator[tuple[Row, str, int]]:
    """Each row with what changes when its file does, and the file's size."""
    last, stamp, size = "", "", 0
    for row in rows:
        if row.path != last:
            last, stamp, size = row.path, "", 0
            if not is_remote(row.path):
                with contextlib.suppress(OSError):  # the audit says what is wrong with it
                    status = os.stat(locate(root, row.path))
                    stamp, size = f"{status.st_size}/{status.st_mtime_ns}", status.st_size
        yield row, stamp, size
