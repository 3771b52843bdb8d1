"""What can be wrong with a transcript, and with a transcript of its audio."""

from __future__ import annotations

import unicodedata

from w2v2.data.audio import SAMPLE_RATE
from w2v2.preparation.config import AuditConfig
from w2v2.preparation.findings import Finding
from w2v2.text.spelling import frames_needed, normalize_text


def check_transcript(text: str, finding: Finding, config: AuditConfig) -> None:
    """Add what is wrong with a transcript to what was found in its audio."""
    words = normalize_text(text).split()
    if not words:
        finding.add("transcript_empty", "nothing but spaces")
        return
    strange = sorted({c for word in words for c in word if not _known(c, config.vocabulary)})
    if strange:
        finding.add("out_of_vocabulary", " ".join(f"{c} (U+{ord(c):04X})" for c in strange))
    if not finding.samples or finding.rejected:
        return
    seconds = finding.samples / finding.rate
    if seconds > config.max_transcribed_seconds:
        finding.add(
            "too_long",
            f"{seconds:.0f} s, which training takes at once, `cut_by` cuts it where w2v2 align finds the words",
        )
    labels = "|".join(words) + "|"  # a boundary after each word, as the vocabulary encodes it
    needed = frames_needed([ord(label) for label in labels])
    frames = (int(seconds * SAMPLE_RATE) - config.receptive_field) // config.hop + 1
    if needed > frames:
        finding.add("ctc_infeasible", f"{len(labels)} labels need {needed} frames, the audio has {frames}")
    speed = sum(map(len, words)) / seconds
    if not config.min_chars_per_second <= speed <= config.max_chars_per_second:
        finding.add("speech_rate", f"{speed:.1f} characters per second")


def _known(character: str, vocabulary: str) -> bool:
    if vocabulary:
        return character in vocabulary
    return character in "'\u2019" or unicodedata.category(character)[0] in "LM"
