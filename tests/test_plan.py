"""The plan of a run: FLOPs and rates against published figures, masks against exact ones; the measurement itself."""

import copy
import itertools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from math import comb
from pathlib import Path

import pytest
import torch
from conftest import override, utterances
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from w2v2 import recipes
from w2v2.cli.main import main
from w2v2.errors import UsageError
from w2v2.model.flops import expected_coverage, forward_flops, peak_flops, training_flops, utilisation
from w2v2.model.packing import plain_path
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.training.config import PretrainConfig
from w2v2.training.mask_preview import preview_masks, span_lengths
from w2v2.training.plan import Measured, Plan, batch_hours, make_plan, settle

NANO = [
    "--model.n-layer", "1", "--model.n-embd", "48", "--model.ffn-dim", "48", "--data.batch-seconds", "4",
    "--data.max-seconds", "2", "--train.shard", "True", "--model.conv-channels", *7 * ["16"],
    "--loss-weights.diversity", "0.35", "--model.conv-norm", "group:8", "--model.neighbourhood", "0",
    "--loss-weights.neighbourhood", "0",
]  # fmt: skip


def measured(**values) -> Measured:
    """BASE on an imaginary H200: 1,000 audio-seconds per second."""
    usual = {
        "device": "NVIDIA H200", "steps": 20, "micro_seconds": 78.125, "plain": 1e-3, "updating": 1.2e-3,
        "spread": 0.0, "cores": 0.5, "memory_gb": 32.0, "parameters": 95_044_608,
        "corpus_hours": 960.0,
    }  # fmt: skip
    return Measured(**(usual | values))


def plan(recipe: PretrainConfig, *, gpus: int = 1, memory: float | None = None, hours=None, figures=None, **given):
    config = copy.deepcopy(recipe)
    if "accumulate" in given:
        config.train.accumulate = given["accumulate"]
    if "peak" in given:
        config.optim.schedule.peak = given["peak"]
    names = {"accumulate": "train.accumulate", "peak": "optim.schedule.peak"}
    settled = settle(recipe, config, devices=gpus, hours=hours, fixed=[names[name] for name in given])
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
    model = model_config.build().eval()  # in training the last block leaves out what is not masked
    samples = [48_000] * 2
    draws = model.draw(utterances(samples), (0, 0))
    # the fused attention of a CPU is one call that the counter does not know
    # nor is what the fast paths compute twice part of the model
    counting = FlopCounterMode(display=False)
    with plain_path(), sdpa_kernel(SDPBackend.MATH), counting as counter, torch.no_grad():
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
    assert found.cpu_seconds_per_update == found.seconds_per_update / 2
    # 63 micro-batches of 78.125 ms and one of 93.75 ms; 400,000 times
    if gpus == 1:
        assert found.seconds_per_update == pytest.approx(63 * 0.078125 + 0.09375)
        assert found.hours_to_finish == pytest.approx(400_000 * found.seconds_per_update / 3600)
    assert found.hours_heard == pytest.approx(555_556, rel=1e-4)
    assert found.passes == pytest.approx(555_556 / 960, rel=1e-4)


def test_smaller_micro_batches_are_accumulated_more() -> None:
    config = recipes.base()
    config.data.batch_seconds = 40.0  # two crops instead of five
    assert settle(recipes.base(), config, devices=4, hours=None, fixed=[]).train.accumulate == 40


# Vaessen and van Leeuwen, arXiv:2402.13723: the peak that was best for a batch. Theirs for 80 min is the recipe's.
@pytest.mark.parametrize(
    ("seconds", "best"), [(150, 7.9e-5), (300, 1.1e-4), (600, 1.6e-4), (1200, 2.2e-4), (2400, 5e-4)]
)
def test_the_scaled_rate_is_near_the_best_published_ones(seconds: float, best: float) -> None:
    found = plan(recipes.paper_base(), hours=seconds / 3600)
    assert best / 1.5 < found.peak < best * 1.5


def test_settings_that_are_given_stay_and_the_scaled_rate_is_told() -> None:
    found = plan(recipes.base(), accumulate=16, peak=5e-4)
    assert (found.accumulate, found.peak) == (16, 5e-4)
    assert found.scaled_peak == pytest.approx(2.5e-4)  # a quarter of the batch


def test_the_batch_that_would_fill_the_memory_is_told() -> None:
    assert plan(recipes.base()).largest_batch_seconds is None
    fixed = 16e-9 * 95_044_608  # weights, gradients, two moments of Adam
    found = plan(recipes.base(), memory=24)
    assert found.memory_gb == 32.0
    assert found.largest_batch_seconds == pytest.approx(87.5 * (0.9 * 24 - fixed) / (32 - fixed), rel=0.02)


def test_a_sharded_run_needs_its_part_of_what_does_not_depend_on_the_batch() -> None:
    config = recipes.base()
    config.train.shard = True
    fixed = 16e-9 * 95_044_608
    assert plan(recipes.base(), gpus=8).memory_gb == pytest.approx(32 + fixed / 4)  # DDP: the gradient a second time
    assert plan(config, gpus=8).memory_gb == pytest.approx(32 - fixed * 7 / 8)
    assert plan(config, gpus=1).memory_gb == pytest.approx(32)


def test_devices_that_fill_no_whole_machines_are_refused() -> None:
    with pytest.raises(UsageError, match="must be 8 at most"):
        settle(recipes.base(), recipes.base(), devices=9, hours=None, fixed=[])
    config = settle(recipes.base(), recipes.base(), devices=64, hours=None, fixed=[])
    assert (config.train.num_nodes, config.train.devices) == (8, 8)


# --- Masks ------------------------------------------------------------------------------------------------------------


def exact_coverage(frames: int, prob: float, span: int, min_spans: int = 2) -> float:
    """Share of frames masked: n distinct starts of C, each start equally likely, the last frame never masked.

    A frame is left alone when none of the k starts that reach it is drawn: C(C - k, n) / C(C, n).
    """
    low = int(prob * frames / span)
    up = prob * frames / span - low
    total = 0.0
    for n, chance in ((low, 1 - up), (low + 1, up)):
        n = min(max(n, min_spans), frames - 1)
        starts = frames - span if frames - span > n else max(frames - n - 1, n)
        for t in range(frames - 1):
            reach = min(t, starts - 1) - max(t - span + 1, 0) + 1
            total += chance * (1 - comb(starts - max(reach, 0), n) / comb(starts, n))
    return total / frames


@pytest.mark.parametrize(("prob", "span"), [(0.65, 10), (0.65, 5), (0.3, 20)])
def test_coverage_as_drawn_is_the_exact_one(prob: float, span: int) -> None:
    config = recipes.paper_base()
    config.model.mask_prob, config.model.mask_length = prob, span
    for seconds in (1, 2, 4, 8, 15.6):
        masks = preview_masks(config, seconds, 4000)
        assert masks.drawn == pytest.approx(exact_coverage(masks.frames, prob, span), abs=0.01), seconds
    assert masks.drawn == pytest.approx(expected_coverage(prob, span), abs=0.015)


def test_the_exact_probability_is_that_of_all_ways_to_choose_the_starts() -> None:
    frames, span, n = 12, 3, 2
    ways = list(itertools.combinations(range(frames - span), n))
    masked = [len({t for s in starts for t in range(s, s + span)} - {frames - 1}) for starts in ways]
    assert exact_coverage(frames, n * span / frames, span) == pytest.approx(sum(masked) / len(ways) / frames)


def test_coverage_as_trained_is_that_of_the_row_with_fewest() -> None:
    config = recipes.paper_base()
    masks = preview_masks(config, 15.6, 2000)  # five rows
    # Of five draws of a normal distribution the least lies 1.163 standard deviations below the mean.
    drawn = [
        config.model.sample_mask(masks.frames, torch.Generator().manual_seed(i)).float().mean().item()
        for i in range(2000)
    ]
    expected = torch.tensor(drawn).mean() - 1.163 * torch.tensor(drawn).std()
    assert masks.trained == pytest.approx(expected.item(), abs=0.005)
    low, middle, high = masks.spans
    assert low < config.model.mask_length < high and low <= middle <= high  # some are cut, some merged


@pytest.mark.parametrize("seconds", [0.08, 0.1, 0.2, 0.3, 0.5])
def test_short_clips_are_masked_but_not_whole(seconds: float) -> None:
    masks = preview_masks(recipes.base(), seconds, 500)
    assert masks.drawn == pytest.approx(exact_coverage(masks.frames, 0.65, 10), abs=0.015)
    assert 2 / masks.frames - 1e-6 <= masks.trained <= (masks.frames - 1) / masks.frames + 1e-6


def test_spans_are_counted_as_by_hand() -> None:
    rows = ["0110011100", "1111100001", "0000000000"]
    masks = torch.tensor([[c == "1" for c in row] for row in rows])
    assert span_lengths(masks).tolist() == [2, 3, 5, 1]
    masks = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    runs = [len(list(run)) for row in masks.tolist() for masked, run in itertools.groupby(row) if masked]
    assert span_lengths(masks).tolist() == runs


def test_a_model_of_ones_own_is_asked_for_its_own_masks() -> None:
    @dataclass(kw_only=True)
    class Comb(ContrastiveConfig):
        def sample_mask(self, n_frames, rng):
            return torch.arange(n_frames) % 4 == 0

    config = recipes.base()
    config.model = Comb()
    short, long = plan(config).masks
    assert (short.seconds, long.seconds) == (config.data.min_seconds, config.data.max_seconds)
    masks = preview_masks(config, 8.0, 20)
    assert (masks.frames, masks.drawn, masks.trained, masks.spans) == (400, 0.25, 0.25, (1, 1, 1))


# --- The command ------------------------------------------------------------------------------------------------------


def planned(capfd: pytest.CaptureFixture[str], *options: str) -> dict:
    assert main(["plan", "tiny", "--json", *options]) == 0
    return json.loads(capfd.readouterr().out)


def test_what_is_measured_is_a_run_of_the_settings_given(corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # a warm start of any length is not gone through
    options = [*NANO, "--train.shard", "False", "--train.accumulate", "3", "--warm-start.updates", "1000000000"]
    options += ["--probe.every", "2", "--probe.labels", "nowhere"]  # nobody looks into what is measured
    found = planned(capfd, "--steps", "4", *options)
    measured = found["measured"]
    assert (measured["steps"], measured["micro_seconds"], measured["corpus_hours"]) == (4, 4.0, None)
    assert 0 < measured["cores"] < 1.5 * torch.get_num_threads() and measured["spread"] >= 0
    seconds = 4.0 * (2 * measured["plain"] + measured["updating"])
    assert found["seconds_per_update"] == pytest.approx(seconds) and seconds > 0
    model = override(recipes.tiny(), options, "").model.build()
    assert measured["parameters"] == sum(p.numel() for p in model.parameters())
    # a process that has torch and Lightning, but not this one's memory, whatever other tests left here
    assert 0.2 < measured["memory_gb"] < 1.5
    on_data = planned(capfd, "--steps", "3", "--data", str(corpus), *NANO)["measured"]
    assert 2.0 <= on_data["micro_seconds"] <= 4.0
    assert on_data["corpus_hours"] == pytest.approx(16 * 3 / 3600, rel=0.2)


def test_the_command_gives_a_table_and_json(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "2", "--memory", "16", "--hours-per-update", "0.01", "--steps", "2", *NANO]
    found = planned(capfd, *options)
    assert found.keys() == {*Plan.__dataclass_fields__, "command"}
    assert found["accumulate"] == round(36 / (2 * 4))
    assert found["peak"] == pytest.approx(1.2e-3 * (2 * found["accumulate"] * 4 / 12) ** 0.5, rel=1e-2)
    words = shlex.split(found["command"])
    assert words[:5] == ["w2v2", "pretrain", "tiny", "--data", "DIR"]
    settled, again = override(recipes.tiny(), NANO, ""), override(recipes.tiny(), words[5:], "")
    settled.train.devices, settled.train.accumulate = 2, found["accumulate"]
    settled.optim.schedule.peak = found["peak"]
    assert again == settled
    assert main(["plan", "tiny", *options]) == 0
    table = capfd.readouterr().out
    assert "micro-batches each per update" in table and "masked of 2 s" in table


KILLED = """
import os
import signal
from dataclasses import dataclass

import torch
from w2v2 import recipes
from w2v2.model.pretraining import ContrastiveConfig


@dataclass(kw_only=True)
class Heavy(ContrastiveConfig):
    def build(self):
        os.kill(os.getpid(), signal.SIGKILL)  # as a kernel without memory left does


@dataclass(kw_only=True)
class Greedy(ContrastiveConfig):
    def build(self):
        return torch.empty(2**55)


def heavy():
    return recipes.PretrainConfig(model=Heavy(), data=recipes.tiny().data)


def greedy():
    return recipes.PretrainConfig(model=Greedy(), data=recipes.tiny().data)
"""


@pytest.mark.parametrize("recipe", ["heavy", "greedy"])
def test_steps_that_run_out_of_memory_are_one_line(
    recipe: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(KILLED)
    assert main(["plan", f"{tmp_path}/mine.py:{recipe}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "ran out of memory, or were killed; lower --data.batch-seconds" in line


def test_a_file_of_the_folder_is_not_taken_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "w2v2.py").write_text("raise SystemExit('not the package')")
    command = [str(Path(sys.executable).parent / "w2v2"), "plan", "tiny", "--steps", "2", *NANO]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "--gpus must be 1 or more"),
        (["--train.max-step", "2"], "Unrecognized options: --train.max-step"),
        (["--data", "nowhere"], "nowhere"),
        (["--data.batch-seconds", "-1"], "error: --data.batch-seconds must be more than 0"),
        (["--model.n-head", "5"], "must be a multiple of --model.n-head"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert main(["plan", "tiny", *options]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_the_recipes_batch_is_the_published_one() -> None:
    for name, hours in (("base", 1.39), ("paper_base", 1.39), ("paper_large_lv60k", 2.1), ("adapt", 1.39)):
        assert batch_hours(getattr(recipes, name)()) == pytest.approx(hours, abs=0.05), name
