"""The encoder: the page's tree, parameter counts, lengths, norms, order of operations, init, batch invariance."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import utterances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from w2v2 import recipes
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.feature_encoder import FeatureEncoder, output_lengths, receptive_field
from w2v2.model.initialization import init_weights
from w2v2.model.masking import Draws
from w2v2.model.pretraining import ContrastiveConfig, Wav2Vec2ForPretraining
from w2v2.model.transformer import MLP, PositionalConvEmbedding, SelfAttention, TransformerBlock
from w2v2.model.wav2vec2 import Wav2Vec2

PRESETS = ("base", "paper_base", "paper_large_lv60k", "small", "tiny")

PAPER_KERNELS, PAPER_STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)

PAGE = """
Wav2Vec2Base(
(feature_encoder): FeatureEncoder(
(conv_layers): ModuleList(
(0): Sequential(
(0): Conv1d(1, 512, kernel_size=(10,), stride=(5,), padding=(4,), bias=False)
(1): GroupNorm(32, 512, eps=1e-05, affine=True)
(2): GELU(approximate='none')
)
(1-4): 4 x Sequential(
(0): Conv1d(512, 512, kernel_size=(3,), stride=(2,), padding=(1,), bias=False)
(1): Identity()
(2): GELU(approximate='none')
)
(5-6): 2 x Sequential(
(0): Conv1d(512, 512, kernel_size=(2,), stride=(2,), bias=False)
(1): Identity()
(2): GELU(approximate='none')
)
)
)
(feature_projection): ...
(positional_embedding): ...
(transformer): ModuleList(
(0-11): 12 x TransformerBlock(
(attn): SelfAttention(
(q_proj): Linear(in_features=768, out_features=768, bias=True)
(k_proj): Linear(in_features=768, out_features=768, bias=True)
(v_proj): Linear(in_features=768, out_features=768, bias=True)
(out_proj): Linear(in_features=768, out_features=768, bias=True)
(dropout): Dropout(p=0.1, inplace=False)
)
(mlp): MLP ...
(ln_1): LayerNorm((768,), eps=1e-05, elementwise_affine=True)
(ln_2): LayerNorm((768,), eps=1e-05, elementwise_affine=True)
(dropout): Dropout(p=0.1, inplace=False)
)
)
(ln_f): LayerNorm((768,), eps=1e-05, elementwise_affine=True)
(dropout): Dropout(p=0.1, inplace=False)
(quantizer): VectorQuantizer(
(projector): Linear(in_features=768, out_features=640, bias=True)
)
(out_linear): Linear(in_features=768, out_features=768, bias=True)
)
"""

# The page's model is the pretraining model here, and its quantizer says which kind it is.
RENAMED = {"Wav2Vec2Base": "Wav2Vec2ForPretraining", "VectorQuantizer": "GumbelVectorQuantizer"}


def parse_page():
    """Path -> what is printed there, and path of each opened container -> names of its children, in order."""
    described, children = {}, {"": []}
    stack = [[""]]  # a range such as (1-4) opens several paths at once
    for line in PAGE.strip().splitlines():
        if line == ")":
            stack.pop()
            continue
        match = re.fullmatch(r"(?:\((?P<name>[\w-]+)\): )?(?:\d+ x )?(?P<text>.+)", line)
        name, text = match["name"], match["text"]
        if name is None:
            described[""] = text.removesuffix("(")
            stack.append([""])
            continue
        first, _, last = name.partition("-")
        names = [str(i) for i in range(int(first), int(last) + 1)] if last else [name]
        paths = []
        for parent in stack[-1]:
            for child in names:
                path = f"{parent}.{child}".removeprefix(".")
                children[parent].append(child)
                described[path] = text.removesuffix("(")
                paths.append(path)
        if text.endswith("("):
            stack.append(paths)
            children |= {path: [] for path in paths}
    return described, children


def on_meta(config):
    with torch.device("meta"):
        return config.build()


def count(*parts):
    return sum(p.numel() for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters()))


def shrunk(preset, **changes):
    """A preset's model with every structural choice kept, but narrow and two blocks deep."""
    config = getattr(recipes, preset)().model
    per_channel = config.conv_norm == f"group:{config.conv_channels[0]}"
    narrow = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "ffn_dim": 96,
        "conv_channels": (32, 32, 32, 32, 32, 32, 40),
        "conv_norm": "group:32" if per_channel else "group:8" if config.conv_norm != "layer" else "layer",
        "n_entries": 12,
        "codebook_dim": 10,
        "similarity_dim": config.similarity_dim and 24,
        "num_distractors": 9,
    }
    return replace(config, **(narrow | changes))


def randomize(model, seed=0):
    """Make every parameter matter: norms, biases and gains away from 1 and 0."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
    return model


def fresh(config, seed=0, kind=Wav2Vec2ForPretraining):
    torch.manual_seed(seed)
    return kind(config)


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def captured(module, inputs=True):
    """A list that fills with what a module is given, or gives."""
    seen = []
    if inputs:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        module.register_forward_hook(lambda _, args, out: seen.append(out))
    return seen


def draws_of(model, samples, *, step_key=(0, 0)):
    return model.draw(utterances(samples), step_key)


# --- The page ---------------------------------------------------------------------------------------------------------


def test_base_is_the_module_tree_printed_on_the_page():
    model = on_meta(recipes.base().model)
    described, children = parse_page()
    assert len([path for path in described if path.endswith("q_proj")]) == 12
    for path, names in children.items():
        assert [name for name, _ in model.get_submodule(path).named_children()] == names, path
    for path, text in described.items():
        module = model.get_submodule(path)
        if "..." in text:
            assert text in ("...", f"{type(module).__name__} ..."), path
        elif "(" in text:  # a leaf of torch's own: build what the page prints, and compare all that torch prints of it
            assert type(module) in (vars(nn)[text.partition("(")[0]],), path
            assert repr(module) == repr(eval(text, dict(vars(nn)))), path
        else:
            assert type(module).__name__ == RENAMED.get(text, text), path


def test_base_has_the_key_parameters_of_the_page():
    model = recipes.base().model
    page = {
        "n_layer": 12,
        "n_head": 8,
        "n_embd": 768,
        "ffn_dim": 3072,
        "max_seq_len": 1024,
        "conv_channels": (512,) * 7,
        "conv_kernel_sizes": (10, 3, 3, 3, 3, 2, 2),
        "conv_strides": (5, 2, 2, 2, 2, 2, 2),
        "dropout": 0.1,
        "pos_conv_kernel": 128,
        "pos_conv_groups": 16,
        "n_groups": 2,
        "n_entries": 320,
    }
    assert {name: getattr(model, name) for name in page} == page


def test_base_builds_what_the_page_leaves_open_from_its_key_parameters():
    model = on_meta(recipes.base().model)
    conv = model.positional_embedding.conv
    assert isinstance(conv, nn.Conv1d)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups) == (768, 768, (128,), 16)
    assert (conv.padding, conv.stride, conv.bias is not None) == ((64,), (1,), True)
    assert {block.attn.n_head for block in model.transformer} == {8}
    mlp = [m for m in model.transformer[0].mlp.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in mlp] == [(768, 3072, True), (3072, 768, True)]
    projection = [m for m in model.feature_projection.children() if not isinstance(m, nn.Dropout)]
    assert repr(projection) == repr([nn.LayerNorm(512), nn.Linear(512, 768)])
    assert tuple(model.quantizer.codebook.shape) == (2, 320, 384)


def test_base_is_trained_as_the_page_says():
    config = recipes.base()
    assert config.train.precision in ("auto", "bf16-mixed")  # auto is bf16-mixed wherever the device has it
    assert config.optim.clip_norm == 1.0
    assert type(config.optim.schedule).__name__ == "WarmupCosine"


def test_every_preset_has_the_pages_names_and_at_most_a_projection_of_the_targets_more():
    page = [
        "feature_encoder", "feature_projection", "positional_embedding", "transformer", "ln_f", "dropout", "quantizer",
        "out_linear",
    ]  # fmt: skip
    for preset in PRESETS:
        names = [name for name, _ in on_meta(shrunk(preset)).named_children()]
        assert [name for name in names if name not in ("project_q", "neighbourhood")] == page
        assert ("neighbourhood" in names) == (preset == "tiny")
        assert ("project_q" in names) == (preset != "base")


def test_paper_base_has_its_exact_parameter_counts():
    model = on_meta(recipes.paper_base().model)
    weight = model.positional_embedding.conv.parametrizations.weight
    counts = {
        "convolutions and GroupNorm": count(model.feature_encoder),
        "feature LayerNorm": count(model.feature_projection.norm),
        "projection": count(model.feature_projection.linear),
        "mask vector": count(model.mask_vector),
        "positional convolution": count(model.positional_embedding),
        "positional gains": weight.original0.numel(),
        "positional directions": weight.original1.numel(),
        "positional bias": model.positional_embedding.conv.bias.numel(),
        "context network": count(model.positional_embedding, model.transformer, model.ln_f),
        "quantizer": count(model.quantizer),
        "quantizer projector": count(model.quantizer.projector),
        "codebook": count(model.quantizer.codebook),
        "project_q": count(model.project_q),
        "final_proj": count(model.out_linear),
        "without quantizer and heads": count(model) - count(model.quantizer, model.project_q, model.out_linear),
        "total": count(model),
    }
    assert counts == {
        "convolutions and GroupNorm": 4_200_448,
        "feature LayerNorm": 1_024,
        "projection": 393_984,
        "mask vector": 768,
        "positional convolution": 4_719_488,
        "positional gains": 128,
        "positional directions": 4_718_592,
        "positional bias": 768,
        "context network": 89_775_488,
        "quantizer": 410_240,
        "quantizer projector": 328_320,
        "codebook": 81_920,
        "project_q": 65_792,
        "final_proj": 196_864,
        "without quantizer and heads": 94_371_712,
        "total": 95_044_608,
    }


def test_base_has_its_exact_parameter_count_part_by_part():
    model = on_meta(recipes.base().model)
    group_norm = model.feature_encoder.conv_layers[0][1]
    mask_vector, gains = count(model.mask_vector), model.positional_embedding.conv.parametrizations.weight.original0
    page = {
        "convolutions": count(model.feature_encoder) - count(group_norm),
        "GroupNorm": count(group_norm),
        "projection": count(model.feature_projection),
        "positional convolution": count(model.positional_embedding) - gains.numel(),
        "blocks": count(model.transformer),
        "ln_f": count(model.ln_f),
        "projector": count(model.quantizer.projector),
        "codebook": count(model.quantizer.codebook),
        "out_linear": count(model.out_linear),
    }
    assert page == {
        "convolutions": 4_199_424,
        "GroupNorm": 1_024,
        "projection": 395_008,
        "positional convolution": 4_719_360,
        "blocks": 12 * 7_087_872,
        "ln_f": 1_536,
        "projector": 492_160,
        "codebook": 245_760,
        "out_linear": 590_592,
    }
    assert (sum(page.values()), mask_vector, gains.numel()) == (95_699_328, 768, 128)
    assert count(model) == 95_700_224 == 95_699_328 + 768 + 128


def test_paper_large_has_its_exact_parameter_count():
    assert count(on_meta(recipes.paper_large_lv60k().model)) == 317_390_592


def test_the_number_of_heads_does_not_change_the_parameter_count():
    twelve, eight = recipes.paper_base().model, replace(recipes.paper_base().model, n_head=8)
    assert count(on_meta(twelve)) == count(on_meta(eight))


def test_paper_presets_have_the_settings_of_the_published_checkpoints():
    base = {
        "n_head": 12, "norm_first": False, "conv_norm": "group:512", "conv_bias": False, "conv_paddings": (0,) * 7,
        "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.1,
        "dropout_features": 0.1, "layer_drop": 0.05, "conv_gradient_scale": 0.1, "codebook_dim": 128,
        "similarity_dim": 256, "target_features": "encoder", "gumbel_start": 2.0, "gumbel_end": 0.5,
        "gumbel_decay": 0.999995, "logit_temperature": 0.1, "num_distractors": 100, "mask_prob": 0.65,
        "mask_length": 10, "normalize_audio": False, "utterance_norm": False, "conv_init_smoothing": 0.0,
    }  # fmt: skip
    large = base | {
        "n_layer": 24, "n_head": 16, "n_embd": 1024, "ffn_dim": 4096, "norm_first": True, "conv_norm": "layer",
        "conv_bias": True, "dropout": 0.0, "attention_dropout": 0.0, "dropout_input": 0.0, "dropout_features": 0.0,
        "layer_drop": 0.0, "conv_gradient_scale": 1.0, "codebook_dim": 384, "similarity_dim": 768, "gumbel_end": 0.1,
        "normalize_audio": True,
    }  # fmt: skip
    for preset, published in (("paper_base", base), ("paper_large_lv60k", large)):
        model = getattr(recipes, preset)().model
        assert {name: getattr(model, name) for name in published} == published
    assert recipes.paper_base().loss_weights == {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 10.0}
    assert recipes.paper_large_lv60k().loss_weights == {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 0.0}
    assert recipes.paper_base().optim.clip_norm is None
    assert recipes.paper_base().data.max_seconds * 16_000 == 250_000


# --- Lengths ----------------------------------------------------------------------------------------------------------


def test_the_papers_stack_gives_the_published_lengths():
    oracle = {
        399: 0, 400: 1, 719: 1, 720: 2, 16_000: 49, 32_000: 99, 250_000: 781, 320_000: 999, 480_000: 1_499,
    }  # fmt: skip
    for preset in ("paper_base", "paper_large_lv60k"):
        assert getattr(recipes, preset)().model.frames(list(oracle)) == list(oracle.values()), preset


def test_the_pages_stack_gives_exactly_50_frames_a_second():
    assert recipes.base().model.frames([16_000 * n for n in (1, 2, 10)]) == [50, 100, 500]


def test_a_frame_sees_400_samples_and_the_next_begins_320_later():
    assert receptive_field(PAPER_KERNELS, PAPER_STRIDES) == 400
    encoder = fresh(shrunk("paper_large_lv60k")).feature_encoder.eval()
    audio = rand(1, 4000)
    clean = encoder(audio)
    for sample in (0, 79, 320, 399, 400, 1000, 1599):
        audio_2 = audio.clone()
        audio_2[0, sample] += 3
        changed = (encoder(audio_2) != clean).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [t for t in range(clean.shape[1]) if 320 * t <= sample < 320 * t + 400], sample


# No more padding than keeps the length at stride 1: beyond it, windows would see nothing but zeros.
LAYER = st.integers(1, 7).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, 4), st.integers(0, (k - 1) // 2)))


@settings(max_examples=60, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=4), st.integers(1, 300))
def test_output_lengths_are_those_that_convolutions_make(layers, samples):
    kernels, strides, paddings = zip(*layers, strict=True)
    encoder = FeatureEncoder((1,) * len(layers), kernels, strides, paddings, [nn.Identity() for _ in layers])
    try:
        made = encoder(torch.zeros(1, samples)).shape[1]
    except RuntimeError:  # torch refuses kernels larger than their input
        made = 0
    assert output_lengths([samples], kernels, strides, paddings) == [made]


def test_forward_makes_the_frames_it_promises_and_refuses_less_than_one():
    for preset in PRESETS:
        model = fresh(shrunk(preset), kind=Wav2Vec2).eval()
        for samples in (16_000, 1_360, 720):
            x, frames = model(rand(1, samples))
            assert list(x.shape) == [1, frames[0], 64]
            assert frames == model.config.frames([samples])
        with pytest.raises(ValueError, match="100 samples"):
            model(rand(2, 16_000), [16_000, 100])


# --- Conv stack -------------------------------------------------------------------------------------------------------


def reference_conv(x, weight, bias, stride, padding):
    """x (C, T) -> (C', T'), by sums over the taps of each window."""
    x = F.pad(x, (padding, padding))
    windows = torch.stack(
        [x[:, t : t + weight.shape[2]] for t in range(0, x.shape[1] - weight.shape[2] + 1, stride)]
    )  # (T', C, K)
    y = torch.einsum("tck,dck->dt", windows, weight)
    return y if bias is None else y + bias[:, None]


def reference_stack(encoder, audio, n_groups):
    """The conv stack of one utterance in float64; n_groups None: LayerNorm after each convolution."""
    x = audio[None].double()
    for i, layer in enumerate(encoder.conv_layers):
        conv, norm = layer[0], layer[1]
        bias = None if conv.bias is None else conv.bias.double()
        x = reference_conv(x, conv.weight.double(), bias, encoder.strides[i], encoder.paddings[i])
        if n_groups is None:
            mean, var = x.mean(0, keepdim=True), x.var(0, keepdim=True, unbiased=False)
            x = (x - mean) / (var + 1e-5).sqrt() * norm.weight.double()[:, None] + norm.bias.double()[:, None]
        elif i == 0:
            y = x.reshape(n_groups, -1)  # statistics over the channels of a group and all of time
            y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            x = y.view_as(x) * norm.weight.double()[:, None] + norm.bias.double()[:, None]
        x = gelu(x)
    return x.T


@pytest.mark.parametrize(("preset", "n_groups"), [("paper_base", 32), ("base", 8), ("paper_large_lv60k", None)])
def test_the_conv_stack_equals_one_written_out_by_hand(preset, n_groups):
    """paper_base: 32 groups of 32 channels, so each channel is normalised over time alone."""
    encoder = randomize(fresh(shrunk(preset)).feature_encoder).eval()
    audio = rand(2, 2_500)
    with torch.no_grad():
        got = encoder(audio)
        for row, x in zip(audio, got, strict=True):
            torch.testing.assert_close(x.double(), reference_stack(encoder, row, n_groups), atol=1e-5, rtol=1e-4)


def test_paper_base_normalises_each_channel_on_its_own_and_base_in_groups_of_16():
    for preset, groups in (("paper_base", 512), ("base", 32)):
        norms = [layer[1] for layer in on_meta(recipes.__dict__[preset]().model).feature_encoder.conv_layers]
        assert isinstance(norms[0], nn.GroupNorm)
        assert (norms[0].num_groups, norms[0].num_channels) == (groups, 512)
        assert all(isinstance(norm, nn.Identity) for norm in norms[1:])


def test_paper_base_convolutions_do_not_pad():
    for preset in ("paper_base", "paper_large_lv60k"):
        layers = on_meta(recipes.__dict__[preset]().model).feature_encoder.conv_layers
        assert [layer[0].padding for layer in layers] == [(0,)] * 7
        assert [layer[0].kernel_size[0] for layer in layers] == list(PAPER_KERNELS)
        assert [layer[0].stride[0] for layer in layers] == list(PAPER_STRIDES)
        assert [layer[0].bias is not None for layer in layers] == [preset == "paper_large_lv60k"] * 7


def test_features_do_not_depend_on_the_gain_of_the_audio_nor_without_padding_on_its_offset():
    audio = rand(1, 8_000)
    for preset, changes in (
        ("paper_base", [2 * audio, 0.25 * audio, audio + 0.5]),
        ("base", [2 * audio, 0.25 * audio]),
    ):
        encoder = fresh(shrunk(preset)).feature_encoder.eval()
        with torch.no_grad():
            plain = encoder(audio)
            for changed in changes:
                assert (encoder(changed) - plain).abs().max() < 1e-3 * plain.abs().max(), preset


def test_utterance_norm_standardises_each_channel_over_the_time_of_its_utterance():
    model = fresh(shrunk("tiny")).eval()
    features = 5 + 3 * rand(1, 40, 40)
    normalised, _ = model.feature_projection(features, [25, 15])
    for rows, got in zip(features[0].split([25, 15]), normalised[0].split([25, 15]), strict=True):
        expected = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(got, F.layer_norm(expected, (40,)), atol=1e-5, rtol=1e-4)


# --- Positional convolution -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [8, 5])
def test_positional_convolution_equals_one_written_out_by_hand(kernel):
    width, groups, frames = 12, 3, 20
    torch.manual_seed(0)
    module = randomize(PositionalConvEmbedding(width, kernel, groups))
    gain, direction = module.conv.parametrizations.weight.original0, module.conv.parametrizations.weight.original1
    assert tuple(gain.shape) == (1, 1, kernel)
    # One gain per tap: the norm runs over output and input channels.
    weight = (gain * direction / direction.square().sum((0, 1), keepdim=True).sqrt()).double()
    x = rand(frames, width)
    expected = torch.zeros(frames, width, dtype=torch.float64)
    per_group = width // groups
    for t in range(frames):  # an even kernel would give a frame more, whose window starts one later: it is dropped
        for tap in range(kernel):
            source = t + tap - kernel // 2
            if 0 <= source < frames:
                for g in range(groups):
                    part = slice(g * per_group, (g + 1) * per_group)
                    expected[t, part] += weight[part, :, tap] @ x[source, part].double()
    expected = gelu(expected + module.conv.bias.double())
    torch.testing.assert_close(module(x[None])[0].double(), expected, atol=1e-5, rtol=1e-4)


def test_positional_convolution_looks_half_a_kernel_back_and_one_less_ahead():
    module = PositionalConvEmbedding(16, 8, 4)
    x = torch.zeros(1, 40, 16)
    x[0, 20] = 1
    touched = (module(x) - module(torch.zeros_like(x))).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert touched == list(range(20 - 3, 20 + 4 + 1))  # output t sees frames t - 4 ... t + 3


def test_positional_convolution_starts_at_the_published_scale_despite_weight_norm():
    torch.manual_seed(0)
    module = PositionalConvEmbedding(768, 128, 16)
    weight = module.conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(4 / (128 * 768)), rel=0.005)
    assert weight.abs().max() > 4 * weight.std()  # normal, not uniform
    assert module.conv.bias.abs().max() == 0
    with torch.no_grad():  # the gains act on the weight
        module.conv.parametrizations.weight.original0[..., 5] *= 3
        torch.testing.assert_close(module.conv.weight[..., 5], 3 * weight[..., 5])
        torch.testing.assert_close(module.conv.weight[..., 6], weight[..., 6])


# --- Blocks -----------------------------------------------------------------------------------------------------------


def block(**changes):
    settings_ = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "norm_first": True} | changes
    torch.manual_seed(0)
    return randomize(TransformerBlock(8, 2, 20, **settings_))


def reference_layer_norm(x, norm):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight.double() + norm.bias.double()


def reference_linear(x, linear):
    return x @ linear.weight.double().T + linear.bias.double()


def reference_attention(x, attn):
    """x (T, D): each head attends to every frame, scores scaled by the root of the head's width."""
    q, k, v = (reference_linear(x, proj) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    width = q.shape[-1] // attn.n_head
    heads = []
    for h in range(attn.n_head):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[:, part])
    return reference_linear(torch.cat(heads, -1), attn.out_proj)


def reference_mlp(x, mlp):
    return reference_linear(gelu(reference_linear(x, mlp.fc_1)), mlp.fc_2)


def reference_block(x, b, norm_first):
    x = x.double()
    if norm_first:
        x = x + reference_attention(reference_layer_norm(x, b.ln_1), b.attn)
        return x + reference_mlp(reference_layer_norm(x, b.ln_2), b.mlp)
    x = reference_layer_norm(x + reference_attention(x, b.attn), b.ln_1)
    return reference_layer_norm(x + reference_mlp(x, b.mlp), b.ln_2)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_equals_one_written_out_by_hand(norm_first):
    module = block(norm_first=norm_first)
    x = rand(2, 7, 8)
    for row, got in zip(x, module(x), strict=True):
        torch.testing.assert_close(got.double(), reference_block(row, module, norm_first), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_context_network_norms_once_before_the_blocks_or_once_after_them(norm_first):
    """Post-norm: ln_f between the positions and the blocks, and none at the end. Pre-norm: the same module, last."""
    model = randomize(fresh(shrunk("base", norm_first=norm_first))).eval()
    x = rand(1, 9, 64)
    with torch.no_grad():
        h = (x + model.positional_embedding(x)).double()[0]
        if not norm_first:
            h = reference_layer_norm(h, model.ln_f)
        for b in model.transformer:
            h = reference_block(h, b, norm_first)
        if norm_first:
            h = reference_layer_norm(h, model.ln_f)
        torch.testing.assert_close(model.contextualize(x)[0].double(), h, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("branch", ["attn", "mlp"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_each_residual_branch_is_dropped_exactly_once(norm_first, branch):
    p = 0.3
    module = block(dropout=p, norm_first=norm_first).train()
    if not norm_first:
        module.ln_1, module.ln_2 = nn.Identity(), nn.Identity()
    with torch.no_grad():  # one branch gives ones, the other nothing
        for name, linear in (("attn", module.attn.out_proj), ("mlp", module.mlp.fc_2)):
            linear.weight.zero_()
            linear.bias.fill_(float(name == branch))
    x = rand(50, 100, 8)
    added = module(x) - x
    kept = added.abs() > 0.5
    # Two dropouts in a row would keep 49 % and scale by 2.04.
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.01)
    torch.testing.assert_close(added[kept], torch.full_like(added[kept], 1 / (1 - p)), atol=1e-5, rtol=0)
    torch.testing.assert_close(added[~kept], torch.zeros_like(added[~kept]), atol=1e-5, rtol=0)


def test_attention_probabilities_are_dropped_in_training_only():
    p = 0.3
    attn = SelfAttention(64, 32, dropout=p).train()
    with torch.no_grad():
        attn.v_proj.weight.zero_()
        attn.v_proj.bias.fill_(1.0)
        attn.out_proj.weight.copy_(torch.eye(64))
        attn.out_proj.bias.zero_()
    x = rand(1, 200, 64)
    lengths = [1] * 200  # one key each: a head gives its value, or nothing

    def attention(x, lengths=None):
        return attn.out_proj(
            attn.attend(*(part.unflatten(0, x.shape[:2]) for part in attn.project(x.flatten(0, 1))), lengths)
        )

    for y in (attention(x, lengths), attention(x.transpose(0, 1)).transpose(0, 1)):
        assert y.gt(0.5).float().mean().item() == pytest.approx(1 - p, abs=0.03)
        torch.testing.assert_close(y[y > 0.5], torch.full_like(y[y > 0.5], 1 / (1 - p)))
    attn.eval()
    torch.testing.assert_close(attention(x, lengths), torch.ones_like(x))


def test_activations_of_the_mlp_are_dropped_between_gelu_and_the_second_layer():
    mlp = MLP(4, 1_000, activation_dropout=0.4).train()
    seen = captured(mlp.fc_2)
    x = rand(1, 20, 4)
    mlp(x)
    inner = gelu(mlp.fc_1(x))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], inner[kept] / 0.6, atol=1e-6, rtol=1e-4)


def test_dropout_follows_the_positions_and_the_norm_of_post_norm_presets():
    model = fresh(shrunk("paper_base", dropout=0.5, dropout_input=0.0)).train()
    seen_dropout, seen_block = captured(model.dropout), captured(model.transformer[0])
    x = rand(1, 30, 64)
    model.contextualize(x)
    torch.testing.assert_close(seen_dropout[0], model.ln_f(x + model.positional_embedding(x)))
    assert (seen_block[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


# --- Masking inside the encoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_covered_frames_become_the_mask_vector_before_positions_and_channels_are_zeroed_after(packed):
    model = fresh(shrunk("paper_base")).eval()
    seen = captured(model.positional_embedding)
    x = rand(2, 10, 64)
    lengths, rows = None, [10, 10]
    if packed:
        x, lengths, rows = x.reshape(1, 20, 64), [13, 7], [13, 7]
    covered = torch.tensor([0, 3, 4, 15])
    channels = torch.zeros(2, 64, dtype=torch.bool)
    channels[0, 5] = channels[1, 40:50] = True
    model.contextualize(x, lengths, covered=covered, channels=channels)
    expected = x.reshape(20, 64).clone()
    expected[covered] = model.mask_vector.detach()
    expected[: rows[0], 5] = 0
    expected[rows[0] :, 40:50] = 0
    torch.testing.assert_close(seen[0].reshape(20, 64), expected, atol=0, rtol=0)


def test_masking_follows_the_projection_and_its_dropout():
    model = fresh(shrunk("paper_base", dropout_input=0.5)).train()
    seen = captured(model.positional_embedding)
    draws = draws_of(model, [16_000])
    model(rand(1, 16_000), draws)
    covered = torch.zeros(49, dtype=torch.bool)
    covered[draws.covered] = True
    vector = model.mask_vector.detach().expand(int(covered.sum()), -1)
    torch.testing.assert_close(seen[0][0][covered], vector, atol=0, rtol=0)  # neither dropped nor scaled
    assert (seen[0][0][~covered] == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("preset", ["base", "paper_base"])
def test_the_quantizer_gets_unmasked_features_of_the_masked_frames_only(preset):
    """The paper: the normalised conv features, before their projection. The page: the projected ones."""
    model = randomize(fresh(shrunk(preset))).eval()
    seen, contexts = captured(model.quantizer), captured(model.out_linear)
    audio = rand(2, 12_000)
    draws = draws_of(model, [12_000] * 2)
    model(audio, draws)
    normalised = model.feature_projection.norm(model.feature_encoder(audio))
    source = normalised if preset == "paper_base" else model.feature_projection.linear(normalised)
    torch.testing.assert_close(seen[0], source.flatten(0, 1)[draws.masked])
    assert seen[0].shape == (len(draws.masked), 40 if preset == "paper_base" else 64)
    assert contexts[0].shape == (len(draws.masked), 64)


def test_the_two_branches_have_dropout_masks_of_their_own():
    model = fresh(shrunk("base", dropout_input=0.5, dropout_features=0.25)).train()
    quantizer, context = captured(model.quantizer), captured(model.positional_embedding)
    draws = draws_of(model, [16_000])
    draws = replace(draws, covered=draws.covered[:0])  # nothing hidden, so that both branches show all frames
    model(rand(1, 16_000), draws)
    dropped_q = quantizer[0] == 0
    dropped_c = context[0][0][draws.masked] == 0
    assert dropped_q.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert dropped_c.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (dropped_q & dropped_c).float().mean().item() == pytest.approx(0.125, abs=0.04)  # independent


@pytest.mark.parametrize("preset", ["base", "paper_base"])
def test_gradients_flow_through_the_targets_into_the_convolutions(preset):
    model = fresh(shrunk(preset)).train()
    out = model(rand(1, 16_000), draws_of(model, [16_000]))
    gradients = torch.autograd.grad(out.losses["diversity"], [*model.feature_encoder.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients)


# --- Init -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def initialised():
    return fresh(replace(recipes.paper_base().model, n_layer=2, n_embd=256, ffn_dim=512))


def assert_uniform(x, low, high):
    assert low <= x.min()
    assert x.max() <= high
    assert x.mean().item() == pytest.approx((low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * x.numel()))
    assert x.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=4 / math.sqrt(x.numel()))


def assert_normal(x, std):
    assert x.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(x.numel()))
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(x.numel()))
    # A normal variable's mean square is pi/2 times its squared mean size; a uniform one's 4/3.
    assert (x.square().mean() / x.abs().mean() ** 2).item() == pytest.approx(math.pi / 2, rel=0.05)


def test_convolutions_start_kaiming_normal_by_fan_in(initialised):
    for layer in initialised.feature_encoder.conv_layers:
        weight = layer[0].weight
        assert_normal(weight, math.sqrt(2 / (weight.shape[1] * weight.shape[2])))


def test_transformer_linears_start_normal_with_zero_bias(initialised):
    linears = [m for m in initialised.transformer.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * 6
    for linear in linears:
        assert_normal(linear.weight, 0.02)
        assert linear.bias.abs().max() == 0


def test_mask_vector_starts_uniform_between_0_and_1(initialised):
    assert_uniform(initialised.mask_vector, 0, 1)


def test_quantizer_starts_with_unit_normal_projector_and_uniform_codebook(initialised):
    assert_normal(initialised.quantizer.projector.weight, 1.0)
    assert initialised.quantizer.projector.bias.abs().max() == 0
    assert_uniform(initialised.quantizer.codebook, 0, 1)
    logits = initialised.quantizer.projector(F.layer_norm(rand(50, 512), (512,)))
    assert logits.std().item() == pytest.approx(math.sqrt(512), rel=0.05)  # so the softmax starts near one-hot


def test_projections_outside_the_transformer_keep_torchs_default_init(initialised):
    for linear in (initialised.feature_projection.linear, initialised.project_q, initialised.out_linear):
        bound = 1 / math.sqrt(linear.in_features)
        assert_uniform(linear.weight, -bound, bound)
        assert_uniform(linear.bias, -bound, bound)


def test_norms_start_as_the_identity(initialised):
    norms = [m for m in initialised.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    assert len(norms) == 1 + 1 + 2 * 2 + 1
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_convolution_biases_of_the_large_model_keep_torchs_default_init():
    model = fresh(replace(recipes.paper_large_lv60k().model, n_layer=1, n_embd=64, ffn_dim=64))
    for layer in model.feature_encoder.conv_layers:
        bound = 1 / math.sqrt(layer[0].weight[0].numel())
        assert_uniform(layer[0].bias, -bound, bound)


def test_ctc_head_starts_xavier_uniform_with_zero_bias():
    model = fresh(shrunk("paper_base"), kind=lambda config: Wav2Vec2ForCTC(config, 300))
    bound = math.sqrt(6 / (64 + 300))
    assert_uniform(model.lm_head.weight, -bound, bound)
    assert model.lm_head.bias.abs().max() == 0


def test_conv_smoothing_keeps_the_response_to_a_constant_and_the_first_kernel():
    plain, smooth = fresh(shrunk("tiny", conv_init_smoothing=0.0)), fresh(shrunk("tiny", conv_init_smoothing=0.8))
    layers = [*zip(plain.feature_encoder.conv_layers, smooth.feature_encoder.conv_layers, strict=True)]
    assert torch.equal(layers[0][0][0].weight, layers[0][1][0].weight)
    for a, b in layers[1:]:
        torch.testing.assert_close(a[0].weight.sum(-1), b[0].weight.sum(-1))
        spread = b[0].weight.std(-1).mean() / a[0].weight.std(-1).mean()
        assert spread.item() == pytest.approx(0.2, rel=1e-3)


def test_a_second_init_of_the_parts_draws_them_anew():
    """init_weights is what initialises: nothing is left as torch.empty found it."""
    model = fresh(shrunk("paper_base"))
    with torch.no_grad():
        model.mask_vector.fill_(float("nan"))
        model.quantizer.codebook.fill_(float("nan"))
    init_weights(model)
    assert all(p.isfinite().all() for p in model.parameters())


# --- Gradient scale ---------------------------------------------------------------------------------------------------


def gradients_at(scale, weights):
    config = shrunk(
        "paper_base", conv_gradient_scale=scale, dropout=0.0, attention_dropout=0.0, dropout_input=0.0,
        dropout_features=0.0, layer_drop=0.0,
    )  # fmt: skip
    model = fresh(config).train()
    draws = draws_of(model, [16_000] * 2)
    torch.manual_seed(1)  # the same Gumbel noise
    losses = model(rand(2, 16_000), draws).losses
    sum(weights[name] * loss for name, loss in losses.items()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "weights",
    [
        {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 10.0},
        {"contrastive": 0.0, "diversity": 0.0, "feature_penalty": 10.0},
    ],
    ids=["all losses", "penalty alone"],
)
def test_gradient_scale_is_exactly_that_factor_on_the_convolutions_and_on_nothing_else(weights):
    full, tenth = gradients_at(1.0, weights), gradients_at(0.1, weights)
    for name, gradient in full.items():
        scale = 0.1 if name.startswith("feature_encoder.") else 1.0
        if gradient is None or gradient.norm() == 0:
            assert tenth[name] is None or tenth[name].norm() == 0
            continue
        assert (tenth[name] - scale * gradient).norm() <= 1e-5 * scale * gradient.norm(), name
    assert all(full[name].norm() > 0 for name in full if name.startswith("feature_encoder."))


def test_gradient_scale_zero_freezes_the_convolutions_alone():
    weights = {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 0.0}
    full, none = gradients_at(1.0, weights), gradients_at(0.0, weights)
    for name, gradient in none.items():
        if name.startswith("feature_encoder."):
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, full[name], atol=1e-6, rtol=1e-4)


def test_gradient_scale_does_not_change_the_features():
    audio = rand(1, 4_000)
    one = fresh(shrunk("paper_base", conv_gradient_scale=1.0)).feature_encoder(audio)
    tenth = fresh(shrunk("paper_base", conv_gradient_scale=0.1)).feature_encoder(audio)
    assert torch.equal(one, tenth)


# --- LayerDrop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_dropped_layer_is_the_identity_with_zero_gradients(norm_first):
    model = randomize(fresh(shrunk("base", n_layer=3, norm_first=norm_first))).eval()
    x = rand(1, 11, 64)
    y = model.contextualize(x, keep_layers=(True, False, True))
    y.square().sum().backward()
    short = copy.deepcopy(model)
    short.zero_grad()
    del short.transformer[1]
    y_short = short.contextualize(x)
    y_short.square().sum().backward()
    torch.testing.assert_close(y, y_short, atol=0, rtol=0)  # the rest is not rescaled
    for name, p in model.transformer[1].named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() == 0, name
    for kept, reference in ((0, 0), (2, 1)):
        pairs = zip(model.transformer[kept].parameters(), short.transformer[reference].parameters(), strict=True)
        for p, q in pairs:
            torch.testing.assert_close(p.grad, q.grad, atol=0, rtol=0)


def test_every_parameter_has_a_gradient_whichever_layers_run():
    model = fresh(shrunk("paper_base")).train()
    draws = replace(draws_of(model, [16_000]), keep_layers=(False, False))
    losses = model(rand(1, 16_000), draws).losses
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_layers_to_drop_depend_on_the_step_alone():
    model = fresh(shrunk("paper_base", n_layer=12, layer_drop=0.5))
    a = draws_of(model, [16_000, 9_000], step_key=(7, 3)).keep_layers
    b = model.draw(utterances([32_000], ["another"], epoch=2), (7, 3)).keep_layers
    assert a == b
    assert len(a) == 12
    patterns = {draws_of(model, [16_000], step_key=(7, step)).keep_layers for step in range(30)}
    assert len(patterns) > 25


def test_layers_are_dropped_as_often_as_configured():
    model = fresh(shrunk("paper_base", n_layer=12, layer_drop=0.2))
    kept = [draws_of(model, [1_300], step_key=(0, step)).keep_layers for step in range(600)]
    share = torch.tensor(kept, dtype=torch.float).mean(0)
    assert share.mean().item() == pytest.approx(0.8, abs=0.015)
    assert share.min() > 0.74  # every one of them
    assert share.max() < 0.86


def test_no_layer_is_dropped_in_validation_or_when_off():
    on, off = fresh(shrunk("paper_base", layer_drop=0.9)), fresh(shrunk("paper_base", layer_drop=0.0))
    assert draws_of(on, [16_000], step_key=None).keep_layers is None
    assert draws_of(off, [16_000]).keep_layers is None
    model = randomize(on).eval()
    runs = [captured(block_) for block_ in model.transformer]
    Wav2Vec2.forward(model, rand(1, 16_000))
    assert [len(run) for run in runs] == [1, 1]


# --- Batch invariance -------------------------------------------------------------------------------------------------

SAMPLES = [9_000, 16_000, 1_400, 7_777]
CLOSE = {"atol": 1e-4, "rtol": 0}  # of outputs of size 1; rounding of randomised weights gives 2e-5


def garbage_padded(rows, seed):
    """A batch whose padding is loud noise, so that anything read from it shows."""
    audio = rand(len(rows), max(len(row) for row in rows), seed=seed, scale=1e3)
    for i, row in enumerate(rows):
        audio[i, : len(row)] = row
    return audio


@pytest.mark.parametrize("preset", PRESETS)
def test_an_utterance_gives_the_same_output_alone_and_in_a_padded_batch(preset):
    model = randomize(fresh(shrunk(preset), kind=Wav2Vec2)).eval()
    rows = [rand(n, seed=n) for n in SAMPLES]
    with torch.no_grad():
        batch, frames = model(garbage_padded(rows, seed=1), SAMPLES)
        assert frames == model.config.frames(SAMPLES)
        assert batch.shape[1] == max(frames)
        for row, got, n in zip(rows, batch, frames, strict=True):
            alone, _ = model(row[None])
            assert alone.std() > 0.1
            torch.testing.assert_close(got[:n], alone[0], **CLOSE)
            assert (got[n:] == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_after_every_utterance_of_a_batch_does_not_matter(preset):
    """All equally long, but shorter than the tensor: the lengths still count."""
    model = randomize(fresh(shrunk(preset), kind=Wav2Vec2)).eval()
    rows = [rand(8_000, seed=n) for n in range(2)]
    audio = torch.cat([garbage_padded(rows, seed=1), rand(2, 3_000, seed=9, scale=1e3)], dim=1)
    with torch.no_grad():
        got, _ = model(audio, [8_000] * 2)
        alone, _ = model(torch.stack(rows))
    torch.testing.assert_close(got, alone, **CLOSE)


@pytest.mark.parametrize("preset", PRESETS)
def test_validation_losses_of_a_padded_batch_are_the_sums_over_its_utterances(preset):
    model = randomize(fresh(shrunk(preset))).eval()
    rows = [rand(n, seed=n) for n in SAMPLES]
    ids = [f"utt-{n}" for n in SAMPLES]
    with torch.no_grad():
        whole = model(garbage_padded(rows, seed=1), model.draw(utterances(SAMPLES, ids)), SAMPLES)
        parts = [
            model(row[None], model.draw(utterances([n], [i]))) for row, n, i in zip(rows, SAMPLES, ids, strict=True)
        ]
    assert whole.num_targets == sum(part.num_targets for part in parts)
    total = sum(part.losses["contrastive"] for part in parts)
    torch.testing.assert_close(whole.losses["contrastive"], total, atol=1e-3, rtol=1e-5)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, sum(part.metrics[name] for part in parts), atol=1e-3, rtol=1e-4, msg=name)


@pytest.mark.parametrize("preset", PRESETS)
def test_ctc_outputs_are_the_same_alone_and_in_a_padded_batch(preset):
    model = randomize(fresh(shrunk(preset), kind=lambda config: Wav2Vec2ForCTC(config, 11))).eval()
    rows = [rand(n, seed=n) for n in SAMPLES]
    with torch.no_grad():
        batch, frames = model(garbage_padded(rows, seed=1), SAMPLES)
        assert batch.exp().sum(-1).sub(1).abs().max() < 1e-5
        for row, got, n in zip(rows, batch, frames, strict=True):
            torch.testing.assert_close(got[:n], model(row[None])[0][0], **CLOSE)


def test_gradients_of_a_padded_batch_are_the_sums_over_its_utterances():
    """Training packs too: masks, distractors and layers are the same, so the contrastive gradients must be."""
    model = randomize(fresh(shrunk("base"))).eval()
    samples = [9_000, 5_000]
    rows = [rand(n, seed=n) for n in samples]
    ids = [f"utt-{n}" for n in samples]

    def gradients(audio, draws, lengths=None):
        loss = model(audio, draws, lengths).losses["contrastive"]
        return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)

    whole = gradients(garbage_padded(rows, seed=1), model.draw(utterances(samples, ids)), samples)
    parts = [
        gradients(row[None], model.draw(utterances([n], [i]))) for row, n, i in zip(rows, samples, ids, strict=True)
    ]
    used = 0
    for got, *expected in zip(whole, *parts, strict=True):
        if got is not None:
            assert (got - sum(expected)).norm() <= 1e-4 * got.norm() + 1e-6
            used += 1
    assert used > 30


def test_one_frame_of_audio_is_enough_for_every_preset():
    for preset in PRESETS:
        model = fresh(shrunk(preset), kind=Wav2Vec2).eval()
        samples = next(n for n in range(1, 401) if model.config.frames([n]) == [1])
        x, frames = model(rand(1, samples))
        assert frames == [1], preset
        assert x.isfinite().all(), preset


def test_a_config_variant_can_bring_its_own_positions_without_touching_the_package():
    class NoPositions(nn.Module):
        def forward(self, x, lengths=None):
            return torch.zeros_like(x)

    class Variant(ContrastiveConfig):
        def build_positional_embedding(self):
            return NoPositions()

    config = Variant(**{name: getattr(shrunk("base"), name) for name in ContrastiveConfig.__dataclass_fields__})
    model = fresh(config).eval()
    x = rand(1, 12, 64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # without positions the network is a function of a set
        shuffled = model.contextualize(x[:, order])
        torch.testing.assert_close(shuffled, model.contextualize(x)[:, order], **CLOSE)


def test_draws_can_be_moved_and_covered_whole():
    model = fresh(shrunk("base"))
    draws = draws_of(model, [16_000, 16_000])
    assert isinstance(draws, Draws)
    blind = model.baseline(draws.to("cpu"))
    assert torch.equal(blind.covered, torch.arange(100))
    assert torch.equal(blind.masked, draws.masked)
    assert torch.equal(blind.distractors, draws.distractors)
