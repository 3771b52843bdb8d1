"""What can be said of a recording or a part of one, each reason by its name."""

from __future__ import annotations

from dataclasses import dataclass, field

REJECTING = ("unreadable", "truncated", "empty", "silent", "non_finite", "too_short", "duplicate", "no_speech")
"""Reasons to leave a recording out."""
WARNING = (
    "clipped",
    "out_of_range",
    "out_of_phase",
    "dc_offset",
    "wrong_extension",
    "speaker_overlap",
    "transcript_missing",
    "transcript_empty",
    "out_of_vocabulary",
    "ctc_infeasible",
    "speech_rate",
    "too_long",
)
"""Reasons that are told and recorded; the recording is kept."""
REASONS = REJECTING + WARNING


@dataclass(frozen=True)
class Part:
    """What a row claims about a recording."""

    row: int
    start: float | None = None
    """Seconds; None: from its beginning."""
    end: float | None = None
    """Seconds; None: to its end."""
    text: str | None = None
    """Transcript; None: none."""
    channel: int | None = None
    """Counted from 1; None: the mean over all."""


@dataclass
class Finding:
    """What one decoding of a row found."""

    row: int
    rate: int = 0
    """Hz."""
    channels: int = 0
    total: int = 0
    """Samples per channel of the whole recording."""
    first: int = 0
    """Sample at which the row starts."""
    samples: int = 0
    """Samples per channel of the row."""
    channel: int | None = None
    """That is to be heard, from 1; None: the mean over all."""
    content: str = ""
    """Hash of the decoded samples."""
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """First and end samples of the pieces to take, counted from the row's own; empty: all of it in one."""
    reasons: list[tuple[str, str]] = field(default_factory=list)
    """(reason, detail)."""

    @property
    def rejected(self) -> bool:
        """Whether any of them is one to leave it out for."""
        return any(reason in REJECTING for reason, _ in self.reasons)

    def add(self, reason: str, detail: str) -> None:
        """One more reason."""
        self.reasons.append((reason, detail))
