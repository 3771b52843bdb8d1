"""Seconds that a checkpoint of ``base`` takes beyond writing as many bytes to the same disk.

    python benchmarks/checkpoint.py --folder . --out benchmarks/results/checkpoint.json

A checkpoint holds weights and both moments of AdamW. Both sides write a new file and wait until it is on the disk
(``fsync``), in turn; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from w2v2 import recipes
from w2v2.training.resume import AtomicIO


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    config = recipes.base()
    model = config.model.build()
    optimizer = config.optim.build(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    path = args.folder / "benchmark.ckpt"
    checkpoint, raw = [], []
    block = os.urandom(1 << 24)
    size = 0
    for _ in range(args.rounds):
        began = time.perf_counter()
        AtomicIO().save_checkpoint(saved, path)
        checkpoint.append(time.perf_counter() - began)
        size = path.stat().st_size
        path.unlink()
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        raw.append(time.perf_counter() - began)
        path.unlink()
    extra = [a - b for a, b in zip(checkpoint, raw, strict=True)]
    record = {
        "command": f"python benchmarks/checkpoint.py --rounds {args.rounds}",
        "versions": {"torch": torch.__version__},
        "gigabytes": size / 1e9,
        "checkpoint_seconds": statistics.median(checkpoint),
        "raw_seconds": statistics.median(raw),
        "extra_seconds": statistics.median(extra),
        "range": [min(extra), max(extra)],
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
