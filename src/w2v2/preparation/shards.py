"""Cuts to manifests and to lhotse Shar tars, in numbered pieces that are read on their own."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import MonoCut, Recording, fastcopy
from lhotse.serialization import SequentialJsonlWriter, deserialize_item
from lhotse.shar.utils import to_shar_placeholder
from lhotse.shar.writers.audio import AudioTarWriter

from w2v2.data.audio import SAMPLE_RATE, AudioError, FloatArray, load_audio
from w2v2.errors import JobError

CUTS_PER_PIECE = 5_000


FORMATS = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "wav": ("WAV", "PCM_16")}
"""Encodings of 16 kHz mono audio in shards, with libsndfile's names."""


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


def names(split: str, number: int) -> tuple[str, str]:
    """Manifest and tar of a piece, as lhotse's Shar names them."""
    return f"{split}/cuts.{number:06d}.jsonl.gz", f"{split}/recording.{number:06d}.tar"


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
    manifest, _ = names(split, number)
    _write_cuts(out / manifest, cuts)
    return Piece(manifest, None, len(cuts), sum(cut.duration for cut in cuts), 0)


def write_shard(out: Path, split: str, number: int, cuts: list[dict[str, Any]], encoding: str) -> Piece:
    """A piece with its audio at 16 kHz in a tar; each cut knows where in the tar its audio lies.

    A tar that is there already, with its manifest, is left as it is.

    Args:
        cuts: as ``MonoCut.to_dict`` gives them, so that the call can go to another process.
        encoding: one of ``FORMATS``.

    Raises:
        JobError: audio that cannot be decoded any more.
    """
    manifest, audio = names(split, number)
    if not (out / manifest).exists():
        partial = out / f"{audio}.partial"
        partial.parent.mkdir(parents=True, exist_ok=True)
        resampled = []
        with AudioTarWriter(str(partial), shard_size=None, format=encoding) as tar:
            for cut in map(deserialize_item, cuts):
                resampled.append(_resampled(cut, tar))
        with tarfile.open(partial) as tar_file:
            places = [
                (member.offset_data, member.size)
                for member in tar_file
                if not member.name.endswith((".json", ".nometa"))
            ]
        placed = [
            fastcopy(cut, custom={**(cut.custom or {}), "shard_offset": offset, "shard_bytes": size})
            for cut, (offset, size) in zip(resampled, places, strict=True)
        ]
        partial.replace(out / audio)
        _write_cuts(out / manifest, placed)
    seconds = sum(cut["duration"] for cut in cuts)
    return Piece(manifest, audio, len(cuts), seconds, (out / audio).stat().st_size)


def _load(cut: MonoCut) -> FloatArray:
    try:
        return load_audio(cut)
    except AudioError as error:
        raise JobError(f"cannot decode {error}: it has changed since it was checked; run prepare again") from error


def _resampled(cut: MonoCut, tar: AudioTarWriter) -> MonoCut:
    samples = _load(cut)
    recording = Recording(
        id=cut.id,
        sources=[],
        sampling_rate=SAMPLE_RATE,
        num_samples=len(samples),
        duration=len(samples) / SAMPLE_RATE,
        channel_ids=[0],
    )
    recording = to_shar_placeholder(recording)
    custom = {name: value for name, value in (cut.custom or {}).items() if name != "channel"}  # there is but one now
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > 1.0:  # integers end there: all of it is made smaller, and larger again when it is loaded
        samples = samples / peak
        custom["gain"] = 1.0 / peak
    tar.write(cut.id, samples[None], SAMPLE_RATE, manifest=recording)
    return fastcopy(cut, start=0.0, duration=recording.duration, channel=0, recording=recording, custom=custom or None)


def _write_cuts(path: Path, cuts: Iterable[MonoCut]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    with SequentialJsonlWriter(partial, overwrite=True) as writer:
        for cut in cuts:
            writer.write(cut)
    partial.replace(path)


def bytes_per_second(cuts: Iterable[MonoCut], encoding: str) -> float:
    """What a second of audio takes in a shard, from encoding some cuts.

    Raises:
        JobError: audio that cannot be decoded any more.
    """
    size = seconds = 0.0
    kind, subtype = FORMATS[encoding]
    for cut in cuts:
        buffer = io.BytesIO()
        samples = _load(cut)
        soundfile.write(buffer, samples, SAMPLE_RATE, format=kind, subtype=subtype)
        size += len(buffer.getvalue()) + 2048  # tar headers, the recording's manifest, padding
        seconds += len(samples) / SAMPLE_RATE
    return size / max(seconds, 1e-9)
