"""CTC log-probabilities to text."""

from __future__ import annotations

from torch import Tensor

from w2v2.text import Vocabulary


def greedy(log_probs: Tensor, vocabulary: Vocabulary) -> str:
    """Most probable label of each frame of (T, labels), repeats merged, blanks removed, as text."""
    return vocabulary.decode(log_probs.argmax(-1).unique_consecutive().tolist())
