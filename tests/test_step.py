"""The fast ways to compute a step give what torch's own modules give, an utterance at a time: results and gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import utterances
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from w2v2 import recipes
from w2v2.model.attention import _DroppedAttention, _jagged, attend
from w2v2.model.conv_stack import conv_stack, first_weights, folded_weights
from w2v2.model.feature_encoder import ChannelLayerNorm, FeatureEncoder
from w2v2.model.packing import Rows, pack, plain_path, unpack
from w2v2.model.slots import Geometry, Slots
from w2v2.model.transformer import PositionalConvEmbedding, TransformerBlock

PRESETS = ["base", "paper_base", "paper_large_lv60k", "tiny"]
LENGTHS = {"equal": [9_000] * 3, "unequal": [9_000, 16_000, 1_400, 7_777], "one frame": [400], "alone": [12_345]}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, expected, bound=1e-5):
    assert (got - expected).norm() <= bound * expected.norm() + 2e-6  # keys' biases have a gradient of zero


def shrunk(preset):
    config = getattr(recipes, preset)().model
    config.conv_channels = (32,) * 7
    config.n_layer, config.n_embd, config.n_head, config.ffn_dim = 2, 48, 4, 96
    config.pos_conv_kernel, config.pos_conv_groups = 16, 4
    config.conv_norm = {"base": "group:8", "paper_base": "group:32"}.get(preset, config.conv_norm)
    config.n_entries, config.codebook_dim, config.num_distractors = 16, 8, 10
    config.dropout = config.attention_dropout = config.dropout_input = config.dropout_features = 0.0
    config.layer_drop = 0.0
    return config


def randomize(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def encoder_of(preset, **changes):
    c = shrunk(preset)
    norms = changes.pop("norms", None) or c.build_conv_norms()
    stack = {"kernel_sizes": c.conv_kernel_sizes, "strides": c.conv_strides, "paddings": c.conv_paddings, **changes}
    return randomize(FeatureEncoder(c.conv_channels, **stack, norms=norms, bias=c.conv_bias, gradient_scale=1.0))


def assert_same(module, compute, bound=1e-5):
    """What ``compute`` gives, and its gradients for the module's parameters, fast and plain."""
    results = []
    for plain in (True, False):
        module.zero_grad()
        if plain:
            with plain_path():
                out = compute()
        else:
            out = compute()
        (out * rand(*out.shape, seed=5)).sum().backward()
        results.append([out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for got, expected in zip(*reversed(results), strict=True):
        close(got, expected, bound)


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


# --- Conv stack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_joined_conv_stack_equals_torchs_convolutions_utterance_by_utterance(preset, lengths):
    encoder = encoder_of(preset)
    audio = rand(len(lengths), max(lengths)) + 0.5  # loud offset: variances are no small differences of large numbers
    for row, n in zip(audio, lengths, strict=True):
        row[n:] = float("nan")
    assert_same(encoder, lambda: encoder(audio, None if len(set(lengths)) == 1 else lengths))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_sizes": (10, 3, 4, 5, 3, 2, 2)},
        {"paddings": (0, 2, 1, 0, 1, 1, 1)},
        {"kernel_sizes": (7, 3, 2, 1, 3, 2, 3), "strides": (4, 1, 3, 2, 2, 2, 1), "paddings": (3, 0, 0, 0, 1, 1, 0)},
        {"kernel_sizes": (400, 3, 3, 3, 3, 2, 2)},  # from here on torch's own convolutions
        {"paddings": (4, 1, 1, 1, 1, 2, 2)},  # frames of nothing but padding
    ],
)
def test_any_kernels_strides_and_paddings_are_joined_as_well(changes):
    encoder = encoder_of("base", **changes)
    assert_same(encoder, lambda: encoder(rand(3, 9_000), [9_000, 4_444, 7_777]))


def test_norms_before_padded_convolutions_leave_nothing_between_utterances():
    encoder = encoder_of("base", norms=[ChannelLayerNorm(32) for _ in range(7)])
    assert_same(encoder, lambda: encoder(rand(2, 6_000), [6_000, 4_444]))


def test_the_stack_is_products_with_and_without_a_gradient_and_convolutions_where_it_is_plain():
    encoder = encoder_of("paper_base")
    with Operators() as seen:
        encoder(rand(2, 4_000)).sum().backward()
    assert not any("convolution" in name for name in seen.names)
    with torch.no_grad(), Operators() as seen:
        encoder(rand(2, 4_000))
    assert not any("convolution" in name for name in seen.names)
    with torch.no_grad(), plain_path(), Operators() as seen:
        encoder(rand(2, 4_000))
    assert sum(name == "convolution" for name in seen.names) == 7


def test_other_norms_than_the_published_ones_and_gradients_of_audio_go_the_plain_way():
    encoder = encoder_of("base", norms=[nn.InstanceNorm1d(32), *(nn.Identity() for _ in range(6))])
    assert encoder(rand(2, 4_000)).requires_grad
    audio = rand(1, 4_000).requires_grad_()
    encoder_of("base")(audio).sum().backward()
    assert audio.grad.norm() > 0


def test_keeping_the_outputs_of_gelu_changes_no_bit():
    encoder = encoder_of("base")
    conv, norm, _ = encoder.conv_layers[0]
    slots = Slots(
        Geometry(encoder.kernel_sizes, encoder.strides, encoder.paddings), [6_000, 4_444], torch.device("cpu")
    )
    windows = slots.windows(rand(2, 6_000), torch.float32)
    results = []
    for keep in (False, True):
        encoder.zero_grad()
        first = folded_weights(conv, norm, slots.moments(windows))
        out = conv_stack(windows, first, slots, encoder._layers(), norm.eps, keep=keep)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in encoder.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("groups", [8, 32])
def test_folded_weights_give_the_group_norm_of_the_convolution(groups):
    conv, norm = nn.Conv1d(1, 32, 10, 5, bias=True), randomize(nn.GroupNorm(groups, 32))
    audio = 3.0 + 0.01 * rand(2, 2_000)
    slots = Slots(Geometry((10,), (5,), (0,)), [2_000] * 2, torch.device("cpu"))
    windows = slots.windows(audio, torch.float32)
    folded = slots.first(windows, folded_weights(conv, norm, slots.moments(windows)))
    expected = norm.double()(conv.double()(audio[:, None].double())).float()  # (B, C, T)
    valid = torch.stack(slots.valid(folded, 1))
    torch.testing.assert_close(valid, expected.mT, atol=2e-3, rtol=0)  # float32 windows of an offset 300 times as loud
    plain = slots.first(windows, first_weights(conv.float()))
    torch.testing.assert_close(torch.stack(slots.valid(plain, 1)), conv(audio[:, None]).mT)


# --- Context network --------------------------------------------------------------------------------------------------


def test_packing_is_undone_by_unpacking_and_padding_is_zero():
    x = rand(1, 9, 3)
    padded = unpack(x, [4, 2, 3])
    assert padded.shape == (3, 4, 3)
    assert (padded[1, 2:] == 0).all()
    assert torch.equal(pack(padded, [4, 2, 3]), x)
    assert torch.equal(pack(unpack(x, [3] * 3), [3] * 3), x)


@pytest.mark.parametrize("queries", [[5, 3, 7], [2, 3, 1]])
def test_attention_of_a_nested_tensor_is_that_of_each_utterance(queries):
    """The kernel for unequal lengths is a GPU's; torch's own definition of the same call runs anywhere."""
    lengths = [5, 3, 7]
    q, k, v = rand(1, sum(queries), 2, 8, seed=1), rand(1, 15, 2, 8, seed=2), rand(1, 15, 2, 8, seed=3)
    nested = F.scaled_dot_product_attention(_jagged(q, queries), _jagged(k, lengths), _jagged(v, lengths))
    torch.testing.assert_close(nested.transpose(1, 2).values()[None], attend(q, k, v, queries, lengths, 0.0))


def test_attention_in_bf16_is_that_of_the_same_numbers_in_float32():
    low, full = ([rand(1, 12, 2, 8, seed=i).bfloat16().to(dtype).requires_grad_() for i in range(3)]
                 for dtype in (torch.bfloat16, torch.float32))  # fmt: skip
    outs = [attend(*part, [5, 7], [5, 7], 0.0) for part in (low, full)]
    assert outs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outs[0].float(), outs[1], atol=1e-2, rtol=1e-2)
    for out in outs:
        out.float().square().sum().backward()
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, atol=2e-2, rtol=2e-2)


def explicit_attention(q, k, v, keep, p):
    probs = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (probs * keep / (1 - p)) @ v


@pytest.mark.parametrize("frames", [(7, 7), (5, 9), (1_100, 1_000)])
def test_dropped_attention_and_its_gradients_are_those_of_the_definition_for_the_mask_it_drew(frames):
    queries, keys = frames
    q, k, v = (rand(2, 3, n, 4, seed=i).requires_grad_() for i, n in enumerate((queries, keys, keys)))
    p = 0.25
    out = _DroppedAttention.apply(q, k, v, p)
    keep = out.grad_fn.saved_tensors[4].view(2, 3, queries, keys)
    assert keep.float().mean().item() == pytest.approx(1 - p, abs=0.2 if queries < 10 else 0.001)
    expected = explicit_attention(q, k, v, keep, p)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    weights = rand(*out.shape, seed=9)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_each_probability_is_dropped_on_its_own_as_often_as_asked():
    v = torch.ones(1, 1, 1, 1).expand(1, 1, 1, 1)
    ones = torch.zeros(1, 200_000, 1, 1)  # a key each: a head gives its value, or nothing
    torch.manual_seed(0)
    out = _DroppedAttention.apply(ones, ones, v.expand_as(ones), 0.1)
    kept = out.flatten() > 0
    torch.testing.assert_close(out.flatten()[kept], torch.full((int(kept.sum()),), 1 / 0.9), atol=1e-4, rtol=0)
    assert (~kept).float().mean().item() == pytest.approx(0.1, abs=0.003)
    pairs = kept[:-1].logical_not() & kept[1:].logical_not()
    assert pairs.float().mean().item() == pytest.approx(0.01, abs=0.001)
    torch.manual_seed(0)
    assert torch.equal(out, _DroppedAttention.apply(ones, ones, v.expand_as(ones), 0.1))


@pytest.mark.parametrize("counts", [[3, 3], [4, 2]])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_gives_wanted_rows_as_it_gives_all(norm_first, counts):
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    block = randomize(TransformerBlock(16, 4, 32, **dropouts, norm_first=norm_first))
    x, index = rand(2, 8, 16), torch.tensor([0, 3, 5, 7, 8, 15] if counts == [4, 2] else [0, 3, 5, 8, 9, 15])
    whole = block(x).flatten(0, 1)[index]
    torch.testing.assert_close(block(x, None, Rows(index, counts))[0], whole, atol=1e-5, rtol=1e-5)
    packed = block(x.flatten(0, 1)[None], [8, 8], Rows(index, counts))[0]
    torch.testing.assert_close(packed, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropped", [None, (True, False), (False, True)])
@pytest.mark.parametrize("lengths", [LENGTHS["equal"], LENGTHS["unequal"]], ids=["equal", "unequal"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_step_has_the_losses_metrics_and_gradients_of_the_plain_path(preset, lengths, dropped):
    model = randomize(shrunk(preset).build()).train()
    draws = model.draw(utterances(lengths))
    draws.keep_layers = dropped
    audio = rand(len(lengths), max(lengths))
    metrics = []

    def compute():
        torch.manual_seed(7)  # Gumbel noise
        out = model(audio, draws, lengths)
        metrics.append(out.metrics)
        return torch.stack(list(out.losses.values()))

    assert_same(model, compute, bound=2e-4)
    for name, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kernel", [1, 7, 16, 18])
def test_the_positional_convolution_is_that_of_each_utterance_on_its_own(kernel):
    module = randomize(PositionalConvEmbedding(24, kernel, 3))
    lengths, x = [9, 30, 1, 17], rand(57, 24).requires_grad_()
    assert_same(module, lambda: module(x[None], lengths))
    with plain_path():
        (expected,) = torch.autograd.grad(module(x[None], lengths).square().sum(), x)
    with Operators() as seen:
        (got,) = torch.autograd.grad(module(x[None], lengths).square().sum(), x)
    close(got, expected)
    assert not any("convolution" in name for name in seen.names)


# --- bf16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_in_bf16_is_as_near_to_fp32_as_autocasts_own_and_casts_parameters_together(norm_first):
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    torch.manual_seed(0)
    block = TransformerBlock(64, 4, 128, **dropouts, norm_first=norm_first)
    x = rand(2, 50, 64)

    def run():
        block.zero_grad()
        out = block(x)
        (out.float() * rand(*x.shape, seed=1)).sum().backward()
        gradients = [p.grad for name, p in block.named_parameters() if name != "attn.k_proj.bias"]  # that one's is zero
        return [out.detach().float(), *gradients]

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        with plain_path():
            plain = run()
        with Operators() as seen:
            fast = run()
    assert seen.names.count("_foreach_copy_") == 2  # there, and the gradients back
    assert seen.names.count("_to_copy") <= 4 + 8  # x, and the sum of the test; attention's own, in float32 on a CPU
    for f, p, e in zip(fast, plain, exact, strict=True):
        assert f.dtype == torch.float32
        # Its output is bf16 too, and a CPU sums the gradients of LayerNorm's parameters in bf16.
        assert (f - e).norm() <= 1.5 * (p - e).norm() + 2**-6 * e.norm()


def test_the_conv_stack_in_bf16_is_as_near_to_fp32_as_autocasts_own():
    encoder = encoder_of("base")
    audio, results = rand(2, 8_000), {}
    for name in ("exact", "plain", "fast"):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            if name == "plain":
                with plain_path():
                    out = encoder(audio, [8_000, 5_555])
            else:
                out = encoder(audio, [8_000, 5_555])
                with torch.no_grad():
                    heard = encoder(audio, [8_000, 5_555])
                assert heard.dtype == out.dtype and (heard - out).norm() <= 2**-6 * out.norm()
        assert out.dtype == (torch.float32 if name == "exact" else torch.bfloat16)
        (out.float() * rand(*out.shape, seed=1)).sum().backward()
        results[name] = [out.detach().float(), *(p.grad for p in encoder.parameters())]
    for f, p, e in zip(results["fast"], results["plain"], results["exact"], strict=True):
        assert (f - e).norm() <= 1.5 * (p - e).norm() + 1e-3 * e.norm()
