"""What a preparation knows, in an SQLite file: it survives a kill, and memory does not grow with the corpus."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from w2v2.data.sources import Row, utterance_id
from w2v2.errors import JobError, UsageError
from w2v2.preparation.audit import REJECTING, Finding, Part

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY, path TEXT, line INTEGER, start REAL, stop REAL, text TEXT, speaker TEXT, split TEXT,
    channel INTEGER, stamp TEXT, bytes INTEGER, seen INTEGER, stem TEXT,
    name TEXT, part TEXT, place INTEGER, done INTEGER DEFAULT 0,
    rate INTEGER, channels INTEGER, total INTEGER, first INTEGER, samples INTEGER, content TEXT, cuts TEXT,
    heard INTEGER,
    UNIQUE (path, line)
);
CREATE TABLE IF NOT EXISTS reasons (row INTEGER, reason TEXT, detail TEXT);
CREATE INDEX IF NOT EXISTS reasons_by_row ON reasons (row);
"""


_REJECTED = ", ".join(f"'{reason}'" for reason in REJECTING)


KEPT = f"done AND part IS NOT NULL AND id NOT IN (SELECT row FROM reasons WHERE reason IN ({_REJECTED}))"
"""SQL condition: rows that go into the corpus."""


ROWS_PER_TASK, BYTES_PER_TASK = 64, 32 << 20
"""What goes to a worker at once, about."""


class Journal:
    """Rows of the source, what was found in each, and where each goes."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA temp_store = FILE;")
        self.db.executescript(_SCHEMA)
        self.db.create_function("share", 1, share_of, deterministic=True)
        self.db.create_function("utterance_id", 1, utterance_id, deterministic=True)
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

    def enter(self, rows: Iterable[tuple[Row, str, int]], *, keep_old: bool = False) -> None:
        """Take in rows of the source, each with a stamp that changes with its content, and its size in bytes.

        Rows that were known and have not changed keep what was found in them; others that were known are forgotten,
        unless ``keep_old``.
        """
        with self.transaction():
            seen = int(self.get("seen") or 0) + 1
            self.put("seen", str(seen))
            for row, stamp, size in rows:
                known = (row.path, row.line, row.start, row.end, row.text, row.speaker, row.split, row.channel)
                mark = hashlib.sha256(repr((stamp, row.start, row.end, row.text, row.channel)).encode()).hexdigest()[
                    :16
                ]
                self.db.execute(
                    """INSERT INTO rows
                    (path, line, start, stop, text, speaker, split, channel, stamp, bytes, seen, stem)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, utterance_id(?1))
                    ON CONFLICT (path, line) DO UPDATE SET start = excluded.start, stop = excluded.stop,
                    text = excluded.text, speaker = excluded.speaker, split = excluded.split, seen = excluded.seen,
                    channel = excluded.channel,
                    bytes = excluded.bytes, done = done AND stamp = excluded.stamp, stamp = excluded.stamp""",
                    (*known, mark, size, seen),
                )
            if not keep_old:
                self.db.execute("DELETE FROM rows WHERE seen != ?", (seen,))
            self.db.execute("DELETE FROM reasons WHERE row NOT IN (SELECT id FROM rows WHERE done)")

    def pending(self) -> Iterator[tuple[str, list[Part], int]]:
        """(path, parts, bytes) of what has not been decoded yet, some parts of one recording at a time."""
        parts: list[Part] = []
        path, size = "", 0
        query = "SELECT id, path, start, stop, text, channel, bytes FROM rows WHERE NOT done ORDER BY path, line"
        for row, at, start, stop, text, channel, taken in self.db.execute(query):
            if parts and (at != path or len(parts) >= ROWS_PER_TASK):
                yield path, parts, size
                parts, size = [], 0
            path = at
            size += taken
            parts.append(Part(row, start, stop, text, channel))
        if parts:
            yield path, parts, size

    def record(self, findings: Iterable[Finding]) -> None:
        """Keep what was found; it is on disk within a second."""
        if not self.db.in_transaction:
            self.db.execute("BEGIN")
        for found in findings:
            self.db.execute(
                "UPDATE rows SET done = 1, rate = ?, channels = ?, total = ?, first = ?, samples = ?, content = ?, "
                "cuts = ?, heard = ? WHERE id = ?",
                (
                    found.rate, found.channels, found.total, found.first, found.samples, found.content,
                    json.dumps(found.cuts), found.channel, found.row,
                ),
            )  # fmt: skip
            self.db.execute("DELETE FROM reasons WHERE row = ?", (found.row,))
            self.db.executemany(
                "INSERT INTO reasons VALUES (?, ?, ?)", [(found.row, reason, said) for reason, said in found.reasons]
            )
        if time.monotonic() - self.saved > 0.5:
            self.db.execute("COMMIT")
            self.saved = time.monotonic()

    def settle(self, listed: Iterable[tuple[str, str]], shares: dict[str, float], seed: int) -> None:
        """Decide, now that every row is known: names, duplicates, splits, speakers in two splits.

        Args:
            listed: (utterance id, split); if there are any, rows that are not listed go into no split.
            shares: of speakers for ``valid`` and ``test``, taken from the rows that no list and no folder assigns.
            seed: of that choice.
        """
        with self.transaction():
            self._name()
            self.db.execute(
                "DELETE FROM reasons WHERE reason IN ('duplicate', 'speaker_overlap', 'transcript_missing')"
            )
            self.db.execute(
                """INSERT INTO reasons SELECT id, 'transcript_missing', 'other rows have one' FROM rows
                WHERE text IS NULL AND EXISTS (SELECT 1 FROM rows WHERE text IS NOT NULL)"""
            )
            self.db.execute("CREATE INDEX IF NOT EXISTS rows_by_content ON rows (content)")
            self.db.execute("UPDATE rows SET part = split")
            self._list(listed)
            self.db.execute(
                f"""INSERT INTO reasons SELECT id, 'duplicate', 'the same samples as ' || first FROM (
                    SELECT id, first_value(path || coalesce(' from ' || start || ' s', ''))
                        OVER same AS first, row_number() OVER same AS nth
                    FROM rows WHERE done AND part IS NOT NULL AND content != ''
                    AND id NOT IN (SELECT row FROM reasons WHERE reason IN ({_REJECTED}))
                    WINDOW same AS (PARTITION BY content ORDER BY path, start, stop, text, line)
                ) WHERE nth > 1"""
            )
            self._divide(shares, seed)
            self.db.execute(
                f"""INSERT INTO reasons SELECT id, 'speaker_overlap', 'speaker ' || speaker || ' is in ' || splits
                FROM rows JOIN (
                    SELECT speaker AS who, group_concat(DISTINCT part) AS splits FROM rows
                    WHERE speaker IS NOT NULL AND {KEPT} GROUP BY speaker HAVING count(DISTINCT part) > 1
                ) ON speaker = who WHERE {KEPT}"""
            )
            self.db.execute("UPDATE rows SET place = share(path)")
            self.db.execute("CREATE INDEX IF NOT EXISTS rows_by_place ON rows (part, place, path, first, line)")

    def _name(self) -> None:
        """Names of rows: the utterance id; where two paths share it, the whole path; then the part."""
        self.db.execute("UPDATE rows SET name = stem")
        self.db.execute(
            """UPDATE rows SET name = replace(replace(path, '/', '_'), ' ', '_') WHERE stem IN
            (SELECT stem FROM rows GROUP BY stem HAVING count(DISTINCT path) > 1)"""
        )
        self.db.execute(
            """UPDATE rows SET name = name || printf('-%.3f-', coalesce(start, 0))
            || CASE WHEN stop IS NULL THEN 'end' ELSE printf('%.3f', stop) END
            WHERE start IS NOT NULL OR stop IS NOT NULL"""
        )
        self.db.execute("UPDATE rows SET name = name || '-ch' || channel WHERE channel IS NOT NULL")
        row = "path || ' ' || coalesce(start, 0) || ' ' || coalesce(stop, 'end') || ' ' || coalesce(channel, 0)"
        self.db.execute(  # two rows may still share one, such as a/b_c.wav and a_b/c.wav
            f"""UPDATE rows SET name = name || printf('-%08x', share({row}) >> 31) WHERE name IN
            (SELECT name FROM rows GROUP BY name HAVING count(DISTINCT {row}) > 1)"""
        )

    def _list(self, listed: Iterable[tuple[str, str]]) -> None:
        self.db.execute("CREATE TEMP TABLE IF NOT EXISTS listed (name TEXT PRIMARY KEY, split TEXT)")
        self.db.execute("DELETE FROM listed")
        self.db.executemany("INSERT OR REPLACE INTO listed VALUES (?, ?)", listed)
        if self.value("SELECT count(*) FROM listed"):
            self.db.execute(
                "UPDATE rows SET part = (SELECT split FROM listed WHERE listed.name IN (rows.stem, rows.name))"
            )
            if not self.value("SELECT count(*) FROM rows WHERE part IS NOT NULL"):
                raise UsageError("the list of splits names no utterance of this source; its ids are the files' names")
        else:
            self.db.execute("UPDATE rows SET part = 'train' WHERE part IS NULL")

    def _divide(self, shares: dict[str, float], seed: int) -> None:
        """Hold out whole speakers of train for each split that is missing; recordings, where there are not two.

        Speakers of one recording stay together, and so do the recordings of a speaker.
        """
        if not self.value(f"SELECT count(*) FROM rows WHERE part = 'train' AND {KEPT}"):
            self.db.execute("UPDATE rows SET part = 'train' WHERE part IS NOT NULL")
        self._group()
        left = 1.0
        for split, wanted in shares.items():
            if not wanted or self.value(f"SELECT count(*) FROM rows WHERE part = ? AND {KEPT}", split):
                continue
            speaker = "coalesce((SELECT leader FROM leaders WHERE who = coalesce(speaker, path)), speaker, path)"
            for group in (speaker, "path"):
                train = f"part = 'train' AND {KEPT}"
                count = self.value(f"SELECT count(DISTINCT {group}) FROM rows WHERE {train}")
                if count < 2:
                    continue
                held = min(max(1, round(wanted / left * count)), count - 1)  # a share of all that there were
                self.db.execute(
                    f"""UPDATE rows SET part = ? WHERE part = 'train' AND {group} IN (
                    SELECT {group} FROM rows WHERE {train} GROUP BY 1 ORDER BY share(? || {group}) LIMIT ?)""",
                    (split, f"{seed}/{split}/" if seed else "", held),
                )
                left -= wanted
                break

    def _group(self) -> None:
        """One leader for all speakers that recordings tie together."""
        leaders: dict[str, str] = {}

        def leader(who: str) -> str:
            while leaders.get(who, who) != who:
                who = leaders[who]
            return who

        several = "SELECT path FROM rows GROUP BY path HAVING count(DISTINCT coalesce(speaker, path)) > 1"
        query = f"SELECT DISTINCT path, coalesce(speaker, path) FROM rows WHERE path IN ({several}) ORDER BY 1, 2"
        for _, together in itertools.groupby(self.db.execute(query), key=lambda row: row[0]):
            first, *others = [leader(who) for _, who in together]
            leaders.update((other, min(first, *others)) for other in (first, *others))
        self.db.execute("CREATE TEMP TABLE IF NOT EXISTS leaders (who TEXT PRIMARY KEY, leader TEXT)")
        self.db.execute("DELETE FROM leaders")
        self.db.executemany("INSERT INTO leaders VALUES (?, ?)", [(who, leader(who)) for who in leaders])

    def findings(self) -> Iterator[dict[str, Any]]:
        """What ``audit.jsonl`` holds: a line per file or row."""
        query = """SELECT path, line, start, stop, channel, part, done,
            (SELECT json_group_array(json_array(reason, detail)) FROM reasons WHERE row = id) FROM rows
            ORDER BY path, line"""
        for path, line, start, stop, channel, part, done, said in self.db.execute(query):
            reasons = sorted(json.loads(said))
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

    def kept(self, split: str) -> Iterator[sqlite3.Row]:
        """Rows of a split, recordings in an order that says nothing about speaker or date, parts of one together."""
        cursor = self.db.cursor()
        cursor.row_factory = sqlite3.Row
        infeasible = "EXISTS (SELECT 1 FROM reasons WHERE row = id AND reason = 'ctc_infeasible') AS infeasible"
        query = f"SELECT *, {infeasible} FROM rows WHERE part = ? AND {KEPT} ORDER BY place, path, first, line"
        return cursor.execute(query, (split,))

    def content_hash(self) -> str:
        """Of everything kept, in an order of its own: samples, transcripts, speakers, splits, cuts."""
        total = hashlib.sha256()
        query = f"""SELECT name, part, content, first, samples, text, speaker, cuts FROM rows WHERE {KEPT}
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
        with path.with_name("lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(f"another preparation is at work in {path.parents[1]}; wait until it is done") from None
            journal = Journal(path)
            try:
                yield journal
            finally:
                journal.close()
    except sqlite3.Error as error:
        raise JobError(
            f"cannot go on with {path}: {error}; free space or choose another folder, then run it again"
        ) from error
