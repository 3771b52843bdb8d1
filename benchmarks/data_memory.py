"""Peak memory of preparing and of streaming a corpus of N, 4 N and 16 N rows.

    python benchmarks/data_memory.py --rows 20000 --out benchmarks/results/data_memory.json

The rows are of a table: parts of 1 to 2 s of a hundred one-minute recordings, all with different starts. Each size is
prepared by ``w2v2 prepare`` with two jobs; then a whole pass over it is planned (bucketed, shuffled, shared out), and a
hundred batches are loaded by two workers. Every measurement has a process of its own; figures are the largest resident
set of that process, and of any of its workers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

FILES, SECONDS = 100, 60.0


def write_table(folder: Path, rows: int) -> Path:
    """Recordings and a table that cuts so many parts out of them."""
    rng = np.random.default_rng(0)
    for i in range(FILES):
        if not (folder / f"{i}.flac").exists():
            soundfile.write(folder / f"{i}.flac", 0.1 * rng.standard_normal(int(SECONDS * 16_000)), 16_000)
    table = folder / f"rows-{rows}.csv"
    keyed = random.Random(0)
    with table.open("w") as file:
        file.write("path,start,end,text,speaker\n")
        for row in range(rows):
            start = keyed.uniform(0, SECONDS - 2)
            end = start + keyed.uniform(1, 2)
            file.write(f"{row % FILES}.flac,{start:.4f},{end:.4f},SOME WORDS,{row % 251}\n")
    return table


def stream(corpus: Path) -> None:
    """Plan a pass, load some batches, say how much memory that took."""
    from w2v2.data.config import DataConfig
    from w2v2.data.corpora import read_corpus
    from w2v2.training.data import SpeechDataModule

    logging.disable(logging.INFO)
    module = SpeechDataModule(read_corpus(corpus), DataConfig(min_seconds=1.0, num_workers=2))
    began = time.perf_counter()
    planned = sum(len(cuts) for _, cuts in module.train_dataloader().sampler)
    seconds = time.perf_counter() - began
    for _ in itertools.islice(module.train_dataloader(), 100):
        pass
    sys.stdout.write(json.dumps({"planned": planned, "plan_seconds": seconds, **peaks()}))


def peaks() -> dict[str, float]:
    """Largest resident sets so far, MiB."""
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"process_mib": round(own, 1), "worker_mib": round(children, 1)}


def prepare(table: Path, out: Path) -> None:
    """The command, in this process."""
    from w2v2.cli.main import main

    logging.disable(logging.INFO)
    began = time.perf_counter()
    assert main(["prepare", str(table), str(out), "--jobs", "2"]) == 0
    sys.stdout.write(json.dumps({"seconds": time.perf_counter() - began, **peaks()}))


def measured(*call: str) -> dict[str, Any]:
    """One of the two functions above, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *call], check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of the smallest corpus (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream:
        return stream(args.stream)
    if args.prepare:
        return prepare(*args.prepare)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 4, 16):
            rows = times * args.rows
            table, corpus = write_table(Path(folder), rows), Path(folder, f"corpus-{rows}")
            results.append(
                {
                    "rows": rows,
                    "prepare": measured("--prepare", str(table), str(corpus)),
                    "stream": measured("--stream", str(corpus)),
                }
            )
            sys.stdout.write(json.dumps(results[-1]) + "\n")
    if args.out:
        record = {"command": f"python benchmarks/data_memory.py --rows {args.rows}", "results": results}
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
