"""Tables as records: CSV, TSV and JSONL, nothing of a row cut or made up."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from w2v2.data.names import nfc
from w2v2.errors import UsageError
from w2v2.files import open_text


def records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number, from 1, and values by ``key`` of their columns, of each row that is not empty.

    Raises:
        UsageError: what would lose or confuse something: fields without a column, two columns of one name, an open
            quotation mark, no JSON object; with the row's number.
    """
    return _json_records(table) if table.suffix.lower() == ".jsonl" else csv_records(table)


@functools.lru_cache(maxsize=1024)  # once for each row otherwise
def key(name: str) -> str:
    """A column's name as it is compared."""
    return nfc(name.strip()).casefold()


def seconds_of(text: str) -> float:
    """Seconds that a table names.

    Raises:
        ValueError: no number, or more than a century.
    """
    seconds = float(text)
    if not abs(seconds) < 3.2e9:
        raise ValueError(text)
    return seconds


def as_text(value: Any) -> str | None:
    """A value of a table as text, 1.0 as 1; None for NaN and null.

    Raises:
        ValueError: it is neither text nor a number.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value == math.inf or value == -math.inf:
        raise ValueError(f"expected text, got {value!r}")
    return str(value)


def _record_of(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Values by the names of their columns, each of which there is once."""
    record: dict[str, Any] = {}
    for name, value in pairs:
        if key(name) in record:
            raise ValueError(f"two columns {name.strip()!r}: rename or remove one")
        record[key(name)] = value
    return record


def say_once(path: Path, pairs: Iterable[tuple[str, str]], said: dict[str, str]) -> dict[str, str]:
    """Add to ``said`` what a file says of each name; raises :class:`UsageError` where that is two things."""
    for name, value in pairs:
        if said.setdefault(name, value) != value:
            raise UsageError(f"{path}: {name} stands twice, as {said.pop(name)!r} and as {value!r}; keep one of them")
    return said


def csv_records(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Row number, from 1, and fields of each row; those that a short row lacks are missing."""
    commas = table.suffix.lower() == ".csv"
    with open_text(table, newline="") as lines:
        # Tab-separated corpora such as Common Voice have bare quotation marks in their sentences.
        rows = (
            csv.reader(lines, skipinitialspace=True, strict=True)
            if commas
            else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        )
        line = 0
        try:
            header = next(rows, None)
            if header is None:
                raise UsageError(f"{table} is empty: expected a line with the names of the columns")
            width = len(header)
            while header and not header[-1].strip():
                header.pop()
            names = list(_record_of((name, "") for name in header))
            for line, row in enumerate(rows, 1):
                if surplus := row[width:] or [field for field in row[len(header) :] if field.strip()]:
                    raise ValueError(
                        f"{len(row)} fields for {len(header)} columns, {surplus[0]!r} is in none; "
                        f"write what holds a {'comma in quotation marks' if commas else 'tab with a blank'}"
                    )
                if any("," in field.partition("\n")[2] for field in row if commas):
                    raise ValueError("a quotation mark opens and closes only lines later; close it, or double it")
                if any(field.strip() for field in row):
                    yield line, dict(zip(names, row, strict=False))
        except (UsageError, UnicodeDecodeError):  # the second is named by who opened the file
            raise
        except csv.Error as error:
            hint = "; is a quotation mark left open?" if commas else ""
            raise UsageError(f"{table}, row {line + 1}: cannot be read: {error}{hint}") from None
        except ValueError as error:
            raise UsageError(f"{table}, row {line}: {error}") from None


def _json_records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(table) as lines:
        for line, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text, object_pairs_hook=_record_of)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{table}, row {line}: expected a JSON object, got {error}") from None
            if not isinstance(record, dict):
                raise UsageError(f"{table}, row {line}: expected a JSON object, got {type(record).__name__}")
            yield line, record
