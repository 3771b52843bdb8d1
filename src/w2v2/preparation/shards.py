"""Rows of the journal as cuts, and cuts as manifests and lhotse Shar tars, in numbered pieces read on their own."""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import MonoCut, Recording
from lhotse.serialization import deserialize_item
from lhotse.shar.utils import to_shar_placeholder
from lhotse.shar.writers.audio import AudioTarWriter

from w2v2.data.audio import SAMPLE_RATE, AudioError, FloatArray, load_audio
from w2v2.data.sources import locate
from w2v2.data.utterance import file_cut, in_shard
from w2v2.errors import JobError
from w2v2.files import whole
from w2v2.preparation.config import ENCODINGS

CUTS_PER_PIECE = 5_000


@dataclass(frozen=True)
class Piece:
    """Cuts that are read together."""

    cuts: str
    """Manifest, relative to the corpus."""
    audio: str | None
    """Tar with their audio, or None: the cuts point into files of their own."""
    utterances: int
    seconds: float
    bytes: int
    """Of the tar; 0 without one."""


def row_cuts(row: sqlite3.Row, root: Path) -> Iterator[MonoCut]:
    """A member of a split as one cut, or as several where it was cut."""
    pieces = json.loads(row["cuts"])
    first_held = len(pieces) - row["held"]
    for i, (start, end) in enumerate(pieces or [(0, row["samples"])]):
        if row["held"] and (i >= first_held) != (row["member_of"] == "valid"):
            continue
        yield file_cut(
            row["name"] if not pieces else f"{row['name']}-{i:04d}",
            locate(root, row["path"]),
            rate=row["rate"],
            channels=row["channels"],
            total=row["total"],
            text=row["text"],
            speaker=row["speaker"],
            recording=row["stem"],
            first=row["first"] + start,
            samples=end - start,
            channel=row["heard"],
            ctc_infeasible=bool(row["infeasible"]),
        )


def grouped(cuts: Iterable[MonoCut], seconds: float) -> Iterator[list[MonoCut]]:
    """Runs of cuts of at most so many seconds together, at least one cut each, and of ``CUTS_PER_PIECE`` at most."""
    group: list[MonoCut] = []
    total = 0.0
    for cut in cuts:
        if group and (total + cut.duration > seconds or len(group) == CUTS_PER_PIECE):
            yield group
            group, total = [], 0.0
        group.append(cut)
        total += cut.duration
    if group:
        yield group


def write_manifest(out: Path, split: str, number: int, cuts: list[MonoCut]) -> Piece:
    """A piece without audio."""
    manifest, _ = _names(split, number)
    _write_cuts(out / manifest, cuts)
    return Piece(manifest, None, len(cuts), sum(cut.duration for cut in cuts), 0)


def write_shard(out: Path, split: str, number: int, cuts: list[dict[str, Any]], encoding: str) -> Piece:
    """A piece with its audio at 16 kHz in a tar; each cut knows where in the tar its audio lies.

    A tar that is there already, with its manifest, is left as it is.

    Args:
        cuts: as ``MonoCut.to_dict`` gives them, so that the call can go to another process.
        encoding: one of ``ENCODINGS``.

    Raises:
        JobError: audio that cannot be decoded any more.
    """
    manifest, audio = _names(split, number)
    if not (out / manifest).exists():
        (out / audio).parent.mkdir(parents=True, exist_ok=True)
        with whole(out / audio) as partial:
            with AudioTarWriter(str(partial), shard_size=None, format=encoding) as tar:
                written = [(cut, *_write_audio(cut, tar)) for cut in map(deserialize_item, cuts)]
            with tarfile.open(partial) as tar_file:
                encoded = [member for member in tar_file if not member.name.endswith((".json", ".nometa"))]
        placed = [
            in_shard(cut, recording, member.offset_data, member.size, gain)
            for (cut, recording, gain), member in zip(written, encoded, strict=True)
        ]
        _write_cuts(out / manifest, placed)
    seconds = sum(cut["duration"] for cut in cuts)
    return Piece(manifest, audio, len(cuts), seconds, (out / audio).stat().st_size)


def _names(split: str, number: int) -> tuple[str, str]:
    """Manifest and tar of a piece, as lhotse's Shar names them."""
    return f"{split}/cuts.{number:06d}.jsonl.gz", f"{split}/recording.{number:06d}.tar"


def _load(cut: MonoCut) -> FloatArray:
    try:
        return load_audio(cut)
    except AudioError as error:
        raise JobError(f"cannot decode {error}: it has changed since it was checked; run prepare again") from error


def _write_audio(cut: MonoCut, tar: AudioTarWriter) -> tuple[Recording, float]:
    """Add a cut's audio to a tar; returns its recording there, and what its samples were multiplied by."""
    samples = _load(cut)
    seconds = len(samples) / SAMPLE_RATE
    recording = to_shar_placeholder(Recording(cut.id, [], SAMPLE_RATE, len(samples), seconds, channel_ids=[0]))
    peak = float(np.abs(samples).max(initial=1.0))  # integers end there: a louder recording is made smaller as a whole
    tar.write(cut.id, samples[None] / peak, SAMPLE_RATE, manifest=recording)
    return recording, 1.0 / peak


def _write_cuts(path: Path, cuts: Iterable[MonoCut]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, gzip.open(partial, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n" for cut in cuts)


def bytes_per_second(cuts: Iterable[MonoCut], encoding: str) -> float:
    """What a second of audio takes in a shard, from encoding some cuts.

    Raises:
        JobError: audio that cannot be decoded any more.
    """
    size = seconds = 0.0
    container, subtype = ENCODINGS[encoding]
    for cut in cuts:
        buffer = io.BytesIO()
        samples = _load(cut)
        soundfile.write(buffer, samples, SAMPLE_RATE, format=container, subtype=subtype)
        size += len(buffer.getvalue()) + 2048  # tar headers, the recording's manifest, padding
        seconds += len(samples) / SAMPLE_RATE
    return size / max(seconds, 1e-9)
