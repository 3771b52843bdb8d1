"""What each choice in ``tiny`` is worth at the demo's budget, by linear probe: one thing changed at a time.

    w2v2 prepare synthetic CORPUS --hours 2
    python benchmarks/ablations.py CORPUS CORPUS-audio --out docs/results/ablations.json

Runs that the file has are left out, so that it can be stopped and started again. Runs whose convolutions are alike take
one warm start of their seed, kept in ``--runs``. Probed is the best layer, phones of voices of ``valid`` from one frame
and from five. Seeds are those of training; the corpus is one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from w2v2 import recipes
from w2v2.checkpoint.native import CONFIG
from w2v2.data.corpora import read_corpus
from w2v2.evaluation.probe import best_layer, probe
from w2v2.files import write_json
from w2v2.serial import save_config
from w2v2.training.config import PretrainConfig
from w2v2.training.optim import WarmupCosine, WarmupLinear
from w2v2.training.pretrain import pretrain
from w2v2.training.resume import WARM_START

PROBE_MINUTES = 10.0
Change = Callable[[PretrainConfig], object]


def _no_warm_start(config: PretrainConfig) -> None:
    """As many updates in all, the convolutions learning as published; the auxiliary loss needs them frozen."""
    config.optim.schedule.total_steps += config.warm_start.updates
    config.warm_start.updates = 0
    config.model.conv_gradient_scale = 0.1
    _no_neighbourhood(config)


def _no_neighbourhood(config: PretrainConfig) -> None:
    _model(neighbourhood=0)(config)
    del config.loss_weights["neighbourhood"]


def _linear(config: PretrainConfig) -> None:
    old = config.optim.schedule
    assert isinstance(old, WarmupCosine)
    config.optim.schedule = WarmupLinear(peak=old.peak, warmup_steps=old.warmup_steps, total_steps=old.total_steps)


def _weight(name: str, value: float) -> Change:
    return lambda config: config.loss_weights.update({name: value})


def _model(**fields: object) -> Change:
    def change(config: PretrainConfig) -> None:
        for name, value in fields.items():
            assert hasattr(config.model, name)
            setattr(config.model, name, value)

    return change


CHANGES: dict[str, Change] = {
    "tiny": lambda config: None,
    "no warm start, convolutions learn": _no_warm_start,
    "no auxiliary loss": _no_neighbourhood,
    "no contrastive loss": _weight("contrastive", 0.0),
    "diversity 0": _weight("diversity", 0.0),
    "diversity .1": _weight("diversity", 0.1),
    "diversity .5": _weight("diversity", 0.5),
    "20 distractors": _model(num_distractors=20),
    "post-norm (paper)": _model(norm_first=False),
    "targets of projected features (page)": _model(target_features="projected"),
    "linear schedule (paper)": _linear,
    "heads 96 wide (page)": _model(n_head=2),
    "heads 64 wide (paper)": _model(n_head=3),
    "no padding (paper)": _model(conv_paddings=(0,) * 7),
    "16 channels a group of GroupNorm (page)": _model(conv_norm="group:2"),
}


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and probe one, and remove what an earlier one left."""
    splits, config, before = read_corpus(args.corpus), recipes.tiny(), time.process_time()
    config.train.seed = seed
    CHANGES[name](config)
    out, model = args.runs / "run", config.model
    shutil.rmtree(out, ignore_errors=True)
    stack = args.runs / f"{model.conv_norm}-{sum(model.conv_paddings)}-seed{seed}".replace(":", "")
    if warm := config.warm_start.updates > 0:
        if not stack.exists():
            pretrain(config.warm_start_run(), splits, stack)
        shutil.copytree(stack, out / WARM_START)  # and a run that stopped there
        shutil.copy(stack / "environment.json", out)
        save_config(config, out / CONFIG)
    trained = pretrain(config, splits, out, resume=warm)
    rows = probe(trained, splits, "valid", args.labels, minutes=PROBE_MINUTES, beside=())["rows"]
    return {"name": name, "seed": seed, **best_layer(rows, "model"), "cpu_seconds": round(time.process_time() - before)}


def untrained(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Log-mel and random weights."""
    rows = probe(recipes.tiny().model.build(), read_corpus(args.corpus), "valid", args.labels, minutes=PROBE_MINUTES)
    return [
        {"name": name, "seed": 0, **best_layer(rows["rows"], features)}
        for name, features in (("log-mel", "log-mel"), ("random weights", "random"))
    ]


def main() -> None:
    """Run what the file lacks, seed by seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path, help="prepared")
    parser.add_argument("labels", type=Path, help="its audio, with phones and their times")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else untrained(args)
    for seed, name in itertools.product(args.seeds, args.only):
        if not any((row["name"], row["seed"]) == (name, seed) for row in rows):
            rows.append(run(name, seed, args))
            write_json(args.out, {"rows": rows})
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
