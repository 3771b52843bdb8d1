"""``w2v2 pretrain``, ``finetune``, and what a run will take: ``plan``."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2v2.cli.options import AddVerb, configure, run_folder
from w2v2.cli.progress import progress
from w2v2.errors import JobError, UsageError

if TYPE_CHECKING:
    from w2v2.data.corpora import Splits
    from w2v2.training.config import FinetuneConfig, PretrainConfig
    from w2v2.training.plan import Measured, Plan

log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verbs."""
    _add_runs(verb)
    _add_plan(verb)


def _add_runs(verb: AddVerb) -> None:
    epilog = "Any setting of the recipe can follow, such as --train.max-steps 100; 'w2v2 {} RECIPE --help' lists them."
    options = {"add_help": False, "overrides": True}
    pretrain = verb("pretrain", _pretrain, "self-supervised pretraining", epilog=epilog.format("pretrain"), **options)
    text = "CTC fine-tuning, of a pretrained encoder or from scratch"
    finetune = verb("finetune", _finetune, text, epilog=epilog.format("finetune"), **options)
    for sub, what in ((pretrain, "run to start from"), (finetune, "run whose encoder to start from")):
        sub.add_argument("recipe", nargs="?", help="name of a recipe, or FILE.py:FUNCTION")
        sub.add_argument(
            "--data",
            action="append",
            help="prepared corpus (folder, https:// or s3://), or folder of audio as it is; again for several",
        )
        sub.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-DATE)")
        sub.add_argument("--init-from", type=Path, help=what)
        sub.add_argument(
            "--resume",
            nargs="?",
            const="yes",
            choices=["yes", "auto"],
            help="go on from the last good checkpoint in --out; auto: if there is one",
        )
        sub.add_argument("-h", "--help", action="store_true", help="this; with RECIPE, its settings too")
        sub.set_defaults(parser=sub)
    finetune.add_argument("--minutes", type=float, help="use only about so many minutes of labels, over all speakers")
    text = "see whether the set-up can learn eight short utterances by heart, and stop; exit code 1: it cannot"
    finetune.add_argument("--preflight", action="store_true", help=text)


def _pretrain(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.data.corpora import read_run
    from w2v2.training.config import PretrainConfig
    from w2v2.training.pretrain import pretrain

    config = configure(args, rest, PretrainConfig)
    config.check()
    splits = read_run(config.data)
    out = run_folder(args)
    pretrain(config, splits, out, init_from=args.init_from, resume=_resume(args, out))
    _finish(out)


def _finetune(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.data.corpora import labelled_subset, read_run
    from w2v2.training.config import FinetuneConfig
    from w2v2.training.finetune import finetune

    config = configure(args, rest, FinetuneConfig)
    config.check()
    if args.minutes is not None and not args.minutes > 0:
        raise UsageError(f"--minutes must be more than 0, got {args.minutes:g}; leave it out for all labels")
    splits = read_run(config.data)
    if args.minutes is not None:
        splits["train"] = labelled_subset(splits["train"], args.minutes, config.train.seed)
    if args.preflight:
        _preflight(config, splits, args.init_from)
        return
    out = run_folder(args)
    with progress("check transcripts") as show:
        finetune(config, splits, out, init_from=args.init_from, resume=_resume(args, out), show=show)
    _finish(out)


def _preflight(config: FinetuneConfig, splits: Splits, init_from: Path | None) -> None:
    from w2v2.training.preflight import preflight

    with progress("preflight") as show:
        found = preflight(config, splits, init_from=init_from, show=show)
    if not found.learns:
        raise JobError(str(found))
    log.info("%s", found)


def _resume(args: argparse.Namespace, out: Path) -> bool:
    from w2v2.training.resume import can_resume

    return args.resume == "yes" or (args.resume == "auto" and can_resume(out))


def _finish(out: Path) -> None:
    """Write the page of a run; of several processes, the first one does."""
    from w2v2.training.run import is_first_process

    if is_first_process():
        from w2v2.report import write_run_report

        log.info("look at %s", write_run_report(out))


def _add_plan(verb: AddVerb) -> None:
    text = "what a pretraining run will take, from some measured steps: time, memory, batch and rate; and what it masks"
    epilog = "Any setting of the recipe can follow, such as --data.batch-seconds 40."
    sub = verb("plan", _plan, text, epilog=epilog, overrides=True)
    sub.add_argument("recipe", help="name of a recipe, or FILE.py:FUNCTION")
    sub.add_argument("--gpus", type=int, default=1, help="devices in all (default: %(default)s)")
    sub.add_argument("--memory", type=float, help="of each device, GB")
    sub.add_argument("--data", action="append", help="audio to measure on (default: noise of the recipe's crops)")
    sub.add_argument("--hours-per-update", type=float, help="audio of an optimiser step, hours (default: the recipe's)")
    sub.add_argument("--steps", type=int, default=20, help="optimiser steps to measure (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.set_defaults(help=False)


def _plan(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.recipes import load_recipe
    from w2v2.training.config import PretrainConfig
    from w2v2.training.plan import make_plan, settle

    for name, value in (("--gpus", args.gpus), ("--steps", args.steps), ("--hours-per-update", args.hours_per_update)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} must be more than 0, got {value:g}")
    recipe = load_recipe(args.recipe, PretrainConfig)
    config = configure(args, rest, PretrainConfig, need_data=False)
    fields = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in rest}
    config = settle(recipe, config, devices=args.gpus, hours=args.hours_per_update, fixed=fields)
    config.check()
    plan, command = make_plan(recipe, config, _measured(config, args.steps), args.memory), _command(recipe, config)
    as_json = json.dumps(asdict(plan) | {"command": command}, indent=2)
    lines = [as_json] if args.json else [*_plan_table(plan, args.memory), command]
    sys.stdout.write("\n".join(lines) + "\n")


def _measured(config: PretrainConfig, steps: int) -> Measured:
    """Measure in a process of its own, whose memory is that of the run alone, and which may be killed."""
    from w2v2.serial import to_dict

    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(_measure, to_dict(config), steps).result()
    except (BrokenProcessPool, RuntimeError) as error:
        if isinstance(error, BrokenProcessPool) or "memory" in str(error):
            raise UsageError(
                "the steps to measure ran out of memory, or were killed; lower --data.batch-seconds "
                f"{config.data.batch_seconds:g}, or set --train.activation-checkpointing True"
            ) from error
        raise


def _measure(values: dict[str, Any], steps: int) -> Measured:
    from w2v2.recipes import load_recipe
    from w2v2.serial import from_dict
    from w2v2.training.config import PretrainConfig
    from w2v2.training.plan import measure

    load_recipe(values["recipe"], PretrainConfig)  # so that the types of a user's file are known
    return measure(from_dict(values, PretrainConfig), steps)


def _command(recipe: PretrainConfig, config: PretrainConfig) -> str:
    """What starts the run that was planned: every setting in which it differs from its recipe."""
    from w2v2.serial import differences, to_dict

    words = ["w2v2", "pretrain", config.recipe]
    for source in config.data.sources or ("DIR",):
        words += ["--data", source]
    for name, (_, value) in differences(to_dict(recipe), to_dict(config)).items():
        if name != "data.sources":
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _plan_table(plan: Plan, memory: float | None) -> list[str]:
    limit, measured = "", plan.measured
    if memory is not None:
        fits = "" if plan.memory_gb <= memory else " (does not fit)"
        limit = f" of {memory:g}{fits}; micro-batches of about {plan.largest_batch_seconds:g} s would fill it"
    rows = {
        "devices": f"{plan.devices} ({measured.device}), {plan.accumulate} micro-batches each per update",
        "audio per update": f"{plan.hours_per_update:.4g} h",
        "peak learning rate": f"{plan.peak:g} (the recipe's, scaled by the root of the batch: {plan.scaled_peak:.3g})",
        "memory per device": f"{plan.memory_gb:.2f} GB{limit}",
        "seconds per update": f"{plan.seconds_per_update:.4g}, {plan.audio_seconds_per_second:.4g} audio-s/s "
        f"({measured.steps} steps measured, middle half within {measured.spread:.0%})",
        "of these": f"{plan.cpu_seconds_per_update:.4g} on the CPU's cores, whatever else the machine does",
        "time to finish": f"{plan.hours_to_finish:.4g} h ({plan.hours_to_finish / 24:.3g} days) for {plan.updates:,} "
        "updates; validation and transfers between devices not counted",
        "audio heard": f"{plan.hours_heard:,.1f} h" + (f", {plan.passes:.1f} passes" if plan.passes else ""),
    }
    for masks in plan.masks:
        low, middle, high = masks.spans
        rows[f"masked of {masks.seconds:g} s"] = (
            f"{masks.trained:.1%} of {masks.frames} frames ({masks.drawn:.1%} before rows are made equal), in spans of "
            f"{middle} frames, {low} to {high} in eight of ten"
        )
    return [f"{name:20} {text}" for name, text in rows.items()]
