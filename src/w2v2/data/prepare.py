"""Audio to a checked manifest: every file decoded once, cuts and ``corpus.json`` written when all of it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut

from w2v2.data.corpora import Splits, read_corpus
from w2v2.errors import UsageError

SCHEMA = 1


def prepare(source: Path, out: Path, progress: Callable[[float], None] | None = None, jobs: int = 2) -> dict[str, Any]:
    """Read a folder in LibriSpeech layout, decode every file, and write ``OUT/{SPLIT.jsonl.gz, corpus.json}``.

    The cuts point into the original audio; nothing is copied. Nothing is written unless all of it is well.

    Returns:
        What ``corpus.json`` holds: ``schema``, ``source``, and for each of ``splits`` its ``hours``, ``utterances``,
        ``speakers``, ``transcribed``.

    Raises:
        UsageError: what ``read_corpus`` refuses, or a file that does not decode to as many finite samples as announced.
    """
    if (out / "corpus.json").exists():
        raise UsageError(f"{out} already holds a prepared corpus; choose another folder, or remove it")
    splits = read_corpus(source)
    cuts = [cut for part in splits.values() for cut in part]
    with ThreadPoolExecutor(jobs) as pool:
        for i, _ in enumerate(pool.map(_check, cuts)):
            if progress:
                progress((i + 1) / len(cuts))
    summary = {"schema": SCHEMA, "source": str(source), "splits": describe(splits)}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, part in splits.items():
        part.to_file(partial / f"{name}.jsonl.gz")
    (partial / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return summary


def describe(splits: Splits) -> dict[str, dict[str, float]]:
    """Size of each split: hours, utterances, speakers, utterances with a transcript."""

    def row(cuts: CutSet) -> dict[str, float]:
        return {
            "hours": sum(cut.duration for cut in cuts) / 3600,
            "utterances": len(cuts),
            "speakers": len({cut.supervisions[0].speaker for cut in cuts}),
            "transcribed": sum(bool(cut.supervisions[0].text) for cut in cuts),
        }

    return {name: row(cuts) for name, cuts in splits.items()}


def _check(cut: MonoCut) -> None:
    path = cut.recording.sources[0].source
    try:
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UsageError(f"cannot decode {path}: {error}; repair or remove it") from error
    if len(samples) < cut.recording.num_samples:
        raise UsageError(
            f"{path} is cut off: its header announces {cut.recording.num_samples} samples, got {len(samples)}; "
            "repair or remove it"
        )
    if not np.isfinite(samples).all():
        raise UsageError(f"{path} holds values that are not finite; repair or remove it")
