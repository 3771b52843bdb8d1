"""How to prepare a corpus."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from w2v2.data.vad import Vad
from w2v2.errors import Count, Positive, Range, Share, ShareBelowOne, UsageError, check_ranges

ENCODINGS = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "wav": ("WAV", "PCM_16")}
"""Encodings of 16 kHz mono audio in shards, with libsndfile's names."""

MIN_CONFIDENCE = 0.1
"""Of an alignment: below it words are taken for others than those that are said."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Thresholds."""

    max_seconds: Annotated[float, Range(1)] = 30.0
    """Recordings without a transcript are cut to at most this, at quiet points, seconds."""
    max_transcribed_seconds: Positive = 60.0
    """``too_long``: recordings with a transcript above this, seconds; those cannot be cut without knowing where."""
    silent_db: float = -60.0
    """``silent``: root mean square without the mean, dB of full scale, below this."""
    max_clipped: float = 1e-5
    """``clipped``: share of samples in runs of three or more equal ones at the recording's peak, above this."""
    max_dc: float = 0.02
    """``dc_offset``: absolute mean, share of full scale, above this."""
    receptive_field: Count = 400
    """``too_short``: fewer samples at 16 kHz than one output frame sees."""
    hop: Count = 320
    """Samples at 16 kHz between output frames, for ``ctc_infeasible``."""
    vocabulary: str = ""
    """``out_of_vocabulary``: characters not among these, in upper case; empty: any but letters, their marks and the
    apostrophe."""
    min_chars_per_second: float = 1.0
    """``speech_rate``: below this."""
    max_chars_per_second: float = 30.0
    """``speech_rate``: above this. LibriSpeech has 4 to 22."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How to prepare a corpus."""

    audit: AuditConfig = field(default_factory=AuditConfig)
    """Thresholds."""
    splits: str = ""
    """Table with the columns ``utt`` and ``role``; without it ROOT/splits.tsv, if there is one."""
    valid_share: ShareBelowOne = 0.05
    """Share of the speakers of train to hold out to validate on, if the source has no validation split."""
    test_share: ShareBelowOne = 0.0
    """The same for a test split."""
    seed: int = 0
    """Of what is held out, and of labelled subsets."""
    labelled: tuple[str, ...] = ()
    """Labelled subsets of train: ``10m``, ``1h``, ``10h``, or ``NAME=FILE`` with an utterance id on each line."""
    columns: tuple[str, ...] = ()
    """Names of a table's columns, such as ``text=sentence``."""
    audio_folder: str = ""
    """Folder that a table's paths are relative to, such as Common Voice's ``clips``; empty: the table's own."""
    speaker: str = ""
    """Regular expression on the relative path, whose first group is the speaker."""
    min_confidence: Share = 0.0
    """Rows of a table whose column ``confidence`` says less are left out, and counted."""
    hf_config: str = ""
    """Configuration of a Hugging Face dataset."""
    shards: str = ""
    """Write the audio into shards: ``flac``, ``opus`` or ``wav``, 16 kHz mono; empty: point into the original files."""
    shard_mb: Positive = 250.0
    """Size of a shard, about, MB."""

    vad: bool = False
    """Of recordings without a transcript keep only what is near speech (``data/vad.py``)."""

    def check(self) -> None:
        """Refuse what cannot work; :class:`UsageError` names the field."""
        check_ranges(self.audit)
        check_ranges(self)
        if self.vad:
            Vad()  # is it installed?
        if self.shards and self.shards not in ENCODINGS:
            raise UsageError(f"`shards` must be one of {', '.join(ENCODINGS)}, got {self.shards!r}")
        for pair in self.columns:
            if "=" not in pair:
                raise UsageError(f"`columns` must be pairs such as text=sentence, got {pair!r}")
        for option, pairs in (("columns", self.columns), ("labelled", self.labelled)):
            names = [pair.partition("=")[0] for pair in pairs]
            if len({*names}) < len(names):
                raise UsageError(f"`{option}` names {max(names, key=names.count)} twice: {' '.join(pairs)}")
        for subset in self.labelled:
            name, listed, file = subset.partition("=")
            if not listed:
                minutes_of(subset)
            if not name.replace("-", "").replace(".", "").isalnum():
                raise UsageError(f"`labelled` NAME=FILE needs a name of letters and digits, got {subset!r}")
            if listed and not Path(file).is_file():
                raise UsageError(f"no file {file}: `labelled` NAME=FILE needs one of utterance ids")
        if self.audio_folder and not Path(self.audio_folder).is_dir():
            raise UsageError(
                f"no folder {self.audio_folder}: `audio_folder` needs the one that a table's paths start in"
            )
        if self.splits and not Path(self.splits).is_file():
            raise UsageError(f"no file {self.splits}: `splits` needs a table with the columns utt and role")


def minutes_of(subset: str) -> float:
    """Minutes of a labelled subset such as ``10m`` or ``1h``."""
    number, unit = subset[:-1], subset[-1:]
    if unit not in ("m", "h") or not number.replace(".", "", 1).isdigit() or not float(number):
        raise UsageError(f"`labelled` must be like 10m, 1h, or NAME=FILE, got {subset!r}")
    return float(number) * (60 if unit == "h" else 1)
