"""What ``w2v2 plan`` predicts of a run, beside what the run then takes, in turn on one machine.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --data manifest --rounds 2 --out benchmarks/results/plan.json

Each round plans on noise, plans on the data, and pretrains for some steps. The run's time is that of training
(``train/audio_seconds_per_second`` in metrics.csv; start-up and validation left out), its memory the peak resident set
of the process, validation and report included. ``alone_seconds``, of one thread: of the plan, its time on a core; of
the run, its time times its share of a core. So they are what either would take on a machine that nobody else uses,
pauses left out. Errors are of the prediction: 0.1 is 10 % too much.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

W2V2 = str(Path(sys.executable).parent / "w2v2")


def planned(recipe: str, steps: int, data: str | None) -> dict[str, float]:
    """Seconds of so many steps and GB, as planned."""
    command = [W2V2, "plan", recipe, "--json", "--train.max-steps", str(steps), *(["--data", data] if data else [])]
    plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "seconds": plan["seconds_per_update"] * steps,
        "alone_seconds": plan["cpu_seconds_per_update"] * steps,
        "memory_gb": plan["memory_gb"],
        "spread": plan["measured"]["spread"],
    }


def ran(recipe: str, steps: int, data: str) -> dict[str, float]:
    """Seconds of training and peak GB of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [W2V2, "pretrain", recipe, "--data", data, "--out", str(out), "--train.max-steps", str(steps)]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        share = (usage.ru_utime + usage.ru_stime) / (time.perf_counter() - began)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        with (out / "metrics.csv").open() as file:
            rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["train/loss"]]
        seconds = heard = 0.0
        for row in rows:
            now = 3600 * float(row["train/hours_heard"])
            seconds += (now - heard) / float(row["train/audio_seconds_per_second"])
            heard = now
        return {
            "seconds": seconds,
            "alone_seconds": seconds * min(share, 1.0),
            "memory_gb": usage.ru_maxrss * 1024 / 1e9,
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="(default: %(default)s)")
    parser.add_argument("--data", required=True, help="corpus to pretrain on")
    parser.add_argument("--steps", type=int, default=200, help="of the run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        found = {
            "noise": planned(args.recipe, args.steps, None),
            "data": planned(args.recipe, args.steps, args.data),
            "run": ran(args.recipe, args.steps, args.data),
        }
        rounds.append(found)
        print(json.dumps(found))
    run = {name: [found["run"][name] for found in rounds] for name in ("seconds", "alone_seconds", "memory_gb")}
    errors = {
        f"{name}, planned on {kind}": [found[kind][name] / found["run"][name] - 1 for found in rounds]
        for kind in ("noise", "data")
        for name in ("seconds", "alone_seconds", "memory_gb")
    }
    record = {
        "command": f"python benchmarks/plan.py --recipe {args.recipe} --steps {args.steps} --rounds {args.rounds}",
        "versions": {"torch": metadata.version("torch")},
        "machine": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rounds": rounds,
        "runs_differ_by": {name: max(values) / min(values) - 1 for name, values in run.items()},
        "errors": errors,
        "error_median": {name: statistics.median(values) for name, values in errors.items()},
    }
    print(json.dumps({"errors": errors, "runs_differ_by": record["runs_differ_by"]}, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
