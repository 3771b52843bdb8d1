"""Utterances to listen to in a report: audio, when each word is said, and what each model has written."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from w2v2.data.audio import SAMPLE_RATE, load_audio
from w2v2.errors import UsageError
from w2v2.inference.align import align_labels, spell
from w2v2.inference.recognizer import Recognizer
from w2v2.inference.words import word_times

if TYPE_CHECKING:
    from lhotse import MonoCut

log = logging.getLogger(__name__)

SECONDS = 3.5
"""Length that a chosen utterance comes nearest to: about 100 kB of FLAC."""


def listening_examples(
    cuts: Sequence[MonoCut], rows: Sequence[Mapping[str, str]], recognizer: Recognizer, count: int = 3
) -> list[dict[str, Any]]:
    """Choose the utterances nearest to ``SECONDS``, no two of one voice: whatever was written, and small enough a page.

    Args:
        rows: ``id``, ``speaker``, ``reference`` and hypotheses of each utterance.
        recognizer: aligns the reference with the audio.

    Returns:
        The chosen rows, each with ``seconds``, ``flac`` (base64) and ``words`` (text, start and end in seconds; none
        where the reference cannot be aligned).
    """
    by_id = {cut.id: cut for cut in cuts}
    by_voice: dict[str, Mapping[str, str]] = {}
    for row in sorted(rows, key=lambda row: abs(by_id[row["id"]].duration - SECONDS)):
        by_voice.setdefault(row["speaker"] or row["id"], row)
    chosen = list(by_voice.values())[:count]
    return [dict(row) | _audible(by_id[row["id"]], row["reference"], recognizer) for row in chosen]


def _audible(cut: MonoCut, text: str, recognizer: Recognizer) -> dict[str, Any]:
    audio, file = load_audio(cut), io.BytesIO()
    soundfile.write(file, audio, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    try:
        log_probs = recognizer.emissions([torch.from_numpy(audio)])[0]
        hypothesis = align_labels(log_probs, spell(text, recognizer.vocabulary), recognizer.vocabulary)
        words = word_times(hypothesis, recognizer.vocabulary, recognizer.model.config.frame_seconds)
    except UsageError as error:
        log.warning("no word times of %s in the report: %s", cut.id, error)
        words = []
    return {
        "seconds": len(audio) / SAMPLE_RATE,
        "flac": base64.b64encode(file.getvalue()).decode(),
        "words": [(word.text, round(word.start, 3), round(word.end, 3)) for word in words],
    }


def samples_of(flac: str) -> NDArray[np.float32]:
    """(S,) of what ``listening_examples`` encoded."""
    samples: NDArray[np.float32] = soundfile.read(io.BytesIO(base64.b64decode(flac)), dtype="float32")[0]
    return samples
