"""What is drawn, and what is minimised: masks, distractors, quantizer, contrastive loss, diversity, sums."""

import math
import statistics
from dataclasses import replace
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from conftest import utterances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from w2v2 import recipes
from w2v2.model.initialization import init_weights
from w2v2.model.losses import contrastive_logits, contrastive_loss, diversity_loss, feature_penalty
from w2v2.model.masking import (
    ContrastiveDraws,
    cut_batch,
    draw_targets,
    equalize_masks,
    keyed_generator,
    sample_distractors,
    sample_span_mask,
    slices,
)
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.quantizer import GumbelVectorQuantizer, gumbel_temperature, perplexity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=generator(seed))


def narrow(preset="paper_base", **changes):
    config = getattr(recipes, preset)().model
    small = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "ffn_dim": 96,
        "conv_channels": (32,) * 7,
        "conv_norm": "layer" if config.conv_norm == "layer" else "group:32",
        "n_entries": 20,
        "codebook_dim": 12,
        "similarity_dim": config.similarity_dim and 24,
    }
    return replace(config, **(small | changes))


def build(config, seed=0):
    torch.manual_seed(seed)
    return config.build()


def captured(module):
    """A list that fills with the positional arguments of each call of a module."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    return seen


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


# --- Masks ------------------------------------------------------------------------------------------------------------


def masks(length, n, prob=0.65, span=10, seed=0):
    rng = generator(seed)
    return torch.stack([sample_span_mask(length, prob, span, rng) for _ in range(n)])


def expected_share(length, prob=0.65, span=10):
    """Exact: a frame stays unmasked if none of the starts that reach it is among the n drawn of length - span."""
    candidates, wanted = length - span, prob * length / span
    share = 0.0
    for n, weight in ((math.floor(wanted), 1 - wanted % 1), (math.floor(wanted) + 1, wanted % 1)):
        for t in range(length):
            reaching = len(range(max(0, t - span + 1), min(t, candidates - 1) + 1))
            share += weight * (1 - math.comb(candidates - reaching, n) / math.comb(candidates, n)) / length
    return share


@pytest.mark.parametrize(
    ("length", "simulated", "deviation"),
    [(49, None, 0.095), (99, 0.499, 0.070), (249, 0.4925, 0.042), (499, 0.4914, 0.029), (781, 0.4907, 0.023)],
)
def test_spans_mask_the_share_of_frames_that_the_published_code_masks(length, simulated, deviation):
    """With 0.65 and 10 about half of the frames, not 65 %: spans overlap."""
    exact = expected_share(length)
    assert simulated is None or exact == pytest.approx(simulated, abs=0.002)
    shares = masks(length, 2_000).float().mean(1)
    assert shares.std().item() == pytest.approx(deviation, rel=0.1)
    assert shares.mean().item() == pytest.approx(exact, abs=4 * deviation / math.sqrt(2_000))


def test_masked_spans_have_the_published_mean_and_median_length():
    runs = [len(list(run)) for mask in masks(781, 400).tolist() for masked, run in groupby(mask) if masked]
    assert statistics.mean(runs) == pytest.approx(14.7, abs=0.2)
    assert statistics.median(runs) == 10
    # Shorter than a span only where the last, never masked, frame cuts one off.
    assert min(runs) in (9, 10)


def test_number_of_spans_is_rounded_at_random_for_each_utterance():
    counts = masks(200, 2_000, prob=0.0615, span=1).sum(1)  # 12.3 spans of one frame
    assert set(counts.tolist()) == {12, 13}
    assert (counts == 13).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_spans_start_at_distinct_frames():
    """150 of 199 candidates: with replacement about 105 frames would be masked."""
    assert set(masks(200, 50, prob=0.75, span=1).sum(1).tolist()) == {150}


def test_at_least_two_spans_are_drawn_however_small_the_share():
    assert set(masks(100, 50, prob=0.0, span=1).sum(1).tolist()) == {2}
    assert masks(100, 200, prob=0.0).sum(1).min() >= 11
    none = [sample_span_mask(100, 0.0, 10, generator(seed), min_spans=0).sum() for seed in range(20)]
    assert max(none) == 0


def test_starts_are_uniform_over_all_frames_but_the_last_span():
    """Candidates are [0, length - span), so the last frame is never masked and the one before can be."""
    length, span = 40, 10
    drawn = masks(length, 6_000, prob=0.5, span=span)  # 2 spans
    first = [mask.nonzero()[0].item() for mask in drawn]
    last = [length - 1 - mask.flip(0).nonzero()[0].item() for mask in drawn]
    assert min(first) == 0
    assert max(last) == length - 2
    # The earlier of two distinct starts of 30 is s with probability (29 - s) / C(30, 2).
    counts = torch.bincount(torch.tensor(first), minlength=30)[:29]
    expected = torch.tensor([(29 - s) / 435 * 6_000 for s in range(29)])
    assert chi_square(counts, expected) < 62  # 28 degrees of freedom, p = 2e-4


@settings(max_examples=400, deadline=None)
@given(
    st.integers(3, 60), st.floats(0, 1), st.integers(1, 20), st.integers(0, 2**32), st.integers(1, 4),
)  # fmt: skip
def test_even_the_shortest_utterance_has_two_masked_frames_and_an_unmasked_one(length, prob, span, seed, min_spans):
    mask = sample_span_mask(length, prob, span, generator(seed), min_spans=max(min_spans, 2))
    assert mask.shape == (length,)
    assert mask.dtype == torch.bool
    assert mask.sum() >= 2
    assert not mask[-1]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_utterances_that_leave_no_distractor_are_refused(length):
    with pytest.raises(ValueError, match=f"got {length}"):
        sample_span_mask(length, 0.65, 10, generator())


def test_equalised_rows_have_the_smallest_count_and_keep_only_masked_frames():
    drawn = list(masks(781, 5))
    rows = equalize_masks(drawn, [generator(i) for i in range(5)])
    target = min(int(mask.sum()) for mask in drawn)
    assert len({int(mask.sum()) for mask in drawn}) > 1
    for before, after in zip(drawn, rows, strict=True):
        assert int(after.sum()) == target
        assert not (after & ~before).any()


def test_frames_to_unmask_are_chosen_uniformly():
    long = torch.ones(20, dtype=torch.bool)
    short = torch.zeros(20, dtype=torch.bool)
    short[:5] = True
    kept = torch.zeros(20)
    for seed in range(2_000):
        kept += equalize_masks([long, short], [generator(seed), generator(seed)])[0]
    assert kept.sum() == 10_000
    # Without replacement the variance is 15/19 of the multinomial one, so the statistic is a shrunk chi-square.
    assert chi_square(kept, torch.full((20,), 500.0)) < 50


def test_equalising_five_rows_leaves_the_published_share_masked():
    shares = []
    for seed in range(200):
        rows = equalize_masks(list(masks(781, 5, seed=seed)), [generator(i) for i in range(5)])
        shares.append(torch.stack(rows).float().mean().item())
    assert statistics.mean(shares) == pytest.approx(0.464, abs=0.003)


def test_keys_alone_decide_a_draw_and_no_two_keys_are_confused():
    assert keyed_generator(1, 2, "a").initial_seed() == keyed_generator(1, 2, "a").initial_seed()
    seeds = [
        keyed_generator(*key).initial_seed()
        for key in [(1, 2, "a"), (2, 1, "a"), (12, "a"), (1, "2a"), ("12", "a", ""), (1, 2, "b"), (1, 3, "a")]
    ]
    assert len(set(seeds)) == len(seeds)


def test_keyed_draws_are_the_same_in_every_process():
    """Pinned: neither Python's salted hash nor a change of ours can move them between runs unnoticed."""
    assert keyed_generator(0, 1, "utt").initial_seed() == 16_667_011_449_136_247_527


def training_draws(model, samples, names):
    return model.draw(utterances(samples, names), (0, 0))


def test_draws_of_an_utterance_do_not_depend_on_its_batch():
    model = build(narrow())
    alone = model.draw(utterances([16_000], "b"))
    batch = model.draw(utterances([20_000, 16_000, 9_000], "abc"))
    start, n = batch.counts[0], batch.counts[1]
    offset = model.config.frames([20_000])[0]
    assert alone.counts == (n,)
    assert torch.equal(batch.masked[start : start + n] - offset, alone.masked)
    assert torch.equal(batch.distractors[start : start + n], alone.distractors)
    # In training a row may lose frames to be equal to the others, but gains none.
    trained = training_draws(model, [20_000, 16_000, 9_000], "abc")
    single = training_draws(model, [16_000], "b")
    n = trained.counts[0]
    assert set((trained.masked[n : 2 * n] - offset).tolist()) <= set(single.masked.tolist())


def test_training_masks_are_equalised_and_validation_masks_are_not():
    model = build(narrow())
    samples = [16_000, 32_000]
    assert len(set(training_draws(model, samples, "ab").counts)) == 1
    assert len(set(model.draw(utterances(samples, "ab")).counts)) == 2


def test_another_epoch_another_mask():
    model = build(narrow())
    a, b = (model.draw(utterances([32_000], epoch=epoch), (0, 0)) for epoch in (0, 1))
    assert not torch.equal(a.masked, b.masked)


# --- Distractors ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(1, 150), st.integers(0, 2**32))
def test_a_distractor_is_another_masked_frame_of_the_utterance(count, k, seed):
    drawn = sample_distractors(count, k, generator(seed))
    assert drawn.shape == (count, k)
    assert drawn.min() >= 0
    assert drawn.max() < count
    assert (drawn != torch.arange(count)[:, None]).all()


def test_distractors_are_uniform_over_the_others_and_drawn_with_replacement():
    drawn = sample_distractors(6, 20_000, generator())
    for frame, row in enumerate(drawn):
        counts = torch.bincount(row, minlength=6)
        assert counts[frame] == 0
        others = torch.cat([counts[:frame], counts[frame + 1 :]])
        assert chi_square(others, torch.full((5,), 4_000.0)) < 23.5  # 4 degrees of freedom, p = 1e-4
    # With replacement, 100 of 150 others leave out more than 50.
    assert len(sample_distractors(151, 100, generator())[0].unique()) < 90


def test_draw_lays_the_frames_of_all_utterances_end_to_end():
    rows = [torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool), torch.tensor([0, 1, 1, 0], dtype=torch.bool)]
    drawn = draw_targets(rows, [generator(0), generator(1)], 50)
    assert drawn.masked.tolist() == [0, 2, 3, 6, 7]
    assert torch.equal(drawn.masked, drawn.covered)
    assert drawn.counts == (3, 2)
    assert drawn.distractors.shape == (5, 50)
    assert set(drawn.distractors[0].tolist()) == {1, 2}  # positions among the utterance's own masked frames
    assert set(drawn.distractors[1].tolist()) == {0, 2}
    assert set(drawn.distractors[3].tolist()) == {1}
    assert set(drawn.distractors[4].tolist()) == {0}


# --- Leak -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper_large_lv60k", "base"])
def test_audio_that_only_masked_frames_hear_changes_targets_but_nothing_the_context_network_gets(preset):
    """Nothing of a masked frame may reach the blocks, through the wide positional convolution least of all.

    Were frames covered after it, their content would be in the 64 unmasked frames on each side. Norms over time are
    switched off here: those of the first convolution do see the whole utterance, in the published model as well.
    """
    model = build(narrow(preset, conv_norm="layer", pos_conv_kernel=128)).eval()
    audio = rand(1, 64_000)
    louder = audio.clone()
    louder[:, 320 * 83 : 320 * 96] += rand(1, 320 * 13, seed=1, scale=5)
    features = [model.feature_encoder(x)[0] for x in (audio, louder)]
    heard = (features[0] != features[1]).any(-1).nonzero().flatten()
    assert 12 <= len(heard) <= 16

    span = torch.arange(int(heard[0]), int(heard[-1]) + 1)
    masked = torch.cat([torch.arange(20, 30), span, torch.arange(150, 160)])
    distractors = sample_distractors(len(masked), 20, generator())
    drawn = ContrastiveDraws(
        masked=masked, counts=(len(masked),), distractors=distractors, covered=masked, n_frames=len(features[0])
    )
    blocks, targets, contexts = captured(model.transformer[0]), captured(model.quantizer), captured(model.out_linear)
    with torch.no_grad():
        for x in (audio, louder):
            model(x, drawn)
    changed = (targets[0][0] != targets[1][0]).any(-1)
    assert changed.tolist() == [False] * 10 + [True] * len(span) + [False] * 10
    assert torch.equal(blocks[0][0], blocks[1][0])
    assert torch.equal(contexts[0][0], contexts[1][0])

    uncovered = replace(drawn, covered=masked[:10])  # the same change is plain to see where it is not covered
    with torch.no_grad():
        for x in (audio, louder):
            model(x, uncovered)
    assert (blocks[2][0] - blocks[3][0])[0].abs().amax(-1).gt(1e-4).sum() > 100


# --- Contrastive loss -------------------------------------------------------------------------------------------------


def naive_logits(context, targets, codes, distractors, counts, temperature):
    """One frame and one distractor after another, in float64."""
    rows, start = [], 0
    for n in counts:
        for t in range(start, start + n):
            c = context[t].double()
            row = []
            for other in [t, *(start + distractors[t]).tolist()]:
                q = targets[other].double()
                if other != t and codes[other].tolist() == codes[t].tolist():
                    row.append(torch.tensor(-math.inf, dtype=torch.float64))
                else:
                    row.append((c @ q) / (c.norm() * q.norm()) / temperature)
            rows.append(torch.stack(row))
        start += n
    return torch.stack(rows)


@st.composite
def problems(draw_):
    counts = tuple(draw_(st.lists(st.integers(2, 7), min_size=1, max_size=4)))
    k, width, groups = draw_(st.integers(1, 6)), draw_(st.integers(2, 5)), draw_(st.integers(1, 3))
    seed, entries = draw_(st.integers(0, 2**32)), draw_(st.integers(1, 3))
    rng = generator(seed)
    total = sum(counts)
    return {
        "context": torch.randn(total, width, generator=rng),
        "targets": torch.randn(total, width, generator=rng),
        "codes": torch.randint(entries, (total, groups), generator=rng),
        "distractors": torch.cat([sample_distractors(n, k, rng) for n in counts]),
        "counts": counts,
        "temperature": draw_(st.sampled_from([0.1, 0.5, 1.0])),
    }


@settings(max_examples=60, deadline=None)
@given(problems())
def test_logits_loss_and_gradients_equal_those_of_the_definition(problem):
    results = []
    for function in (contrastive_logits, naive_logits):
        leaves = {name: problem[name].clone().requires_grad_() for name in ("context", "targets")}
        logits = function(**{**problem, **leaves})
        loss = -logits.double().log_softmax(-1)[:, 0].sum() if function is naive_logits else (
            contrastive_loss(logits).loss
        )  # fmt: skip
        loss.backward()
        results.append([logits, loss, *(leaf.grad for leaf in leaves.values())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), atol=2e-4, rtol=2e-4)
    assert torch.equal(results[0][0].isneginf(), results[1][0].isneginf())


def problem(n=6, k=5, width=8, **changes):
    return {
        "context": rand(n, width, seed=1),
        "targets": rand(n, width, seed=2),
        "codes": torch.arange(n)[:, None].expand(n, 2),
        "distractors": sample_distractors(n, k, generator(3)),
        "counts": (n,),
        **changes,
    }


def test_the_target_is_class_0_and_logits_are_cosines_over_the_temperature():
    given_ = problem()
    logits = contrastive_logits(**given_)
    assert logits.shape == (6, 6)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 0], F.cosine_similarity(given_["context"], given_["targets"]) / 0.1)
    torch.testing.assert_close(contrastive_logits(**given_, temperature=0.2), logits / 2)
    loud = contrastive_logits(**{**given_, "context": 100 * given_["context"], "targets": given_["targets"] / 100})
    torch.testing.assert_close(loud, logits)


def test_distractors_with_the_targets_own_codes_are_excluded_only_if_all_groups_agree():
    codes = torch.tensor([[1, 1], [1, 1], [1, 2], [2, 1], [3, 3], [4, 4]])
    others = torch.tensor([[1, 2, 3, 4, 5]]).repeat(6, 1)
    others[1:, 0] = 0
    logits = contrastive_logits(**problem(codes=codes, distractors=others))
    assert logits[0].isneginf().tolist() == [False, True, False, False, False, False]
    out = contrastive_loss(logits)
    assert out.identical.item() == pytest.approx(((codes[others] == codes[:, None]).all(-1)).float().mean(-1).sum())


def test_vectors_are_equal_by_their_codes_even_where_projection_makes_them_equal():
    """Equal vectors of different codes are a hard distractor, not an excluded one: ties, loss ln(1 + K)."""
    given_ = problem(targets=torch.ones(6, 8), context=torch.ones(6, 8))
    out = contrastive_loss(contrastive_logits(**given_))
    assert out.loss.item() == pytest.approx(6 * math.log(6), rel=1e-6)
    assert out.identical == 0


def test_loss_is_zero_and_nothing_is_correct_where_all_distractors_are_identical():
    codes = torch.ones(6, 2, dtype=torch.long)
    context = rand(6, 8, seed=1).requires_grad_()
    out = contrastive_loss(contrastive_logits(**problem(codes=codes, context=context)))
    assert out.loss.item() == 0
    assert out.correct.item() == 0
    assert out.identical.item() == 6
    out.loss.backward()
    assert context.grad.isfinite().all()
    assert context.grad.abs().max() == 0


def test_accuracy_counts_strict_wins_only():
    inf = math.inf
    logits = torch.tensor(
        [
            [1.0, 0.0, 0.5],  # a hit
            [1.0, 2.0, 0.0],  # a miss
            [1.0, 1.0, 0.0],  # a tie
            [0.0, 0.0, 0.0],  # a constant model
            [1.0, -inf, -inf],  # nothing to be told apart from
            [1.0, -inf, 0.0],  # a hit over what is left
            [-1.0, -inf, 0.0],  # a miss
        ]
    )
    out = contrastive_loss(logits)
    assert out.correct.item() == 2
    assert out.identical.item() == 1 + 0.5 + 0.5


def test_a_perfect_model_hits_every_frame_and_a_constant_one_none():
    targets = torch.eye(6)
    assert contrastive_loss(contrastive_logits(**problem(targets=targets, context=targets))).correct == 6
    assert contrastive_loss(contrastive_logits(**problem(targets=targets, context=torch.ones(6, 6)))).correct == 0


def test_losses_are_fp32_under_bf16_autocast_bit_for_bit():
    given_ = problem(n=40, k=30)
    features = rand(1, 30, 40)
    quantizer = init_weights_of(GumbelVectorQuantizer(8, 2, 40, 4)).eval()
    x = rand(40, 8)

    def compute():
        q = quantizer(x, 1.0)
        return [
            contrastive_logits(**given_),
            contrastive_loss(contrastive_logits(**given_)).loss,
            feature_penalty(features, [30], [7]),
            q.quantized,
            q.prob_perplexity,
            perplexity(q.code_counts / len(x)),
            diversity_loss(q.prob_perplexity, 80, 7),
        ]

    plain = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (given_["context"] @ given_["targets"].T).dtype == torch.bfloat16  # autocast is on
        cast = compute()
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def test_bf16_contexts_are_compared_in_fp32():
    given_ = problem(n=40, k=30)
    half = {**given_, "context": given_["context"].bfloat16(), "targets": given_["targets"].bfloat16()}
    full = {**given_, "context": half["context"].float(), "targets": half["targets"].float()}
    assert torch.equal(contrastive_logits(**half), contrastive_logits(**full))


def test_model_losses_are_fp32_under_bf16_autocast():
    model = build(narrow()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(rand(1, 16_000), model.draw(utterances([16_000]), (0, 0))).losses
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())


def test_an_untrained_model_is_at_chance():
    """ln 101 = 4.615 nats for each frame while codes are diverse."""
    model = build(narrow("paper_base", n_entries=320, n_embd=96, codebook_dim=64, similarity_dim=128)).train()
    out = model(rand(2, 64_000), model.draw(utterances([64_000] * 2), (0, 0)))
    summary = model.summarize(out.metrics)
    assert summary["identical_distractors"] < 0.05
    assert out.losses["contrastive"].item() / out.num_targets == pytest.approx(math.log(101), abs=0.15)
    assert summary["accuracy"] < 0.06


# --- Diversity and penalty --------------------------------------------------------------------------------------------


def test_perplexity_is_the_sum_over_groups_and_runs_from_2_to_640():
    uniform = torch.full((2, 320), 1 / 320)
    single = torch.zeros(2, 320)
    single[:, 7] = 1
    half = torch.zeros(2, 320)
    half[0, :4], half[1, :16] = 1 / 4, 1 / 16
    assert perplexity(uniform).item() == pytest.approx(640, abs=0.05)
    assert perplexity(single).item() == pytest.approx(2, abs=1e-4)
    assert perplexity(half).item() == pytest.approx(4 + 16, abs=1e-3)


def test_diversity_loss_is_0_when_uniform_near_1_when_collapsed_and_scales_with_the_targets():
    assert diversity_loss(torch.tensor(640.0), 640, 100).item() == 0
    assert diversity_loss(torch.tensor(2.0), 640, 1).item() == pytest.approx(638 / 640)
    assert diversity_loss(torch.tensor(160.0), 640, 100).item() == pytest.approx(75.0)


def test_minimising_the_diversity_loss_raises_the_perplexity():
    quantizer = init_weights_of(GumbelVectorQuantizer(16, 2, 20, 4))
    with torch.no_grad():
        quantizer.projector.weight.mul_(0.1)
        quantizer.projector.bias[3] += 5  # one code takes nearly all
        quantizer.projector.bias[20 + 4] += 5
    x = rand(200, 16)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=10.0)
    history = []
    for _ in range(30):
        value = quantizer(x, 2.0).prob_perplexity
        history.append(value.item())
        optimizer.zero_grad()
        diversity_loss(value, 40, 1).backward()
        optimizer.step()
    assert history[0] < 8
    assert history[-1] > 2 * history[0]


def test_feature_penalty_is_the_mean_square_over_all_frames_times_the_targets():
    features = rand(2, 30, 8)
    assert feature_penalty(features, [30] * 2, [7] * 2).item() == pytest.approx(14 * features.square().mean().item())


def test_feature_penalty_of_unequal_utterances_is_the_sum_of_what_each_has_alone():
    features = rand(1, 70, 8)
    rows = zip(features.split([50, 20], dim=1), [(50, 7), (20, 3)], strict=True)
    alone = sum(feature_penalty(row, [n], [count]).item() for row, (n, count) in rows)
    assert feature_penalty(features, [50, 20], [7, 3]).item() == pytest.approx(alone)


@pytest.mark.parametrize("preset", ["base", "paper_base"])
def test_model_losses_are_the_sums_that_the_definitions_give(preset):
    model = build(narrow(preset)).eval()
    audio = rand(2, 16_000)
    drawn = model.draw(utterances([16_000] * 2), (0, 0))
    seen = []
    model.quantizer.register_forward_hook(lambda _, args, out: seen.append(out))
    out = model(audio, drawn)
    m = len(drawn.masked)
    assert out.num_targets == m == sum(drawn.counts)
    assert out.losses.keys() == {"contrastive", "diversity", "feature_penalty"}
    raw = model.feature_encoder(audio)  # before its LayerNorm, masked frames and others
    torch.testing.assert_close(out.losses["feature_penalty"], m * raw.square().mean())
    torch.testing.assert_close(out.losses["diversity"], m * (40 - seen[0].prob_perplexity) / 40)
    assert set(out.losses) == set(recipes.__dict__[preset]().loss_weights)


# --- Quantizer --------------------------------------------------------------------------------------------------------


def init_weights_of(quantizer, seed=0):
    torch.manual_seed(seed)
    init_weights(quantizer)
    return quantizer


def test_straight_through_equals_torchs_hard_gumbel_softmax_times_the_codebook():
    quantizer = init_weights_of(GumbelVectorQuantizer(8, 3, 6, 5)).train()
    weight = rand(40, 15, seed=5)
    results = []
    for ours in (True, False):
        quantizer.zero_grad()
        x = rand(40, 8, scale=0.5).requires_grad_()
        torch.manual_seed(3)
        if ours:
            quantized = quantizer(x, 0.7).quantized
        else:
            logits = quantizer.projector(x).view(40, 3, 6)
            hard = F.gumbel_softmax(logits, tau=0.7, hard=True)  # y_hard - y_soft.detach() + y_soft
            quantized = torch.einsum("ngv,gvd->ngd", hard, quantizer.codebook).flatten(1)
        (quantized * weight).sum().backward()
        results.append([quantized, x.grad, *(p.grad.clone() for p in quantizer.parameters())])
    for got, expected in zip(*results, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_straight_through_gradient_is_that_of_the_soft_choice():
    """d loss / d logits by hand: softmax's Jacobian at temperature tau, applied to codebook @ gradient."""
    quantizer = init_weights_of(GumbelVectorQuantizer(4, 1, 5, 3)).train()
    with torch.no_grad():
        quantizer.projector.weight.zero_()
    tau, g = 0.5, rand(1, 3, seed=1)
    torch.manual_seed(9)
    noise = -torch.empty(1, 1, 5).exponential_().log()
    torch.manual_seed(9)
    quantizer(torch.zeros(1, 4), tau).quantized.mul(g).sum().backward()
    soft = (noise / tau).softmax(-1).view(5)
    upstream = (quantizer.codebook[0] @ g[0]).detach()
    expected = soft * (upstream - (soft * upstream).sum()) / tau
    torch.testing.assert_close(quantizer.projector.bias.grad, expected, atol=1e-6, rtol=1e-4)
    chosen = torch.zeros(5, 3)
    chosen[int(soft.argmax())] = g[0]
    torch.testing.assert_close(quantizer.codebook.grad[0], chosen)


def test_entries_are_looked_up_group_by_group_in_the_order_of_the_logits():
    quantizer = init_weights_of(GumbelVectorQuantizer(4, 2, 10, 3)).eval()
    with torch.no_grad():
        quantizer.projector.weight.zero_()
        quantizer.projector.bias[3] = quantizer.projector.bias[10 + 5] = 50.0
    for module in (quantizer, quantizer.train()):
        out = module(rand(2, 4), 1.0)
        assert out.codes.tolist() == [[3, 5], [3, 5]]
        expected = torch.cat([quantizer.codebook[0, 3], quantizer.codebook[1, 5]])
        assert torch.equal(out.quantized, expected.expand(2, 6))
    assert quantizer.output_dim == 6


def test_evaluation_takes_the_largest_logit_without_noise():
    quantizer = init_weights_of(GumbelVectorQuantizer(8, 2, 10, 3)).eval()
    x = rand(60, 8, scale=0.1)
    outs = []
    for seed, tau in ((0, 2.0), (1, 0.1)):
        torch.manual_seed(seed)
        outs.append(quantizer(x, tau))
    best = quantizer.projector(x).view(60, 2, 10).argmax(-1)
    assert torch.equal(outs[0].codes, best)
    assert torch.equal(outs[1].codes, best)
    assert torch.equal(outs[0].quantized, outs[1].quantized)


def test_training_samples_codes_by_their_probability_whatever_the_temperature():
    quantizer = init_weights_of(GumbelVectorQuantizer(2, 1, 4, 3)).train()
    with torch.no_grad():
        quantizer.projector.weight.zero_()
        quantizer.projector.bias.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).log())
    for tau in (2.0, 0.5):
        counts = torch.bincount(quantizer(torch.zeros(20_000, 2), tau).codes[:, 0], minlength=4)
        assert chi_square(counts, 20_000 * torch.tensor([0.4, 0.3, 0.2, 0.1])) < 21  # 3 degrees of freedom, p = 1e-4


def test_probability_perplexity_knows_neither_noise_nor_temperature_and_has_a_gradient():
    quantizer = init_weights_of(GumbelVectorQuantizer(8, 2, 10, 3)).train()
    x = rand(50, 8, scale=0.3).requires_grad_()
    torch.manual_seed(0)
    a = quantizer(x, 2.0)
    torch.manual_seed(1)
    b = quantizer(x, 0.1)
    assert not torch.equal(a.codes, b.codes)
    mean = quantizer.projector(x).view(50, 2, 10).softmax(-1).mean(0)
    expected = sum(math.exp(-sum(p * math.log(p) for p in row)) for row in mean.tolist())
    for out in (a, b, quantizer.eval()(x, 1.0)):
        assert out.prob_perplexity.item() == pytest.approx(expected, rel=1e-5)
        gradients = torch.autograd.grad(out.prob_perplexity, [x, *quantizer.projector.parameters()], retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients)
        torch.testing.assert_close(out.probs_sum, 50 * mean)
        assert not out.probs_sum.requires_grad


def test_code_perplexity_is_of_the_noise_free_choices_without_gradient():
    quantizer = init_weights_of(GumbelVectorQuantizer(8, 2, 10, 3)).train()
    x = rand(50, 8, scale=0.3)
    out = quantizer(x, 2.0)
    best = quantizer.projector(x).view(50, 2, 10).argmax(-1)
    assert not torch.equal(out.codes, best)  # noise is on
    counts = torch.stack([torch.bincount(best[:, g], minlength=10) for g in range(2)])
    assert torch.equal(out.code_counts.long(), counts)
    expected = sum(math.exp(-sum(n / 50 * math.log(n / 50) for n in row if n)) for row in counts.tolist())
    assert perplexity(out.code_counts / len(x)).item() == pytest.approx(expected, rel=1e-5)
    assert not out.code_counts.requires_grad


def test_equal_logits_have_the_full_perplexity_and_one_code_has_2():
    quantizer = init_weights_of(GumbelVectorQuantizer(4, 2, 320, 2)).eval()
    with torch.no_grad():
        quantizer.projector.weight.zero_()
    assert quantizer(rand(9, 4), 1.0).prob_perplexity.item() == pytest.approx(640, abs=0.05)
    with torch.no_grad():
        quantizer.projector.bias[[0, 320]] = 100.0
    out = quantizer(rand(9, 4), 1.0)
    assert out.prob_perplexity.item() == pytest.approx(2, abs=1e-4)
    assert perplexity(out.code_counts / 9).item() == pytest.approx(2, abs=1e-4)


def test_temperature_follows_the_published_curve_of_optimiser_steps():
    def tau(step, end=0.5):
        return gumbel_temperature(step, 2.0, end, 0.999995)

    assert tau(0) == 2
    assert tau(277_258) == pytest.approx(0.5, abs=1e-5)
    assert tau(277_200) > 0.5
    assert tau(300_000) == tau(400_000) == 0.5
    assert tau(599_145, end=0.1) == pytest.approx(0.1, abs=1e-5)
    assert tau(100_000) == pytest.approx(2 * math.exp(-100_000 * -math.log1p(-5e-6)))


def test_the_model_hands_the_temperature_of_its_step_to_the_quantizer():
    model = build(narrow(gumbel_start=2.0, gumbel_end=0.5, gumbel_decay=0.9)).train()
    seen = captured(model.quantizer)
    drawn = model.draw(utterances([16_000]), (0, 0))
    for step in (0, 1, 3, 100):
        model(rand(1, 16_000), drawn, step=step)
    assert [args[1] for args in seen] == pytest.approx([2.0, 1.8, 2 * 0.9**3, 0.5])
    assert [name for name, _ in model.named_buffers()] == []  # no hidden counter to restore
    assert not any("temp" in name for name, _ in model.named_parameters())


# --- Sums and figures -------------------------------------------------------------------------------------------------


def add(*metrics):
    return {name: sum(m[name] for m in metrics) for name in metrics[0]}


def test_figures_of_summed_batches_are_those_of_their_union():
    model = build(narrow("base")).eval()
    audio = torch.cat([rand(2, 16_000, seed=1), rand(3, 16_000, seed=2, scale=0.1)])
    names = [str(i) for i in range(5)]
    with torch.no_grad():
        whole = model(audio, model.draw(utterances([16_000] * 5, names)))
        parts = [
            model(audio[part], model.draw(utterances([16_000] * len(names[part]), names[part])))
            for part in (slice(0, 2), slice(2, 5))
        ]
    union = model.summarize(whole.metrics)
    summed = model.summarize(add(*(part.metrics for part in parts)))
    assert summed == pytest.approx(union, rel=1e-5)
    single = [model.summarize(part.metrics) for part in parts]
    for name in ("prob_perplexity", "code_perplexity"):
        mean = statistics.mean(figures[name] for figures in single)
        assert summed[name] != pytest.approx(mean, rel=1e-3), name
    assert sum(part.num_targets for part in parts) == whole.num_targets
    total = sum(part.losses["contrastive"].item() for part in parts)
    assert whole.losses["contrastive"].item() == pytest.approx(total, rel=1e-5)


def test_figures_are_what_their_names_say():
    model = build(narrow("paper_base")).eval()
    outputs = []
    model.quantizer.register_forward_hook(lambda _, args, out: outputs.append(out))
    audio = rand(2, 16_000)
    drawn = model.draw(utterances([16_000, 12_000], "ab"))
    out = model(audio, drawn, [16_000, 12_000])
    figures = model.summarize(out.metrics)
    codes = outputs[0].codes
    assert not any(value.requires_grad for value in out.metrics.values())
    frames = sum(model.config.frames([16_000, 12_000]))
    assert figures["masked_fraction"] == pytest.approx(len(drawn.masked) / frames)
    assert figures["prob_perplexity"] == pytest.approx(outputs[0].prob_perplexity.item(), rel=1e-4)
    assert figures["code_perplexity"] == pytest.approx(
        perplexity(outputs[0].code_counts / len(outputs[0].codes)).item(), rel=1e-4
    )
    rows = codes.split(list(drawn.counts))
    same = [
        (row[distractors] == row[:, None]).all(-1).float().mean(-1)
        for row, distractors in zip(rows, drawn.distractors.split(list(drawn.counts)), strict=True)
    ]
    assert figures["identical_distractors"] == pytest.approx(torch.cat(same).mean().item(), rel=1e-5)
    distinct = [len({tuple(code) for code in row.tolist()}) for row in rows]
    assert figures["codes_per_utterance"] == pytest.approx(statistics.mean(distinct))


class FixedCodes(nn.Module):
    """A quantizer that says it chose what it was told to."""

    output_dim = 6

    def __init__(self, inner):
        super().__init__()
        self.inner, self.codes = inner, None

    def forward(self, x, temperature):
        return replace(self.inner(x, temperature), codes=self.codes)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32), st.integers(1, 3))
def test_distinct_codes_are_counted_within_each_utterance(groups, entries, seed, count):
    model = build(narrow("base", n_layer=0, n_groups=3, codebook_dim=2, num_distractors=3)).eval()
    model.quantizer = FixedCodes(model.quantizer)
    model.out_linear = nn.Linear(64, 6)
    samples = [4_000 + 900 * i for i in range(count)]
    drawn = model.draw(utterances(samples))
    codes = torch.randint(entries, (len(drawn.masked), groups), generator=generator(seed))
    model.quantizer.codes = codes
    out = model(rand(count, max(samples)), drawn, samples)
    sets = [{tuple(code) for code in row.tolist()} for row in codes.split(list(drawn.counts))]
    assert out.metrics["distinct_codes"].item() == sum(map(len, sets))
    assert out.metrics["utterances"].item() == count


def test_a_baseline_with_everything_masked_asks_for_the_same_targets():
    model = build(narrow("base")).eval()
    blocks, targets = captured(model.positional_embedding), captured(model.quantizer)
    drawn = model.draw(utterances([16_000] * 2, "ab"))
    with torch.no_grad():
        model(rand(2, 16_000), drawn)
        blind = model(rand(2, 16_000), model.baseline(drawn))
        other = model(rand(2, 16_000, seed=5), model.baseline(drawn))
    assert torch.equal(blocks[1][0], model.mask_vector.detach().expand(2, 50, 64))
    assert torch.equal(targets[0][0], targets[1][0])
    assert blind.num_targets == len(drawn.masked)
    assert blind.losses["contrastive"] != other.losses["contrastive"]  # targets still come from the audio


# --- Sub-batches ------------------------------------------------------------------------------------------------------


def test_a_large_batch_has_the_objective_of_the_small_ones_it_is_made_of():
    """One batch of six, cut into parts of two, gives the loss and the gradient of three batches of two."""
    config = ContrastiveConfig(
        n_layer=1, n_head=2, n_embd=32, ffn_dim=32, conv_channels=(32,) * 7, n_entries=8, codebook_dim=4,
        dropout=0.0, attention_dropout=0.0, dropout_input=0.0, dropout_features=0.0, layer_drop=0.0,
        num_distractors=10, sub_batch_seconds=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = config.build().eval()  # without Gumbel noise, whose order would differ
    audio, keys = torch.randn(6, 16_000), [f"utterance-{i}" for i in range(6)]

    def gradient(parts: list[slice]) -> tuple[dict[str, float], list[torch.Tensor]]:
        model.zero_grad()
        sums: dict[str, float] = {}
        for part in parts:
            draws = model.draw(utterances([16_000] * len(keys[part]), keys[part]), (0, 0))
            out = model(audio[part], draws)
            weighted = out.losses["contrastive"] + 0.1 * out.losses["diversity"] + 10 * out.losses["feature_penalty"]
            weighted.backward()
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in out.losses.items()}
        return sums, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    small, small_gradient = gradient([slice(0, 2), slice(2, 4), slice(4, 6)])
    large, large_gradient = gradient([slice(0, 6)])
    assert large == pytest.approx(small, rel=1e-5)
    for one, other in zip(large_gradient, small_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    config.sub_batch_seconds = None  # the fault that this guards against: the diversity loss of all six together
    assert gradient([slice(0, 6)])[0]["diversity"] < 0.99 * small["diversity"]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_a_batch_is_cut_in_order_into_parts_that_hold_no_more_than_allowed(samples, longest):
    parts = slices(cut_batch(samples, longest))
    assert [i for part in parts for i in range(len(samples))[part]] == list(range(len(samples)))
    for part in parts:
        assert len(samples[part]) == 1 or len(samples[part]) * max(samples[part]) <= longest
