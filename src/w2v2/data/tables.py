"""Rows of tables and of Hugging Face datasets."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from w2v2.data.audio import FORMATS, MOST_CHANNELS
from w2v2.data.sources import Row
from w2v2.data.splits import named_split
from w2v2.errors import UsageError
from w2v2.files import whole

log = logging.getLogger(__name__)

COLUMNS = ("path", "start", "end", "text", "speaker", "split", "channel")


def table_rows(table: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Rows of a CSV, TSV or JSONL table.

    Args:
        table: paths in it are relative to its folder, absolute, or URLs.
        columns: name in the table of each of ``COLUMNS`` that is called otherwise there.

    Raises:
        UsageError: no such column, a row that lacks one, a value that cannot be; with the row's number.
    """
    columns = columns or {}
    names = {column: columns.get(column, column) for column in COLUMNS}
    needed = [names[column] for column in COLUMNS if column == "path" or column in columns]
    present: dict[str, str] = {}
    for line, record in _json_records(table) if table.suffix.lower() == ".jsonl" else _csv_records(table):
        if not present:
            if missing := [name for name in needed if name not in record]:
                raise UsageError(
                    f"{table} has no column {missing[0]!r}: expected one, got {', '.join(map(str, record))}; "
                    "name the columns with `columns` path=NAME"
                )
            present = {column: name for column, name in names.items() if name in record}
            if unread := [str(name) for name in record if name not in names.values()]:
                log.warning("%s: nobody reads the columns %s; name them with `columns`", table, ", ".join(unread))
        where = f"{table}, row {line}"
        for column, name in names.items():
            if column in present and name not in record:
                raise UsageError(f"{where}: no column {name!r}, which the rows before have; add it, empty or null")
            if column not in present and name in record:
                raise UsageError(f"{where}: column {name!r}, which the rows before lack; add it, null there")
        yield _table_row(where, line, {column: record[name] for column, name in present.items()}, names)


def _table_row(where: str, line: int, values: dict[str, Any], names: Mapping[str, str]) -> Row:
    """A row of what stands in its columns; empty is as good as null, but for a transcript."""

    def expect(column: str, wanted: str) -> UsageError:
        return UsageError(f"{where}: expected {wanted} in {names[column]!r}, got {values[column]!r}")

    given = {column: value for column, value in values.items() if value not in (None, "")}
    if not isinstance(given.get("path"), str):
        raise expect("path", "a path")
    start, end = (_seconds(given.get(column)) for column in ("start", "end"))
    for column, seconds in (("start", start), ("end", end)):
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise expect(column, "seconds")
    if end is not None and end <= (start or 0.0):
        raise UsageError(f"{where}: expected an end after the start {start or 0.0:g}, got {end:g}")
    if "split" in given and named_split(str(given["split"])) is None:
        raise expect("split", "train, dev, valid or test")
    channel = str(given.get("channel", 1))
    if not channel.isdecimal() or not 1 <= int(channel) <= MOST_CHANNELS:
        raise expect("channel", "a channel from 1")
    text, speaker = (None if values.get(column) is None else str(values[column]) for column in ("text", "speaker"))
    try:
        f"{given['path']}{text}{speaker}".encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {error.object[error.start]!r} is half a character; repair it") from None
    return Row(
        path=given["path"],
        line=line,
        start=start,
        end=end,
        text=text,
        speaker=speaker or None,
        split=named_split(str(given["split"])) if "split" in given else None,
        channel=int(channel) if "channel" in given else None,
    )


def _seconds(value: Any) -> float | None:
    """A number, or -1 for what is none."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return -1.0


def listed_splits(path: Path) -> Iterator[tuple[str, str]]:
    """(utterance id, split) of a table with the columns ``utt`` and ``role``, such as ``splits.tsv``."""
    for _, row in _csv_records(path):
        if not {"role", "utt"} <= row.keys():
            raise UsageError(f"{path} needs the columns role and utt, got {', '.join(row)}")
        if row["utt"] and (split := named_split(row["role"])):
            yield row["utt"], split


def _csv_records(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Row number, from 1, and fields of each row; those that a short row lacks are missing."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        # Tab-separated corpora such as Common Voice have bare quotation marks in their sentences.
        commas = table.suffix.lower() == ".csv"
        rows = csv.reader(file) if commas else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = next(rows, None)
            if header is None:
                raise UsageError(f"{table} is empty: expected a line with the names of the columns")
            for line, row in enumerate(rows, 1):
                if row:
                    yield line, dict(zip(header, row, strict=False))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{table} cannot be read as a table in UTF-8: {error}") from None


def _json_records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open("rb") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise UsageError(f"{table}, row {line}: expected a JSON object, got {error}") from None
            if not isinstance(record, dict):
                raise UsageError(f"{table}, row {line}: expected a JSON object, got {type(record).__name__}")
            yield line, record


def hf_rows(name: str, audio: Path, columns: Mapping[str, str] | None, done: int, config: str | None) -> Iterator[Row]:
    """Rows of a Hugging Face dataset, streamed; audio that is inside it is written, as it is, to a folder.

    Args:
        name: of a dataset on the hub, or a local folder, as ``datasets.load_dataset`` takes it.
        audio: folder for the audio; paths of rows are relative to it, or absolute.
        columns: name there of ``audio``, ``text``, ``speaker``, if they are called otherwise.
        done: rows that an earlier call has already given.
        config: of the dataset.

    Raises:
        UsageError: ``datasets`` is not installed, or there is no such dataset or column.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError("Hugging Face datasets need: pip install datasets") from None
    try:
        parts = datasets.load_dataset(name, config, streaming=True)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot load the dataset {name}: {str(error).splitlines()[0]}") from error
    names = {column: (columns or {}).get(column, column) for column in ("audio", "text", "speaker")}
    line = 0
    for split, part in parts.items():
        features = part.features or {}
        if names["audio"] not in features:
            raise UsageError(
                f"dataset {name} has no column {names['audio']!r}: got {', '.join(features)}; "
                "name it with `columns` audio=NAME"
            )
        rows: Iterable[dict[str, Any]] = part.cast_column(names["audio"], datasets.Audio(decode=False))
        for record in rows:
            line += 1
            if line > done:
                path = _hf_audio(record[names["audio"]] or {}, audio, line)
                if path is None:
                    raise UsageError(f"dataset {name}, row {line}: no audio in {names['audio']!r}; remove the row")
                values = (record.get(names[column]) for column in ("text", "speaker"))
                text, speaker = (None if value is None else str(value) for value in values)
                yield Row(path, line, text=text, speaker=speaker, split=named_split(split))


def _hf_audio(value: Mapping[str, Any], folder: Path, line: int) -> str | None:
    if value.get("bytes") is None:
        return value.get("path")
    suffix = os.path.splitext(value["path"] or "")[1].lower()
    relative = f"{line // 10_000:04d}/{line:08d}{suffix if suffix in FORMATS else '.wav'}"
    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
    with whole(folder / relative) as partial:
        partial.write_bytes(value["bytes"])
    return relative
