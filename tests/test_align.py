"""Forced alignment against every path there is, and against paths that were planted."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w2v2 import recipes
from w2v2.errors import UsageError
from w2v2.inference.align import align, align_labels, forced_align, spell
from w2v2.inference.recognizer import Recognizer
from w2v2.inference.recordings import source_of
from w2v2.inference.transcribe import Layout
from w2v2.inference.transcripts import Transcript, to_ctm, to_textgrid
from w2v2.model.ctc import Wav2Vec2ForCTC
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


def spoken(path: list[int]) -> Recognizer:
    """Hears these labels, one a frame, whatever the audio."""

    class Fixed(Recognizer):
        def emissions(self, audio: list[torch.Tensor]) -> list[torch.Tensor]:
            frames = self.model.config.frames([len(row) for row in audio])
            assert frames == [len(path)]
            logits = torch.zeros(len(path), len(VOCABULARY.labels))
            logits[torch.arange(len(path)), path] = 12.0
            return [logits.log_softmax(-1)]

    return Fixed(Wav2Vec2ForCTC(recipes.tiny_ctc().model, len(VOCABULARY.labels)), VOCABULARY)


def aligned(path: list[int], text: str, folder: Path, **options: bool) -> Transcript:
    audio = folder / "a.wav"
    soundfile.write(audio, np.zeros(320 * len(path)), 16_000)
    result = align(spoken(path), source_of(str(audio)), text, layout=Layout(600.0, 3.0), **options)
    assert isinstance(result, Transcript)
    return result


A, B, END = 3, 4, 2


def test_what_has_no_label_is_left_out_of_the_matching_and_kept_in_the_words(tmp_path: Path) -> None:
    path = [0] * 20 + [A, B, B, END] + [0] * 46 + [A, A, END, 0, B, END] + [0] * 24
    result = aligned(path, "3) ab, 25 \u20ac a\u2014 b! \u2026", tmp_path, skip_unknown=True)
    assert result.text == "3) ab, 25 \u20ac a\u2014 b! \u2026"
    assert [word.text for word in result.words] == result.text.split()
    for before, after in itertools.pairwise(result.words):
        assert before.start < before.end <= after.start + 1e-9
    times = {word.text: (word.start, word.end) for word in result.words}
    assert times["ab,"] == pytest.approx((0.4, 0.46), abs=0.13) and times["a\u2014"][0] == pytest.approx(1.4, abs=0.13)
    assert times["3)"] == pytest.approx((0.0, times["ab,"][0]))
    assert times["25"][0] == times["ab,"][1] and times["\u20ac"][1] == times["a\u2014"][0]  # said somewhere in between
    assert times["25"][1] == pytest.approx((times["25"][0] + times["\u20ac"][1]) / 2)
    assert times["\u2026"][1] == pytest.approx(2.0) and not result.doubt
    with pytest.raises(UsageError, match="no text to align"):
        aligned(path, "25 \u20ac", tmp_path, skip_unknown=True)


def test_words_without_labels_before_a_first_one_at_0_have_time_too(tmp_path: Path) -> None:
    result = aligned([A, A, B, END] + [0] * 46, "2 ab", tmp_path, skip_unknown=True)
    first, second = result.words
    assert (first.text, first.start) == ("2", 0.0) and 0 < first.end == second.start < second.end
    for timestamps in ("word", "char"):
        lines = to_ctm(result, timestamps, "a").splitlines()
        assert "2" in [line.split()[4] for line in lines], lines
    assert 'text = "2"' in to_textgrid(result, "char")


def test_audio_far_longer_than_its_text_is_doubted(tmp_path: Path) -> None:
    speech = [A, 0, B, END, B, A, END, 0] * 800  # 128 s
    assert "the model hears 4800 labels in 128 s, the text has 6" in aligned(speech, "AB BA", tmp_path).doubt
    stretched = [A, *[0] * 5000, B, END]
    assert "AB lasts 100 s" in aligned(stretched, "AB", tmp_path).doubt
    silence = [0] * 3000
    assert not aligned([*silence, A, 0, B, END, *silence], "AB", tmp_path).doubt  # nothing else is said
    assert not aligned(speech, "AB BA " * 800, tmp_path).doubt
