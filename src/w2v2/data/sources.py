"""Where audio comes from, as rows: a folder of files, a table, a Hugging Face dataset."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2v2.data.audio import FORMATS, MOST_CHANNELS
from w2v2.data.storage import is_remote
from w2v2.errors import UsageError

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
COLUMNS = ("path", "start", "end", "text", "speaker", "split", "channel")
_SUBSET = re.compile(r"(train|dev|val|test)(ing|elopment|id|idation)?(?![a-z])", re.IGNORECASE)


_NOBODY = {"audio", "clips", "data", "flac", "mp3", "recordings", "sounds", "speech", "wav", "wavs"}
"""Folders that are surely no speaker's."""


@dataclass(frozen=True)
class Row:
    """A recording, or a part of one, and what is known about it."""

    path: str
    """Relative to the source's root, ``/`` between folders; or absolute, or a URL."""
    line: int = 0
    """Row number in a table, from 1; 0 in a folder."""
    start: float | None = None
    """Seconds; None: from the beginning."""
    end: float | None = None
    """Seconds; None: to the end."""
    text: str | None = None
    """Transcript; None: none."""
    speaker: str | None = None
    split: str | None = None
    """train, valid or test; None: to be decided."""
    channel: int | None = None
    """Of the recording, from 1; None: the mean over all."""


def folder_rows(root: Path, speaker: str | None = None) -> Iterator[Row]:
    """A row for every audio file of a tree, in the order of their names.

    Transcripts are taken from ``*.trans.txt`` in the same folder (lines of utterance id and text), or from a ``.txt``
    of the same name beside the audio. A first folder named ``train*``, ``dev*``, ``valid*`` or ``test*`` decides the
    split. The speaker is that part of the path that begins the file's name, as in LibriSpeech's
    ``SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac``, otherwise the file's own folder.

    Args:
        root: folder; symbolic links are followed.
        speaker: regular expression whose first group, matched in the relative path, is the speaker instead.

    Raises:
        UsageError: a loop of links, a name that is not UTF-8, a folder or a transcript that cannot be read.
    """
    pattern = _compile(speaker)
    for path, text in folder_texts(root):
        if isinstance(text, UsageError):
            raise text
        yield Row(path, text=text, speaker=speaker_of(path, pattern), split=split_of(path))


def folder_texts(root: Path) -> Iterator[tuple[str, str | UsageError | None]]:
    """Every audio file of a tree, relative to it, in the order of their names, and its transcript.

    Instead of that, what is wrong with the file that it should be in; None: there is no such file.

    Raises:
        UsageError: as for ``audio_paths``.
    """
    for folder, names in _walk(str(root), ()):
        texts, fault = _folder_transcripts(Path(folder), names)
        own = {name for name in names if name.endswith(".txt") and not name.endswith(".trans.txt")}
        for name, path in _audio_in(root, folder, names):
            stem = os.path.splitext(name)[0]
            text: str | UsageError | None = texts.get(stem)
            if text is None:
                text = _read_text(Path(folder, f"{stem}.txt")) if f"{stem}.txt" in own else fault
            yield path, text


def audio_paths(root: Path) -> Iterator[str]:
    """Every audio file of a tree, relative to it, in the order of their names.

    Raises:
        UsageError: a loop of links, a name that is not UTF-8, a folder that may not be read.
    """
    for folder, names in _walk(str(root), ()):
        for _, path in _audio_in(root, folder, names):
            yield path


def _audio_in(root: Path, folder: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name, and path relative to the root, of a folder's audio files."""
    relative = os.path.relpath(folder, root).replace(os.sep, "/")
    for name in names:
        if os.path.splitext(name)[1].lower() in FORMATS:
            yield name, name if relative == "." else f"{relative}/{name}"


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--speaker must be a regular expression, got {pattern!r}: {error}") from None
    if not compiled.groups:
        raise UsageError(f"--speaker needs a group in parentheses that is the speaker, got {pattern!r}")
    return compiled


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files, sorted; links followed, but not in a circle."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UsageError(f"symbolic link loop: {folder} leads back to a folder that contains it; remove the link")
    folders: list[str] = []
    files: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(entry.path).decode(errors="backslashreplace")
            raise UsageError(f"file name that is not UTF-8: {shown}; rename it") from None
        if entry.name.startswith("."):
            continue
        try:
            (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:  # a link to itself
            raise UsageError(f"symbolic link loop: {entry.path} ({error.strerror}); remove the link") from None
    if files:
        yield folder, files
    for name in folders:
        yield from _walk(os.path.join(folder, name), (*above, here))


def _folder_transcripts(folder: Path, names: list[str]) -> tuple[dict[str, str], UsageError | None]:
    """Texts by utterance id from ``*.trans.txt``, and what is wrong with one that cannot be read."""
    texts: dict[str, str] = {}
    fault: UsageError | None = None
    for name in names:
        if name.endswith(".trans.txt"):
            found = _read_text(folder / name)
            if isinstance(found, UsageError):
                fault = found
                continue
            for line in found.splitlines():
                utterance, _, text = line.partition(" ")
                texts[utterance] = text.strip()
    return texts, fault


def _read_text(path: Path) -> str | UsageError:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return UsageError(f"{path} is not UTF-8 text; convert it")
    except OSError as error:
        return UsageError(f"{path} cannot be read: {error.strerror}")


def speaker_of(path: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The speaker that a relative path tells, or None."""
    if pattern is not None:
        match = pattern.search(path)
        return match and match.group(1)
    *folders, name = path.split("/")
    first = name.split("-")[0]
    if first in folders:
        return first
    if not folders or folders[-1].lower() in _NOBODY or named_split(folders[-1]) is not None:
        return None
    return folders[-1]


def split_of(path: str) -> str | None:
    """The split that the first folder of a relative path names, or None."""
    first, _, rest = path.partition("/")
    return named_split(first) if rest else None


def named_split(name: str) -> str | None:
    """``dev-clean`` is valid, and so on; None for other names."""
    match = _SUBSET.match(name)
    return {"train": "train", "dev": "valid", "val": "valid", "test": "test"}[match[1].lower()] if match else None


def utterance_id(path: str) -> str:
    """LibriSpeech's own ids stay; otherwise the relative path without its ending, in one word."""
    *folders, name = path.split("/")
    stem = name.rsplit(".", 1)[0]
    if stem.split("-")[0] in folders:
        return stem
    return "_".join([*folders, stem]).replace(" ", "_")


def listed_splits(path: Path) -> Iterator[tuple[str, str]]:
    """(utterance id, split) of a table with the columns ``utt`` and ``role``, such as ``splits.tsv``."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="," if path.suffix.lower() == ".csv" else "\t")
        try:
            if not rows.fieldnames or not {"role", "utt"} <= set(rows.fieldnames):
                raise UsageError(f"{path} needs the columns role and utt, got {rows.fieldnames}")
            for row in rows:
                split = named_split(row["role"] or "")
                if split is not None and row["utt"]:
                    yield row["utt"], split
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as a table in UTF-8: {error}") from None


def table_rows(table: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Rows of a CSV, TSV or JSONL table.

    Args:
        table: paths in it are relative to its folder, absolute, or URLs.
        columns: name in the table of each of ``COLUMNS`` that is called otherwise there.

    Raises:
        UsageError: no such column, a row that lacks one, a value that is no number; with the row's number.
    """
    names = {column: (columns or {}).get(column, column) for column in COLUMNS}
    records = _json_records(table) if table.suffix.lower() in (".jsonl", ".json") else _csv_records(table)
    present: list[str] = []
    for line, record in records:
        if not present:
            missing = [names[column] for column in COLUMNS if column in (columns or {}) and names[column] not in record]
            if names["path"] not in record or missing:
                wanted = missing[0] if missing else names["path"]
                raise UsageError(
                    f"{table} has no column {wanted!r}: expected one, got {', '.join(map(str, record))}; "
                    "name the columns with --columns path=NAME"
                )
            present = [column for column in COLUMNS if names[column] in record]
            unread = [str(name) for name in record if name not in names.values()]
            if unread:
                log.warning("%s: nobody reads the columns %s; name them with --columns", table, ", ".join(unread))
        late = [names[column] for column in COLUMNS if column not in present and names[column] in record]
        if late:
            raise UsageError(f"{table}, row {line}: column {late[0]!r}, which the rows before lack; add it, null there")
        yield _table_row(table, line, record, {column: names[column] for column in present})


def _table_row(table: Path, line: int, record: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    where = f"{table}, row {line}"
    for name in names.values():
        if name not in record:
            raise UsageError(f"{where}: no column {name!r}, which the rows before have; add it, empty or null")
    values: dict[str, Any] = {column: record[name] for column, name in names.items()}
    if not values["path"] or not isinstance(values["path"], str):
        raise UsageError(f"{where}: expected a path in {names['path']!r}, got {values['path']!r}")
    channel = values.get("channel")
    if channel in (None, ""):
        channel = None
    elif not str(channel).isdecimal() or not 1 <= int(channel) <= MOST_CHANNELS:
        raise UsageError(f"{where}: expected a channel from 1 in {names['channel']!r}, got {channel!r}")
    for column in ("start", "end"):
        values[column] = _seconds(where, names, column, values.get(column))
    start, end = values["start"] or 0.0, values["end"]
    if end is not None and end <= start:
        raise UsageError(f"{where}: expected an end after the start {start:g}, got {end:g}")
    split = values.get("split") or None
    if split is not None and named_split(str(split)) is None:
        raise UsageError(f"{where}: expected train, dev, valid or test in {names['split']!r}, got {split!r}")
    text, speaker = values.get("text"), values.get("speaker")
    try:
        f"{values['path']}{text}{speaker}".encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {error.object[error.start]!r} is half a character; repair it") from None
    return Row(
        path=values["path"],
        line=line,
        start=values["start"],
        end=end,
        text=None if text is None else str(text),
        speaker=None if speaker in (None, "") else str(speaker),
        split=None if split is None else named_split(str(split)),
        channel=None if channel is None else int(channel),
    )


def _seconds(where: str, names: Mapping[str, str], column: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{where}: expected seconds in {names[column]!r}, got {value!r}")
    return seconds


def _csv_records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        tabs = table.suffix.lower() == ".tsv"
        # Tab-separated corpora such as Common Voice have bare quotation marks in their sentences.
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
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


def locate(root: Path, path: str) -> str:
    """Path or URL of a row's audio."""
    return path if is_remote(path) else str(root / path)


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
        raise UsageError("Hugging Face datasets need: pip install 'w2v2[hf]'") from None
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
                "name it with --columns audio=NAME"
            )
        rows: Iterable[dict[str, Any]] = part.cast_column(names["audio"], datasets.Audio(decode=False))
        for record in rows:
            line += 1
            if line > done:
                path = _hf_audio(record[names["audio"]] or {}, audio, line)
                if path is None:
                    raise UsageError(f"dataset {name}, row {line}: no audio in {names['audio']!r}; remove the row")
                text, speaker = (
                    None if record.get(names[column]) is None else str(record[names[column]])
                    for column in ("text", "speaker")
                )
                yield Row(path, line, text=text, speaker=speaker, split=named_split(split))


def _hf_audio(value: Mapping[str, Any], folder: Path, line: int) -> str | None:
    if value.get("bytes") is None:
        return value.get("path")
    suffix = os.path.splitext(value["path"] or "")[1].lower()
    relative = f"{line // 10_000:04d}/{line:08d}{suffix if suffix in FORMATS else '.wav'}"
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(value["bytes"])
    partial.replace(path)
    return relative
