"""The splits of a preparation that is settled, as manifests or shards."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lhotse import MonoCut

from w2v2.data.names import nfc
from w2v2.data.splits import SPLITS, choose_labelled
from w2v2.errors import JobError, Show, UsageError
from w2v2.files import read_text
from w2v2.preparation.config import PrepareConfig, minutes_of
from w2v2.preparation.executors import in_order
from w2v2.preparation.journal import Journal
from w2v2.preparation.shards import Piece, bytes_per_second, grouped, row_cuts, write_manifest, write_shard

log = logging.getLogger(__name__)


@dataclass
class CorpusWriter:
    """Writes splits, and labelled subsets of train, into folders of their own."""

    journal: Journal
    root: Path
    """That paths of rows are relative to."""
    out: Path
    config: PrepareConfig
    executor: Executor
    jobs: int

    def write(self, content: str, show: Show) -> dict[str, Any]:
        """Write all; pieces that are there already are left as they are, if they are of this content.

        Returns:
            What ``corpus.json`` says of each.

        Raises:
            JobError: nothing to write, no space for it, audio that cannot be decoded any more, a worker that died.
            UsageError: a labelled subset of nothing.
        """
        splits = [split for split in SPLITS if self.journal.summary(split).utterances]
        if not splits:
            raise JobError(f"nothing of the source can be used; {self.out / 'audit.jsonl'} says why")
        if "train" not in splits and self.journal.value("SELECT count(*) FROM rows WHERE part = 'train'"):
            raise JobError(f"nothing of train can be used; {self.out / 'audit.jsonl'} says why")
        chosen = list(map(self._choose, self.config.labelled))
        splits += chosen
        for split in (*SPLITS, *chosen):
            of = f"{content} {self._order(split)} {self.config.shards} {self.config.shard_mb}"
            if self.journal.get(f"content of {split}") != of:
                shutil.rmtree(self.out / split, ignore_errors=True)
                self.journal.put(f"content of {split}", of)
        summaries = {split: self.journal.summary(split) for split in splits}
        total, done = sum(summary.seconds for summary in summaries.values()), 0.0
        seconds = self._piece_seconds(total, splits[0]) if self.config.shards else float("inf")
        described = {}
        for split, summary in summaries.items():
            pieces = []
            for piece in self._pieces(split, seconds):
                pieces.append(piece)
                done += piece.seconds
                show("write", min(done / total, 1.0))
            described[split] = {
                "hours": sum(piece.seconds for piece in pieces) / 3600,
                "utterances": sum(piece.utterances for piece in pieces),
                "speakers": summary.speakers,
                "transcribed": summary.transcribed,
                "pieces": [asdict(piece) for piece in pieces],
            }
        return described

    def _order(self, split: str) -> str:
        """A hash of what is in a split, in the order that pieces are cut in."""
        total = hashlib.sha256()
        for row in self.journal.members(split):
            total.update(f"{row['name']} {row['held']}\n".encode())
        return total.hexdigest()

    def _choose(self, subset: str) -> str:
        """Choose a labelled subset; returns the name of its split."""
        name, _, file = subset.partition("=")
        rows = self.journal.transcribed()
        if file:
            wanted = set(nfc(read_text(Path(file))).split())
            chosen = {row for row, _, _ in rows if row in wanted}
            if len(chosen) < len(wanted):
                log.info("%s: %d of %d ids are in train with a transcript", name, len(chosen), len(wanted))
        else:
            chosen = choose_labelled(rows, minutes_of(subset), self.config.seed)
        if not chosen:
            raise UsageError(f"`labelled` {subset}: no utterance of train has a transcript and is on the list")
        self.journal.choose(f"train-{name}", chosen)
        return f"train-{name}"

    def _cuts(self, split: str) -> Iterator[MonoCut]:
        for row in self.journal.members(split):
            yield from row_cuts(row, self.root)

    def _pieces(self, split: str, seconds: float) -> Iterator[Piece]:
        pieces = enumerate(grouped(self._cuts(split), seconds))
        if not self.config.shards:
            return (write_manifest(self.out, split, number, cuts) for number, cuts in pieces)
        tasks = (
            (self.out, split, number, [cut.to_dict() for cut in cuts], self.config.shards) for number, cuts in pieces
        )
        return in_order(self.executor, write_shard, tasks, 2 * self.jobs)

    def _piece_seconds(self, total: float, first: str) -> float:
        """Audio in a shard of the size wanted, seconds, after a look whether the disk holds all of them."""
        key = f"bytes of {self.config.shards} per second"
        rate = float(self.journal.get(key) or 0) or bytes_per_second(islice(self._cuts(first), 20), self.config.shards)
        self.journal.put(key, str(rate))
        have = sum(path.stat().st_size for path in self.out.glob("*/recording.*.tar"))
        need, free = max(1.05 * total * rate - have, 0.0), shutil.disk_usage(self.out).free
        log.info("shards take about %.2f GB, %.2f GB are free", need / 1e9, free / 1e9)
        if need > free:
            raise JobError(
                f"shards need {need / 1e9:.1f} GB, {self.out} has {free / 1e9:.1f} GB free; free space, choose another "
                "disk, or `shards` opus"
            )
        return self.config.shard_mb * 1e6 / rate
