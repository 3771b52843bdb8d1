"""The same weights, masks and distractors in Hugging Face's implementation give the same states, losses and gradients.

Where the two differ by definition, the comparison is arranged so that the difference does not show:

* Hugging Face quantises all frames and picks the masked ones; here only masked frames are quantised. Without noise it
  is the same; with noise, masks that are a prefix of one utterance, or all of it, meet the same noise in both.
* In evaluation its perplexity, and so its diversity loss, is of the hard choices; here the loss is always of the
  probabilities. So in evaluation it is compared with ``code_perplexity``, and diversity losses in training.
* Its perplexity has ``p log p``, here as in fairseq ``p log(p + 1e-7)``: less than 1e-4 of the value.
* It excludes a distractor whose projected vector equals the target's, here the codes are compared: the same unless two
  codes have the same vector.
* It has no feature penalty and no gradient scale: neither takes part here.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from w2v2 import recipes
from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.huggingface import hf_config, hf_names
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.losses import ctc_loss
from w2v2.model.masking import ContrastiveDraws, sample_distractors
from w2v2.model.quantizer import perplexity

transformers = pytest.importorskip("transformers")
WIDTH, CHANNELS, GROUPS, ENTRIES, ENTRY, SPACE = 48, 32, 2, 10, 8, 24


def ours(preset):
    """Every parameter away from its initial value, so that none can hide; codes diverse; no randomness but Gumbel's."""
    config = replace(
        getattr(recipes, preset)().model,
        n_layer=3,
        n_head=4,
        n_embd=WIDTH,
        ffn_dim=96,
        conv_channels=(CHANNELS,) * 7,
        conv_norm="layer" if preset == "paper_large_lv60k" else f"group:{CHANNELS}",
        n_groups=GROUPS,
        n_entries=ENTRIES,
        codebook_dim=ENTRY,
        similarity_dim=SPACE,
        num_distractors=12,
        dropout=0.0,
        attention_dropout=0.0,
        dropout_input=0.0,
        dropout_features=0.0,
        layer_drop=0.0,
        conv_gradient_scale=1.0,
    )
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.quantizer.projector.weight.mul_(0.3)
    return model


def theirs(model):
    """Their model of the same shape, and our name of each parameter with theirs."""
    values = hf_config(Checkpoint(source=Path(), config=model.config, state=model.state_dict()))
    hf = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**values, attn_implementation="eager"))
    spelling = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    names = hf_names(model.state_dict(), type(model))
    for old, new in spelling.items():
        names = {ours: their.removesuffix(old) + new if their.endswith(old) else their for ours, their in names.items()}
    return hf, names


def copied(preset):
    model = ours(preset)
    hf, names = theirs(model)
    source, target = dict(model.named_parameters()), dict(hf.named_parameters())
    assert names.keys() == source.keys()
    assert set(names.values()) == target.keys()  # nothing on either side is left out
    with torch.no_grad():
        for a, b in names.items():
            target[b].copy_(source[a].view_as(target[b]))  # (G, V, D) -> (1, G V, D)
    return model, hf, names


def both(masks, k, seed=0):
    """Draws for us, and (mask_time_indices, sampled_negative_indices) for them, from (B, T) masks."""
    rng = torch.Generator().manual_seed(seed)
    batch, frames = masks.shape
    masked, distractors = masks.flatten().nonzero().flatten(), []
    negatives = torch.zeros(batch, frames, k, dtype=torch.long)
    for b, mask in enumerate(masks):
        positions = mask.nonzero().flatten() + b * frames  # in the frames of all utterances laid end to end
        distractors.append(sample_distractors(len(positions), k, rng))
        negatives[b, mask] = positions[distractors[-1]]
    counts = tuple(masks.sum(1).tolist())
    draws = ContrastiveDraws(
        masked=masked, counts=counts, distractors=torch.cat(distractors), covered=masked, n_frames=batch * frames
    )
    return draws, masks.long(), negatives


def audio_of(batch, samples):
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(1))


def spans(batch, frames):
    masks = torch.zeros(batch, frames, dtype=torch.bool)
    for b in range(batch):
        masks[b, 2 + b : 14 + b] = True
        masks[b, 25 : 33 + 4 * b] = True
    return masks


def record(module, outputs=True):
    seen = []
    if outputs:
        module.register_forward_hook(lambda _, args, out: seen.append(out))
    else:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


PRESETS = ["paper_base", "paper_large_lv60k"]
close = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("preset", PRESETS)
def test_states_projections_and_contrastive_loss_are_the_same(preset):
    model, hf, _ = copied(preset)
    model.eval(), hf.eval()
    audio, masks = audio_of(2, 16_000), spans(2, 49)
    draws, mask_time_indices, negatives = both(masks, 12)
    inputs = [record(block, outputs=False) for block in model.transformer]
    outputs = [record(block) for block in model.transformer]
    contexts, targets, quantized = record(model.out_linear), record(model.project_q), record(model.quantizer)
    their_inputs = [record(layer, outputs=False) for layer in hf.wav2vec2.encoder.layers]
    their_outputs = [record(layer) for layer in hf.wav2vec2.encoder.layers]
    last = record(hf.wav2vec2.encoder)
    with torch.no_grad():
        out = model(audio, draws)
        hf_out = hf(audio, mask_time_indices=mask_time_indices, sampled_negative_indices=negatives)
    assert len(inputs) == len(their_inputs) == 3
    for mine, other in zip(inputs + outputs, their_inputs + their_outputs, strict=True):
        torch.testing.assert_close(mine[0], other[0], **close)
    final = model.ln_f(outputs[-1][0]) if model.config.norm_first else outputs[-1][0]
    torch.testing.assert_close(final, last[0].last_hidden_state, **close)
    torch.testing.assert_close(contexts[0], hf_out.projected_states[masks], **close)
    torch.testing.assert_close(targets[0], hf_out.projected_quantized_states[masks], **close)
    assert quantized[0].codes.unique(dim=0).shape[0] > 5
    assert out.metrics["identical"] > 0  # some distractors are excluded, on both sides
    torch.testing.assert_close(out.losses["contrastive"], hf_out.contrastive_loss, **close)
    torch.testing.assert_close(
        perplexity(quantized[0].code_counts / len(quantized[0].codes)), hf_out.codevector_perplexity, atol=0, rtol=1e-4
    )


def compare_gradients(model, hf, names, losses, hf_loss, bound=1e-4):
    """Names of parameters that neither side gives a gradient, after comparing all others."""
    losses.backward()
    hf_loss.backward()
    target = dict(hf.named_parameters())
    without = set()
    total = torch.stack([p.grad.norm() for p in target.values() if p.grad is not None]).norm().item()
    for name, parameter in model.named_parameters():
        mine, other = parameter.grad, target[names[name]].grad
        size = [0.0 if gradient is None else gradient.norm().item() for gradient in (mine, other)]
        if max(size) < 1e-6 * total:
            without.add(name)
        else:  # the second term is rounding, for gradients far smaller than the others
            assert (mine - other.view_as(mine)).norm() <= bound * size[1] + 1e-7 * total, name
    return without


def key_biases(model):
    """Softmax does not see a bias of the keys: its gradient is rounding."""
    return {f"transformer.{i}.attn.k_proj.bias" for i in range(model.config.n_layer)}


@pytest.mark.parametrize("preset", PRESETS)
def test_contrastive_gradients_are_the_same_without_noise(preset):
    model, hf, names = copied(preset)
    model.eval(), hf.eval()
    draws, mask_time_indices, negatives = both(spans(2, 49), 12)
    audio = audio_of(2, 16_000)
    hf_out = hf(audio, mask_time_indices=mask_time_indices, sampled_negative_indices=negatives)
    loss = model(audio, draws).losses["contrastive"]
    without = compare_gradients(model, hf, names, loss, hf_out.contrastive_loss)
    assert without == key_biases(model) | {"quantizer.projector.weight", "quantizer.projector.bias"}  # argmax


def in_training(preset, masks, step=0):
    """Both models in training, on the same Gumbel noise."""
    model, hf, names = copied(preset)
    model.train(), hf.train()
    draws, mask_time_indices, negatives = both(masks, 12)
    audio = audio_of(len(masks), 16_000)
    hf.set_gumbel_temperature(max(2.0 * 0.999995**step, model.config.gumbel_end))
    quantized, hf_quantized = record(model.quantizer), record(hf.quantizer)
    torch.manual_seed(5)
    out = model(audio, draws, step=step)
    torch.manual_seed(5)
    hf_out = hf(audio, mask_time_indices=mask_time_indices, sampled_negative_indices=negatives)
    # The noise is the same: so are the codes drawn with it, and they are not the largest logits.
    torch.testing.assert_close(quantized[0].quantized, hf_quantized[0][0][masks], **close)
    best = model.eval()(audio, draws) and quantized[1].codes
    model.train()
    assert not torch.equal(quantized[0].codes, best)
    return model, hf, names, out, hf_out


def noise_of_a_prefix_is_a_prefix():
    drawn = []
    for frames in (30, 49):
        torch.manual_seed(0)
        drawn.append(torch.empty(frames * GROUPS, ENTRIES).exponential_())
    return torch.equal(drawn[0], drawn[1][: 30 * GROUPS])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("step", [0, 100_000])
@pytest.mark.parametrize("mask", ["prefix", "everything"])
def test_losses_and_gradients_of_training_are_the_same(preset, step, mask):
    if mask == "prefix" and not noise_of_a_prefix_is_a_prefix():
        pytest.skip("this build of torch draws small and large tensors in different orders")
    masks = torch.arange(49)[None] < 30 if mask == "prefix" else torch.ones(2, 49, dtype=torch.bool)
    model, hf, names, out, hf_out = in_training(preset, masks, step)
    torch.testing.assert_close(out.losses["contrastive"], hf_out.contrastive_loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.losses["diversity"], hf_out.diversity_loss, atol=0, rtol=1e-4)
    loss = out.losses["contrastive"] + 0.1 * out.losses["diversity"]
    torch.testing.assert_close(loss, hf_out.loss, atol=1e-4, rtol=1e-5)
    without = compare_gradients(model, hf, names, loss, hf_out.loss)
    # Where every frame is replaced by the mask vector, nothing comes through the projection.
    linear = {"feature_projection.linear.weight", "feature_projection.linear.bias"}
    assert without == key_biases(model) | (linear if mask == "everything" else set())


def test_padded_utterances_give_the_same_states():
    """Layer-norm models alone: with GroupNorm Hugging Face lets padding into the statistics."""
    model, hf, _ = copied("paper_large_lv60k")
    model.eval(), hf.eval()
    samples = [16_000, 9_000, 5_000]
    audio, attention = audio_of(3, 16_000), torch.zeros(3, 16_000, dtype=torch.long)
    for b, n in enumerate(samples):
        attention[b, :n] = 1
        audio[b, n:] = 0
    with torch.no_grad():
        mine, frames = super(type(model), model).forward(audio, samples)
        other = hf.wav2vec2(audio, attention_mask=attention).last_hidden_state
    assert frames == hf._get_feat_extract_output_lengths(torch.tensor(samples)).tolist()
    for b, n in enumerate(frames):
        torch.testing.assert_close(mine[b, :n], other[b, :n], **close)


@pytest.mark.parametrize("preset", PRESETS)
def test_ctc_log_probabilities_are_the_same(preset):
    model, hf, _ = copied(preset)
    torch.manual_seed(0)
    mine, other = Wav2Vec2ForCTC(model.config, 11).eval(), transformers.Wav2Vec2ForCTC(hf.config).eval()
    mine.load_state_dict(model.state_dict(), strict=False)
    other.wav2vec2.load_state_dict(hf.wav2vec2.state_dict())
    other.lm_head = torch.nn.Linear(WIDTH, 11)
    other.lm_head.load_state_dict(mine.lm_head.state_dict())
    audio = audio_of(2, 8_000)
    with torch.no_grad():
        torch.testing.assert_close(mine(audio)[0], other(audio).logits.log_softmax(-1), **close)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", [(7, 3, 5), (1, 12, 4)])
def test_ctc_loss_and_gradients_are_the_same(preset, lengths):
    """Of utterances of one length: with padding Hugging Face's GroupNorm models give outputs that depend on the batch.

    Its loss is summed with ``ctc_loss_reduction="sum"``, as here; labels beyond a transcript are -100 there.
    """
    model, hf, names = copied(preset)
    torch.manual_seed(0)
    mine, other = Wav2Vec2ForCTC(model.config, 11), transformers.Wav2Vec2ForCTC(hf.config)
    mine.load_state_dict(model.state_dict(), strict=False)
    other.wav2vec2.load_state_dict(hf.wav2vec2.state_dict())
    other.lm_head = torch.nn.Linear(WIDTH, 11)
    other.lm_head.load_state_dict(mine.lm_head.state_dict())
    other.config.update({"vocab_size": 11, "pad_token_id": 0, "ctc_loss_reduction": "sum", "ctc_zero_infinity": True})
    mine.eval(), other.eval()
    audio = audio_of(3, 8_000)
    labels = torch.full((3, max(lengths)), -100)
    for row, n in zip(labels, lengths, strict=True):
        row[:n] = torch.randint(1, 11, (n,))
        row[n // 2 : n // 2 + 1] = row[n // 2 - 1 : n // 2] if n > 1 else row[:1]  # a label twice in a row
    log_probs, frames = mine(audio)
    loss = ctc_loss(log_probs, frames, labels.clamp(min=0), torch.tensor(lengths), blank=0)
    hf_loss = other(audio, labels=labels).loss
    torch.testing.assert_close(loss, hf_loss, atol=0, rtol=1e-5)
    heads = {name: name for name in ("lm_head.weight", "lm_head.bias")}
    theirs_by_ours = {name: names[name] for name, _ in mine.named_parameters() if name in names} | heads
    without = compare_gradients(mine, other, theirs_by_ours, loss, hf_loss, bound=1e-5)
    assert without == key_biases(model) | {"mask_vector"}  # nothing is masked in evaluation


def test_frame_counts_are_the_same():
    model, hf, _ = copied("paper_base")
    samples = [400, 719, 720, 16_000, 16_079, 16_080, 250_000, 480_000]
    assert model.config.frames(samples) == hf._get_feat_extract_output_lengths(torch.tensor(samples)).tolist()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_whole_preset_has_as_many_parameters(preset):
    """On the meta device, at full size."""
    config = getattr(recipes, preset)().model
    with torch.device("meta"):
        model = config.build()
        hf, names = theirs(model)
    source, target = dict(model.named_parameters()), dict(hf.named_parameters())
    assert set(names.values()) == target.keys()
    for a, b in names.items():
        assert source[a].numel() == target[b].numel(), a
    assert sum(p.numel() for p in source.values()) == sum(p.numel() for p in target.values())
