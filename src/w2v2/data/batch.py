"""Cuts to batches of samples: reading, mixing down, cropping, normalising."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from lhotse import MonoCut
from torch import Tensor
from torch.utils.data import Dataset

from w2v2.data.audio import SAMPLE_RATE, AudioError, FloatArray, load_audio
from w2v2.data.augment import Augmentation, keyed_rng
from w2v2.data.corpora import Row
from w2v2.data.storage import UnreachableError, read_ranges

log = logging.getLogger(__name__)


Encode = Callable[[str], list[int]]


Fits = Callable[[float, str], bool]
"""(seconds, transcript): whether CTC can emit the transcript's labels in the frames of so much audio."""


@dataclass
class Batch:
    """Some utterances. B of them, S samples of the longest, U labels of the longest."""

    audio: Tensor
    """(B, S) float32 at 16 kHz, padded with zeros."""
    lengths: Tensor
    """(B,) int64 samples; stays on the host."""
    offsets: Tensor
    """(B,) int64 samples at 16 kHz between the start of each utterance and that of its crop; stays on the host."""
    ids: list[str]
    """Utterance ids."""
    epochs: list[int]
    """How many times each utterance has come before: what crops and masks are drawn by."""
    place: tuple[int, int] = (0, 0)
    """(epoch, which batch of it), the same for all ranks' batches of a step."""
    draws: Any = None
    """What the model drew for it, if it did so in the worker."""
    targets: Tensor | None = None
    """(B, U) int64 labels, padded with zeros."""
    target_lengths: Tensor | None = None
    """(B,) int64 labels of each utterance."""
    texts: list[str | None] = field(default_factory=list)
    """Transcripts as they are; None: there is none."""
    speakers: list[str | None] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Utterances that could not be read and are left out: what was wrong, by id. B may be 0."""

    def pin_memory(self) -> Batch:
        """The same with all that goes to a device where it can be copied from without waiting; the loader calls it."""
        pinned = {
            name: value.pin_memory()
            for name in ("audio", "targets", "draws")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **pinned)


class SpeechDataset(Dataset[Batch]):
    """Turns (place, utterances), which a sampler chose, into a :class:`Batch`.

    Args:
        seed: of the crops.
        max_seconds: crop longer utterances to this; None: never crop.
        same_length: crop all to the shortest of the batch, at an own random place each, as pretraining wants.
        normalize: 0, or what is added to the variance of a whole utterance that is given zero mean and unit variance,
            before it is cropped.
        encode: transcript -> labels, for targets.
        draw: batch -> its ``draws``.
        augmentation: changes what is read; None: nothing does.
        fits: a transcript that would not in a faster utterance keeps it from being faster.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        max_seconds: float | None = None,
        same_length: bool = False,
        normalize: float = 0.0,
        encode: Encode | None = None,
        draw: Callable[[Batch], Any] | None = None,
        augmentation: Augmentation | None = None,
        fits: Fits | None = None,
    ) -> None:
        self.seed, self.max_seconds, self.same_length = seed, max_seconds, same_length
        self.normalize, self.encode, self.draw = normalize, encode, draw
        self.augmentation, self.fits = augmentation, fits

    def __getitem__(self, item: tuple[tuple[int, int], list[Row]]) -> Batch:
        place, utterances = item
        cuts = [row.cut() for row in utterances]
        limit = self.max_seconds or float("inf")
        if self.same_length:
            limit = min(limit, min(cut.duration for cut in cuts))
        epochs = [(cut.custom or {}).get("pass", place[0]) for cut in cuts]
        rows: list[FloatArray] = []
        offsets: list[int] = []
        good: list[int] = []
        bad = {}
        encoded = _shard_bytes(cuts)
        for i, cut in enumerate(cuts):
            try:
                data = encoded.get(i)
                if isinstance(data, OSError):
                    raise AudioError(f"{cut.recording.sources[0].source} ({cut.id}): {data}")
                offset, row = self._load(cut, epochs[i], limit, data)
                rows.append(row)
                offsets.append(round(offset * SAMPLE_RATE))
                good.append(i)
            except AudioError as error:
                bad[cut.id] = str(error)
        if self.same_length and rows:  # rounding at other rates may leave one sample more in some
            shortest = min(len(row) for row in rows)
            rows = [row[:shortest] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        audio = torch.zeros(len(rows), max((len(row) for row in rows), default=0))
        for i, row in enumerate(rows):
            audio[i, : len(row)] = torch.from_numpy(row)
        supervisions = [cuts[i].supervisions[0] for i in good]
        batch = Batch(
            audio=audio,
            lengths=lengths,
            offsets=torch.tensor(offsets, dtype=torch.long),
            ids=[cuts[i].id for i in good],
            epochs=[epochs[i] for i in good],
            place=place,
            texts=[supervision.text for supervision in supervisions],
            speakers=[supervision.speaker for supervision in supervisions],
            bad=bad,
        )
        if self.encode is not None:
            labels = [torch.tensor(self.encode(text or ""), dtype=torch.long) for text in batch.texts]
            batch.targets = torch.nn.utils.rnn.pad_sequence(labels or [lengths], batch_first=True)[: len(labels)]
            batch.target_lengths = torch.tensor([len(row) for row in labels], dtype=torch.long)
        if self.draw is not None and good:
            batch.draws = self.draw(batch)
        return batch

    def _load(self, cut: MonoCut, epoch: int, limit: float, data: bytes | None) -> tuple[float, FloatArray]:
        """Seconds from the cut's start to the crop's, and the crop."""
        if fault := unreadable_reason(cut):
            raise AudioError(fault)
        duration, stretch = min(cut.duration, limit), 1.0
        if self.augmentation is not None:
            rng = keyed_rng(self.seed, "augment", epoch, cut.id)
            stretch, text = self.augmentation.draw_stretch(rng), cut.supervisions[0].text or ""
            if self.same_length:  # the crop is as long as ever, and made of more or less
                length, duration = duration, min(cut.duration, duration / stretch)
                stretch = length / duration
            elif self.fits is not None and not self.fits(duration * stretch, text):
                stretch = 1.0
        # Same-length batches are for training, so crops move with the epoch; elsewhere they depend on the id alone.
        key = f"{self.seed}/{epoch}/{cut.id}" if self.same_length else cut.id
        offset = random.Random(key).uniform(0, cut.duration - duration)
        if self.normalize and self.augmentation is None:
            start = round(offset * SAMPLE_RATE)
            samples = self._normalized(load_audio(cut, data=data))
            return offset, samples[start : start + round(duration * SAMPLE_RATE)]
        samples = load_audio(cut, offset, duration, data)
        if self.augmentation is not None:  # which wants samples at their own level, and changes it
            samples = self._normalized(self.augmentation(samples, stretch, rng))
        return offset, samples

    def _normalized(self, samples: FloatArray) -> FloatArray:
        """To mean 0 and variance 1, where that is wanted."""
        return (samples - samples.mean()) / np.sqrt(samples.var() + self.normalize) if self.normalize else samples


def unreadable_reason(cut: MonoCut) -> str:
    """What was wrong with its file's header, if anything (``read_corpus``)."""
    reason: str = (cut.custom or {}).get("unreadable", "")
    return reason


def _shard_bytes(cuts: list[MonoCut]) -> dict[int, bytes | OSError]:
    """Encoded audio of the cuts that lie in shards, by place in the list; fetched together where they are remote."""
    places = {
        i: (cut.recording.sources[0].source, cut.custom["shard_offset"], cut.custom["shard_bytes"])
        for i, cut in enumerate(cuts)
        if cut.custom and "shard_offset" in cut.custom
    }
    if not places:
        return {}
    try:
        return dict(zip(places, read_ranges(list(places.values())), strict=True))
    except UnreachableError:
        raise
    except OSError as error:
        if len(places) == 1:
            return dict.fromkeys(places, error)
        return {i: _shard_bytes([cuts[i]])[0] for i in places}  # each by itself tells which it is
