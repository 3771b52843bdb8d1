"""``w2v2 prepare``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from pathlib import Path

from w2v2.cli.options import AddVerb, override
from w2v2.cli.progress import progress
from w2v2.errors import UsageError

log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verb."""
    sub = verb(
        "prepare",
        _prepare,
        "check every recording of a source of audio, and write its manifests, or shards to stream from",
        epilog="Thresholds of the audit can follow, such as --max-dc 0.05; --thresholds lists them. "
        "Examples: w2v2 prepare LibriSpeech corpus; w2v2 prepare calls.csv corpus --columns path=file text=sentence; "
        "w2v2 prepare hf:my/dataset corpus --shards.",
        overrides=True,
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
    from w2v2.preparation.config import AuditConfig, PrepareConfig
    from w2v2.preparation.run import prepare, summary_table

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
            from w2v2.preparation.executors import RayExecutor

            executor = stack.enter_context(RayExecutor(args.ray))
        summary = prepare(source, args.out, config, jobs=args.jobs, strict=args.strict, executor=executor, show=show)
    for line in summary_table(summary):
        log.info("%s", line)


def _download(args: argparse.Namespace) -> Path:
    from w2v2.preparation.download import OFFICIAL, download_librispeech

    parts = [part for part in args.download.split(",") if part]
    with progress("download") as show:
        return download_librispeech(
            parts,
            Path(args.source),
            base_url=args.base_url or OFFICIAL,
            checksums=args.checksums,
            show=show,
        )


def _synthesize(args: argparse.Namespace) -> Path:
    from w2v2.synthetic.corpus import synthesize
    from w2v2.synthetic.speakers import SyntheticConfig

    audio: Path = args.out.with_name(args.out.name + "-audio")
    with progress("synthesise") as show:
        synthesize(audio, SyntheticConfig.sized(args.hours, args.seed), show)
    return audio
