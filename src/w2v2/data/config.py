"""Where the audio is and how it is batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from w2v2.errors import Count, NotNegative, Positive, Range, UsageError, Whole, check_ranges


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
