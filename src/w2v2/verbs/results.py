"""``w2v2 demo``, ``evaluate`` and ``report``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from w2v2.errors import UsageError
from w2v2.progress import progress
from w2v2.verbs.settings import AddVerb, place

if TYPE_CHECKING:
    from w2v2.data.corpora import Split
    from w2v2.data.datamodule import Batch

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
    text = "WER and CER of a fine-tuned run, how sure and of which errors; loss and accuracy of a pretraining run"
    evaluate = verb("evaluate", _evaluate, text)
    evaluate.add_argument("model", type=Path, help="run folder, or folder of weights")
    evaluate.add_argument("--data", required=True, help="prepared corpus, or folder of audio")
    evaluate.add_argument("--split", default="test", help="train, valid or test (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.add_argument("--out", type=Path, help="folder of results, replaced (default: RUN/evaluation/SPLIT)")
    evaluate.add_argument(
        "--against",
        type=Path,
        help="results of another system on the same utterances, a folder as of --out, to test",
    )
    evaluate.add_argument("--batch-seconds", type=float, help="audio in a batch at most, s (default: 87.5)")
    evaluate.add_argument("--workers", type=int, help="processes that decode audio (default: 2)")
    evaluate.add_argument("--max-bad", help="share of utterances that may be unreadable; named (default: 0.1%%)")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.checkpoint import CONFIG, VOCABULARY, expect_file
    from w2v2.data.corpora import read_corpus

    splits = read_corpus(args.data, training=False)
    if args.split not in splits:
        raise UsageError(f"--split must be one of {', '.join(splits)}, which {args.data} has; got {args.split!r}")
    if (args.model / VOCABULARY).exists():
        _evaluate_recognizer(args, splits[args.split])
        return
    from w2v2.train import evaluate_pretrained

    expect_file(args.model, CONFIG)
    given = [name for name in _RECOGNIZERS_ONLY if getattr(args, name) is not None]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{args.model} has no CTC head, so {options} cannot be used; name a run of 'w2v2 finetune'")
    sys.stdout.write(json.dumps(evaluate_pretrained(args.model, splits, args.split), indent=2) + "\n")


_RECOGNIZERS_ONLY = ("out", "against", "batch_seconds", "workers", "max_bad", "device")


def _evaluate_recognizer(args: argparse.Namespace, split: Split) -> None:
    from w2v2.config import DataConfig, TrainConfig, check_run
    from w2v2.data.datamodule import whole_utterances
    from w2v2.decode import Greedy
    from w2v2.evaluate import evaluation_table, hypotheses_file, run_evaluation
    from w2v2.recognizer import load_recognizer

    given = {"batch_seconds": args.batch_seconds, "num_workers": args.workers, "max_bad": args.max_bad}
    config = DataConfig(**{name: value for name, value in given.items() if value is not None})
    check_run(config, TrainConfig())
    if args.against is not None:
        hypotheses_file(args.against)
    recognizer = load_recognizer(args.model)
    place(recognizer.model, args.device)
    with progress("evaluate") as show:
        found = run_evaluation(
            recognizer,
            Greedy(recognizer.vocabulary),
            _watched(whole_utterances(args.split, split, config), split.seconds, show),
            args.out or args.model / "evaluation" / args.split,
            {"run": str(args.model), "data": args.data, "split": args.split, "decoder": {}},
            against=args.against,
        )
    lines = [json.dumps(found, indent=2, ensure_ascii=False)] if args.json else evaluation_table(found)
    sys.stdout.write("\n".join(lines) + "\n")


def _watched(batches: Iterable[Batch], seconds: float, show: Callable[[str, float], None]) -> Iterator[Batch]:
    heard = 0.0
    for batch in batches:
        yield batch
        heard += batch.lengths.sum().item() / 16_000
        show("evaluate", min(1.0, heard / seconds))


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.report import write_demo_report, write_run_report

    demo = (args.folder / "summary.json").exists()
    log.info("look at %s", (write_demo_report if demo else write_run_report)(args.folder))
