"""``w2v2 demo``, ``evaluate`` and ``report``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from w2v2.errors import UsageError
from w2v2.verbs.settings import AddVerb

log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verbs."""
    _add_demo(verb)
    _add_evaluate(verb)
    report = verb("report", _report, "one self-contained HTML page of a run")
    report.add_argument("folder", type=Path, help="run folder")


def _add_demo(verb: AddVerb) -> None:
    demo = verb("demo", _demo, "the whole road offline: synthesise, prepare, pretrain, fine-tune, evaluate, report")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of results (default: %(default)s)")
    demo.add_argument("--data", type=Path, help="real speech in LibriSpeech layout instead of the synthetic corpus")
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    demo.add_argument("--hours", type=float, default=2.0, help="synthetic training audio, hours (default: %(default)s)")
    demo.add_argument(
        "--shrink", type=float, default=1.0, help="divide the number of updates by this, for a quick look (default: 1)"
    )


def _demo(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.demo import run_demo

    page = run_demo(args.out, data=args.data, seed=args.seed, hours=args.hours, shrink=args.shrink)
    log.info("look at %s", page)


def _add_evaluate(verb: AddVerb) -> None:
    evaluate = verb("evaluate", _evaluate, "loss and accuracy of a pretraining run, or WER and CER of a fine-tuned one")
    evaluate.add_argument("model", type=Path, help="run folder")
    evaluate.add_argument("--data", required=True, help="prepared corpus, or folder of audio")
    evaluate.add_argument("--split", default="test", help="train, valid or test (default: %(default)s)")


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
