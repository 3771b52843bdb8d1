"""Speed of checking and of loading audio on this CPU, beside lhotse's Shar reader and Hugging Face datasets.

    python benchmarks/data.py --data LibriSpeech --out benchmarks/results/data.json

Without --data an hour of synthetic speech is made. Everything runs in one process on one thread, in turn, on the same
utterances; figures are multiples of real time, medians over rounds, and ratios are medians over the rounds' own pairs.

* ``prepare``: the audit of every file (decoding, statistics, hash), and the whole command with one job, start included.
* loading: ours is a pass as validation reads it: batches by seconds, decoded, collated. lhotse is its own
  ``CutSet.from_shar`` and ``load_audio``, Hugging Face is ``datasets`` streaming (the same bytes in
  Parquet, as on its hub) with soundfile as its decoder, its own needing torchcodec; neither of the two collates.
* HTTP: the FLAC shards from a server on this machine, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import soundfile
import torch
from lhotse import CutSet

from w2v2.data.config import DataConfig
from w2v2.data.corpora import read_corpus
from w2v2.preparation.audit import audit
from w2v2.preparation.config import AuditConfig, PrepareConfig
from w2v2.preparation.findings import Part
from w2v2.preparation.run import prepare
from w2v2.synthetic.corpus import synthesize
from w2v2.synthetic.speakers import SyntheticConfig
from w2v2.training.data import SpeechDataModule

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import serve

EVERYTHING = DataConfig(num_workers=0, min_seconds=0.1, max_seconds=60.0, batch_seconds=87.5)


def ours(corpus: str) -> Callable[[], float]:
    """A pass over train; returns seconds of audio."""
    loader = SpeechDataModule(read_corpus(corpus), EVERYTHING).eval_dataloader("train")
    return lambda: sum(int(batch.lengths.sum()) for batch in loader) / 16_000


def shar(corpus: Path) -> Callable[[], float]:
    """lhotse's own reader."""
    return lambda: sum(cut.load_audio().shape[1] for cut in CutSet.from_shar(in_dir=corpus / "train")) / 16_000


def parquet(files: list[str], folder: Path) -> list[str]:
    """The files in Parquet, a hundred to each, as datasets on the hub are stored."""
    folder.mkdir()
    written = []
    for i in range(0, len(files), 100):
        rows = [{"bytes": Path(file).read_bytes(), "path": file} for file in files[i : i + 100]]
        written.append(str(folder / f"{i:06d}.parquet"))
        pyarrow.parquet.write_table(pyarrow.table({"audio": rows}), written[-1])
    return written


def hugging_face(files: list[str]) -> Callable[[], float]:
    """``datasets`` streaming, without its decoder, which needs torchcodec; soundfile decodes."""
    data = datasets.load_dataset("parquet", data_files={"train": files}, split="train", streaming=True)

    def run() -> float:
        seconds = 0.0
        for row in data:
            samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
            seconds += len(samples) / rate
        return seconds

    return run


def decode(files: list[str]) -> Callable[[], float]:
    """soundfile alone."""
    return lambda: sum(len(soundfile.read(file, dtype="float32")[0]) for file in files) / 16_000


def check(files: list[str]) -> Callable[[], float]:
    """The audit of every file."""
    config = AuditConfig()

    def run() -> float:
        found = [audit(file, [Part(i)], config)[0] for i, file in enumerate(files)]
        return sum(one.samples / one.rate for one in found)

    return run


def served(folder: str, address: Any) -> None:
    """Serve a folder until the process is ended."""
    with serve(Path(folder)) as server:
        address.put(server.url)
        time.sleep(3600)


@contextlib.contextmanager
def http(folder: Path) -> Iterator[str]:
    """Address of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=served, args=(str(folder), address), daemon=True)
    process.start()
    yield address.get()
    process.kill()


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Multiples of real time, each side once a round; the first round warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            seconds = run()
            if i:
                speeds[name].append(seconds / (time.perf_counter() - start))
    return speeds


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of 16 kHz FLAC; default: an hour of synthetic speech")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        source = args.data or work / "speech"
        if args.data is None:
            synthesize(source, SyntheticConfig(hours=1.0, valid_hours=0.05, test_hours=0.05))
        began = time.perf_counter()
        prepare(source, work / "files", jobs=1)
        command = time.perf_counter() - began
        for kind in ("flac", "wav"):
            prepare(source, work / kind, PrepareConfig(shards=kind, shard_mb=50.0), jobs=2)
        files = [cut.recording.sources[0].source for cut in read_corpus(work / "files")["train"]]
        total = sum(split.seconds for split in read_corpus(work / "files").values())
        address = stack.enter_context(http(work / "flac"))
        speeds = measure(
            {
                "soundfile alone, FLAC files": decode(files),
                "audit, FLAC files": check(files),
                "ours, FLAC files": ours(str(work / "files")),
                "ours, FLAC shards": ours(str(work / "flac")),
                "ours, FLAC shards over HTTP": ours(address),
                "ours, PCM shards": ours(str(work / "wav")),
                "lhotse, FLAC shards": shar(work / "flac"),
                "lhotse, PCM shards": shar(work / "wav"),
                "datasets, FLAC in Parquet": hugging_face(parquet(files, work / "parquet")),
            },
            args.rounds,
        )
    pairs = {
        "ours / lhotse, FLAC shards": ("ours, FLAC shards", "lhotse, FLAC shards"),
        "ours / lhotse, PCM shards": ("ours, PCM shards", "lhotse, PCM shards"),
        "ours / datasets, FLAC shards / Parquet": ("ours, FLAC shards", "datasets, FLAC in Parquet"),
    }
    ratios = {
        name: [a / b for a, b in zip(speeds[one], speeds[other], strict=True)] for name, (one, other) in pairs.items()
    }
    record = {
        "command": "python benchmarks/data.py"
        + (" --data LibriSpeech" if args.data else "")
        + f" --rounds {args.rounds}",
        "versions": {name: metadata.version(name) for name in ("lhotse", "datasets", "soundfile", "numpy", "torch")},
        "machine": platform.processor() or platform.machine(),
        "utterances": len(files),
        "hours": total / 3600,
        "real_time": {name: {"median": statistics.median(v), "range": [min(v), max(v)]} for name, v in speeds.items()},
        "prepare_one_job_whole_command": {"seconds": command, "real_time": total / command},
        "ratios": {name: {"median": statistics.median(v), "range": [min(v), max(v)]} for name, v in ratios.items()},
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
