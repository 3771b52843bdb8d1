"""The plan of a run: FLOPs, arithmetic and warnings against published figures; the measurement against the run."""

import copy
import json
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from w2v2 import recipes
from w2v2.cli.main import main
from w2v2.cli.options import override
from w2v2.errors import UsageError
from w2v2.model.flops import forward_flops, peak_flops, training_flops, utilisation
from w2v2.training.config import PretrainConfig
from w2v2.training.plan import Measured, Plan, batch_hours, make_plan, measure, middle_mean, published_wer, settle

NANO = [
    "--model.n-layer", "1", "--model.n-embd", "48", "--model.ffn-dim", "48", "--data.batch-seconds", "4",
    "--data.max-seconds", "2", "--train.shard", "True", "--model.conv-channels", *7 * ["16"],
    "--loss-weights.diversity", "0.35", "--model.conv-norm", "group:8",
]  # fmt: skip


def measured(**values) -> Measured:
    """BASE on an imaginary H200: 1,000 audio-seconds per second."""
    usual = {
        "device": "NVIDIA H200", "steps": 20, "micro_seconds": 78.125, "plain": 1e-3, "updating": 1.2e-3,
        "spread": 0.0, "cpu_plain": None, "cpu_updating": None, "memory_gb": 30.0, "reserved_gb": 32.0,
        "parameters": 95_044_608, "corpus_hours": 960.0,
    }  # fmt: skip
    return Measured(**(usual | values))


def plan(recipe: PretrainConfig, *, gpus: int = 1, memory: float | None = None, hours=None, figures=None, **given):
    config = copy.deepcopy(recipe)
    if "accumulate" in given:
        config.train.accumulate = given["accumulate"]
    if "peak" in given:
        config.optim.schedule.peak = given["peak"]
    names = {"accumulate": "--train.accumulate", "peak": "--optim.schedule.peak"}
    options = [names[name] for name in given]
    settled = settle(recipe, config, devices=gpus, hours_per_update=hours, given=options)
    return make_plan(recipe, settled, figures or measured(), memory)


def test_flops_of_the_released_base_are_those_of_the_reference() -> None:
    forward = forward_flops(recipes.paper_base().model, 12.0)
    published = {"convolutions": 4.91, "linears": 8.48, "attention": 1.10, "positional": 0.47, "rest": 0.07}
    assert forward.keys() == published.keys()
    for name, gigaflops in published.items():
        assert forward[name] / 1e9 == pytest.approx(gigaflops, abs=0.006), name
    assert training_flops(recipes.paper_base().model, 12.0) / 1e9 == pytest.approx(45.1, abs=0.05)


@pytest.mark.parametrize("name", ["paper_base", "base", "tiny"])
def test_flops_are_what_torch_counts(name: str) -> None:
    config = getattr(recipes, name)()
    model_config = config.model
    model_config.n_layer, model_config.layer_drop = 2, 0.0
    model = model_config.build()
    samples = [48_000] * 2
    draws = model.draw(samples, [("a",), ("b",)], step_key=(0,))
    # the fused attention of a CPU is one call that the counter does not know
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 48_000), draws)
    counted = counter.get_total_flops() / 6.0  # 2 x 3 s
    assert sum(forward_flops(model_config, 3.0).values()) == pytest.approx(counted, rel=0.02)


def test_peaks_are_found_by_the_device_name_and_unknown_ones_are_none() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB") == 125e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("NVIDIA L40S") is None
    assert peak_flops("CPU, 2 threads") is None


def test_utilisation_is_the_share_of_all_devices_peak() -> None:
    # 45.1 GFLOP per second of audio; 8 A100 that take 27,660 s of it a second do half of their 312 TFLOP/s each
    flops = training_flops(recipes.paper_base().model, 12.0)
    assert utilisation(flops, 27_660, 8, 312e12) == pytest.approx(0.5, abs=0.001)
    assert utilisation(flops, 27_660, 4, 312e12) == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize(("gpus", "accumulate"), [(1, 64), (2, 32), (8, 8), (64, 1)])
def test_the_batch_is_kept_on_any_number_of_devices(gpus: int, accumulate: int) -> None:
    found = plan(recipes.base(), gpus=gpus)
    assert found.accumulate == accumulate
    assert found.peak == 5e-4
    assert found.hours_per_update == pytest.approx(64 * 78.125 / 3600)
    assert found.warnings == ()
    # 63 micro-batches of 78.125 ms and one of 93.75 ms; 400,000 times
    if gpus == 1:
        assert found.seconds_per_update == pytest.approx(63 * 0.078125 + 0.09375)
        assert found.hours_to_finish == pytest.approx(400_000 * found.seconds_per_update / 3600)
    assert found.hours_heard == pytest.approx(555_556, rel=1e-4)
    assert found.passes == pytest.approx(555_556 / 960, rel=1e-4)


def test_smaller_micro_batches_are_accumulated_more() -> None:
    config = recipes.base()
    config.data.batch_seconds = 40.0  # two crops instead of five
    assert settle(recipes.base(), config, devices=4, hours_per_update=None, given=[]).train.accumulate == 40


# Vaessen and van Leeuwen, arXiv:2402.13723: the peak that was best for a batch. Theirs for 80 min is the recipe's.
@pytest.mark.parametrize(
    ("seconds", "best"), [(150, 7.9e-5), (300, 1.1e-4), (600, 1.6e-4), (1200, 2.2e-4), (2400, 5e-4)]
)
def test_the_scaled_rate_is_near_the_best_published_ones(seconds: float, best: float) -> None:
    found = plan(recipes.paper_base(), hours=seconds / 3600)
    assert best / 1.5 < found.peak < best * 1.5
    assert not any("too high" in text or "is low" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accumulate": 1, "peak": 5e-4}, "accumulation 1 and a peak of 0.0005"),
        ({"accumulate": 8, "peak": 5e-4}, "0.17 h of audio per update where the recipe has 1.39, at a peak of 0.0005"),
        ({"accumulate": 1}, "78 s of audio per update: from 150 s on"),
        ({"accumulate": 1, "peak": 7.3e-6}, "a peak of 7.3e-06 is low for 78 s"),
    ],
)
def test_published_failures_are_warned_of(given: dict[str, float], said: str) -> None:
    assert any(said in text for text in plan(recipes.base(), **given).warnings)


def test_a_small_model_is_held_to_its_recipe_alone() -> None:
    figures = measured(parameters=1_300_000, micro_seconds=12.0)
    assert plan(recipes.tiny(), figures=figures).warnings == ()
    assert plan(recipes.tiny(), figures=figures).wer is None
    assert plan(recipes.tiny(), figures=figures, peak=1e-4).warnings[0].startswith("a peak of 0.0001 is low")


def test_memory_is_warned_of_with_the_batch_that_would_fit() -> None:
    assert plan(recipes.base(), memory=80).warnings == ()
    found = plan(recipes.base(), memory=24)
    assert "32.0 GB are needed on each device, 24 are there" in found.warnings[0]
    fixed = 16e-9 * 95_044_608  # weights, gradients, two moments of Adam
    assert found.largest_batch_seconds == pytest.approx(87.5 * (0.9 * 24 - fixed) / (32 - fixed), rel=0.02)


def test_a_sharded_run_needs_its_part_of_what_does_not_depend_on_the_batch() -> None:
    config = recipes.base()
    config.train.shard = True
    fixed = 16e-9 * 95_044_608
    assert plan(recipes.base(), gpus=8).memory_gb == pytest.approx(32 + fixed / 4)  # DDP: the gradient a second time
    assert plan(config, gpus=8).memory_gb == pytest.approx(32 - fixed * 7 / 8)
    assert plan(config, gpus=1).memory_gb == pytest.approx(32)


def test_the_published_table_is_read_at_its_rows_and_between_them() -> None:
    assert published_wer(66_667) == pytest.approx((8.95, 22.65))
    between = published_wer(100_000)
    assert between is not None and 7.25 < between[0] < 8.95 and 18.1 < between[1] < 22.65
    assert published_wer(2_000) is None
    assert published_wer(10**7) == published_wer(533_333)


def test_devices_that_fill_no_whole_machines_are_refused() -> None:
    with pytest.raises(UsageError, match="--gpus must be 8 at most"):
        settle(recipes.base(), recipes.base(), devices=9, hours_per_update=None, given=[])
    config = settle(recipes.base(), recipes.base(), devices=64, hours_per_update=None, given=[])
    assert (config.train.num_nodes, config.train.devices) == (8, 8)


def test_the_middle_mean_does_not_see_outliers() -> None:
    assert middle_mean([1.0, 2.0, 3.0, 4.0, 100.0]) == 3.0
    assert middle_mean([5.0]) == 5.0


def test_what_is_measured_is_a_run_of_the_settings_given(corpus: Path) -> None:
    config = recipes.tiny()
    config.model.n_layer, config.model.n_embd, config.model.ffn_dim = 1, 48, 48
    config.data.batch_seconds, config.data.max_seconds = 4.0, 2.0
    config.train.accumulate = 3
    figures = measure(config, 4)
    assert figures.steps == 4
    assert figures.micro_seconds == 4.0
    assert (
        figures.cpu_updating is not None and 0 < figures.cpu_updating < 2 * torch.get_num_threads() * figures.updating
    )
    assert figures.parameters == sum(p.numel() for p in config.model.build().parameters())
    assert figures.corpus_hours is None
    # a process that has torch, Lightning and matplotlib, but not this one's memory, whatever other tests left here
    assert 0.2 < figures.memory_gb < 1.5
    config.data.sources = (str(corpus),)
    on_data = measure(config, 3)
    assert 2.0 <= on_data.micro_seconds <= 4.0
    assert on_data.corpus_hours == pytest.approx(16 * 3 / 3600, rel=0.2)


def test_the_command_gives_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["plan", "tiny", "--gpus", "2", "--memory", "16", "--hours-per-update", "0.01", "--steps", "2", *NANO]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == Plan.__dataclass_fields__.keys()
    assert found["accumulate"] == round(36 / (2 * 4))
    assert found["peak"] == pytest.approx(1.2e-3 * (2 * found["accumulate"] * 4 / 12) ** 0.5, rel=1e-2)
    words = shlex.split(found["command"])
    assert words[:5] == ["w2v2", "pretrain", "tiny", "--data", "DIR"]
    planned, again = override(recipes.tiny(), NANO, ""), override(recipes.tiny(), words[5:], "")
    planned.train.devices, planned.train.accumulate = 2, found["accumulate"]
    planned.optim.schedule.peak = found["peak"]
    assert again == planned
    assert main(call) == 0
    assert "micro-batches each per update" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "--gpus must be more than 0"),
        (["--train.max-step", "2"], "Unrecognized options: --train.max-step"),
        (["--data", "nowhere"], "nowhere"),
        (["--model.n-head", "5"], "must be a multiple of n-head"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert main(["plan", "tiny", *options]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_the_recipes_batch_is_the_published_one() -> None:
    for name, hours in (("base", 1.39), ("paper_base", 1.39), ("paper_large_lv60k", 2.1), ("adapt", 1.39)):
        assert batch_hours(getattr(recipes, name)()) == pytest.approx(hours, abs=0.05), name
