"""``w2v2 convert``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from w2v2.cli.options import AddVerb
from w2v2.cli.progress import progress

log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verb."""
    sub = verb(
        "convert",
        _convert,
        "a model to or from Hugging Face's or fairseq's format, with a certificate that both compute the same",
        epilog="Examples: w2v2 convert runs/base hf-base --to hf; w2v2 convert wav2vec_small.pt ours --to ours.",
    )
    sub.add_argument(
        "source", type=Path, help="run folder or folder of weights, folder of Hugging Face, or .pt file of fairseq"
    )
    sub.add_argument("out", type=Path, help="folder to write; new or empty")
    sub.add_argument("--to", required=True, choices=["ours", "hf", "fairseq"], help="format to write")


def _convert(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.checkpoint.formats import CERTIFICATE, convert

    with progress("convert") as show:
        found = convert(args.source, args.out, args.to, show)
    if found["compared_with"] is None:
        log.warning("not compared with another implementation: %s", found["why_not"])
    else:
        log.info("compared with %s: largest difference %.2g", found["compared_with"], found["largest"])
    log.info("wrote %s, with %s", args.out, CERTIFICATE)
