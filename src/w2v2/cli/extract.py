"""``w2v2 extract``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from w2v2.cli.options import MODEL, Device, Language, Workers, default, refuse_without
from w2v2.cli.progress import progress
from w2v2.data.config import DataConfig
from w2v2.errors import Count, JobError, Positive, UsageError

log = logging.getLogger("w2v2")


@dataclass(kw_only=True)
class Extract:
    """See ``main.VERBS``."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL)]
    audio: Annotated[Positional[tuple[str, ...]], arg(metavar="[AUDIO ...]")] = ()
    """Files, and folders of audio."""
    data: Annotated[str | None, default("none", "DIR")] = None
    """Prepared corpus (folder, https:// or s3://), or folder of audio with splits."""
    split: str = "test"
    """Of --data, or a subset such as dev-other."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder of results, with index.jsonl of what is where."""
    layers: Annotated[tuple[int, ...], default("the last; none with --codes", "[INT ...]")] = ()
    """0: what the first block gets, I: what block I gives."""
    codes: bool = False
    """Codes of a pretraining run's quantizer."""
    pool: Annotated[Literal["mean"] | None, default("none", "mean")] = None
    """One vector for each recording: the mean over its frames."""
    format: Literal["safetensors", "numpy"] = "safetensors"
    """Of the files."""
    batch_seconds: Positive = 60.0
    """Audio in a batch, s."""
    max_seconds: Positive = 120.0
    """Longer recordings are refused, s."""
    num_workers: Workers = 2
    """Processes that decode --data."""
    language: Language = None
    device: Device = None
    """cpu, cuda, cuda:1, mps."""
    channel: Annotated[Count | None, default("the mix of all", "INT")] = None
    """Of files: the one to take, from 1."""

    def run(self, named: Collection[str]) -> None:
        """Write the files, and say of which recordings there are none."""
        from w2v2.inference.extract import (
            INDEX,
            Wanted,
            check_wanted,
            extract_files,
            find_files,
            read_files,
            read_split,
        )
        from w2v2.inference.onnx import OnnxModel
        from w2v2.inference.recognizer import load, network_of, place
        from w2v2.model.wav2vec2 import Wav2Vec2

        if bool(self.audio) == bool(self.data):
            raise UsageError("name either files and folders of audio, or a corpus with `data`")
        refuse_without("data", ("split", "workers"), named, given=bool(self.data))
        if self.data and self.channel:
            raise UsageError("`channel` is of files; the utterances of a corpus have theirs already, leave it out")
        layers = self.layers or (() if self.codes else (-1,))
        wanted = Wanted(layers=layers, codes=self.codes, pool=self.pool is not None, format=self.format)
        model = network_of(load(self.model, self.language))
        assert isinstance(model, Wav2Vec2 | OnnxModel)
        check_wanted(model, wanted.layers, codes=wanted.codes, pool=wanted.pool)
        place(model, self.device)
        if self.data:
            data = DataConfig(batch_seconds=self.batch_seconds, num_workers=self.num_workers, max_bad="100%")
            items, total = read_split(self.data, self.split, data, self.max_seconds)
        else:
            files = find_files(self.audio)
            items, total = read_files(files, self.max_seconds, self.channel), len(files)
        failed = 0
        with progress("extract") as show:
            for done, row in enumerate(extract_files(model, items, self.out, wanted, self.batch_seconds), 1):
                if "error" in row:
                    failed += 1
                    log.warning("%s: %s", row["source"], row["error"])
                show("extract", min(1.0, done / total))
        if failed:
            raise JobError(
                f"{failed} of {done} recordings gave nothing; {self.out / INDEX} and the lines above say why"
            )
