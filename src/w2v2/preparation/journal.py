"""What a preparation knows, in an SQLite file: it survives a kill, and memory does not grow with the corpus."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from w2v2.data.names import utterance_id
from w2v2.data.sources import Row
from w2v2.errors import JobError, public
from w2v2.preparation.findings import REJECTING, Finding, Part

_SCHEMA = f"""
PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA temp_store = FILE;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY, path TEXT, line INTEGER, start REAL, stop REAL, text TEXT, speaker TEXT, split TEXT,
    channel INTEGER, stamp TEXT, bytes INTEGER, seen INTEGER, stem TEXT,
    name TEXT, part TEXT, place INTEGER, done INTEGER DEFAULT 0,
    rate INTEGER, channels INTEGER, total INTEGER, first INTEGER, samples INTEGER, content TEXT, cuts TEXT,
    heard INTEGER, before TEXT, held INTEGER DEFAULT 0,
    UNIQUE (path, line)
);
CREATE TABLE IF NOT EXISTS reasons (row INTEGER, reason TEXT, detail TEXT);
CREATE INDEX IF NOT EXISTS reasons_by_row ON reasons (row);
CREATE TEMP VIEW kept AS SELECT * FROM rows WHERE done AND part IS NOT NULL AND id NOT IN
    (SELECT row FROM reasons WHERE reason IN ({", ".join(f"'{reason}'" for reason in REJECTING)}));
CREATE TEMP TABLE chosen (subset TEXT, name TEXT, PRIMARY KEY (subset, name));
CREATE TEMP VIEW members AS SELECT part AS member_of, * FROM kept UNION ALL
    SELECT 'valid', * FROM kept WHERE held UNION ALL
    SELECT subset, kept.* FROM kept JOIN chosen USING (name) WHERE part = 'train';
"""
"""Kept are rows that go into the corpus; members those of its splits, and again those of labelled subsets of train.
Of the only recording of a corpus ``held`` parts, the last, are of the split valid, the others of train."""
_ROWS_PER_TASK, _BYTES_PER_TASK = 64, 32 << 20


class Totals(NamedTuple):
    """How far the audit is."""

    rows: int
    checked: int
    size: int
    """Bytes, and one for each row."""
    checked_size: int


class Summary(NamedTuple):
    """What is in a split or subset."""

    utterances: int
    speakers: int
    transcribed: int
    seconds: float


class Journal:
    """Rows of the source, what the audit has found in each, and where each goes."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript(_SCHEMA)
        self.db.create_function("share", 1, share_of, deterministic=True)
        self.db.create_function("utterance_id", 1, utterance_id, deterministic=True)
        self.db.create_function("public", 1, public, deterministic=True)
        self.saved = 0.0

    def close(self) -> None:
        """Write what is pending."""
        if self.db.in_transaction:
            self.db.execute("COMMIT")
        self.db.close()

    def get(self, key: str) -> str | None:
        """A value kept by ``put``."""
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: str) -> None:
        """Keep a value."""
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing."""
        if self.db.in_transaction:
            self.db.execute("COMMIT")
        self.db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def value(self, query: str, *values: Any) -> Any:
        """The first column of the first row of a query."""
        return self.db.execute(query, values).fetchone()[0]

    # --- Rows and findings --------------------------------------------------------------------------------------------

    def enter(self, rows: Iterable[tuple[Row, str, int]], *, keep_old: bool = False) -> None:
        """Take in rows of the source, each with a stamp that changes with its content, and its size in bytes.

        Rows that were known and have not changed keep what was found in them; others that were known are forgotten,
        unless ``keep_old``.
        """
        with self.transaction():
            seen = int(self.get("seen") or 0) + 1
            self.put("seen", str(seen))
            for row, stamp, size in rows:
                claims = (stamp, row.start, row.end, row.text, row.channel)
                mark = hashlib.sha256(repr(claims).encode()).hexdigest()[:16]
                where = (row.path, row.line, row.start, row.end, row.text, row.speaker, row.split, row.channel)
                self.db.execute(
                    """INSERT INTO rows
                    (path, line, start, stop, text, speaker, split, channel, stamp, bytes, seen, stem)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, utterance_id(?1))
                    ON CONFLICT (path, line) DO UPDATE SET start = excluded.start, stop = excluded.stop,
                    text = excluded.text, speaker = excluded.speaker, split = excluded.split, seen = excluded.seen,
                    channel = excluded.channel, bytes = excluded.bytes, done = done AND stamp = excluded.stamp,
                    stamp = excluded.stamp""",
                    (*where, mark, size, seen),
                )
            if not keep_old:
                self.db.execute("DELETE FROM rows WHERE seen != ?", (seen,))
            self.db.execute(  # a codec may have been installed, or a right given
                "UPDATE rows SET done = 0 WHERE id IN (SELECT row FROM reasons WHERE reason = 'unreadable')"
            )
            self.db.execute("DELETE FROM reasons WHERE row NOT IN (SELECT id FROM rows WHERE done)")

    def source_hash(self) -> str:
        """Of all rows as they were entered, with the state of their files."""
        total = hashlib.sha256()
        for row in self.db.execute("SELECT path, line, stamp, speaker, split FROM rows ORDER BY path, line"):
            total.update(repr(row).encode())
        return total.hexdigest()

    def differences(self, others: Iterable[tuple[str, int]]) -> tuple[int, int]:
        """Rows that are not among others, as (path, row number), and others that are not among the rows."""
        self.db.execute("CREATE TEMP TABLE others (path TEXT, line INTEGER)")
        self.db.executemany("INSERT INTO others VALUES (?, ?)", others)
        pairs = ("rows", "others"), ("others", "rows")
        query = "SELECT count(*) FROM (SELECT path, line FROM {} EXCEPT SELECT path, line FROM {})"
        new, gone = (int(self.value(query.format(*pair))) for pair in pairs)
        return new, gone

    def last_line(self) -> int:
        """The highest row number that was entered; 0: none."""
        return int(self.value("SELECT coalesce(max(line), 0) FROM rows"))

    def totals(self) -> Totals:
        """How much there is, and how much of it has been decoded."""
        query = "SELECT count(*), total(done), total(bytes + 1), total((bytes + 1) * done) FROM rows"
        return Totals(*map(int, self.db.execute(query).fetchone()))

    def pending(self) -> Iterator[list[tuple[str, list[Part]]]]:
        """What has not been decoded yet, path by path with its parts, as much as goes to a worker at once."""
        task: dict[str, list[Part]] = {}
        rows = size = 0
        query = "SELECT path, bytes, id, start, stop, text, channel FROM rows WHERE NOT done ORDER BY path, line"
        for path, bytes_of_path, *part in self.db.execute(query):
            if rows >= _ROWS_PER_TASK or (size >= _BYTES_PER_TASK and path not in task):
                yield list(task.items())
                task, rows, size = {}, 0, 0
            task.setdefault(path, []).append(Part(*part))
            rows += 1
            size += bytes_of_path
        if task:
            yield list(task.items())

    def record(self, findings: Iterable[Finding]) -> int:
        """Keep what was found, on disk within a second; returns its size as ``totals`` counts."""
        size = 0
        if not self.db.in_transaction:
            self.db.execute("BEGIN")
        for f in findings:
            size += self.value(
                "UPDATE rows SET done = 1, rate = ?, channels = ?, total = ?, first = ?, samples = ?, content = ?, "
                "cuts = ?, heard = ? WHERE id = ? RETURNING bytes + 1",
                *(f.rate, f.channels, f.total, f.first, f.samples, f.content, json.dumps(f.cuts), f.channel, f.row),
            )
            self.db.execute("DELETE FROM reasons WHERE row = ?", (f.row,))
            self.db.executemany("INSERT INTO reasons VALUES (?, ?, ?)", [(f.row, *reason) for reason in f.reasons])
        if time.monotonic() - self.saved > 0.5:
            self.db.execute("COMMIT")
            self.saved = time.monotonic()
        return size

    def findings(self) -> Iterator[dict[str, Any]]:
        """What ``audit.jsonl`` holds: a line per file or row."""
        query = """SELECT path, line, start, stop, channel, part, done,
            (SELECT json_group_array(json_array(reason, detail)) FROM reasons WHERE row = id) FROM rows
            ORDER BY path, line"""
        for path, line, start, stop, channel, part, done, pairs in self.db.execute(query):
            reasons = sorted(json.loads(pairs))
            names = [reason for reason, _ in reasons]
            status = "rejected" if set(names) & set(REJECTING) else "warned" if names else "ok"
            details = [f"{reason}: {detail}" for reason, detail in reasons]
            if part is None and done:
                details.append("in no split: not listed")
            where = {"row": line} if line else {}
            if start is not None or stop is not None:
                where |= {"start": start, "end": stop}
            if channel is not None:
                where |= {"channel": channel}
            yield {"path": path, **where, "status": status, "reasons": names, "detail": "; ".join(details)}

    # --- Splits, once they are settled --------------------------------------------------------------------------------

    def transcribed(self) -> Iterator[tuple[str, str | None, float]]:
        """(name, speaker, seconds) of the rows of train that have a transcript."""
        query = "SELECT name, speaker, samples * 1.0 / rate FROM kept WHERE part = 'train' AND trim(text) != ''"
        return iter(self.db.execute(query))

    def choose(self, subset: str, names: Iterable[str]) -> None:
        """Make some rows of train a subset, which is then read like a split."""
        self.db.executemany("INSERT OR REPLACE INTO chosen VALUES (?, ?)", ((subset, name) for name in sorted(names)))

    def summary(self, split: str) -> Summary:
        """Figures of a split or subset."""
        query = """SELECT count(*), count(DISTINCT speaker), total(trim(text) != ''), total(samples * 1.0 / rate)
            FROM members WHERE member_of = ?"""
        utterances, speakers, transcribed, seconds = self.db.execute(query, (split,)).fetchone()
        return Summary(utterances, speakers, int(transcribed), seconds)

    def members(self, split: str) -> Iterator[sqlite3.Row]:
        """Rows of a split or subset, recordings in an order that says nothing about speaker or date, parts together."""
        cursor = self.db.cursor()
        cursor.row_factory = sqlite3.Row
        infeasible = "EXISTS (SELECT 1 FROM reasons WHERE row = id AND reason = 'ctc_infeasible') AS infeasible"
        query = f"SELECT *, {infeasible} FROM members WHERE member_of = ? ORDER BY place, path, first, line"
        return cursor.execute(query, (split,))

    def content_hash(self) -> str:
        """Of everything kept, in an order of its own: samples, transcripts, speakers, splits, cuts."""
        total = hashlib.sha256()
        query = """SELECT name, part, content, first, samples, text, speaker, cuts FROM kept
            ORDER BY name, first, content, line"""
        for row in self.db.execute(query):
            total.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return total.hexdigest()


def share_of(key: str) -> int:
    """A number that depends on a key alone and is spread evenly."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """A journal; SQLite's complaints about the disk become failures in one line.

    Raises:
        JobError: the disk is full, the file cannot be used, or another process is using it.
    """
    try:
        with FileLock(path.with_name("lock"), timeout=0):
            journal = Journal(path)
            try:
                yield journal
            finally:
                journal.close()
    except Timeout:
        raise JobError(f"another preparation is at work in {path.parents[1]}; wait until it is done") from None
    except sqlite3.Error as error:
        raise JobError(
            f"cannot go on with {path}: {error}; free space or choose another folder, then run it again"
        ) from error
