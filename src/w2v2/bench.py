"""How fast audio comes: what one worker loads, and how long a training step would wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from w2v2.config import DataConfig
from w2v2.data.audio import SAMPLE_RATE
from w2v2.data.corpora import Split, read_corpus
from w2v2.data.datamodule import Batch, SpeechDataModule
from w2v2.data.storage import is_remote
from w2v2.errors import UsageError


@dataclass(frozen=True)
class DataSpeed:
    """Speed of one source of audio."""

    source: str
    kind: str
    """Files or shards, here or remote."""
    hours_per_second: float
    """Audio-hours that one worker decodes, crops and collates in a second."""
    real_time: float
    """The same as a multiple of real time."""
    batches_per_second: float
    """Of all workers together."""
    wait: float
    """Seconds that a training step waits for its batch, median."""
    wait_share: float
    """Share of the time that training would wait."""


def data_speed(source: str, config: DataConfig, *, step_seconds: float, seconds: float) -> DataSpeed:
    """Measure a corpus as pretraining reads it: first in this process, then through the loader.

    Args:
        source: prepared corpus, or folder of audio.
        config: batches, crops and workers.
        step_seconds: that a training step takes; it is slept.
        seconds: about how long each of the two measurements may take.

    Raises:
        UsageError: as ``read_corpus``; a corpus without a train split.
    """
    found = read_corpus(source)
    if "train" not in found:
        raise UsageError(f"no split 'train' in {source}, which is measured: got {', '.join(found)}")
    splits = {"train": found["train"]}
    loader = SpeechDataModule(splits, config).train_dataloader()
    heard, began = 0.0, time.perf_counter()
    for item in _again(loader.sampler):
        heard += _seconds(loader.dataset[item])
        if time.perf_counter() - began > seconds:
            break
    speed = heard / (time.perf_counter() - began)
    waits: list[float] = []
    batches = _again(loader)
    next(batches)  # starting the workers is no wait of a step
    began = time.perf_counter()
    while not waits or time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(step_seconds)
    elapsed = time.perf_counter() - began
    return DataSpeed(
        source=source,
        kind=_kind(source, splits["train"]),
        hours_per_second=speed / 3600,
        real_time=speed,
        batches_per_second=len(waits) / elapsed,
        wait=sorted(waits)[len(waits) // 2],
        wait_share=sum(waits) / elapsed,
    )


def _again(source: Any) -> Iterator[Any]:
    while True:
        yield from source


def _seconds(batch: Batch) -> float:
    return int(batch.lengths.sum()) / SAMPLE_RATE


def _kind(source: str, split: Split) -> str:
    cut = next(iter(split))
    path = cut.recording.sources[0].source
    where = "remote " if is_remote(source) or is_remote(path) else ""
    if split.pieces[0].audio:
        return f"{where}shards"
    return f"{where}{path.rsplit('.', 1)[-1].upper()} files"


def speed_table(rows: Sequence[DataSpeed], step_seconds: float, workers: int) -> list[str]:
    """Lines for a person."""
    lines = [
        f"{'source':40} {'kind':16} {'audio-h/s':>9} {'x real time':>11} {'wait of a step':>14} {'share':>6}",
        f"{'':40} {'':16} {'1 worker':>9} {'1 worker':>11} {f'of {step_seconds:g} s, {workers} w.':>14}",
    ]
    for row in rows:
        lines.append(
            f"{row.source[-40:]:40} {row.kind:16} {row.hours_per_second:9.3f} {row.real_time:11.0f} "
            f"{1000 * row.wait:11.1f} ms {row.wait_share:6.1%}"
        )
    return lines
