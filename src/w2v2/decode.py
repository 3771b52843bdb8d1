"""CTC log-probabilities to text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from w2v2.text import Vocabulary


def greedy(log_probs: Tensor, lengths: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """Most probable label of each frame, repeats merged, blanks removed.

    Args:
        log_probs: (B, T, labels).
        lengths: frames of each utterance.
    """
    texts = []
    for row, length in zip(log_probs.argmax(-1).cpu(), lengths, strict=True):
        ids = row[:length].unique_consecutive().tolist()
        texts.append(vocabulary.decode(ids))
    return texts
