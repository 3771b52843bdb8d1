"""What pretraining is worth with more labels: the arms of a finished demo, fine-tuned on an hour and on all of them.

    w2v2 demo --seed 1 --out DEMO
    python benchmarks/labels.py DEMO --seed 1 --out docs/results/labels.json

Encoders, trigram and test voices are the demo's, so are recipes and decoding, but for the number of updates: 2,400.
Two arms at a time, of one thread each; those that the file has are left out, so that it can be stopped and started
again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from w2v2 import demo, recipes
from w2v2.data.corpora import labelled_subset, read_corpus
from w2v2.files import write_json

MINUTES = (60.0, 1e6)
"""Of labels; the second is all of them."""


def hear(arm: str, minutes: float, folder: Path, seed: int, updates: int) -> dict[str, Any]:
    """Fine-tune and score one arm, with the minutes that it was given."""
    splits = read_corpus(folder / "manifest")
    labelled = labelled_subset(splits["train"], minutes, seed)
    out = folder / f"labels-{labelled.seconds / 60:.0f}min"
    out.mkdir(exist_ok=True)
    for name in ("pretrain", demo.TRIGRAM):
        if not (out / name).exists():
            (out / name).symlink_to(folder.resolve() / name)
    shutil.rmtree(out / arm, ignore_errors=True)  # of a call that was stopped
    shrink = recipes.tiny_ctc().optim.schedule.total_steps / updates
    heard = demo.hear_arm(arm, splits, labelled, "test", out, seed, shrink)
    rows = demo.heard_rows(splits["test"], heard)
    return {"arm": arm, "minutes": labelled.seconds / 60, "updates": updates, "seed": seed} | demo.arm_rates(rows, arm)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=2_400)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=demo.one_thread) as pool:
        jobs = {}
        for minutes in MINUTES:
            for arm in reversed(demo.ARMS):
                key = f"seed {options.seed}, {'all' if minutes > 1e5 else f'{minutes:g}'}, {arm}"
                if key not in runs:
                    job = pool.submit(hear, arm, minutes, options.demo, options.seed, options.updates)
                    jobs[job] = key
        for job in as_completed(jobs):
            runs[jobs[job]] = job.result()
            write_json(options.out, dict(sorted(runs.items())))


if __name__ == "__main__":
    main()
