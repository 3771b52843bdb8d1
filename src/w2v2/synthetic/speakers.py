"""Who speaks in the synthetic corpus, how, how much and in which split."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Literal

from w2v2.data.augment import keyed_rng
from w2v2.errors import Count, Positive, Range, UsageError, check_ranges

Split = Literal["train", "valid", "test"]
ACCENTS = (
    "en", "en-us", "en-us-nyc", "en-029", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd"
)  # fmt: skip
_VOICES = (resources.files(__package__) / "voices.txt").read_text(encoding="utf-8").splitlines()
FAMILIES = {line.split()[0].lower(): line.split() for line in _VOICES if not line.startswith("#")}
"""Suitable espeak-ng voice variants by family; no family is in two splits."""
_FEMALE = {"andrea", "anika", "annie", "grandma", "shelby", "steph"}
_LARGEST_HELD_OUT_FAMILY = 3
_MIN_SPEAKER_SECONDS = 4.0


@dataclass(kw_only=True)
class SyntheticConfig:
    """What to synthesise."""

    hours: Positive = 2.0
    """Audio of the training split, hours."""
    valid_hours: Positive = 0.1
    """Audio of the validation split, hours."""
    test_hours: Positive = 0.2
    """Audio of the test split, hours."""
    n_speakers: Annotated[int, Range(3)] = 96
    """Speakers of all splits together; an eighth each for validation and test."""
    seed: int = 0
    """Seed of everything random."""
    jobs: Count = field(default_factory=lambda: min(os.cpu_count() or 1, 32))
    """Processes; has no influence on what is written."""

    @classmethod
    def sized(cls, hours: float, seed: int, speakers: int = 96) -> SyntheticConfig:
        """So many hours to train on, a twentieth to validate on and a tenth to test on, enough for each speaker."""
        valid, test = max(0.05 * hours, 0.02), max(0.1 * hours, 0.02)
        return cls(hours=hours, valid_hours=valid, test_hours=test, n_speakers=speakers, seed=seed)

    def __post_init__(self) -> None:
        check_ranges(self)
        for split, (name, hours, count) in self.shares().items():
            if not hours * 3600 / count >= _MIN_SPEAKER_SECONDS:
                raise UsageError(
                    f"`{name}`: expected at least {_MIN_SPEAKER_SECONDS:g} s for each of the {count} {split} speakers, "
                    f"got {hours} h; raise it to {_MIN_SPEAKER_SECONDS * count / 3600:.3f} or lower `n_speakers`"
                )

    def shares(self) -> dict[Split, tuple[str, float, int]]:
        """For each split the name of its field of hours, its hours and its number of speakers."""
        held_out = max(1, round(self.n_speakers / 8))
        return {
            "train": ("hours", self.hours, self.n_speakers - 2 * held_out),
            "valid": ("valid_hours", self.valid_hours, held_out),
            "test": ("test_hours", self.test_hours, held_out),
        }


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """One speaker of the corpus: a voice with a pitch, a rate and an accent of its own."""

    id: int
    """Name of the speaker's folder."""
    family: str
    """Key of `FAMILIES`."""
    voice: str
    """espeak-ng voice variant."""
    accent: str
    """espeak-ng language."""
    pitch: int
    """espeak-ng pitch, 0 to 99; 50 is the voice's own."""
    rate: int
    """Words per minute."""
    split: Split
    """The only split the speaker is in."""
    seconds: float
    """Audio to make, seconds."""


def split_families(seed: int) -> dict[Split, list[str]]:
    """Deal the voice families to the splits: at least ten voices each, two families of women among them, held out."""
    names = sorted(name for name, voices in FAMILIES.items() if len(voices) <= _LARGEST_HELD_OUT_FAMILY)
    order = [names[i] for i in keyed_rng(seed, "families").permutation(len(names))]
    female, male = [f for f in order if f in _FEMALE], [f for f in order if f not in _FEMALE]
    held_out: dict[Split, list[str]] = {"valid": [], "test": []}
    for families in held_out.values():
        families += [female.pop(), female.pop()]
        while sum(len(FAMILIES[family]) for family in families) < 10:
            families.append(male.pop())
    taken = {family for families in held_out.values() for family in families}
    return {"train": [family for family in FAMILIES if family not in taken], **held_out}


def plan_speakers(config: SyntheticConfig) -> list[Speaker]:
    """Every speaker of the corpus; the numbers depend on the configuration alone."""
    speakers: list[Speaker] = []
    families = split_families(config.seed)
    for split, (_, hours, count) in config.shares().items():
        rng = keyed_rng(config.seed, "speakers", split)
        shuffled = [families[split][i] for i in rng.permutation(len(families[split]))]
        # A voice of each family in turn, so that few speakers are still as different as can be.
        depth = max(len(FAMILIES[family]) for family in shuffled)
        voices = [(f, FAMILIES[f][i]) for i in range(depth) for f in shuffled if i < len(FAMILIES[f])]
        accents, own_pitch = rng.permutation(ACCENTS), rng.random(len(voices))
        for number in range(count):
            turn, which = divmod(number, len(voices))
            family, voice = voices[which]
            speaker = Speaker(
                id=1001 + len(speakers),
                family=family,
                voice=voice,
                accent=str(accents[(number + turn) % len(accents)]),
                # The golden ratio keeps the pitches of speakers who share a voice apart.
                pitch=round(32 + 36 * ((own_pitch[which] + 0.618 * turn) % 1)),
                rate=int(rng.integers(140, 200)),
                split=split,
                seconds=hours * 3600 / count,
            )
            speakers.append(speaker)
    return speakers
