"""Where the audio is and how it is batched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from w2v2.errors import Count, NotNegative, Positive, Range, Share, UsageError, Whole, check_ranges


@dataclass(kw_only=True)
class AugmentConfig:
    """How an utterance is changed each time that it is read for training; by default it is not."""

    speed: Annotated[float, Range(0, 1)] = 0.0
    """It is up to this share faster, with a higher voice, or slower; 0.1: by a factor of 1/1.1 to 1.1. One whose labels
    would no longer fit in its frames is not. Batches get longer by as much."""
    tilt_db: NotNegative = 0.0
    """A microphone adds up to so many dB an octave, or takes them away, around 1 kHz."""
    gain_db: NotNegative = 0.0
    """It is up to so many dB louder or softer."""
    noise: Share = 0.0
    """Share of the utterances with noise."""
    snr_db: tuple[float, float] = (8.0, 25.0)
    """Voice over noise, dB, from and to."""
    noise_folder: str = ""
    """Recordings of noise; none: it is made, white to pink."""
    room: Share = 0.0
    """Share of the utterances that are heard in a room."""
    room_folder: str = ""
    """Impulse responses of rooms; none: they are made, 0.1 to 0.4 s of reverberation."""
    low_pass: Share = 0.0
    """Share of the utterances that lose what is above a frequency of 2.5 to 7 kHz."""
    codec: Share = 0.0
    """Share of the utterances that have been through Opus, MP3 or Vorbis."""

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return any((self.speed, self.tilt_db, self.gain_db, self.noise, self.room, self.low_pass, self.codec))


@dataclass(kw_only=True)
class DataConfig:
    """Where the audio is and how it is batched."""

    sources: tuple[str, ...] = ()
    """Prepared corpora (folders, ``https://`` or ``s3://`` addresses), or folders of audio as they are."""
    weights: tuple[Annotated[float, Range(0, 1_000, above=True, below=True)], ...] = ()
    """How many times a pass each utterance of each corpus comes; none: once."""
    train_split: str = "train"
    """Split to train on, such as a labelled subset that ``prepare`` made: ``train-10m``."""
    batch_seconds: Positive = 87.5
    """Audio in one micro-batch at most, seconds (fairseq ``max_tokens`` 1.4M samples); a longer utterance is alone."""
    max_seconds: Positive = 15.625
    """Crop of an utterance in pretraining at most, seconds (``max_sample_size`` 250,000 samples)."""
    min_seconds: NotNegative = 2.0
    """Shorter utterances are left out, and counted (``min_sample_size`` 32,000 samples)."""
    num_buckets: Count = 10
    """Groups of similar duration that batches are drawn from."""
    shuffle_buffer: Count = 10_000
    """Utterances (not audio) held to draw batches from: what shuffling can reach beyond the order of the pieces."""
    num_workers: Whole = 2
    """Processes that decode audio, per rank; 0: in the training process."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Changes of the audio in training."""
    max_bad: str = "0.1%"
    """Share of the utterances of a split that may turn out unreadable before the run stops; 0.1% or 0.001."""

    def check(self) -> None:
        """Refuse what cannot work; :class:`UsageError` names the field."""
        check_ranges(self, "data")
        bad_share(self.max_bad)
        if self.min_seconds > self.max_seconds:
            raise UsageError(
                f"`data.min_seconds` must not exceed `data.max_seconds` ({self.max_seconds:g}), "
                f"got {self.min_seconds:g}"
            )


def bad_share(text: str) -> float:
    """``0.1%`` or ``0.001`` as a share."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"`data.max_bad` must be a share such as 0.1% or 0.001, got {text!r}")
    return share
