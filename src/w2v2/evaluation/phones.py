"""Phones with their times, from NIST CTM and Praat TextGrid, and the class of each frame."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2v2.errors import UsageError
from w2v2.files import read_text
from w2v2.model.wav2vec2 import Wav2Vec2Config

_SILENCE = {"", "sil", "<sil>", "h#", "sp", "spn", "pau", "_", "<eps>"}
_RARE = 0.0005
"""Share of the labelled time below which a phone is no class."""


class Phone(NamedTuple):
    """A phone of an utterance."""

    label: str
    start: float
    """Seconds from the utterance's start, as ``end``."""
    end: float


Labels = dict[str, list[Phone]]
"""By utterance id, in order of time; silence is left out."""


def fold(label: str) -> str:
    """The phone without stress, length, tone, Kaldi's place in a word: ``AH0_B`` is ``AH``, espeak's ``i:`` stays."""
    return re.sub("_[BIES]$", "", label).rstrip("0123456789#-[;!") or label


def read_labels(folder: Path) -> Labels:
    """Labels of all ``*.ctm`` (utterance, channel, start, duration, phone) and ``*.TextGrid`` (tier ``phones``) there.

    A file of phones beside others of words is ``*.phones.ctm``; where there is one, other CTM files are not read.

    Raises:
        UsageError: there are none, or one is not what it should be.
    """
    ctm = sorted(folder.rglob("*.phones.ctm")) or sorted(folder.rglob("*.ctm"))
    grids = sorted(folder.rglob("*.TextGrid"))
    if not (ctm or grids):
        raise UsageError(f"no labels in {folder}: expected phones with times, *.ctm or *.TextGrid; name their folder")
    rows = [row for path in ctm for row in _ctm(path)] + [row for path in grids for row in _grid(path)]
    labels: Labels = {}
    for name, phone in rows:
        labels.setdefault(name, [])
        if not {phone.label.lower(), fold(phone.label).lower()} & _SILENCE:
            labels[name].append(phone._replace(label=fold(phone.label)))
    return {name: sorted(phones, key=lambda phone: phone.start) for name, phones in labels.items()}


def _ctm(path: Path) -> Iterable[tuple[str, Phone]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() and not line.startswith(";;"):
            try:
                name, _, start, duration, label, *_ = line.split()
                yield name, Phone(label, float(start), float(start) + float(duration))
            except ValueError:
                raise UsageError(
                    f"{path}, line {number}: expected utterance, channel, start, duration and phone, got {line[:60]!r}"
                ) from None


_INTERVAL = re.compile(r'xmin\s*=\s*(\S+)\s+xmax\s*=\s*(\S+)\s+text\s*=\s*"((?:[^"]|"")*)"')


def _grid(path: Path) -> Iterable[tuple[str, Phone]]:
    tiers = read_text(path).split('class = "IntervalTier"')[1:]
    wanted = [tier for tier in tiers if re.search(r'name\s*=\s*"phones?"', tier)]
    if len(wanted) != 1:
        raise UsageError(f"{path}: expected a TextGrid (long text format) with one tier 'phones', got {len(wanted)}")
    for start, end, label in _INTERVAL.findall(wanted[0]):
        try:
            yield path.stem, Phone(label, float(start), float(end))
        except ValueError:
            raise UsageError(f"{path}: expected seconds of {label!r}, got {start} and {end}") from None


def nothing_labelled(split: str) -> UsageError:
    """What is wrong with labels of none of a split's utterances."""
    return UsageError(f"no utterance of split {split!r} has phones with times; expected ids as in the corpus")


def check_times(labels: Mapping[str, Sequence[Phone]], seconds: Mapping[str, float]) -> None:
    """Refuse labels of other audio.

    Raises:
        UsageError: a phone that starts before its utterance, or ends 50 ms or more after it.
    """
    for name, length in seconds.items():
        for phone in labels.get(name, ()):
            if not 0 <= phone.start <= phone.end <= length + 0.05:
                raise UsageError(
                    f"phone {phone.label!r} of {name}, {phone.start:g} to {phone.end:g} s, leaves its audio of "
                    f"{length:g} s; expected the labels of this very audio"
                )


def phone_classes(train: Iterable[Sequence[Phone]], scored: Iterable[Sequence[Phone]]) -> list[str]:
    """The phones that are told apart: those of the training utterances but the rarest, by time, longest first.

    Raises:
        UsageError: a phone that is not rare in what is scored is never trained.
    """
    times = [_seconds(utterances) for utterances in (train, scored)]
    classes, wanted = (
        [label for label, time in counts.most_common() if time >= _RARE * counts.total()] for counts in times
    )
    missing = [label for label in wanted if label not in times[0]]
    if missing:
        raise UsageError(
            f"phones in no class: {' '.join(missing)}, which the training utterances do not have; expected labels of "
            f"one kind in both, or more minutes of them"
        )
    return classes


def _seconds(utterances: Iterable[Sequence[Phone]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for phones in utterances:
        for phone in phones:
            counts[phone.label] += phone.end - phone.start  # type: ignore[assignment]
    return counts


def frame_classes(
    phones: Sequence[Phone], centers: NDArray[np.float64], classes: Mapping[str, int]
) -> NDArray[np.int64]:
    """(T,) the class at each frame's middle, seconds; -1 where there is no phone, or one of no class."""
    labels = np.full(len(centers), -1)
    for phone in phones:
        labels[(centers >= phone.start) & (centers < phone.end)] = classes.get(phone.label, -1)
    return labels


def frames_to_last(phones: Sequence[Phone], config: Wav2Vec2Config, classes: Mapping[str, int]) -> list[int]:
    """As ``frame_classes``, of a model's frames up to the end of the last phone."""
    end = max((phone.end for phone in phones), default=0.0)
    centers = itertools.takewhile(lambda center: center < end, map(config.frame_seconds, itertools.count()))
    labels: list[int] = frame_classes(phones, np.array([*centers]), classes).tolist()
    return labels
