"""Any audio to a checked corpus: every recording decoded once, manifests or shards, and ``corpus.json`` at the end.

Everything that is done is kept: a preparation that was killed goes on with the rest and ends with the same corpus.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

from lhotse import MonoCut, SupervisionSegment

from w2v2.data.corpora import SCHEMA, choose_labelled, file_recording
from w2v2.data.sources import SPLITS, Row, folder_rows, hf_rows, listed_splits, locate, table_rows
from w2v2.data.storage import is_remote
from w2v2.errors import JobError, Show, UsageError
from w2v2.preparation.audit import REASONS, AuditConfig, Part, audit_all
from w2v2.preparation.executors import local_executor
from w2v2.preparation.journal import BYTES_PER_TASK, KEPT, ROWS_PER_TASK, Journal, open_journal
from w2v2.preparation.shards import FORMATS, Piece, bytes_per_second, grouped, write_manifest, write_shard

TABLES = (".csv", ".tsv", ".jsonl")


HF = "hf:"


T = TypeVar("T")


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How to prepare a corpus."""

    audit: AuditConfig = field(default_factory=AuditConfig)
    """Thresholds."""
    splits: str = ""
    """Table with the columns ``utt`` and ``role``; without it ROOT/splits.tsv, if there is one."""
    valid_share: float = 0.05
    """Share of the speakers of train to hold out to validate on, if the source has no validation split."""
    test_share: float = 0.0
    """The same for a test split."""
    seed: int = 0
    """Of what is held out, and of labelled subsets."""
    labelled: tuple[str, ...] = ()
    """Labelled subsets of train: ``10m``, ``1h``, ``10h``, or ``NAME=FILE`` with an utterance id on each line."""
    columns: tuple[str, ...] = ()
    """Names of a table's columns, such as ``text=sentence``."""
    speaker: str = ""
    """Regular expression on the relative path, whose first group is the speaker."""
    hf_config: str = ""
    """Configuration of a Hugging Face dataset."""
    shards: str = ""
    """Write the audio into shards: ``flac``, ``opus`` or ``wav``, 16 kHz mono; empty: point into the original files."""
    shard_mb: float = 250.0
    """Size of a shard, about, MB."""


def prepare(
    source: str | Path,
    out: Path,
    config: PrepareConfig | None = None,
    *,
    jobs: int = 1,
    strict: bool = False,
    executor: Executor | None = None,
    progress: Show | None = None,
) -> dict[str, Any]:
    """Check a source of audio and write ``OUT/{corpus.json, audit.jsonl, SPLIT/cuts.NNNNNN.jsonl.gz}``.

    Args:
        source: a folder of audio (LibriSpeech's layout or any other), a table (CSV, TSV, JSONL), or ``hf:NAME``.
        out: folder of the corpus; new, or one that a preparation of the same source was stopped in.
        config: how.
        jobs: processes.
        strict: fail, after the audit, if it found anything at all.
        executor: where to decode and encode instead of on this machine's processes; any ``concurrent.futures``
            executor, such as Dask's or Ray's, whose workers see the same files.
        progress: is told the stage and the share done.

    Returns:
        What ``corpus.json`` holds.

    Raises:
        UsageError: a source or options that cannot work.
        JobError, OSError: what went wrong on the way, or with ``strict`` what was found.
    """
    config = config or PrepareConfig()
    report = progress or (lambda stage, share: None)
    _check(config)
    source = _absolute(source)
    options = {"source": source, **asdict(config)}
    if (done := _finished(out, options)) is not None:
        shutil.rmtree(out / ".prepare", ignore_errors=True)
        log.info("%s is prepared already", out)
        if strict:
            _refuse_findings(done, out)
        return done
    work = out / ".prepare"
    made = not out.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with open_journal(work / "journal.sqlite") as journal:
            root = _begin(journal, source, out, options, report)
    except UsageError:
        if made:  # and nothing has been read, so nothing is lost
            shutil.rmtree(out)
        raise
    with open_journal(work / "journal.sqlite") as journal, contextlib.ExitStack() as stack:
        if executor is None:
            executor = stack.enter_context(local_executor(jobs))
        _check_all(journal, root, config.audit, executor, jobs, report)
        listed = Path(config.splits) if config.splits else root / "splits.tsv"
        shares = {"valid": config.valid_share, "test": config.test_share}
        journal.settle(listed_splits(listed) if config.splits or listed.exists() else (), shares, config.seed)
        counts = _write_audit(journal, out)
        summary: dict[str, Any] = {
            "schema": SCHEMA,
            "source": source,
            "options": options,
            "content_hash": journal.content_hash(),
            "audit": counts,
        }
        if strict:
            _refuse_findings(summary, out)
        if not journal.value(f"SELECT count(*) FROM rows WHERE {KEPT}"):
            raise JobError(f"nothing of {source} can be used; {out / 'audit.jsonl'} says why")
        writer = _Writer(journal, root, out, config, executor, jobs, report)
        summary["splits"] = writer.write(summary["content_hash"])
    _write_json(out / "corpus.json", summary)
    shutil.rmtree(work)
    return summary


def _check(config: PrepareConfig) -> None:
    if config.shards and config.shards not in FORMATS:
        raise UsageError(f"--shards must be one of {', '.join(FORMATS)}, got {config.shards!r}")
    for name, value in (("--valid-share", config.valid_share), ("--test-share", config.test_share)):
        if not 0 <= value < 1:
            raise UsageError(f"{name} must be at least 0 and less than 1, got {value:g}")
    if config.shard_mb <= 0:
        raise UsageError(f"--shard-mb must be more than 0, got {config.shard_mb:g}")
    if not 1 <= config.audit.max_seconds < float("inf"):
        raise UsageError(f"--max-seconds must be at least 1 and finite, got {config.audit.max_seconds:g}")
    for name, samples in (("--hop", config.audit.hop), ("--receptive-field", config.audit.receptive_field)):
        if samples < 1:
            raise UsageError(f"{name} must be 1 sample or more, got {samples}")
    for pair in config.columns:
        if "=" not in pair:
            raise UsageError(f"--columns must be pairs such as text=sentence, got {pair!r}")
    for subset in config.labelled:
        _minutes(subset)
        if not subset.partition("=")[0].replace("-", "").replace(".", "").isalnum():
            raise UsageError(f"--labelled NAME=FILE needs a name of letters and digits, got {subset!r}")
        if "=" in subset and not Path(subset.partition("=")[2]).is_file():
            raise UsageError(f"no file {subset.partition('=')[2]}: --labelled NAME=FILE needs one of utterance ids")
    if config.splits and not Path(config.splits).is_file():
        raise UsageError(f"no file {config.splits}: --splits needs a table with the columns utt and role")


def _minutes(subset: str) -> float:
    """Length of a labelled subset in minutes; 0 for one given by a list."""
    if "=" in subset:
        return 0.0
    number, unit = subset[:-1], subset[-1:]
    if unit not in ("m", "h") or not number.replace(".", "", 1).isdigit() or not float(number):
        raise UsageError(f"--labelled must be like 10m, 1h, or NAME=FILE, got {subset!r}")
    return float(number) * (60 if unit == "h" else 1)


def _absolute(source: str | Path) -> str:
    text = str(source)
    return text if text.startswith(HF) else str(Path(source).absolute())


def _finished(out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The corpus that is there already, if it is this one."""
    path = out / "corpus.json"
    if path.exists():
        with contextlib.suppress(ValueError):  # not JSON, and so not of ours
            done = json.loads(path.read_text())
            if isinstance(done, dict) and done.get("schema") == SCHEMA and _same(done.get("options"), options):
                return done
        raise UsageError(f"{out} already holds a prepared corpus; choose another folder, or remove it")
    if out.exists() and not (out / ".prepare").exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no unfinished preparation; choose another folder")
    return None


def _same(one: Any, other: Any) -> bool:
    return bool(json.loads(json.dumps(one)) == json.loads(json.dumps(other)))


def _begin(journal: Journal, source: str, out: Path, options: dict[str, Any], report: Show) -> Path:
    """Enter the rows of the source; returns the folder that their paths are relative to."""
    begun = journal.get("options")
    if begun is not None and not _same(json.loads(begun), options):
        old = json.loads(begun)
        changed = [name for name in options if not _same(old.get(name), options[name])]
        raise UsageError(
            f"{out} holds an unfinished preparation with other options ({', '.join(changed)}): finish it with those, "
            "or choose another folder"
        )
    columns = dict(pair.split("=", 1) for pair in options["columns"])
    path = Path(source)
    if source.startswith(HF):
        root = (out / "audio").absolute()
        done = journal.value("SELECT coalesce(max(line), 0) FROM rows")
        rows = hf_rows(source.removeprefix(HF), root, columns, done, options["hf_config"] or None)
        while batch := list(islice(rows, 500)):
            journal.enter(_stamped(root, batch), keep_old=True)
            journal.put("options", json.dumps(options))  # now, so that no other dataset goes on from here
            report("read", 0.0)
    elif path.is_dir():
        root = path
        journal.enter(_stamped(root, folder_rows(root, options["speaker"] or None)))
    elif path.suffix.lower() in TABLES and path.exists():
        root = path.parent
        journal.enter(_stamped(root, table_rows(path, columns)))
    elif path.exists():
        raise UsageError(f"cannot read {path}: expected a folder, or a table ending in {', '.join(TABLES)}")
    else:
        raise UsageError(f"no folder or table {path}: expected audio, a table of it, or hf:NAME")
    if not journal.value("SELECT count(*) FROM rows"):
        raise UsageError(f"no audio in {source}: expected files such as .flac, .wav, .mp3, .ogg, .opus; check the path")
    journal.put("options", json.dumps(options))
    return root


def _stamped(root: Path, rows: Iterable[Row]) -> Iterator[tuple[Row, str, int]]:
    last, stamp, size = "", "", 0
    for row in rows:
        if row.path != last:
            last, stamp, size = row.path, "", 0
            if not is_remote(row.path):
                with contextlib.suppress(OSError):  # the audit says what is wrong with it
                    status = os.stat(locate(root, row.path))
                    stamp, size = f"{status.st_size}/{status.st_mtime_ns}", status.st_size
        yield row, stamp, size


# --- Decoding ---------------------------------------------------------------------------------------------------------


def _check_all(journal: Journal, root: Path, config: AuditConfig, executor: Executor, jobs: int, report: Show) -> None:
    total, left = (journal.value(f"SELECT coalesce(sum(bytes + 1), 0) FROM rows{w}") for w in ("", " WHERE NOT done"))
    if left < total:
        done = journal.value("SELECT count(*) FROM rows WHERE done")
        log.info("%d of %d checked already", done, journal.value("SELECT count(*) FROM rows"))

    def tasks() -> Iterator[tuple[int, tuple[Any, ...]]]:
        group: list[tuple[str, list[Part]]] = []
        size = rows = 0
        for path, parts, taken in journal.pending():
            group.append((locate(root, path), parts))
            size += taken + len(parts)
            rows += len(parts)
            if rows >= ROWS_PER_TASK or size >= BYTES_PER_TASK:
                yield size, (group, config)
                group, size, rows = [], 0, 0
        if group:
            yield size, (group, config)

    for size, findings in _in_order(executor, audit_all, tasks(), 4 * jobs):
        journal.record(findings)
        left -= size
        report("check", 1 - left / max(total, 1))


def _in_order(
    executor: Executor, work: Callable[..., T], tasks: Iterator[tuple[int, tuple[Any, ...]]], ahead: int
) -> Iterator[tuple[int, T]]:
    """Results of tasks, a bounded number of them under way."""
    running: deque[tuple[int, Future[T], Any]] = deque()
    try:
        for size, arguments in islice(tasks, ahead):
            running.append((size, executor.submit(work, *arguments), arguments))
        while running:
            size, future, arguments = running.popleft()
            yield size, future.result()
            for size, arguments in islice(tasks, 1):
                running.append((size, executor.submit(work, *arguments), arguments))
    except BrokenExecutor as error:
        raise JobError(
            f"a worker process died ({error}); what is done is kept, run it again with fewer jobs"
        ) from error
    finally:
        for _, future, _ in running:
            future.cancel()


# --- Writing ----------------------------------------------------------------------------------------------------------


def _write_audit(journal: Journal, out: Path) -> dict[str, Any]:
    """``audit.jsonl``, and its counts."""
    status = dict.fromkeys(("ok", "warned", "rejected"), 0)
    reasons = dict.fromkeys(REASONS, 0)
    partial = out / "audit.jsonl.partial"
    with partial.open("w", encoding="utf-8") as file:
        for line in journal.findings():
            status[line["status"]] += 1
            for reason in line["reasons"]:
                reasons[reason] += 1
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(out / "audit.jsonl")
    return {**status, "reasons": reasons}


def _refuse_findings(summary: dict[str, Any], out: Path) -> None:
    found = {reason: count for reason, count in summary["audit"]["reasons"].items() if count}
    if found:
        said = ", ".join(f"{count} {reason}" for reason, count in found.items())
        raise JobError(f"the audit found {said}, and --strict allows nothing; {out / 'audit.jsonl'} lists them")


@dataclass
class _Writer:
    """Splits to pieces."""

    journal: Journal
    root: Path
    out: Path
    config: PrepareConfig
    executor: Executor
    jobs: int
    report: Show

    def write(self, content: str) -> dict[str, Any]:
        """Every split; returns what ``corpus.json`` says of each."""
        subsets = {f"train-{name}": chosen for name, chosen in self._subsets()}
        parts = [split for split in SPLITS if self._rows(split)]
        if self.journal.get("pieces") != content:  # of another state of the source
            for split in [*SPLITS, *subsets]:
                shutil.rmtree(self.out / split, ignore_errors=True)
            self.journal.put("pieces", content)
        seconds = self.journal.value(f"SELECT sum(samples * 1.0 / rate) FROM rows WHERE {KEPT}")
        for chosen in subsets.values():  # they are written again
            train = self.journal.kept("train")
            seconds += sum(row["samples"] / row["rate"] for row in train if row["name"] in chosen)
        limit, done = self._piece_seconds(seconds), 0.0
        described = {}
        for split in [*parts, *subsets]:
            pieces = []
            for piece in self._pieces(split, subsets.get(split), limit):
                pieces.append(piece)
                done += piece.seconds
                self.report("write", min(done / seconds, 1.0))
            described[split] = self._describe(split, subsets.get(split), pieces)
        return described

    def _rows(self, split: str) -> int:
        return int(self.journal.value(f"SELECT count(*) FROM rows WHERE part = ? AND {KEPT}", split))

    def _cuts(self, split: str, chosen: set[str] | None) -> Iterator[MonoCut]:
        for row in self.journal.kept("train" if chosen is not None else split):
            if chosen is None or row["name"] in chosen:
                yield from row_cuts(row, self.root)

    def _pieces(self, split: str, chosen: set[str] | None, seconds: float) -> Iterator[Piece]:
        groups = enumerate(grouped(self._cuts(split, chosen), seconds))
        if not self.config.shards:
            for number, cuts in groups:
                yield write_manifest(self.out, split, number, cuts)
            return
        tasks = (
            (0, (self.out, split, number, [cut.to_dict() for cut in cuts], self.config.shards))
            for number, cuts in groups
        )
        for _, piece in _in_order(self.executor, write_shard, tasks, 2 * self.jobs):
            yield piece

    def _piece_seconds(self, total: float) -> float:
        """Audio in a piece; for shards by the size wanted, after a look whether the disk holds all of them."""
        if not self.config.shards:
            return float("inf")
        known = self.journal.get("bytes_per_second")
        rate = float(known or 0) or bytes_per_second(islice(self._cuts("train", None), 20), self.config.shards)
        self.journal.put("bytes_per_second", str(rate))
        have = sum(path.stat().st_size for path in self.out.glob("*/recording.*.tar"))
        need, free = max(1.05 * total * rate - have, 0.0), shutil.disk_usage(self.out).free
        log.info("shards take about %.2f GB, %.2f GB are free", need / 1e9, free / 1e9)
        if need > free:
            raise JobError(
                f"shards need {need / 1e9:.1f} GB, {self.out} has {free / 1e9:.1f} GB free; free space, choose another "
                "disk, or --shards opus"
            )
        return self.config.shard_mb * 1e6 / rate

    def _subsets(self) -> Iterator[tuple[str, set[str]]]:
        train = f"part = 'train' AND text IS NOT NULL AND trim(text) != '' AND {KEPT}"
        for subset in self.config.labelled:
            name, _, file = subset.partition("=")
            if file:
                wanted = set(Path(file).read_text(encoding="utf-8-sig", errors="replace").split())
                rows = self.journal.db.execute(f"SELECT name FROM rows WHERE {train}")
                chosen = {found for (found,) in rows if found in wanted}
                if len(chosen) < len(wanted):
                    log.info("%s: %d of %d ids are in train with a transcript", name, len(chosen), len(wanted))
            else:
                rows = self.journal.db.execute(f"SELECT name, speaker, samples * 1.0 / rate FROM rows WHERE {train}")
                chosen = choose_labelled(rows, _minutes(subset), self.config.seed)
            if not chosen:
                raise UsageError(f"--labelled {subset}: no utterance of train has a transcript and is on the list")
            yield name, chosen

    def _describe(self, split: str, chosen: set[str] | None, pieces: list[Piece]) -> dict[str, Any]:
        if chosen is None:
            where, values = f"part = ? AND {KEPT}", [split]
        else:
            self.journal.db.execute("CREATE TEMP TABLE IF NOT EXISTS chosen (name TEXT PRIMARY KEY)")
            self.journal.db.execute("DELETE FROM chosen")
            self.journal.db.executemany("INSERT INTO chosen VALUES (?)", [(name,) for name in sorted(chosen)])
            where, values = f"part = 'train' AND name IN (SELECT name FROM chosen) AND {KEPT}", []
        query = f"SELECT count(DISTINCT speaker), coalesce(sum(trim(text) != ''), 0) FROM rows WHERE {where}"
        speakers, transcribed = self.journal.db.execute(query, values).fetchone()
        return {
            "hours": sum(piece.seconds for piece in pieces) / 3600,
            "utterances": sum(piece.utterances for piece in pieces),
            "speakers": speakers,
            "transcribed": transcribed,
            "pieces": [asdict(piece) for piece in pieces],
        }


def row_cuts(row: sqlite3.Row, root: Path) -> Iterator[MonoCut]:
    """A row of the journal as one cut, or as several where it was cut."""
    rate = row["rate"]
    recording = file_recording(row["stem"], locate(root, row["path"]), rate, row["total"], row["channels"])
    bounds = [0, *json.loads(row["cuts"]), row["samples"]]
    for i, (a, b) in enumerate(pairwise(bounds)):
        name = row["name"] if len(bounds) == 2 else f"{row['name']}-{i:04d}"
        start, duration = (row["first"] + a) / rate, (b - a) / rate
        said = SupervisionSegment(
            id=name, recording_id=recording.id, start=0.0, duration=duration, text=row["text"], speaker=row["speaker"]
        )
        custom: dict[str, Any] = {"ctc_infeasible": True} if row["infeasible"] else {}
        if row["heard"] is not None:
            custom["channel"] = row["heard"]
        yield MonoCut(
            id=name,
            start=start,
            duration=duration,
            channel=(row["heard"] or 1) - 1,
            recording=recording,
            supervisions=[said],
            custom=custom or None,
        )


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def summary_table(summary: dict[str, Any]) -> list[str]:
    """Lines that tell a person what came out."""
    counts = summary["audit"]
    lines = [f"{counts['ok']} ok, {counts['warned']} with a warning, {counts['rejected']} rejected"]
    lines += [f"  {reason:20} {count:8}" for reason, count in counts["reasons"].items() if count]
    for name, split in summary.get("splits", {}).items():
        lines.append(
            f"{name:10} {split['hours']:9.2f} h {split['utterances']:9} utterances {split['speakers']:6} speakers "
            f"{split['transcribed']:9} with a transcript"
        )
    return lines
