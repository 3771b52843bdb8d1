"""Word and character error rates over a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer


@dataclass(frozen=True)
class ErrorRates:
    """Edits over all references together, not means of utterances. Shares, not per cent."""

    wer: float
    """Word errors / reference words."""
    cer: float
    """Character errors, spaces included / reference characters."""


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Corpus-level WER and CER of hypotheses against references, both already in the same spelling."""
    references, hypotheses = list(references), list(hypotheses)
    return ErrorRates(wer=jiwer.wer(references, hypotheses), cer=jiwer.cer(references, hypotheses))
