"""Greedy decoding against a frame-by-frame rule, times against frames."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from w2v2 import recipes
from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import make_decoder
from w2v2.decoding.greedy import Greedy
from w2v2.errors import UsageError
from w2v2.inference.words import label_scores, word_times
from w2v2.model.feature_encoder import FeatureEncoder
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_texts(["AB"])  # blank, unknown, boundary, A, B
SMALL = Vocabulary(labels=("A", "|", "B", "<blank>"), blank=3, unknown=None, boundary=1)


def peaked(ids: list[int], height: float = 3.0) -> torch.Tensor:
    """(T, labels) log-probabilities whose maxima are the ids."""
    logits = torch.zeros(len(ids), 5)
    logits[torch.arange(len(ids)), ids] = height
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


def test_without_flashlight_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "w2v2.decoding.beam", raising=False)
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(UsageError, match=r"pip install flashlight-text"):
        make_decoder(SMALL, beam=BeamConfig())
    assert isinstance(make_decoder(SMALL), Greedy)


# --- Times ------------------------------------------------------------------------------------------------------------


def test_a_word_begins_before_its_first_label_by_the_usual_gap_and_ends_with_its_last() -> None:
    # Gaps of 2, 2 and 15 frames from a last label to the next first one: 40 ms is usual, 300 ms is a pause.
    ids = [0, 0, 0, 3, 3, 0, 4, 2, 0, 4, 0, 2, 3, 2, *[0] * 14, 4, 2, 2]
    found = Greedy(VOCABULARY)(peaked(ids))
    assert found.text == "AB B A B"
    words = word_times(found, VOCABULARY, lambda frame: frame / 50)
    assert [(w.text, w.start, w.end) for w in words] == [
        ("AB", pytest.approx(0.06 - 0.01 - 0.04), pytest.approx(0.12 + 0.01)),
        ("B", pytest.approx(0.12 + 0.01), pytest.approx(0.18 + 0.01)),
        ("A", pytest.approx(0.18 + 0.01), pytest.approx(0.24 + 0.01)),
        ("B", pytest.approx(0.56 - 0.01 - 0.04), pytest.approx(0.56 + 0.01)),
    ]
    first, second = words[0].characters
    assert (first.text, first.start, first.end) == ("A", words[0].start, pytest.approx(0.09))
    assert (second.text, second.start, second.end) == ("B", first.end, words[0].end)


@given(st.lists(st.integers(0, 4), max_size=60), st.sampled_from([0.0, 0.0075, 12.0]))
def test_words_and_characters_last_and_do_not_overlap(ids: list[int], first: float) -> None:
    log_probs = peaked(ids)
    found = Greedy(VOCABULARY)(log_probs)
    words = word_times(found, VOCABULARY, lambda frame: first + frame / 50, label_scores(found, log_probs))
    assert " ".join(word.text for word in words) == found.text
    characters = [character for word in words for character in word.characters]
    for units in (words, characters):
        assert all(0 <= unit.start < unit.end for unit in units)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(units))
    for word in words:
        assert word.text == "".join(character.text for character in word.characters)
        assert (word.start, word.end) == (word.characters[0].start, pytest.approx(word.characters[-1].end))
        assert word.probability() == pytest.approx(float(log_probs.max().exp()))
    pauses = [b.start - a.end for a, b in itertools.pairwise(words)]
    assert all(pause == 0 or pause >= 0.0999 for pause in pauses)


def test_words_far_from_each_other_do_not_begin_in_the_pause() -> None:
    found = Greedy(VOCABULARY)(peaked([*[0] * 50, 3, 2, *[0] * 50, 4, 2]))
    assert [w.start for w in word_times(found, VOCABULARY, lambda frame: frame / 50)] == [
        pytest.approx(1.0 - 0.01 - 0.12),
        pytest.approx(2.04 - 0.01 - 0.12),
    ]
    alone = Greedy(VOCABULARY)(peaked([*[0] * 50, 3, 2]))
    assert word_times(alone, VOCABULARY, lambda frame: frame / 50)[0].start == pytest.approx(1.0 - 0.01 - 0.06)


STRANGE = ContrastiveConfig(
    conv_channels=(512,) * 4, conv_kernel_sizes=(7, 4, 1, 6), conv_strides=(3, 2, 2, 5), conv_paddings=(5, 0, 1, 4)
)


@pytest.mark.parametrize(
    "config", [recipes.base().model, recipes.paper_base().model, STRANGE], ids=["base", "paper_base", "strange"]
)
def test_a_frame_is_at_the_middle_of_what_it_sees(config: ContrastiveConfig) -> None:
    """Impulse response of the convolutions alone, backwards: which samples a frame depends on, and how much."""
    layers = len(config.conv_kernel_sizes)
    geometry = (config.conv_kernel_sizes, config.conv_strides, config.conv_paddings)
    encoder = FeatureEncoder((1,) * layers, *geometry, [nn.Identity()] * layers, gradient_scale=1.0).double()
    for layer in encoder.conv_layers:
        layer[2] = nn.Identity()  # no GELU: what is left is linear
        nn.init.ones_(layer[0].weight)
    field = 1 + sum(
        (kernel - 1) * math.prod(config.conv_strides[:i]) for i, kernel in enumerate(config.conv_kernel_sizes)
    )
    samples = 3000
    audio = torch.zeros(1, samples, dtype=torch.double, requires_grad=True)
    features = encoder(audio)[0]
    assert len(features) == config.frames([samples])[0] > 8
    whole = 0
    for frame in range(len(features)):
        response = torch.autograd.grad(features[frame, 0], audio, retain_graph=True)[0][0]
        center = round(config.frame_seconds(frame) * 16_000 * 2) / 2
        seen = response.nonzero().flatten()
        first, last = center - (field - 1) / 2, center + (field - 1) / 2
        assert first <= seen[0] and seen[-1] <= last
        if first >= 0 and last < samples:  # nothing of it in the padding
            whole += 1
            assert (int(seen[0]), int(seen[-1])) == (first, last)
            inside = response[int(first) : int(last) + 1]
            torch.testing.assert_close(inside, inside.flip(0), rtol=0, atol=0)
    assert whole > 4
