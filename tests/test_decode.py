"""Greedy decoding against a frame-by-frame rule, word times against frames written down by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w2v2.decode import Greedy, word_times
from w2v2.text import Vocabulary

VOCABULARY = Vocabulary.from_texts(["AB"])  # blank, unknown, boundary, A, B


def peaked(ids: list[int]) -> torch.Tensor:
    """(T, labels) log-probabilities whose maxima are the ids."""
    logits = torch.zeros(len(ids), 5)
    logits[torch.arange(len(ids)), ids] = 3.0
    return logits.log_softmax(-1)


@given(st.lists(st.integers(0, 4), max_size=20))
def test_greedy_merges_repeats_drops_blanks_and_knows_its_frames(ids: list[int]) -> None:
    found = Greedy(VOCABULARY)(peaked(ids))
    expected = [i for at, i in enumerate(ids) if i != 0 and (at == 0 or ids[at - 1] != i)]
    assert list(found.ids) == expected
    for label, start, end in zip(found.ids, found.starts, found.ends, strict=True):
        assert set(ids[start : end + 1]) == {label}
        assert start == 0 or ids[start - 1] != label
        assert end == len(ids) - 1 or ids[end + 1] != label


def test_words_last_from_their_first_frame_to_their_last() -> None:
    found = Greedy(VOCABULARY)(peaked([0, 3, 3, 0, 4, 4, 2, 0, 0, 4, 2, 2]))
    assert found.text == "AB B"
    words = word_times(found, VOCABULARY, lambda frame: frame / 50)
    assert [(w.text, w.start, w.end) for w in words] == [
        ("AB", 0.01, pytest.approx(0.11)),
        ("B", pytest.approx(0.17), 0.19),
    ]
