"""What a preparation does after it was killed, workers and all, again and again."""

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import RATE

from w2v2.cli import main as cli

FILES = 480
KILLS = 10
# Children of a process that has everything imported begin at once; beyond that they are the command as it is.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["w2v2.preparation.run", "w2v2.preparation.corpus", "w2v2.cli.main", "tyro", "rich.progress", __name__]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of 1 to 2.5 s with transcripts, two files that are no audio, and three that are there twice."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for i in range(FILES):
        folder = root / f"s{i % 16}" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"s{i % 16}-1-{i:04d}.wav"
        if i in (7, 200):
            path.write_text("no audio")
        elif i in (50, 51, 300):
            path.write_bytes((root / f"s{(i - 1) % 16}" / "1" / f"s{(i - 1) % 16}-1-{i - 1:04d}.wav").read_bytes())
        else:
            soundfile.write(path, rng.uniform(-0.5, 0.5, int(rng.uniform(1, 2.5) * RATE)), RATE)
        path.with_suffix(".txt").write_text("SUN MOON STAR SKY")
    return root


def command(arguments: list[str], log: Path) -> None:
    """A process group of its own, as a shell or a queue gives one to a job."""
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.exit(cli.main(["prepare", *arguments]))


def start(source: Path, out: Path, *options: str) -> Any:
    log_of(out).unlink(missing_ok=True)
    process = context.Process(target=command, args=([str(source), str(out), *options], log_of(out)))
    process.start()
    wait_for(log_of(out).exists, process)
    return process


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def checked(out: Path) -> int:
    """Rows that the journal has on disk."""
    path = out / ".prepare" / "journal.sqlite"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
            return int(journal.execute("SELECT count(*) FROM rows WHERE done").fetchone()[0])
    except sqlite3.Error:  # not yet there
        return 0


def readable(out: Path) -> int:
    """Those of them that will not be tried again."""
    with closing(sqlite3.connect(f"file:{out / '.prepare' / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        query = (
            "SELECT count(*) FROM rows WHERE done AND id NOT IN (SELECT row FROM reasons WHERE reason = 'unreadable')"
        )
        return int(journal.execute(query).fetchone()[0])


def finished(out: Path) -> dict[Path, int]:
    """Pieces that are complete, with the time of writing."""
    pieces: dict[Path, int] = {}
    for manifest in out.glob("*/cuts.*.jsonl.gz"):
        tar = manifest.with_name(manifest.name.replace("cuts", "recording").replace("jsonl.gz", "tar"))
        pieces |= {path: path.stat().st_mtime_ns for path in (manifest, tar) if path.exists()}
    return pieces


def outcome(out: Path) -> dict[str, Any]:
    cuts = {str(path.relative_to(out)): gzip.decompress(path.read_bytes()) for path in out.glob("*/cuts.*")}
    tars = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).digest() for path in out.glob("*/*.tar")}
    summary = json.loads((out / "corpus.json").read_text())
    return {"summary": summary, "audit": (out / "audit.jsonl").read_bytes(), "cuts": cuts, "tars": tars}


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    end = time.monotonic() + 300
    while not condition() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.002)


def progress(out: Path) -> int:
    """Rows checked and shards written, which take about as long."""
    return checked(out) + 4 * len(list(out.glob("*/*.tar")))


@pytest.mark.parametrize("shards", [True, False], ids=["shards", "manifests"])
def test_a_preparation_that_is_killed_ten_times_ends_as_one_that_is_not(
    source: Path, tmp_path: Path, shards: bool
) -> None:
    options = ("--labelled", "0.5m", *(("--jobs", "2", "--shards", "--shard-mb", "0.4") if shards else ("--jobs", "1")))
    whole = tmp_path / "whole"
    process = start(source, whole, *options)
    process.join()
    assert process.exitcode == 0, log_of(whole).read_text()
    assert "checked already" not in log_of(whole).read_text()
    expected = outcome(whole)
    end = FILES + 4 * len(expected["tars"])

    rng = random.Random(int(shards))
    kills = most = 0
    for number in itertools.count():  # one that came to its end before it was killed is followed by another
        out = tmp_path / f"killed{number}"
        known = [0]
        kept: dict[Path, int] = {}
        while True:
            target = progress(out) + rng.randrange(1, end // KILLS)
            process = start(source, out, *options)
            if kills < KILLS:
                wait_for(lambda out=out, target=target: progress(out) >= min(target, end), process)
                time.sleep(rng.uniform(0, 0.05))
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
            process.join()
            log = log_of(out).read_text()
            said = re.findall(r"(\d+) of (\d+) checked already", log)
            assert said in ([(str(known[-1]), str(FILES))], [])
            if known[-1] and "is prepared already" not in log:
                assert said or process.exitcode  # what is cut off early may say nothing
            now = finished(out) if shards else {}
            assert kept.items() <= now.items()  # neither lost nor written again
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, log_of(out).read_text()
            known.append(readable(out))
            kept = now
        assert known == sorted(known)
        most = max(most, len(kept))
        assert outcome(out) == expected
        assert not list(out.rglob("*partial*")) and not (out / ".prepare").exists()
        if kills == KILLS:
            break
    assert bool(most) == shards


def test_workers_end_with_the_process_that_was_killed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out, "--jobs", "2")
    wait_for(lambda: checked(out) > 0, process)

    def group() -> list[str]:
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if line.split()[0] == str(process.pid) and "Z" not in line]

    assert len(group()) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    end = time.monotonic() + 300
    while group():
        assert time.monotonic() < end, group()
        time.sleep(0.05)
