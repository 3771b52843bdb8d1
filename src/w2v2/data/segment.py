"""Where to cut a long recording."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FRAME_SECONDS = 0.02
_SMOOTH = 10  # frames: a dip has to last about as long as a pause between words


def quiet_points(energy: npt.NDArray[np.float32], longest: int) -> list[int]:
    """Frames at which to cut so that no piece is longer than ``longest``, at the quietest place within reach.

    Each piece but the last has at least half of ``longest``, and the last at least a quarter.

    Args:
        energy: (T,) mean square of each frame.
        longest: frames, at least 8.
    """
    smooth = np.convolve(energy, np.ones(_SMOOTH) / _SMOOTH, mode="same")
    points: list[int] = []
    at = 0
    while len(energy) - at > longest:
        low, high = at + longest // 2, min(at + longest, len(energy) - longest // 4)
        window = smooth[low : high + 1]
        at = high - int(np.argmin(window[::-1]))  # of several, the last: fewer pieces
        points.append(at)
    return points
