"""The ``w2v2`` command: a recipe and overrides of its leaves become one typed configuration and one call.

Heavy imports live inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from w2v2.errors import JobError, StoppedError, UsageError
from w2v2.progress import progress

T = TypeVar("T")
log = logging.getLogger("w2v2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit code 0: done; 1: it failed; 2: the call or the input has to be put right; 130: interrupted."""
    # oneDNN keeps 1024 primitives, one for each length of a crop: a third of a small model's memory, and no time saved.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        if rest and args.verb not in ("prepare", "pretrain", "finetune", "plan", "mask-preview"):
            raise UsageError(f"unknown arguments {' '.join(rest)}; see 'w2v2 {args.verb} --help'")
        args.run(args, rest)
    except UsageError as error:
        sys.stderr.write(f"w2v2: error: {_last_line(error)}\n")
        return 2
    except StoppedError as stop:
        sys.stderr.write(f"w2v2: {stop}\n")
        return stop.exit_code
    except (JobError, OSError) as error:
        sys.stderr.write(f"w2v2: failed: {_last_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("w2v2: interrupted\n")
        return 130
    return 0


def _last_line(error: Exception) -> str:
    """The message; of one that comes from a data worker, with that worker's traceback, the last line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix(_name(error))


def _name(error: Exception) -> str:
    kind = type(error)
    return f"{kind.__qualname__}: " if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}: "


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="w2v2", description="wav2vec 2.0: from raw audio to a trusted transcript")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace, list[str]], None], text: str, **kwargs: Any) -> Any:
        sub = verbs.add_parser(name, help=text, description=text, **kwargs)
        sub.set_defaults(run=run)
        return sub

    demo = verb("demo", _demo, "the whole road offline: synthesise, prepare, pretrain, fine-tune, evaluate, report")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of results (default: %(default)s)")
    demo.add_argument("--data", type=Path, help="real speech in LibriSpeech layout instead of the synthetic corpus")
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    demo.add_argument("--hours", type=float, default=2.0, help="synthetic training audio, hours (default: %(default)s)")
    demo.add_argument(
        "--shrink", type=float, default=1.0, help="divide the number of updates by this, for a quick look (default: 1)"
    )

    _add_prepare(verb)

    pretrain = verb(
        "pretrain",
        _pretrain,
        "self-supervised pretraining",
        epilog="Any setting of the recipe can follow, such as --train.max-steps 100; 'w2v2 pretrain RECIPE --help' "
        "lists them.",
        add_help=False,
    )
    finetune = verb(
        "finetune",
        _finetune,
        "CTC fine-tuning, of a pretrained encoder or from scratch",
        epilog="Any setting of the recipe can follow; 'w2v2 finetune RECIPE --help' lists them.",
        add_help=False,
    )
    for sub, what in ((pretrain, "run to start from"), (finetune, "pretraining run whose encoder to start from")):
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

    _add_plan(verb)
    _add_mask_preview(verb)

    evaluate = verb("evaluate", _evaluate, "loss and accuracy of a pretraining run, or WER and CER of a fine-tuned one")
    evaluate.add_argument("model", type=Path, help="run folder")
    evaluate.add_argument("--data", required=True, help="prepared corpus, or folder of audio")
    evaluate.add_argument("--split", default="test", help="train, valid or test (default: %(default)s)")

    bench = verb("bench", _bench, "speed of data loading: audio-hours per second by source, and the wait of a step")
    bench.add_argument("what", choices=["data"], help="what to measure")
    bench.add_argument("data", nargs="+", help="prepared corpora (folders, https:// or s3://), or folders of audio")
    bench.add_argument("--workers", type=int, default=2, help="processes that load (default: %(default)s)")
    bench.add_argument("--batch-seconds", type=float, default=87.5, help="audio in a batch, s (default: %(default)s)")
    bench.add_argument("--step-seconds", type=float, default=0.25, help="of a training step (default: %(default)s)")
    bench.add_argument("--seconds", type=float, default=10.0, help="for each measurement (default: %(default)s)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")

    text = "whether a pretraining run looks like healthy ones of its recipe; exit code 1: no"
    compare = verb("compare", _compare, text)
    compare.add_argument("folder", type=Path, help="run folder")
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")

    report = verb("report", _report, "one self-contained HTML page of a run")
    report.add_argument("folder", type=Path, help="run folder")
    return parser


def _demo(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.demo import run_demo

    page = run_demo(args.out, data=args.data, seed=args.seed, hours=args.hours, shrink=args.shrink)
    log.info("look at %s", page)


def _add_plan(verb: Any) -> None:
    text = "what a pretraining run will take and give, from some measured steps and published figures"
    sub = verb("plan", _plan, text, epilog="Any setting of the recipe can follow, such as --data.batch-seconds 40.")
    sub.add_argument("recipe", help="name of a recipe, or FILE.py:FUNCTION")
    sub.add_argument("--gpus", type=int, default=1, help="devices in all (default: %(default)s)")
    sub.add_argument("--memory", type=float, help="of each device, GB")
    sub.add_argument("--data", action="append", help="audio to measure on (default: noise of the recipe's crops)")
    sub.add_argument("--hours-per-update", type=float, help="audio of an optimiser step, hours (default: the recipe's)")
    sub.add_argument("--steps", type=int, default=20, help="optimiser steps to measure (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.set_defaults(help=False)


def _plan(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.config import PretrainConfig
    from w2v2.plan import make_plan, measure, plan_table, settle
    from w2v2.recipes import load_recipe

    for name, value in (("--gpus", args.gpus), ("--steps", args.steps), ("--hours-per-update", args.hours_per_update)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} must be more than 0, got {value:g}")
    recipe = load_recipe(args.recipe, PretrainConfig)
    config = _configure(args, rest, PretrainConfig, need_data=False)
    config = settle(recipe, config, devices=args.gpus, hours_per_update=args.hours_per_update, given=rest)
    config.check()
    plan = make_plan(recipe, config, measure(config, args.steps), args.memory)
    lines = [json.dumps(asdict(plan), indent=2)] if args.json else plan_table(plan)
    sys.stdout.write("\n".join(lines) + "\n")


def _add_mask_preview(verb: Any) -> None:
    sub = verb(
        "mask-preview",
        _mask_preview,
        "how much of an utterance is really masked, and in what spans, by its duration",
        epilog="Any setting of the recipe can follow, such as --model.mask-prob 0.5.",
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
    from w2v2.config import PretrainConfig
    from w2v2.mask_preview import corpus_durations, mask_table, preview_masks

    config = _configure(args, rest, PretrainConfig, need_data=False)
    config.check()
    rows = preview_masks(config, corpus_durations(config) if config.data.sources else args.durations, args.draws)
    found = [json.dumps([asdict(row) for row in rows], indent=2)]
    sys.stdout.write("\n".join(found if args.json else mask_table(rows, config.model.mask_length)) + "\n")


def _add_prepare(verb: Any) -> None:
    sub = verb(
        "prepare",
        _prepare,
        "check every recording of a source of audio, and write its manifests, or shards to stream from",
        epilog="Thresholds of the audit can follow, such as --max-dc 0.05; --thresholds lists them. "
        "Examples: w2v2 prepare LibriSpeech corpus; w2v2 prepare calls.csv corpus --columns path=file text=sentence; "
        "w2v2 prepare hf:my/dataset corpus --shards.",
    )
    sub.add_argument(
        "source", help="folder of audio of any kind, table (.csv, .tsv, .jsonl), hf:DATASET, or the word synthetic"
    )
    sub.add_argument(
        "out", type=Path, help="folder for corpus.json, audit.jsonl and the manifests; resumed if it is there"
    )
    sub.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per core)")
    sub.add_argument("--ray", metavar="ADDRESS", help="work on a Ray cluster (auto, local, or its address) instead")
    sub.add_argument("--strict", action="store_true", help="fail if the audit finds anything")
    sub.add_argument(
        "--shards", nargs="?", const="flac", default="", help="write 16 kHz mono audio into tars: flac, opus, wav"
    )
    sub.add_argument("--shard-mb", type=float, default=250.0, help="size of a shard, MB (default: %(default)s)")
    sub.add_argument(
        "--splits", default="", help="table with the columns utt and role (default: SOURCE/splits.tsv, if any)"
    )
    sub.add_argument(
        "--valid-share", type=float, default=0.05, help="speakers held out to validate on (default: %(default)s)"
    )
    sub.add_argument(
        "--test-share", type=float, default=0.0, help="speakers held out to test on (default: %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of what is held out, and of subsets (default: %(default)s)")
    sub.add_argument(
        "--labelled", nargs="+", default=(), help="labelled subsets of train: 10m 1h 10h, or NAME=FILE of ids"
    )
    sub.add_argument("--columns", nargs="+", default=(), help="names of a table's columns, such as text=sentence")
    sub.add_argument("--speaker", default="", help="regular expression on the path; its first group is the speaker")
    sub.add_argument("--hf-config", default="", help="configuration of a Hugging Face dataset")
    sub.add_argument(
        "--download", help="LibriSpeech parts to download into SOURCE first, such as train-clean-100,dev-clean"
    )
    sub.add_argument("--base-url", help="mirror to download from (default: the official address)")
    sub.add_argument("--checksums", type=Path, help="md5 sums of the archives, where they are not the published ones")
    sub.add_argument("--thresholds", action="store_true", help="list the options that set the audit's thresholds")
    sub.add_argument("--hours", type=float, default=2.0, help="of synthetic training audio (default: %(default)s)")


def _prepare(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.data.audit import AuditConfig
    from w2v2.data.prepare import PrepareConfig, prepare, summary_table

    audit = override(AuditConfig(), ["--help"] if args.thresholds else rest, "w2v2 prepare SOURCE OUT")
    names = ("splits", "valid_share", "test_share", "seed", "speaker", "hf_config", "shards", "shard_mb")
    config = PrepareConfig(
        audit=audit,
        labelled=tuple(args.labelled),
        columns=tuple(args.columns),
        **{name: getattr(args, name) for name in names},
    )
    if args.jobs < 1:
        raise UsageError(f"--jobs must be 1 or more, got {args.jobs}")
    source = args.source
    if args.download:
        source = _download(args)
    elif source == "synthetic" and not Path(source).exists():
        source = _synthesize(args)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(progress("prepare"))
        executor = None
        if args.ray:
            from w2v2.data.executors import RayExecutor

            executor = stack.enter_context(RayExecutor(args.ray))
        summary = prepare(
            source, args.out, config, jobs=args.jobs, strict=args.strict, executor=executor, progress=show
        )
    for line in summary_table(summary):
        log.info("%s", line)


def _download(args: argparse.Namespace) -> Path:
    from w2v2.data.download import OFFICIAL, download_librispeech

    parts = [part for part in args.download.split(",") if part]
    with progress("download") as show:
        return download_librispeech(
            parts,
            Path(args.source),
            base_url=args.base_url or OFFICIAL,
            checksums=args.checksums,
            progress=lambda share: show("download", share),
        )


def _synthesize(args: argparse.Namespace) -> Path:
    from w2v2.data.synthetic import SyntheticConfig, synthesize

    audio: Path = args.out.with_name(args.out.name + "-audio")
    with progress("synthesise") as show:
        synthesize(audio, SyntheticConfig.sized(args.hours, args.seed), lambda share: show("synthesise", share))
    return audio


def _pretrain(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.config import PretrainConfig
    from w2v2.data.corpora import read_run
    from w2v2.train import pretrain

    config = _configure(args, rest, PretrainConfig)
    config.check()
    splits = read_run(config.data)
    out = _run_folder(args)
    pretrain(config, splits, out, init_from=args.init_from, resume=_resume(args, out))
    _finish(out)


def _finetune(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.config import FinetuneConfig
    from w2v2.data.corpora import labelled_subset, read_run
    from w2v2.tasks.finetune import finetune

    config = _configure(args, rest, FinetuneConfig)
    config.check()
    splits = read_run(config.data)
    if args.minutes is not None:
        splits["train"] = labelled_subset(splits["train"], args.minutes, config.train.seed)
    out = _run_folder(args)
    finetune(config, splits, out, init_from=args.init_from, resume=_resume(args, out))
    _finish(out)


def _resume(args: argparse.Namespace, out: Path) -> bool:
    from w2v2.train import can_resume

    return args.resume == "yes" or (args.resume == "auto" and can_resume(out))


def _finish(out: Path) -> None:
    """Write the page of a run; of several processes, the first one does."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0":
        from w2v2.report import write_run_report

        log.info("look at %s", write_run_report(out))


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.checkpoint import VOCABULARY
    from w2v2.data.corpora import read_corpus

    splits = read_corpus(args.data, training=False)
    if args.split not in splits:
        raise UsageError(f"--split must be one of {', '.join(splits)}, which {args.data} has; got {args.split!r}")
    if (args.model / VOCABULARY).exists():
        from w2v2.tasks.finetune import evaluate_recognizer as evaluate
    else:
        from w2v2.train import evaluate_pretrained as evaluate
    figures = evaluate(args.model, splits, args.split)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def _bench(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.bench import data_speed, speed_table
    from w2v2.config import DataConfig, TrainConfig, check_run

    config = DataConfig(num_workers=args.workers, batch_seconds=args.batch_seconds)
    check_run(config, TrainConfig())
    with progress("bench") as show:
        rows = []
        for i, source in enumerate(args.data):
            rows.append(data_speed(source, config, step_seconds=args.step_seconds, seconds=args.seconds))
            show("bench", (i + 1) / len(args.data))
    if args.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(speed_table(rows, args.step_seconds, args.workers)) + "\n")


def _compare(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.compare import compare, verdict_table

    verdict = compare(args.folder)
    lines = [json.dumps(verdict.to_dict(), indent=2)] if args.json else verdict_table(verdict)
    sys.stdout.write("\n".join(lines) + "\n")
    if not verdict.inside:
        raise JobError(f"{args.folder} is outside the bands of {verdict.recipe} at step {verdict.step}")


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.report import write_demo_report, write_run_report

    demo = (args.folder / "summary.json").exists()
    log.info("look at %s", (write_demo_report if demo else write_run_report)(args.folder))


def _configure(args: argparse.Namespace, rest: list[str], kind: type[T], *, need_data: bool = True) -> T:
    """The recipe, with the shape of the model that the run starts from, if any, and the command line's overrides."""
    from w2v2.checkpoint import pretrained_config
    from w2v2.recipes import load_recipe, recipe_names

    names = ", ".join(recipe_names(kind))
    if args.recipe is None:
        if args.help:
            args.parser.epilog = f"Recipes: {names}. {args.parser.epilog}"
            args.parser.print_help()
            raise SystemExit(0)
        raise UsageError(f"name a recipe: one of {names}, or FILE.py:FUNCTION")
    config: Any = load_recipe(args.recipe, kind)
    if getattr(args, "init_from", None) is not None:
        config.take_shape(pretrained_config(args.init_from))
    if args.help:
        args.parser.print_help()
        rest = ["--help"]
    config = override(config, rest, f"w2v2 {args.verb} {args.recipe}")
    if args.data is not None:
        config.data.sources = tuple(args.data)
    if need_data and not config.data.sources:
        raise UsageError("name the audio with --data DIR: a prepared corpus, or a folder of audio")
    done: T = config
    return done


def override(config: T, args: Sequence[str], prog: str) -> T:
    """Set leaves of a configuration from arguments such as ``--train.max-steps 100``.

    Raises:
        UsageError: an unknown field, or a value of another type.
    """
    import tyro

    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(config), default=config, args=list(args), config=markers, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro's framed complaint as one line, with its first suggestion."""
    frame = set("─-+╭╮╰╯│| ")
    lines = [line.strip("│| \t") for line in box.splitlines() if set(line) - frame and line[0] not in "╭+"]
    asides = ("Perhaps you meant", "Argument helptext", "Got errors", "For full helptext")
    problem = " ".join(itertools.takewhile(lambda line: not line.startswith(asides), lines))
    hints = [line.split()[0] for line in lines[1:] if line.startswith("--")]
    return f"{problem}; did you mean {hints[0]}?" if "Unrecognized" in problem and hints else problem


def _run_folder(args: argparse.Namespace) -> Path:
    if args.out is not None:
        return Path(args.out)
    name = Path(args.recipe.rpartition(":")[0]).stem if ":" in args.recipe else args.recipe
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


if __name__ == "__main__":
    sys.exit(main())
