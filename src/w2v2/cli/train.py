"""``w2v2 pretrain``, ``finetune``, and what goes with a run: ``plan``, ``mask-preview``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from w2v2.cli.options import AddVerb, configure, run_folder
from w2v2.cli.progress import progress
from w2v2.errors import JobError, UsageError

if TYPE_CHECKING:
    from w2v2.data.corpora import Splits
    from w2v2.training.config import FinetuneConfig


log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verbs."""
    _add_runs(verb)
    _add_plan(verb)
    _add_mask_preview(verb)


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
    from w2v2.training.run import can_resume

    return args.resume == "yes" or (args.resume == "auto" and can_resume(out))


def _finish(out: Path) -> None:
    """Write the page of a run; of several processes, the first one does."""
    from w2v2.training.run import is_first_process

    if is_first_process():
        from w2v2.report import write_run_report

        log.info("look at %s", write_run_report(out))


def _add_plan(verb: AddVerb) -> None:
    text = "what a pretraining run will take and give, from some measured steps and published figures"
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
    from w2v2.training.plan import make_plan, measure, plan_table, settle

    for name, value in (("--gpus", args.gpus), ("--steps", args.steps), ("--hours-per-update", args.hours_per_update)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} must be more than 0, got {value:g}")
    recipe = load_recipe(args.recipe, PretrainConfig)
    config = configure(args, rest, PretrainConfig, need_data=False)
    config = settle(recipe, config, devices=args.gpus, hours_per_update=args.hours_per_update, given=rest)
    config.check()
    plan = make_plan(recipe, config, measure(config, args.steps), args.memory)
    lines = [json.dumps(asdict(plan), indent=2)] if args.json else plan_table(plan)
    sys.stdout.write("\n".join(lines) + "\n")


def _add_mask_preview(verb: AddVerb) -> None:
    sub = verb(
        "mask-preview",
        _mask_preview,
        "how much of an utterance is really masked, and in what spans, by its duration",
        epilog="Any setting of the recipe can follow, such as --model.mask-prob 0.5.",
        overrides=True,
    )
    sub.add_argument("recipe", help="name of a recipe, or FILE.py:FUNCTION")
    sub.add_argument(
        "--durations", nargs="+", type=float, default=[1, 2, 4, 8, 15.6], help="seconds (default: 1 2 4 8 15.6)"
    )
    sub.add_argument("--draws", type=int, default=2000, help="utterances of each duration (default: %(default)s)")
    sub.add_argument("--data", action="append", help="corpus whose own durations (quantiles) are taken instead")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.set_defaults(help=False)


def _mask_preview(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.mask_preview import corpus_durations, mask_table, preview_masks
    from w2v2.training.config import PretrainConfig

    config = configure(args, rest, PretrainConfig, need_data=False)
    config.check()
    rows = preview_masks(config, corpus_durations(config) if config.data.sources else args.durations, args.draws)
    found = [json.dumps([asdict(row) for row in rows], indent=2)]
    sys.stdout.write("\n".join(found if args.json else mask_table(rows, config.model.mask_length)) + "\n")
