"""Features of the encoder: hidden states, codes and pooled vectors, from Python and by ``w2v2 extract``."""

from dataclasses import replace

import pytest
import torch
from test_parity_hf import PRESETS, audio_of, copied

from w2v2 import recipes


@pytest.mark.parametrize("preset", PRESETS)
def test_hidden_states_are_hugging_faces_layer_by_layer(preset):
    model, hf, _ = copied(preset)
    model.eval(), hf.eval()
    audio = audio_of(2, 16_000)
    with torch.no_grad():
        mine, frames = model.hidden_states(audio)
        out = hf.wav2vec2(audio, output_hidden_states=True)
    theirs = [*out.hidden_states[:-1], out.last_hidden_state]  # its last hidden state is before ln_f
    assert frames == [49, 49]
    assert len(mine) == len(theirs) == model.config.n_layer + 1
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_hidden_states_end_with_what_encode_returns_and_do_not_depend_on_the_batch(norm_first):
    config = replace(recipes.tiny().model, n_layer=2, n_embd=48, ffn_dim=48, norm_first=norm_first)
    torch.manual_seed(0)
    model = config.build().eval()
    audio = audio_of(2, 16_000)
    with torch.no_grad():
        states, frames = model.hidden_states(audio, [16_000, 9_000])
        encoded, _ = model.encode(audio, [16_000, 9_000])
        alone, _ = model.hidden_states(audio[1:, :9_000])
    assert torch.equal(states[-1], encoded)
    for together, row in zip(states, alone, strict=True):
        torch.testing.assert_close(together[1, : frames[1]], row[0], atol=1e-5, rtol=1e-5)
        assert together[1, frames[1] :].abs().max() == 0
