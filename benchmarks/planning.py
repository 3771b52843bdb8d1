"""CPU time that planning takes from a training process: of a step, of the start of a pass, of going on late in one.

    python benchmarks/planning.py --rows 200000 1000000 --out benchmarks/results/planning.json

Manifests of 1,000 utterances of 2 to 30 s each, as ``w2v2 prepare`` writes them, in batches of 87.5 s, crops of 15.6 s.
Each measurement has a process of its own; user and system time, all threads counted, the forming of batches in the
queue of a worker left out. ``resume_replayed_seconds`` is without the window that a checkpoint knows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

RANKS, PIECE, RATE = (1, 8, 64), 1_000, 16_000


def write_manifests(folder: Path, rows: int) -> None:
    """Lines of prepared utterances, without audio."""
    from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

    folder.mkdir()
    keyed = random.Random(0)
    recording = Recording("NAME", [AudioSource("file", [0], "/corpus/train/NAME.flac")], RATE, 113_968, 7.123, [0])
    supervision = SupervisionSegment("NAME", "NAME", 0.0, 7.123, text="AN UTTERANCE OF SOME WORDS", speaker="one")
    template = json.dumps(MonoCut("NAME", 0.0, 7.123, 0, recording=recording, supervisions=[supervision]).to_dict())
    for start in range(0, rows, PIECE):
        lines = []
        for i in range(start, min(rows, start + PIECE)):
            samples = keyed.randrange(2 * RATE, 30 * RATE)
            line = template.replace("NAME", f"utterance-{i:07d}").replace("113968", str(samples))
            lines.append(line.replace("7.123", str(samples / RATE)))
        (folder / f"cuts.{start // PIECE:06d}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def measure(folder: Path, ranks: int, position: dict[str, Any] | None, skip: int, steps: int) -> dict[str, Any]:
    """Plan in this process: from the beginning or from a position, so many steps or, for 0, to the end."""
    from w2v2.data.config import DataConfig
    from w2v2.data.corpora import Piece, Split
    from w2v2.data.passes import Passes
    from w2v2.data.sampler import EpochSampler, Position

    logging.disable(logging.INFO)
    pieces = tuple(Piece(manifest=str(path), utterances=PIECE) for path in sorted(folder.iterdir()))
    began = time.process_time()
    passes = Passes("train", Split(pieces, 1, len(pieces) * PIECE), DataConfig(), shuffle=True)
    start = None if position is None else Position(**position)
    sampler = EpochSampler(
        passes, batch_seconds=87.5, max_seconds=15.625, world_size=ranks, skip=skip, start=start, rank=ranks - 1
    )
    batches = iter(sampler)
    next(batches)
    first = time.process_time()
    count = sum(1 for _ in islice(batches, steps or None))
    return {
        "steps": count,
        "first_seconds": first - began,
        "milliseconds_a_step": 1e3 * (time.process_time() - first) / max(count, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "position": asdict(sampler.position(skip + count)),
    }


def measured(folder: Path, ranks: int, *, position: Any = None, skip: int = 0, steps: int = 0) -> dict[str, Any]:
    """The same in a process of its own."""
    call = [sys.executable, __file__, "--measure", json.dumps([str(folder), ranks, position, skip, steps])]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def compare(folder: Path, rows: int, ranks: int) -> dict[str, Any]:
    """A whole pass, then going on at 95 % of it with and without the position."""
    whole = measured(folder, ranks)
    late = int(0.95 * whole["steps"])
    position = measured(folder, ranks, steps=late - 1)["position"]
    resumed = measured(folder, ranks, position=position, skip=late, steps=1)
    replayed = measured(folder, ranks, skip=late, steps=1)
    return {
        "rows": rows,
        "ranks": ranks,
        "steps": whole["steps"],
        "milliseconds_a_step": round(whole["milliseconds_a_step"], 2),
        "start_seconds": round(whole["first_seconds"], 2),
        "resume_seconds": round(resumed["first_seconds"], 2),
        "resume_replayed_seconds": round(replayed["first_seconds"], 2),
        "peak_mib": round(whole["peak_mib"]),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--out", type=Path, help="JSON file to write; what it holds as 'before' stays")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, *rest = json.loads(args.measure)
        sys.stdout.write(json.dumps(measure(Path(folder), *rest)))
        return
    results = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "manifests")
            write_manifests(folder, rows)
            for ranks in RANKS:
                results.append(compare(folder, rows, ranks))
                sys.stdout.write(json.dumps(results[-1]) + "\n")
    if args.out:
        record = json.loads(args.out.read_text()) if args.out.exists() else {}
        record |= {
            "command": f"python benchmarks/planning.py --rows {' '.join(map(str, args.rows))}",
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in ("lhotse", "numpy", "torch")},
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
