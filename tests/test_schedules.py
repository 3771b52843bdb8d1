"""Learning rates by optimiser step, and the one normalisation of gradients, in a real Trainer."""

import contextlib
import logging
import math
import os
import socket
import warnings
from dataclasses import dataclass
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step import Operators
from torch.utils.data import DataLoader

from w2v2 import recipes
from w2v2.data.batch import Batch
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.training.config import TrainConfig
from w2v2.training.optim import OptimConfig, TriStage, WarmupCosine, WarmupLinear
from w2v2.training.pretrain import PretrainTask, pretrain, weighted_sum
from w2v2.training.task import step_seed

# --- Schedules --------------------------------------------------------------------------------------------------------


def test_the_papers_schedule_passes_through_its_published_points():
    lr = recipes.paper_base().optim.schedule
    assert isinstance(lr, WarmupLinear)
    points = {0: 0.0, 16_000: 2.5e-4, 32_000: 5e-4, 216_000: 2.5e-4, 400_000: 0.0, 500_000: 0.0}
    assert [lr(step) for step in points] == pytest.approx(list(points.values()), abs=1e-12)


def test_the_pages_schedule_warms_up_and_follows_a_cosine_to_a_tenth_of_its_peak():
    lr = recipes.base().optim.schedule
    assert isinstance(lr, WarmupCosine)
    points = {
        0: 0.0,
        16_000: 2.5e-4,
        32_000: 5e-4,
        32_000 + 368_000 // 3: 5e-4 * (0.1 + 0.9 * 0.75),  # cos 60 degrees is a half
        216_000: 5e-4 * 0.55,
        400_000: 5e-5,
        900_000: 5e-5,
    }
    assert [lr(step) for step in points] == pytest.approx(list(points.values()), rel=1e-5)


def fairseq_tri_stage(step, peak, total, phases, initial, final):
    """``_decide_stage`` and ``step_update`` of fairseq's tri_stage_lr_scheduler.py, with phase_ratio."""
    warmup, hold, decay = (int(total * share) for share in phases)
    if step < warmup:
        return initial * peak + (peak - initial * peak) / warmup * step
    if step < warmup + hold:
        return peak
    if step <= warmup + hold + decay:
        return peak * math.exp(math.log(final) / decay * (step - warmup - hold))
    return final * peak


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 2_000), st.integers(0, 25_000), st.floats(1e-6, 1e-2), st.floats(0.01, 0.5))
def test_tri_stage_equals_fairseqs(tens, step, peak, final):
    lr = TriStage(peak=peak, total_steps=10 * tens, final_scale=final)
    expected = fairseq_tri_stage(step, peak, 10 * tens, (0.1, 0.4, 0.5), 0.01, final)
    assert lr(step) == pytest.approx(expected, rel=1e-9)


def test_tri_stage_has_the_fine_tuning_points():
    lr = TriStage(peak=5e-5, total_steps=20_000)
    points = {0: 5e-7, 2_000: 5e-5, 9_999: 5e-5, 10_000: 5e-5, 15_000: 5e-5 * math.sqrt(0.05), 20_000: 2.5e-6}
    assert [lr(step) for step in points] == pytest.approx(list(points.values()), rel=1e-6)


SCHEDULES = st.builds(
    lambda kind, peak, warmup, rest: kind(peak=peak, warmup_steps=warmup, total_steps=warmup + rest),
    st.sampled_from([WarmupCosine, WarmupLinear]),
    st.floats(1e-6, 1e-2),
    st.integers(0, 300),
    st.integers(1, 700),
)


@settings(max_examples=60, deadline=None)
@given(SCHEDULES)
def test_the_rate_rises_to_its_peak_without_jumps_and_never_rises_again(lr):
    rates = [lr(step) for step in range(lr.total_steps + 10)]
    up, down = rates[: lr.warmup_steps + 1], rates[lr.warmup_steps :]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert rates[lr.warmup_steps] == pytest.approx(lr.peak)
    assert max(rates) <= lr.peak * (1 + 1e-12)
    end = lr.peak * lr.floor if isinstance(lr, WarmupCosine) else 0.0
    assert rates[lr.total_steps :] == pytest.approx([end] * 10)
    # No step is steeper than the line of the warm-up, or pi / 2 times that of the decay.
    steepest = lr.peak * max(1 / max(lr.warmup_steps, 1), math.pi / 2 / (lr.total_steps - lr.warmup_steps))
    jumps = [abs(b - a) for a, b in pairwise(rates)]
    assert max(jumps) <= steepest * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 100), st.floats(0.01, 1.0))
def test_tri_stage_has_no_jumps_but_at_its_start(tens, final):
    lr = TriStage(peak=1.0, total_steps=10 * tens, final_scale=final)
    rates = [lr(step) for step in range(lr.total_steps + 5)]
    steepest = max(1 / tens, 1 - final ** (1 / (5 * tens)))
    assert max(abs(b - a) for a, b in pairwise(rates)) <= steepest * (1 + 1e-6)


def test_a_schedule_is_a_function_of_the_step_alone():
    lr = WarmupCosine(warmup_steps=10, total_steps=100)
    forwards = [lr(step) for step in range(100)]
    assert [lr(step) for step in reversed(range(100))] == forwards[::-1]


def test_adamw_decays_every_parameter_and_has_the_published_betas():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = recipes.paper_base().optim.build(model.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-6, 0.01)


# --- One gradient -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FixedCountConfig(ContrastiveConfig):
    """Masks of one size whatever the utterance, so that equalising a batch's rows changes none of them."""

    def sample_mask(self, n_frames, rng):
        mask = torch.zeros(n_frames, dtype=torch.bool)
        mask[torch.randperm(n_frames - 1, generator=rng)[:8]] = True
        return mask


def config_of(kind=ContrastiveConfig, **changes):
    config = recipes.base().model
    small = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "ffn_dim": 48,
        "conv_channels": (16,) * 7,
        "conv_norm": "group:4",
        "pos_conv_kernel": 16,
        "n_entries": 8,
        "codebook_dim": 6,
        "num_distractors": 5,
        "mask_length": 4,
    }
    names = ContrastiveConfig.__dataclass_fields__
    return kind(**({name: getattr(config, name) for name in names} | small | changes))


class Recorder(PretrainTask):
    """Keeps what the optimiser is given."""

    def on_fit_start(self):
        self.gradients, self.rates = [], []

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])


CONTRASTIVE = {"contrastive": 1.0, "diversity": 0.0, "feature_penalty": 0.0}
ALL = {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 10.0}
SEED = 11


def fit(model, batches, weights, *, accumulate=1, steps=1, optim=None, kind=Recorder, clip=None, **more):
    task = kind(model, optim or OptimConfig(clip_norm=None), weights, SEED)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **more,
        )
        trainer.fit(task, DataLoader(batches, batch_size=None))
    assert trainer.global_step == steps
    return task


def batch_of(lengths, first=0):
    audio = torch.zeros(len(lengths), max(lengths))
    for i, n in enumerate(lengths):
        audio[i, :n] = torch.randn(n, generator=torch.Generator().manual_seed(first + i))
    ids = [f"utt-{first + i}" for i in range(len(lengths))]
    zeros = [0] * len(ids)
    return Batch(audio, torch.tensor(lengths), torch.tensor(zeros), ids, zeros)


def assert_same_gradients(got, expected, rel=1e-4):
    assert got.keys() == expected.keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    assert total > 0
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rel * gradient.norm() + 1e-6 * total, name


def quiet_model(**changes):
    """No noise but what the keys of the utterances decide; LayerDrop on, whose key is the step."""
    off = {"dropout": 0.0, "attention_dropout": 0.0, "dropout_input": 0.0, "dropout_features": 0.0, "layer_drop": 0.5}
    torch.manual_seed(0)
    model = config_of(FixedCountConfig, **(off | changes)).build()
    model.quantizer.eval()  # Gumbel noise is keyed by the micro-batch
    return model


def test_weights_are_cast_to_bf16_once_for_all_micro_batches_of_a_step_and_again_for_the_next(monkeypatch):
    rows, runs, casts = [batch_of([6_000], first=i) for i in range(6)], {}, {}
    for name in ("kept", "anew"):
        if name == "anew":
            monkeypatch.setattr(Recorder, "casts_kept", lambda task: contextlib.nullcontext())
        with Operators() as seen:
            runs[name] = fit(
                quiet_model(layer_drop=0.0), rows, CONTRASTIVE, accumulate=3, steps=2, precision="bf16-mixed"
            )
        casts[name] = seen.names.count("_foreach_copy_")
    assert casts == {"kept": 4 * 8, "anew": 4 * 12}  # two blocks and two projections; gradients come back six times
    for got, expected in zip(runs["kept"].gradients, runs["anew"].gradients, strict=True):
        for parameter, gradient in expected.items():
            torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=0)


def test_one_batch_of_four_and_four_of_one_and_two_of_two_give_the_same_gradient():
    lengths = [6_000, 6_000, 6_000, 6_000]
    rows = [batch_of([n], first=i) for i, n in enumerate(lengths)]
    runs = {
        "1 x 4": fit(quiet_model(), [batch_of(lengths)], CONTRASTIVE),
        "4 x 1": fit(quiet_model(), rows, CONTRASTIVE, accumulate=4),
        "2 x 2": fit(quiet_model(), [batch_of([6_000] * 2), batch_of([6_000] * 2, 2)], CONTRASTIVE, accumulate=2),
    }
    assert not runs["1 x 4"].model.quantizer.training
    for task in runs.values():
        assert len(task.gradients) == 1
        assert_same_gradients(task.gradients[0], runs["1 x 4"].gradients[0])


ROWS = [([6_000] * 2, 0), ([6_000], 2), ([6_000], 3), ([6_000], 4)]


def run_rank(rank, port, folder):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    batches = [batch_of(*row) for row in ROWS[2 * rank : 2 * rank + 2]]
    task = fit(quiet_model(), batches, CONTRASTIVE, accumulate=2, strategy="ddp", devices=2)
    assert task.trainer.world_size == 2
    assert task.trainer.global_rank == rank
    torch.save(task.gradients[0], folder / f"{rank}.pt")


def test_two_processes_give_the_gradient_of_one_with_their_micro_batches(tmp_path):
    """Of unequal size, so that a mean of the ranks' means would differ."""
    alone = fit(quiet_model(), [batch_of(*row) for row in ROWS], CONTRASTIVE, accumulate=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port, tmp_path), nprocs=2)
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"{rank}.pt"), alone.gradients[0])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_divides_the_sum_of_all_losses_by_all_its_masked_frames(accumulate):
    """Against the definition, without a Trainer: micro-batches of unequal size, all losses, noise and dropout."""
    batches = [batch_of([9_000, 9_000]), batch_of([3_000], first=2), batch_of([5_000, 4_000], first=3)][:accumulate]
    torch.manual_seed(0)
    model = config_of().build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    task = fit(model, batches, ALL, accumulate=accumulate)

    model.load_state_dict(state)
    model.zero_grad()
    model.train()
    targets = []
    for i, batch in enumerate(batches):
        draws = model.draw(batch, (SEED, 0, 0))
        torch.manual_seed(step_seed(SEED, 0, 0, i))
        out = model(batch.audio, draws, batch.lengths.tolist(), step=0)
        (out.losses["contrastive"] + 0.1 * out.losses["diversity"] + 10 * out.losses["feature_penalty"]).backward()
        targets.append(out.num_targets)
    assert accumulate == 1 or len(set(targets)) == 3
    expected = {name: p.grad / sum(targets) for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(task.gradients[0], expected)


def test_the_last_step_of_an_epoch_with_fewer_micro_batches_is_normalised_by_its_own():
    """Three micro-batches, accumulated by two: the second step has one, and its whole gradient."""
    batches = [batch_of([6_000], first=i) for i in range(3)]
    still = OptimConfig(schedule=WarmupCosine(peak=0.0, warmup_steps=1, total_steps=9), clip_norm=None)
    task = fit(quiet_model(layer_drop=0.0), batches, CONTRASTIVE, accumulate=2, steps=2, optim=still)
    alone = fit(quiet_model(layer_drop=0.0), batches[2:], CONTRASTIVE)
    assert_same_gradients(task.gradients[1], alone.gradients[0])


def test_rate_and_temperature_follow_optimiser_steps_not_micro_batches():
    model = config_of(gumbel_start=2.0, gumbel_end=0.1, gumbel_decay=0.5).build()
    temperatures = []
    model.quantizer.register_forward_pre_hook(lambda _, args: temperatures.append(args[1]))
    schedule = WarmupLinear(peak=1e-3, warmup_steps=2, total_steps=6)
    optim = OptimConfig(schedule=schedule, clip_norm=None)
    batches = [batch_of([6_000], first=i) for i in range(8)]
    task = fit(model, batches, ALL, accumulate=2, steps=4, optim=optim)
    assert temperatures == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert task.rates == pytest.approx([schedule(step) for step in (1, 2, 3, 4)])
    assert task.rates == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4])


def test_a_run_draws_the_same_noise_again():
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model = config_of().build()
        torch.manual_seed(int(torch.randint(1_000, ()).item()) + len(gradients))  # whatever state it starts from
        gradients.append(fit(model, [batch_of([6_000] * 2)] * 2, ALL, steps=2).gradients)
    for first, second in zip(*gradients, strict=True):
        for name, gradient in first.items():
            assert torch.equal(gradient, second[name]), name


def test_noise_differs_between_steps_ranks_and_micro_batches():
    seeds = {step_seed(0, step, rank, i) for step in range(5) for rank in range(3) for i in range(3)}
    assert len(seeds) == 45
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_total_is_the_weighted_sum_and_every_loss_must_have_its_weight():
    losses = {"contrastive": torch.tensor(3.0), "diversity": torch.tensor(5.0)}
    assert weighted_sum(losses, {"diversity": 0.1, "contrastive": 2.0}).item() == pytest.approx(6.5)
    for weights in ({"contrastive": 1.0}, {"contrastive": 1.0, "diversity": 1.0, "penalty": 1.0}):
        with pytest.raises(ValueError, match="loss_weights"):
            weighted_sum(losses, weights)


class ClippedRecorder(Recorder):
    """Keeps the norm that is to be clipped, and what clipping leaves of it."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.norms = [self._norm()]
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.norms.append(self._norm())

    def _norm(self):
        return torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm().item()


def test_it_is_the_normalised_gradient_whose_norm_is_clipped():
    task = fit(quiet_model(), [batch_of([6_000] * 4)], CONTRASTIVE, kind=ClippedRecorder, clip=1e-3)
    expected = torch.stack([g.norm() for g in task.gradients[0].values()]).norm().item()
    assert expected > 2e-3
    assert task.norms == pytest.approx([expected, 1e-3], rel=1e-3)


@pytest.mark.parametrize("precision", ["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_every_precision_takes_clipped_steps_or_is_refused_in_words(precision, corpus, tmp_path):
    """``base`` asks for bf16-mixed, where there is a GPU, and clipping at once."""
    config = recipes.base()
    assert config.optim.clip_norm == 1.0
    config.model = config_of()
    config.data = recipes.tiny().data
    config.train = TrainConfig(accelerator="cpu", precision=precision, max_steps=2, log_every=1, val_every=2)
    refusal, model = "", None
    try:
        model = pretrain(config, read_corpus(corpus), tmp_path / "run")
    except UsageError as error:
        refusal = str(error)
    if model is None:
        assert precision in refusal
        assert precision not in ("auto", "32-true", "bf16-mixed")
    else:
        assert all(p.isfinite().all() for p in model.parameters())
