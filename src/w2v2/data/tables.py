"""Rows of tables and of Hugging Face datasets."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from w2v2.data.audio import FORMATS, MOST_CHANNELS
from w2v2.data.names import existing, nfc, speaker_name, utterance_id
from w2v2.data.records import as_text, csv_records, key, records, say_once, seconds_of
from w2v2.data.sources import Row, audio_paths
from w2v2.data.splits import named_split
from w2v2.errors import UsageError, printable
from w2v2.files import whole

log = logging.getLogger(__name__)

COLUMNS = ("path", "start", "end", "text", "speaker", "split", "channel", "confidence")
_HF_COLUMNS = ("audio", "text", "speaker")


def table_rows(
    table: Path,
    columns: Mapping[str, str] | None = None,
    audio: Path | None = None,
    *,
    min_confidence: float = 0.0,
    passed_over: Counter[str] | None = None,
) -> Iterator[Row]:
    """Rows of a CSV, TSV or JSONL table. Blanks around the names of columns, and their case, do not matter.

    Args:
        table: paths in it are relative to its folder, absolute, or URLs.
        columns: name in the table of each of ``COLUMNS`` that is called otherwise there.
        audio: folder that paths are relative to, instead of the table's.
        min_confidence: rows that have less of it are left out.
        passed_over: where these are counted.

    Raises:
        UsageError: no such column, a row that lacks one, a value that cannot be; with the row's number.
    """
    columns = _mapping(columns, COLUMNS)
    names = {column: key(columns.get(column, column)) for column in COLUMNS}
    needed = [names[column] for column in COLUMNS if column == "path" or column in columns]
    present: dict[str, str] = {}
    for line, record in records(table):
        if not present:
            if missing := [name for name in needed if name not in record]:
                raise UsageError(
                    f"{table} has no column {missing[0]!r}: expected one, got {', '.join(map(str, record))}; "
                    "name the columns with `columns` path=NAME"
                )
            present = {column: name for column, name in names.items() if name in record}
            if unread := ", ".join(str(name) for name in record if name not in names.values()):
                shown = printable(unread)[:500]
                log.warning("%s: nobody reads the columns %s; name them with `columns`", table, shown)
        where = f"{table}, row {line}"
        for column, name in names.items():
            if column in present and name not in record:
                raise UsageError(f"{where}: no column {name!r}, which the rows before have; add it, empty or null")
            if column not in present and name in record:
                raise UsageError(f"{where}: column {name!r}, which the rows before lack; add it, null there")
        values = {column: record[name] for column, name in present.items()}
        row = _table_row(where, line, values, names)
        if not _confident(where, values.get("confidence"), min_confidence):
            if passed_over is not None:
                passed_over[f"rows of less confidence than {min_confidence:g}"] += 1
            continue
        yield replace(row, path=existing(audio or table.parent, row.path))


def _confident(where: str, value: Any, least: float) -> bool:
    """Whether a row says, as a share, that it is as sure as wanted; one that says nothing is."""
    try:
        confidence = float(text) if (text := as_text(value)) and text.strip() else 1.0
        if not 0 <= confidence <= 1:
            raise ValueError(value)
    except ValueError:
        raise UsageError(f"{where}: expected a confidence of 0 to 1, got {value!r}") from None
    return confidence >= least


def _mapping(columns: Mapping[str, str] | None, known: Sequence[str]) -> Mapping[str, str]:
    for column in columns or {}:
        if column not in known:
            raise UsageError(f"`columns` {column}=...: expected one of {', '.join(known)} before the =")
    return columns or {}


def _table_row(where: str, line: int, values: dict[str, Any], names: Mapping[str, str]) -> Row:
    """A row of what stands in its columns; empty or NaN is as good as null, but for an empty transcript."""

    def expect(column: str, wanted: str) -> UsageError:
        return UsageError(f"{where}: expected {wanted} in {names[column]!r}, got {values[column]!r}")

    def text_of(column: str) -> str | None:
        try:
            return as_text(values.get(column))
        except ValueError:
            raise expect(column, "text") from None

    given = {column: text for column in values if (text := text_of(column))}
    if not isinstance(values["path"], str) or "path" not in given or "\0" in given["path"]:
        raise expect("path", "a path")
    seconds: dict[str, float] = {}
    for column in given.keys() & {"start", "end"}:
        try:
            seconds[column] = seconds_of(given[column])
        except ValueError:
            raise expect(column, "seconds") from None
    split = named_split(given["split"].strip()) if "split" in given else None
    if "split" in given and split is None:
        raise expect("split", "train, dev, valid or test")
    channel = given.get("channel", "1").strip()
    if not channel.isdecimal() or len(channel) > 9 or not 1 <= int(channel) <= MOST_CHANNELS:
        raise expect("channel", "a channel from 1")
    text = text_of("text")
    try:
        f"{given['path']}{text}{given.get('speaker')}".encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {error.object[error.start]!r} is half a character; repair it") from None
    return Row(
        path=given["path"],
        line=line,
        start=seconds.get("start"),
        end=seconds.get("end"),
        text=text,
        speaker=speaker_name(given.get("speaker")),
        split=split,
        channel=int(channel) if "channel" in given else None,
    )


def listed_splits(path: Path) -> dict[str, str]:
    """Split by utterance id, of a table with the columns ``utt`` and ``role``, such as ``splits.tsv``.

    An utterance may be named by its file, too. One with an empty role is in no split, one of two refused.
    """
    said: dict[str, str] = {}
    for line, row in csv_records(path):
        if not {"role", "utt"} <= row.keys():
            raise UsageError(f"{path} needs the columns role and utt, got {', '.join(row)}")
        name, role = row["utt"].strip(), row["role"].strip()
        if name and role:
            if (split := named_split(role)) is None:
                raise UsageError(f"{path}, row {line}: role: expected train, dev, valid, test or nothing, got {role!r}")
            utt = utterance_id(name) if os.path.splitext(name)[1].lower() in FORMATS else nfc(name)
            say_once(path, [(utt, split)], said)
    return said


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
    if Path(name).is_dir() and next(audio_paths(Path(name)), None):
        raise UsageError(f"{name} is a folder of audio: prepare it as such, without hf:; metadata.csv in it is read")
    try:
        import datasets
    except ImportError:
        raise UsageError("Hugging Face datasets need: pip install datasets") from None
    try:
        parts = datasets.load_dataset(name, config, streaming=True)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot load the dataset {name}: {str(error).splitlines()[0]}") from error
    names = {column: _mapping(columns, _HF_COLUMNS).get(column, column) for column in _HF_COLUMNS}
    line = 0
    for split, part in parts.items():
        features = part.features or {}
        for column in ("audio", *(columns or {})):
            if names[column] not in features:
                raise UsageError(
                    f"dataset {name} has no column {names[column]!r}: got {', '.join(features)}; "
                    f"name it with `columns` {column}=NAME"
                )
        if not line and (unread := ", ".join(column for column in features if column not in names.values())):
            log.warning("dataset %s: nobody reads the columns %s; name them with `columns`", name, unread[:500])
        rows: Iterable[dict[str, Any]] = part.cast_column(names["audio"], datasets.Audio(decode=False))
        for record in rows:
            line += 1
            if line > done:
                path = _hf_audio(record[names["audio"]] or {}, audio, line)
                if path is None:
                    raise UsageError(f"dataset {name}, row {line}: no audio in {names['audio']!r}; remove the row")
                try:
                    text, speaker = (as_text(record.get(names[column])) for column in ("text", "speaker"))
                except ValueError as error:
                    raise UsageError(f"dataset {name}, row {line}: {error}; name the columns with `columns`") from None
                yield Row(path, line, text=text, speaker=speaker_name(speaker), split=named_split(split))


def _hf_audio(value: Mapping[str, Any], folder: Path, line: int) -> str | None:
    if value.get("bytes") is None:
        return value.get("path")
    suffix = os.path.splitext(value["path"] or "")[1].lower()
    relative = f"{line // 10_000:04d}/{line:08d}{suffix if suffix in FORMATS else '.wav'}"
    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
    with whole(folder / relative) as partial:
        partial.write_bytes(value["bytes"])
    return relative
