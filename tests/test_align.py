"""Forced alignment against every path there is, and against paths that were planted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w2v2.errors import UsageError
from w2v2.inference.align import align_labels, forced_align, spell
from w2v2.text.vocabulary import Vocabulary

LABELS = 4
VOCABULARY = Vocabulary.from_texts(["AB"])  # blank, unknown, boundary, A, B


def merged(path: tuple[int, ...], blank: int) -> list[int]:
    return [i for i, _ in itertools.groupby(path) if i != blank]


def score(log_probs: torch.Tensor, path: tuple[int, ...]) -> float:
    return float(log_probs[torch.arange(len(path)), list(path)].double().sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 6),
    ids=st.lists(st.integers(1, LABELS - 1), max_size=4),
    blank=st.integers(0, LABELS - 1),
)
def test_no_path_that_says_the_labels_is_more_probable(seed: int, frames: int, ids: list[int], blank: int) -> None:
    ids = [0 if i == blank else i for i in ids]  # whichever id is the blank
    ids = [i for i in ids if i != blank]
    log_probs = (3 * torch.randn(frames, LABELS, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    paths = [path for path in itertools.product(range(LABELS), repeat=frames) if merged(path, blank) == ids]
    if not paths:
        with pytest.raises(UsageError, match=f"needs at least .* frames, the audio has {frames}"):
            forced_align(log_probs, ids, blank)
        return
    places = forced_align(log_probs, ids, blank).tolist()
    found = tuple(blank if place < 0 else ids[place] for place in places)
    assert merged(found, blank) == ids
    assert [place for place, _ in itertools.groupby(p for p in places if p >= 0)] == list(range(len(ids)))
    assert score(log_probs, found) == pytest.approx(max(score(log_probs, path) for path in paths), abs=1e-9)


def test_a_planted_path_of_minutes_comes_back_frame_by_frame() -> None:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (2000,), generator=rng).tolist()
    planted: list[int] = []
    for place, label in enumerate(ids):
        planted += [-1] * int(torch.randint(int(place > 0 and ids[place - 1] == label), 5, (), generator=rng))
        planted += [place] * int(torch.randint(1, 4, (), generator=rng))
    logits = torch.randn(len(planted), 30, generator=rng)
    for frame, place in enumerate(planted):
        logits[frame, 0 if place < 0 else ids[place]] += 12
    assert forced_align(logits.log_softmax(-1), ids, blank=0).tolist() == planted


def test_labels_keep_their_frames_and_the_score_is_the_paths() -> None:
    path = [0, 3, 3, 0, 4, 4, 2, 0, 4, 2, 2]
    logits = torch.zeros(len(path), 5)
    logits[torch.arange(len(path)), path] = 5.0
    log_probs = logits.log_softmax(-1)
    found = align_labels(log_probs, spell("ab b", VOCABULARY), VOCABULARY)
    assert (found.text, found.ids) == ("AB B", (3, 4, 2, 4, 2))
    assert found.starts == (1, 4, 6, 8, 9)
    assert found.ends == (2, 5, 6, 8, 10)
    assert found.score == pytest.approx(score(log_probs, tuple(path)))


def test_what_cannot_be_aligned_is_said() -> None:
    for text, message in (("AÖB CÖ", "no label for C Ö: "), (" ", "no text to align"), ("", "no text to align")):
        with pytest.raises(UsageError, match=message):
            spell(text, VOCABULARY)
    with pytest.raises(UsageError, match="no label for 'C'"):
        spell("C", Vocabulary(labels=("<blank>", "|", "A"), unknown=None, boundary=1))
    with pytest.raises(UsageError, match="200000 frames times 60000 labels would take too long"):
        forced_align(torch.zeros(1).expand(200_000, LABELS), [1, 2] * 30_000, blank=0)
    never = torch.zeros(4, 5)
    never[:, 3] = -torch.inf
    with pytest.raises(UsageError, match="no probability at all"):
        align_labels(never, [3, 2], VOCABULARY)
