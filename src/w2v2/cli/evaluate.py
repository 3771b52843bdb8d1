"""``w2v2 demo``, ``evaluate`` and ``report``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2v2.cli.decoding import SETTINGS, add_decoder_options, decoder_asked_for, show_beam_settings
from w2v2.cli.options import AddVerb, place, reading
from w2v2.cli.progress import progress
from w2v2.errors import Show, UsageError

if TYPE_CHECKING:
    from w2v2.data.batch import Batch
    from w2v2.data.config import DataConfig
    from w2v2.data.corpora import Splits
    from w2v2.decoding.config import BeamConfig
    from w2v2.decoding.greedy import Decoder
    from w2v2.inference.recognizer import Recognizer
    from w2v2.model.wav2vec2 import Wav2Vec2


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
    example = "w2v2 evaluate RUN --data corpus --lm words.arpa --tune valid --against RUN/evaluation/test"
    epilog = f"{SETTINGS} Example: {example}."
    evaluate = verb("evaluate", _evaluate, text, epilog=epilog, overrides=True)
    evaluate.add_argument("model", type=Path, help="run folder, or folder of weights")
    evaluate.add_argument("--data", required=True, help="prepared corpus, or folder of audio")
    evaluate.add_argument("--split", default="test", help="split, or subset such as test-other (default: %(default)s)")
    add_decoder_options(evaluate)
    evaluate.add_argument("--tune", metavar="SPLIT", help="split to tune the weights of LM and words on, such as valid")
    evaluate.add_argument("--trials", type=int, help="weights to try with --tune (default: 64)")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.add_argument("--out", type=Path, help="folder of results, replaced (default: RUN/evaluation/SPLIT)")
    evaluate.add_argument(
        "--against", type=Path, help="results of another system on the same utterances, a folder as of --out, to test"
    )
    text = "phones and speakers that a linear classifier tells from each layer, beside log-mel, MFCC and random weights"
    evaluate.add_argument("--probe", nargs="?", const="", metavar="LABELS", help=f"{text}; phones with times "
                          "(*.ctm, *.TextGrid) in this folder (default: of --data)")  # fmt: skip
    evaluate.add_argument("--layers", type=int, nargs="+", help="of --probe: blocks from 1, 0 the convolutions (all)")
    evaluate.add_argument("--minutes", type=float, help="of --probe: labelled audio of either split (default: 20)")
    evaluate.add_argument("--batch-seconds", type=float, help="audio in a batch at most, s (default: 87.5)")
    evaluate.add_argument("--workers", dest="num_workers", type=int, help="processes that decode audio (default: 2)")
    evaluate.add_argument("--max-bad", help="share of utterances that may be unreadable; named (default: 0.1%%)")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.data.corpora import read_corpus
    from w2v2.inference.recognizer import Recognizer, load

    show_beam_settings(args, _USAGE)
    splits = read_corpus(args.data, training=False)
    for name, split in (("--split", args.split), ("--tune", args.tune)):
        if split is not None and split not in splits:
            raise UsageError(f"{name} must be one of {', '.join(splits)}, which {args.data} has; got {split!r}")
    model = load(args.model)
    if args.probe is not None:
        _probe(args, splits, model.model if isinstance(model, Recognizer) else model)
        return
    if given := [f"`{name}`" for name in ("layers", "minutes") if getattr(args, name) is not None]:
        raise UsageError(f"{given[0]} needs `probe`: add it, or leave {given[0]} out")
    if isinstance(model, Recognizer):
        _evaluate_recognizer(args, rest, splits, model)
        return
    from w2v2.training.pretrain import evaluate_pretrained

    given = [f"`{name}`" for name in _RECOGNIZERS_ONLY if getattr(args, name) is not None] + rest[:1]
    if given:
        raise UsageError(
            f"{args.model} has no CTC head, so {', '.join(given)} cannot be used; name a run of 'w2v2 finetune'"
        )
    sys.stdout.write(json.dumps(evaluate_pretrained(args.model, splits, args.split), indent=2) + "\n")


def _probe(args: argparse.Namespace, splits: Splits, model: Wav2Vec2) -> None:
    from w2v2.evaluation.probe import probe
    from w2v2.evaluation.table import probe_table

    with progress("probe") as show:
        minutes = {} if args.minutes is None else {"minutes": args.minutes}
        labels = Path(args.probe or args.data)
        found = probe(model, splits, args.split, labels, layers=args.layers, show=show, **minutes)
    lines = [json.dumps(found, indent=2, ensure_ascii=False)] if args.json else probe_table(found)
    sys.stdout.write("\n".join(lines) + "\n")


_USAGE = "w2v2 evaluate RUN --data CORPUS"


_RECOGNIZERS_ONLY = (
    "lm", "lexicon", "hot_words", "tune", "trials", "out", "against", "batch_seconds", "num_workers", "max_bad",
    "device",
)  # fmt: skip


def _evaluate_recognizer(args: argparse.Namespace, rest: list[str], splits: Splits, recognizer: Recognizer) -> None:
    from w2v2.checkpoint.formats import OURS, recognize
    from w2v2.data.loader import whole_utterances
    from w2v2.evaluation.evaluate import hypotheses_file, run_evaluation
    from w2v2.evaluation.table import evaluation_table
    from w2v2.training.config import FinetuneConfig, run_config

    config = reading(batch_seconds=args.batch_seconds, num_workers=args.num_workers, max_bad=args.max_bad)
    if args.against is not None:
        hypotheses_file(args.against)
    place(recognizer.model, args.device)
    trained = run_config(args.model) if recognize(args.model)[0] is OURS else None
    if len(splits) == 1 and isinstance(trained, FinetuneConfig) and args.data in trained.data.sources:
        log.warning(
            "%s is one split here, and what the model was trained on: for a score of unseen speakers, hold some out "
            "with 'w2v2 prepare'", args.data,
        )  # fmt: skip
    with progress("evaluate") as show:
        decoder, settings = _decoder(args, rest, recognizer, splits, config, show)
        split = splits[args.split]
        found = run_evaluation(
            recognizer,
            decoder,
            _watched(whole_utterances(args.split, split, config), split.seconds, show),
            args.out or args.model / "evaluation" / args.split,
            {"run": str(args.model), "data": args.data, "split": args.split, "decoder": settings},
            against=args.against,
        )
    lines = [json.dumps(found, indent=2, ensure_ascii=False)] if args.json else evaluation_table(found)
    sys.stdout.write("\n".join(lines) + "\n")


def _decoder(
    args: argparse.Namespace,
    rest: list[str],
    recognizer: Recognizer,
    splits: Splits,
    data: DataConfig,
    show: Show,
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder that was asked for, tuned, and a record of it."""
    from w2v2.decoding.greedy import Greedy

    made = decoder_asked_for(args, rest, recognizer.vocabulary, _USAGE)
    if args.tune is None and args.trials is not None:
        raise UsageError("--trials is of --tune SPLIT; name a split to tune on")
    if args.tune is not None:
        if args.lm is None and args.lexicon is None:
            raise UsageError("--tune looks for weights of an LM and of words; name one with --lm, or a --lexicon")
        scored = {cut.id for cut in splits[args.split]}
        shared = sum(cut.id in scored for cut in splits[args.tune])
        if shared:
            raise UsageError(
                f"--tune {args.tune} is what is scored, {shared} utterances of it; tune on others than those of --split"
            )
        made = made.tuned(_tune(args, recognizer, made, splits, data, show))
    if isinstance(made, Greedy):
        return made, {}
    paths = {name: None if path is None else str(path) for name, path in (("lm", args.lm), ("lexicon", args.lexicon))}
    return made, {**paths, "hot_words": tuple(args.hot_words or ()), "tuned_on": args.tune, **asdict(made.config)}


def _tune(
    args: argparse.Namespace,
    recognizer: Recognizer,
    decoder: Any,
    splits: Splits,
    data: DataConfig,
    show: Show,
) -> BeamConfig:
    from w2v2.data.loader import whole_utterances
    from w2v2.evaluation.evaluate import tune_weights
    from w2v2.evaluation.tuning import EmissionCache, weights_key

    split, key = splits[args.tune], weights_key(args.model)
    found = tune_weights(
        recognizer,
        decoder.tuned,
        whole_utterances(args.tune, split, data),
        {u.id: recognizer.vocabulary.normalize(u.text) for u in split.utterances() if u.text is not None},
        EmissionCache(args.model / "emissions" / f"{split.audio}-{key[:16]}", key),
        start=decoder.config,
        trials=64 if args.trials is None else args.trials,
        progress=show,
    )
    for line in found.table()[:6]:
        log.info("%s", line)
    return found.best


def _watched(batches: Iterable[Batch], seconds: float, show: Show) -> Iterator[Batch]:
    heard = 0.0
    for batch in batches:
        yield batch
        heard += batch.lengths.sum().item() / 16_000
        show("evaluate", min(1.0, heard / seconds))


def _report(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.report import write_demo_report, write_run_report

    demo = (args.folder / "summary.json").exists()
    log.info("look at %s", (write_demo_report if demo else write_run_report)(args.folder))
