"""``w2v2 prepare``."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from w2v2.cli.options import File, Settings, default, optional_value
from w2v2.cli.progress import progress
from w2v2.errors import Count, Range, Share, UsageError, check_ranges
from w2v2.preparation.config import MIN_CONFIDENCE, AuditConfig, PrepareConfig

log = logging.getLogger("w2v2")


@dataclass(kw_only=True)
class Prepare:
    """See ``main.VERBS``. Examples: w2v2 prepare LibriSpeech corpus; w2v2 prepare hf:my/dataset corpus --shards."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Folder of audio of any kind, table (.csv, .tsv, .jsonl), hf:DATASET, or the word synthetic."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder for corpus.json, audit.jsonl and the manifests; resumed if it is there."""
    jobs: Annotated[Count | None, default("one per core", "INT")] = None
    """Processes."""
    ray: Annotated[str | None, default("none", "ADDRESS")] = None
    """Work on a Ray cluster (auto, local, or its address) instead."""
    strict: bool = False
    """Fail if the audit finds anything."""
    shards: Annotated[str, optional_value("flac", "flac", "opus", "wav"), default("none", "[flac|opus|wav]")] = ""
    """Write 16 kHz mono audio into tars, of FLAC unless another is named."""
    shard_mb: float = 250.0
    """Size of a shard, MB."""
    vad: bool = False
    """Of recordings without a transcript, keep what is near speech."""
    splits: Annotated[str, default("SOURCE/splits.tsv, if any", "FILE")] = ""
    """Table with the columns utt and role."""
    valid_share: float = 0.05
    """Share of the speakers held out to validate on."""
    test_share: float = 0.0
    """Share of the speakers held out to test on."""
    seed: int = 0
    """Of what is held out, and of subsets."""
    labelled: Annotated[tuple[str, ...], default("none", "[SUBSET ...]")] = ()
    """Labelled subsets of train: 10m 1h 10h, or NAME=FILE of ids."""
    columns: Annotated[tuple[str, ...], default("as they are called", "[FIELD=NAME ...]")] = ()
    """Names of a table's columns, such as path=file text=sentence."""
    audio_folder: Annotated[str, default("that of the table", "DIR")] = ""
    """Folder that a table's paths are relative to, such as Common Voice's clips."""
    speaker: Annotated[str, default("none", "REGEX")] = ""
    """Regular expression on the path; its first group is the speaker."""
    hf_config: Annotated[str, default("none", "NAME")] = ""
    """Configuration of a Hugging Face dataset."""
    download: Annotated[str | None, default("none", "PARTS")] = None
    """LibriSpeech parts to download into SOURCE first, such as train-clean-100,dev-clean."""
    base_url: Annotated[str | None, default("the official address", "URL")] = None
    """Mirror to download from."""
    checksums: File = None
    """MD5 sums of the archives, where they are not the published ones."""
    hours: float = 2.0
    """Of synthetic training audio."""
    speakers: Annotated[int, Range(3)] = 96
    """Of synthetic speech, all splits together; an eighth each to validate and test."""
    cut_by: Annotated[str | None, default("none", "MODEL")] = None
    """Recogniser that cuts recordings with a transcript, where they are longer than --max-seconds, into
    utterances, by alignment; OUT-cut.jsonl has them, with their confidence."""
    min_confidence: Annotated[Share | None, default("0, with --cut-by 0.1", "SHARE")] = None
    """Leave out rows of a table whose column confidence says less."""
    audit: Settings[AuditConfig] = field(default_factory=AuditConfig)

    def run(self, named: Collection[str]) -> None:
        """Prepare, and say what is there now."""
        from w2v2.preparation.run import prepare
        from w2v2.preparation.summary import summary_table

        check_ranges(self)
        names = ["splits", "valid_share", "test_share", "seed", "speaker", "hf_config", "shards", "shard_mb"]
        names += ["audit", "labelled", "columns", "audio_folder", "vad"]
        usual = MIN_CONFIDENCE if self.cut_by else 0.0
        least = usual if self.min_confidence is None else self.min_confidence
        config = PrepareConfig(min_confidence=least, **{name: getattr(self, name) for name in names})
        source: str | Path = self.source
        if self.download:
            source = self._download(self.download)
        elif source == "synthetic" and not Path(source).exists():
            source = self._synthesize()
        if self.cut_by:
            source, config = self._cut(self.cut_by, str(source), config)
        with contextlib.ExitStack() as stack:
            show = stack.enter_context(progress("prepare"))
            executor = None
            if self.ray:
                from w2v2.preparation.executors import RayExecutor

                executor = stack.enter_context(RayExecutor(self.ray))
            summary = prepare(
                source,
                self.out,
                config,
                jobs=self.jobs or _cores(),
                strict=self.strict,
                executor=executor,
                show=show,
            )
        for line in summary_table(summary):
            log.info("%s", line)

    def _download(self, parts: str) -> Path:
        from w2v2.preparation.download import OFFICIAL, download_librispeech

        with progress("download") as show:
            return download_librispeech(
                [part for part in parts.split(",") if part],
                Path(self.source),
                base_url=self.base_url or OFFICIAL,
                checksums=self.checksums,
                show=show,
            )

    def _cut(self, model: str, source: str, config: PrepareConfig) -> tuple[Path, PrepareConfig]:
        """A table of utterances instead of the source, and how to read it."""
        from w2v2.inference.cut import cut_table
        from w2v2.inference.recognizer import load_recognizer, place, weights_key

        if source.startswith("hf:"):
            raise UsageError("`cut_by` is for folders and tables; prepare hf: first, and its audio with a table of it")
        config.check()
        path = Path(source)
        recognizer = load_recognizer(model)
        place(recognizer.model, None)
        table = (out := self.out.absolute()).with_name(f"{out.name}-cut.jsonl")
        table.parent.mkdir(parents=True, exist_ok=True)
        with progress("cut") as show:
            counts = cut_table(recognizer, weights_key(model), path, table, config, show)
        log.info(
            "%s: %s", table, ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to cut"
        )
        folder = path if path.is_dir() else path.parent
        audio, listed = str(Path(config.audio_folder or folder).absolute()), folder / "splits.tsv"
        splits = config.splits or (str(listed) if listed.exists() else "")
        return table, replace(config, splits=splits, columns=(), audio_folder=audio, speaker="")

    def _synthesize(self) -> Path:
        from w2v2.synthetic.corpus import synthesize
        from w2v2.synthetic.speakers import SyntheticConfig

        audio = (out := self.out.absolute()).with_name(f"{out.name}-audio")
        with progress("synthesise") as show:
            synthesize(audio, SyntheticConfig.sized(self.hours, self.seed, self.speakers), show)
        return audio


def _cores() -> int:
    """That this process may use; not every system tells which."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
