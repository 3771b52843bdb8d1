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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from w2v2.errors import UsageError

T = TypeVar("T")
log = logging.getLogger("w2v2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit code 0: done; 1: it failed; 2: the call or the input has to be put right; 130: interrupted."""
    args, rest = _parser().parse_known_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        if rest and args.verb not in ("pretrain", "finetune"):
            raise UsageError(f"unknown arguments {' '.join(rest)}; see 'w2v2 {args.verb} --help'")
        args.run(args, rest)
    except UsageError as error:
        # One that comes from a data worker carries that worker's traceback: its last line is the message.
        message = str(error).strip().splitlines()[-1].removeprefix("w2v2.errors.UsageError: ")
        sys.stderr.write(f"w2v2: error: {message}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"w2v2: failed: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("w2v2: interrupted\n")
        return 130
    return 0


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

    prepare = verb("prepare", _prepare, "check a folder in LibriSpeech layout and write its manifest")
    prepare.add_argument("source", type=Path, help="folder SUBSET/SPEAKER/CHAPTER/*.flac with *.trans.txt")
    prepare.add_argument("out", type=Path, help="new folder for corpus.json and one manifest per split")

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
        sub.add_argument("--data", type=Path, help="prepared folder, or folder in LibriSpeech layout")
        sub.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE-DATE)")
        sub.add_argument("--init-from", type=Path, help=what)
        sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
        sub.add_argument("-h", "--help", action="store_true", help="this; with RECIPE, its settings too")
        sub.set_defaults(parser=sub)
    finetune.add_argument("--minutes", type=float, help="use only about so many minutes of labels, over all speakers")

    evaluate = verb("evaluate", _evaluate, "loss and accuracy of a pretraining run, or WER and CER of a fine-tuned one")
    evaluate.add_argument("model", type=Path, help="run folder")
    evaluate.add_argument("--data", type=Path, required=True, help="prepared folder, or folder in LibriSpeech layout")
    evaluate.add_argument("--split", default="test", help="train, valid or test (default: %(default)s)")

    report = verb("report", _report, "one self-contained HTML page of a run")
    report.add_argument("folder", type=Path, help="run folder")
    return parser


def _demo(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.demo import run_demo

    page = run_demo(args.out, data=args.data, seed=args.seed, hours=args.hours, shrink=args.shrink)
    log.info("look at %s", page)


def _prepare(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.data.prepare import prepare

    with progress("prepare") as show:
        summary = prepare(args.source, args.out, show)
    for name, split in summary["splits"].items():
        log.info(
            "%-6s %7.2f h  %7d utterances  %5d speakers", name, split["hours"], split["utterances"], split["speakers"]
        )


def _pretrain(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.config import PretrainConfig
    from w2v2.data.corpora import read_corpus
    from w2v2.train import pretrain

    config = _configure(args, rest, PretrainConfig)
    config.check()
    splits = read_corpus(Path(config.data.path))
    out = _run_folder(args)
    pretrain(config, splits, out, init_from=args.init_from, resume=args.resume)
    _finish(out)


def _finetune(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.checkpoint import pretrained_config
    from w2v2.config import FinetuneConfig
    from w2v2.data.corpora import labelled_subset, read_corpus
    from w2v2.tasks.finetune import finetune

    config = _configure(args, rest, FinetuneConfig)
    if args.init_from is not None:
        config.take_shape(pretrained_config(args.init_from))
    config.check()
    splits = read_corpus(Path(config.data.path))
    if args.minutes is not None:
        splits["train"] = labelled_subset(splits["train"], args.minutes, config.train.seed)
    out = _run_folder(args)
    finetune(config, splits, out, init_from=args.init_from, resume=args.resume)
    _finish(out)


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


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.report import write_demo_report, write_run_report

    demo = (args.folder / "summary.json").exists()
    log.info("look at %s", (write_demo_report if demo else write_run_report)(args.folder))


def _configure(args: argparse.Namespace, rest: list[str], kind: type[T]) -> T:
    """The recipe with the command line's overrides."""
    from w2v2.recipes import load_recipe, recipe_names

    names = ", ".join(recipe_names(kind))
    if args.recipe is None:
        if args.help:
            args.parser.epilog = f"Recipes: {names}. {args.parser.epilog}"
            args.parser.print_help()
            raise SystemExit(0)
        raise UsageError(f"name a recipe: one of {names}, or FILE.py:FUNCTION")
    config: Any = load_recipe(args.recipe, kind)
    if args.help:
        args.parser.print_help()
        rest = ["--help"]
    config = override(config, rest, f"w2v2 {args.verb} {args.recipe}")
    if args.data is not None:
        config.data.path = str(args.data)
    if not config.data.path:
        raise UsageError("name the audio with --data DIR: a prepared folder, or one in LibriSpeech layout")
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


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar with the time to go, on a terminal; a function that takes the share done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


if __name__ == "__main__":
    sys.exit(main())
