"""``w2v2 extract``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from w2v2.cli.options import AddVerb, place, reading
from w2v2.cli.progress import progress
from w2v2.errors import JobError, UsageError

if TYPE_CHECKING:
    from w2v2.inference.extract import Item


log = logging.getLogger("w2v2")


INDEX = "index.jsonl"


def add(verb: AddVerb) -> None:
    """Add the verb."""
    sub = verb("extract", _extract, "hidden states, codes or pooled vectors of recordings, a file for each")
    sub.add_argument("model", type=Path, help="run folder, or folder of weights")
    sub.add_argument("audio", nargs="*", help="files, and folders of audio")
    sub.add_argument("--data", help="prepared corpus (folder, https:// or s3://), or folder of audio with splits")
    sub.add_argument("--split", default="test", help="of --data, or a subset such as dev-other (default: %(default)s)")
    sub.add_argument("--out", type=Path, required=True, help=f"folder of results, with {INDEX} of what is where")
    sub.add_argument(
        "--layers", type=int, nargs="+", help="0: what the first block gets, I: what block I gives (default: the last)"
    )
    sub.add_argument("--codes", action="store_true", help="codes of a pretraining run's quantizer")
    sub.add_argument("--pool", choices=["mean"], help="one vector for each recording: the mean over its frames")
    sub.add_argument("--format", choices=["safetensors", "numpy"], default="safetensors", help="(default: %(default)s)")
    sub.add_argument("--batch-seconds", type=float, default=60.0, help="audio in a batch, s (default: %(default)s)")
    sub.add_argument(
        "--max-seconds", type=float, default=120.0, help="longer recordings are refused, s (default: %(default)s)"
    )
    sub.add_argument(
        "--workers", dest="num_workers", type=int, default=2, help="processes that decode --data (default: %(default)s)"
    )
    sub.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")


def _extract(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.checkpoint.formats import read
    from w2v2.inference.extract import Wanted, check_wanted, extract_files

    if bool(args.audio) == bool(args.data):
        raise UsageError("name either files and folders of audio, or a corpus with --data")
    for name, value in (("--batch-seconds", args.batch_seconds), ("--max-seconds", args.max_seconds)):
        if value <= 0:
            raise UsageError(f"{name} must be more than 0, got {value:g}")
    layers = tuple(args.layers or (() if args.codes else (-1,)))
    wanted = Wanted(layers=layers, codes=args.codes, pool=args.pool is not None, format=args.format)
    model = read(args.model).build()
    check_wanted(model, wanted.layers, codes=wanted.codes, pool=wanted.pool)
    place(model, args.device)
    items, total = _items(args)
    done = failed = 0
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(progress("extract"))
        args.out.mkdir(parents=True, exist_ok=True)
        index = stack.enter_context((args.out / INDEX).open("w", encoding="utf-8"))
        for row in extract_files(model, items, args.out, wanted, args.batch_seconds):
            index.write(json.dumps(row, ensure_ascii=False) + "\n")
            done += 1
            if "error" in row:
                failed += 1
                log.warning("%s: %s", row["source"], row["error"])
            show("extract", min(1.0, done / total))
    if failed:
        raise JobError(f"{failed} of {done} recordings gave nothing; {args.out / INDEX} and the lines above say why")


def _items(args: argparse.Namespace) -> tuple[Iterator[Item], int]:
    """Utterances, and about how many."""
    from w2v2.inference.extract import corpus_items, find_files, read_files

    if not args.data:
        found = find_files(args.audio)
        return read_files(found, args.max_seconds), len(found)
    from w2v2.data.corpora import read_corpus
    from w2v2.data.loader import whole_utterances

    config = reading(batch_seconds=args.batch_seconds, num_workers=args.num_workers, max_bad="100%")
    splits = read_corpus(args.data, training=False)
    if args.split not in splits:
        raise UsageError(f"--split must be one of {', '.join(splits)}, which {args.data} has; got {args.split!r}")
    split = splits[args.split]
    return corpus_items(whole_utterances(args.split, split, config), args.data, args.max_seconds), len(split)
