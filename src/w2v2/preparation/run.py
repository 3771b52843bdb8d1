"""Any audio to a checked corpus: every recording decoded once, manifests or shards, and ``corpus.json`` at the end.

Everything that is done is kept: a preparation that was killed goes on with the rest and ends with the same corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections import Counter
from concurrent.futures import Executor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from w2v2.data.sources import locate
from w2v2.data.splits import SCHEMA
from w2v2.data.tables import hf_rows, listed_splits
from w2v2.errors import JobError, Show, UsageError, public, quiet
from w2v2.files import copy_whole, open_text, whole, write_json
from w2v2.preparation.audit import audit_all
from w2v2.preparation.config import PrepareConfig
from w2v2.preparation.executors import in_order, local_executor
from w2v2.preparation.findings import REASONS
from w2v2.preparation.journal import Journal, open_journal
from w2v2.preparation.reading import refuse_unused, source_rows, stamped
from w2v2.preparation.settle import settle
from w2v2.preparation.summary import Corpus
from w2v2.serial import checked, parse_json, read_json

HF, _JOURNAL = "hf:", "journal.sqlite"
log = logging.getLogger(__name__)


def prepare(
    source: str | Path,
    out: Path,
    config: PrepareConfig | None = None,
    *,
    jobs: int = 1,
    strict: bool = False,
    executor: Executor | None = None,
    show: Show = quiet,
) -> dict[str, Any]:
    """Check a source of audio and write ``OUT/{corpus.json, audit.jsonl, SPLIT/cuts.NNNNNN.jsonl.gz}``.

    Args:
        source: a folder of audio (LibriSpeech's layout or any other), a table (CSV, TSV, JSONL), or ``hf:NAME``.
        out: folder of the corpus; new, or one of the same source and options: what was begun is finished, and of what
            has changed since, only that is decoded again.
        config: how.
        jobs: processes.
        strict: fail, after the audit, if it found anything at all.
        executor: where to decode and encode instead of on this machine's processes; any ``concurrent.futures``
            executor, such as Dask's or Ray's, whose workers see the same files.
        show: told the stage and the share done.

    Returns:
        What ``corpus.json`` holds.

    Raises:
        UsageError: a source or options that cannot work.
        JobError, OSError: what went wrong on the way, or with ``strict`` what was found.
    """
    config = config or PrepareConfig()
    config.check()
    source = str(source) if str(source).startswith(HF) else str(Path(source).absolute())
    options = {"source": source, **asdict(config)}
    work = out / ".prepare"
    finished = _finished(out, options)
    if finished and (source.startswith(HF) or not Path(source).exists()):
        log.info("%s is not compared with its source", out)
        return _as_it_is(finished, out, strict=strict)
    if finished and (out / _JOURNAL).exists() and not (work / _JOURNAL).exists():
        work.mkdir(exist_ok=True)
        copy_whole(out / _JOURNAL, work / _JOURNAL)
    root = _begin(source, out, config, options, show)
    with open_journal(work / _JOURNAL) as journal:
        sources = _sources(journal, options)
        changes = _changes(journal, finished, sources, out) if finished else ""
    if finished and not changes:
        if not (out / _JOURNAL).exists():
            copy_whole(work / _JOURNAL, out / _JOURNAL)
        shutil.rmtree(work)
        return _as_it_is(finished, out, strict=strict)
    if finished:
        log.info("%s: changed are %s; doing what is new", out, changes)
    with contextlib.ExitStack() as stack:
        if executor is None:
            executor = stack.enter_context(local_executor(jobs))
        summary = _write(root, out, config, options, executor, jobs, sources, strict=strict, show=show)
    shutil.rmtree(work)
    return summary


def _write(
    root: Path,
    out: Path,
    config: PrepareConfig,
    options: dict[str, Any],
    executor: Executor,
    jobs: int,
    sources: dict[str, str],
    *,
    strict: bool,
    show: Show,
) -> dict[str, Any]:
    """Audit what has not been, and write the corpus; returns what ``corpus.json`` holds."""
    work = out / ".prepare"
    with open_journal(work / _JOURNAL) as journal:
        _audit(journal, root, config, executor, jobs, show)
        table = _splits(options)
        known = config.splits or (table.exists() and not options["source"].startswith(HF))
        shares = {"valid": config.valid_share, "test": config.test_share}
        settle(journal, listed_splits(table).items() if known else (), shares, config.seed)
        counts, content = _write_audit(journal, out), journal.content_hash()
        if strict:
            _refuse_findings(counts, out)
        from w2v2.preparation.corpus import CorpusWriter  # late: it needs lhotse, which needs torch

        (out / "corpus.json").unlink(missing_ok=True)  # what is written from here is another one
        splits = CorpusWriter(journal, root, out, config, executor, jobs).write(content, show)
    head = {"schema": SCHEMA, "source": options["source"], "options": options, "sources": sources}
    summary = {**head, "content_hash": content, "audit": counts, "splits": splits}
    write_json(out / "corpus.json", summary)
    copy_whole(work / _JOURNAL, out / _JOURNAL)  # what is known of each recording, for the next time
    return summary


def _as_it_is(finished: dict[str, Any], out: Path, *, strict: bool) -> dict[str, Any]:
    log.info("%s is prepared already", out)
    if strict:
        _refuse_findings(finished["audit"], out)
    return finished


def _finished(out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The corpus that is there already, if it is this one."""
    path, why = out / "corpus.json", ""
    if path.exists():
        with contextlib.suppress(UsageError):  # not of ours
            corpus = read_json(path)
            checked(corpus, Corpus, str(path))
            if corpus.get("schema") == SCHEMA:
                if not (differ := _other(corpus["options"], options)):
                    return corpus
                why = f" with other options ({', '.join(differ)})"
        raise UsageError(f"{out} already holds a prepared corpus{why}; choose another folder, or remove it")
    if out.exists() and not (out / ".prepare").exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no unfinished preparation; choose another folder")
    return None


class _Finding(TypedDict):
    path: str
    row: NotRequired[int]


def _changes(journal: Journal, finished: dict[str, Any], now: dict[str, str], out: Path) -> str:
    """What is not as it was when the corpus was made of it; empty: all is."""
    before = checked(finished.get("sources", now), dict[str, str], str(out / "corpus.json"))
    changed = [name for name in now | before if now.get(name) != before.get(name) and name != _ROWS]
    if now[_ROWS] != before[_ROWS]:
        with open_text(audit := out / "audit.jsonl") as lines:
            rows = (checked(parse_json(line, audit), _Finding, str(audit)) for line in lines)
            new, gone = journal.differences((row["path"], row.get("row", 0)) for row in rows)
        changed.append(f"{new} new and {gone} gone of {_ROWS}" if new or gone else f"some of {_ROWS}")
    if unread := journal.value("SELECT count(*) FROM rows WHERE NOT done") and now == before:
        changed.append(f"{unread} that could not be read")
    return ", ".join(changed)


_ROWS = "its recordings and transcripts"


def _splits(options: dict[str, Any]) -> Path:
    """The list that is named, or the source's."""
    source = Path(options["source"])
    return Path(options["splits"] or (source if source.is_dir() else source.parent) / "splits.tsv")


def _sources(journal: Journal, options: dict[str, Any]) -> dict[str, str]:
    """A hash of each thing that a corpus is made of: its rows with the state of their files, and lists."""
    lists = [str(_splits(options))]
    lists += [subset.partition("=")[2] for subset in options["labelled"] if "=" in subset]
    hashes = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in lists if Path(path).is_file()}
    return {_ROWS: journal.source_hash(), **hashes}


def _other(old: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Names of options that differ; one that there was not before had its default."""
    old, options = asdict(PrepareConfig()) | old, json.loads(json.dumps(options))
    return [name for name in options if json.loads(json.dumps(old.get(name))) != options[name]]


_AFTER_AUDIT = ("splits", "valid_share", "test_share", "seed", "labelled", "shards", "shard_mb")
"""Options that may be others when an unfinished preparation is taken up: what has been heard serves them, too."""


# --- Reading ----------------------------------------------------------------------------------------------------------


def _begin(source: str, out: Path, config: PrepareConfig, options: dict[str, Any], show: Show) -> Path:
    """Start or take up a journal, and enter the rows of the source; returns the folder that their paths start from.

    A folder that is new is removed again if the source cannot be used, unless audio has been downloaded into it.
    """
    new = not out.exists()
    (out / ".prepare").mkdir(parents=True, exist_ok=True)
    try:
        with open_journal(out / ".prepare" / _JOURNAL) as journal:
            if (begun := journal.get("options")) is not None:
                old = json.loads(begun)
                if changed := [name for name in _other(old, options) if name not in _AFTER_AUDIT]:
                    raise UsageError(
                        f"{out} holds an unfinished preparation with other options ({', '.join(changed)}): finish it "
                        "with those, or choose another folder"
                    )
            root = _enter(journal, source, out, config, options, show)
            if not journal.totals().rows:
                raise UsageError(
                    f"no audio in {source}: expected files such as .flac, .wav, .mp3, .ogg, .opus; check the path"
                )
            journal.put("options", json.dumps(options))
    except UsageError:
        if new and not (out / "audio").exists():
            shutil.rmtree(out)
        raise
    return root


def _enter(
    journal: Journal, source: str, out: Path, config: PrepareConfig, options: dict[str, Any], show: Show
) -> Path:
    if not source.startswith(HF):
        passed_over = Counter[str]()
        root, rows = source_rows(Path(source), config, passed_over)
        journal.enter(stamped(root, rows))
        journal.put("passed_over", json.dumps({what: count for what, count in passed_over.most_common() if count}))
        return root
    refuse_unused(config, ("speaker", "audio_folder"), "a dataset of Hugging Face; `columns` speaker=NAME tells it")
    root = (out / "audio").absolute()
    columns = dict(pair.split("=", 1) for pair in config.columns)
    rows = hf_rows(source.removeprefix(HF), root, columns, journal.last_line(), config.hf_config or None)
    while batch := list(islice(rows, 500)):
        journal.enter(stamped(root, batch), keep_old=True)
        journal.put("options", json.dumps(options))  # now, so that no other dataset goes on from here
        show("read", 0.0)
    return root


# --- The audit --------------------------------------------------------------------------------------------------------


def _audit(journal: Journal, root: Path, config: PrepareConfig, executor: Executor, jobs: int, show: Show) -> None:
    """Decode what has not been decoded yet, and keep what is found."""
    totals = journal.totals()
    if totals.checked:
        log.info("%d of %d checked already", totals.checked, totals.rows)
    done = totals.checked_size
    tasks = (
        ([(locate(root, path), parts) for path, parts in recordings], config.audit, config.vad)
        for recordings in journal.pending()
    )
    for findings in in_order(executor, audit_all, tasks, 4 * jobs):
        done += journal.record(findings)
        show("check", done / totals.size)


def _write_audit(journal: Journal, out: Path) -> dict[str, Any]:
    """``audit.jsonl``, and its counts."""
    status = dict.fromkeys(("ok", "warned", "rejected"), 0)
    reasons = dict.fromkeys(REASONS, 0)
    with whole(out / "audit.jsonl") as partial, partial.open("w", encoding="utf-8") as file:
        for line in journal.findings():
            status[line["status"]] += 1
            for reason in line["reasons"]:
                reasons[reason] += 1
            file.write(public(json.dumps(line, ensure_ascii=False)) + "\n")
    unlisted = int(journal.value("SELECT count(*) FROM rows WHERE done AND part IS NULL"))
    passed_over = json.loads(journal.get("passed_over") or "{}")
    return {**status, "unlisted": unlisted, "passed_over": passed_over, "reasons": reasons}


def _refuse_findings(counts: dict[str, Any], out: Path) -> None:
    if reasons := ", ".join(f"{count} {reason}" for reason, count in counts["reasons"].items() if count):
        raise JobError(f"the audit found {reasons}, and `strict` allows nothing; {out / 'audit.jsonl'} lists them")
