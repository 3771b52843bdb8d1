"""``w2v2 plan``: what a pretraining run will cost and give, from a few measured steps and published figures.

The steps are those of ``train.pretrain`` itself, in a process of its own. Published: Vaessen and van Leeuwen
(arXiv:2402.13723; github.com/nikvaessen/w2v2-batch-size), BASE on LibriSpeech; fairseq issues, named in the warnings.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from w2v2.data.config import DataConfig
from w2v2.data.corpora import Split, Splits, read_corpora
from w2v2.errors import JobError, UsageError
from w2v2.model.flops import peak_flops, training_flops, utilisation
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.serial import load_config, save_config, to_dict
from w2v2.training.config import PretrainConfig

WARM_UP_STEPS = 5


LENGTHS = 16
"""Batches of other crops that a CPU meets before the measured steps."""


# Hours heard, greedy WER on test-clean and test-other after fine-tuning on 100 h; middles of the published ranges.
_WER = (
    (2_083, 37.2, 64.9), (4_167, 30.0, 57.8), (8_333, 22.65, 50.1), (16_667, 16.7, 40.7), (33_333, 11.7, 29.5),
    (66_667, 8.95, 22.65), (133_333, 7.25, 18.1), (266_667, 6.26, 15.45), (533_333, 5.96, 15.7),
)  # fmt: skip


_BASE_SIZE = 50_000_000


_SAFE_SECONDS = 150


# --- Measurement ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a short run took, on one device."""

    device: str
    steps: int
    """Optimiser steps measured, those of the warm-up left out."""
    micro_seconds: float
    """Audio in a micro-batch, mean."""
    plain: float
    """Seconds per second of audio of a micro-batch without an update; mean of the middle half."""
    updating: float
    """The same with the update."""
    spread: float
    """Middle half of the same, its width over its middle."""
    cpu_plain: float | None
    """As ``plain``, of the process's own time on the CPU's cores, all its threads together, which others on the machine
    hardly change; None on a GPU."""
    cpu_updating: float | None
    """The same with the update."""
    memory_gb: float
    """Peak, GB (1e9 bytes): resident set of the process on a CPU, allocated by tensors on a GPU."""
    reserved_gb: float
    """Peak that the process took of the device, GB; on a CPU as ``memory_gb``."""
    parameters: int
    corpus_hours: float | None = None
    """Of the training split, when real audio was given."""

    def seconds_per_update(self, accumulate: int) -> float:
        """Of an optimiser step of so many micro-batches."""
        return self.micro_seconds * ((accumulate - 1) * self.plain + self.updating)

    def cpu_seconds_per_update(self, accumulate: int) -> float | None:
        """The same of the time on the CPU's cores; with one thread, what a step takes on a machine all of its own."""
        if self.cpu_plain is None or self.cpu_updating is None:
            return None
        return self.micro_seconds * ((accumulate - 1) * self.cpu_plain + self.cpu_updating)


def measure(config: PretrainConfig, steps: int = 20) -> Measured:
    """Pretrain for some steps in a process of its own, on the configuration's data or on noise of its crops' shape.

    Args:
        config: the run; more than two accumulated micro-batches are not measured but reckoned.
        steps: optimiser steps, after a few to warm up.

    Raises:
        UsageError: the batch does not fit into the device's memory.
        JobError: the steps failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="w2v2-plan-") as name:
        folder = Path(name)
        short = copy.deepcopy(config)
        short.train.max_steps = WARM_UP_STEPS + steps + 1  # a step ends where the next one begins
        short.train.accumulate = min(config.train.accumulate, 2)
        short.train.devices = short.train.num_nodes = 1
        short.train.val_every = short.train.checkpoint_every = 10**6
        if not short.data.sources:
            count = math.ceil(
                (short.train.max_steps + 2) * short.train.accumulate * crops(config.data, config.data.max_seconds)
            )
            short.data.sources = (str(_noise(folder / "noise", config.data.max_seconds, count)),)
            short.data.train_split, short.data.weights = "train", ()
        short.check()
        save_config(short, folder / "config.json")
        child = [
            sys.executable,
            "-m",
            "w2v2.training.plan",
            str(folder),
            "noise" if not config.data.sources else "data",
        ]
        done = subprocess.run(child, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "out of memory" in done.stderr.lower() or done.returncode == -9:
                raise UsageError(
                    f"--data.batch-seconds {config.data.batch_seconds:g} does not fit into this device's memory; lower "
                    "it, or set --train.activation-checkpointing True"
                )
            raise JobError(f"the measured steps failed: {said}")
        return Measured(**json.loads((folder / "measured.json").read_text()))


def crops(data: DataConfig, seconds: float) -> int:
    """Whole crops of so many seconds in a micro-batch."""
    return max(int(data.batch_seconds / seconds + 1e-9), 1)


def _noise(root: Path, seconds: float, count: int) -> Path:
    """A corpus of noise: ``count`` utterances to train on, a batch to validate on; on disk only a few."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("valid", 4)):
        folder = root / split / split
        folder.mkdir(parents=True)
        for i in range(number):
            path = folder / f"{split}-{i}.wav"
            if i < 16:
                samples = 0.1 * rng.standard_normal(math.ceil(seconds * SAMPLE_RATE))
                soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
            else:
                os.link(folder / f"{split}-{i % 16}.wav", path)
    return root


class _Clock:
    """Notes when each training forward pass begins: on a GPU by the device's own clock, so that nothing waits."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self.cpu_marks: list[float] = []
        self.audio: list[float] = []

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            return
        audio = args[0]
        if audio.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
            self.cpu_marks.append(time.process_time())
        lengths = args[2] if len(args) > 2 else None
        self.audio.append((audio.numel() if lengths is None else sum(lengths)) / SAMPLE_RATE)

    def per_audio(self) -> list[float]:
        """Seconds from each mark to the next, per second of audio."""
        if self.cpu_marks:
            return self._over_audio(two - one for one, two in pairwise(self.marks))
        torch.cuda.synchronize()
        return self._over_audio(one.elapsed_time(two) / 1000 for one, two in pairwise(self.marks))

    def cpu_per_audio(self) -> list[float]:
        """Seconds of the process on the CPU's cores, likewise; empty on a GPU."""
        return self._over_audio(two - one for one, two in pairwise(self.cpu_marks))

    def _over_audio(self, seconds: Iterable[float]) -> list[float]:
        return [took / audio for took, audio in zip(seconds, self.audio, strict=False)]


def _measure_here(folder: Path, kind: str) -> None:
    """The body of the measuring process: a whole short run, its validation, checkpoint and report too."""
    from w2v2.recipes import load_recipe
    from w2v2.report import write_run_report
    from w2v2.training.pretrain import pretrain

    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    if ".py:" in recipe:
        load_recipe(recipe, PretrainConfig)  # so that the file's own types are known
    config = load_config(folder / "config.json", PretrainConfig)
    splits = read_corpora(config.data.sources, config.data.weights)
    train = splits.get(config.data.train_split, splits["train"])
    hours = train.seconds / 3600 if kind == "data" else None
    few: Splits = {"train": train, "valid": Split.of(islice(splits["valid"], 32))}
    clock, build = _Clock(), config.model.build
    cuda = torch.cuda.is_available() and config.train.accelerator != "cpu"

    def timed() -> Any:
        model = build()
        if not cuda:
            _meet_other_lengths(model, config.data)
        model.register_forward_pre_hook(clock)
        return model

    config.model.build = timed  # type: ignore[method-assign]
    model = pretrain(config, few, folder / "run")
    write_run_report(folder / "run")
    every = config.train.accumulate
    skip = WARM_UP_STEPS * every
    plain, updating = _by_kind(clock.per_audio(), every)
    cpu_plain, cpu_updating = _by_kind(clock.cpu_per_audio(), every)
    low, high = np.quantile(updating, [0.25, 0.75])
    rss = _peak_rss()
    measured = Measured(
        device=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        steps=len(updating),
        micro_seconds=float(np.mean(clock.audio[skip:])),
        plain=middle_mean(plain or updating),
        updating=middle_mean(updating),
        spread=float((high - low) / middle_mean(updating)),
        cpu_plain=middle_mean(cpu_plain or cpu_updating) if cpu_updating else None,
        cpu_updating=middle_mean(cpu_updating) if cpu_updating else None,
        memory_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else rss,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if cuda else rss,
        parameters=sum(p.numel() for p in model.parameters()),
        corpus_hours=hours,
    )
    (folder / "measured.json").write_text(json.dumps(asdict(measured)))


def _meet_other_lengths(model: Any, data: DataConfig) -> None:
    """Passes over batches of crops of some lengths: kernels are kept for each, and gaps between buffers of each size.

    Twenty steps meet few lengths, or one, a run meets many; what they add is a tenth of a small model's memory.
    """
    for seconds in np.linspace(data.min_seconds, data.max_seconds, LENGTHS):
        samples = [round(seconds * SAMPLE_RATE)] * crops(data, data.max_seconds)
        draws = model.draw(samples, [("length", i) for i in range(len(samples))], step_key=("length",))
        torch.stack(list(model(torch.randn(len(samples), samples[0]), draws).losses.values())).sum().backward()
    model.zero_grad(set_to_none=True)


def _by_kind(per_audio: Sequence[float], every: int) -> tuple[list[float], list[float]]:
    """Figures of the micro-batches after the warm-up: those without an update, and those with one."""
    warm = list(enumerate(per_audio))[WARM_UP_STEPS * every :]
    return [x for i, x in warm if (i + 1) % every], [x for i, x in warm if (i + 1) % every == 0]


def middle_mean(values: Sequence[float]) -> float:
    """Mean of the middle half: hardly moved by pauses of the machine, and finer than the median of a few."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return float(np.mean(ordered[cut : len(ordered) - cut]))


def _peak_rss() -> float:
    """GB. Linux counts the parent's into ``ru_maxrss`` of a process that was started by ``vfork``, not into this."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


# --- Plan -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run before it starts."""

    recipe: str
    devices: int
    accumulate: int
    batch_seconds: float
    hours_per_update: float
    """Audio of all devices and micro-batches, hours."""
    recipe_hours_per_update: float
    peak: float
    scaled_peak: float
    """The recipe's peak times the root of the ratio of the two batches."""
    updates: int
    seconds_per_update: float
    cpu_seconds_per_update: float | None
    """Of one device's process, on the CPU's cores; None on a GPU."""
    audio_seconds_per_second: float
    """Of all devices."""
    hours_to_finish: float
    hours_heard: float
    passes: float | None
    """Over the training split; None without data."""
    memory_gb: float
    memory_limit_gb: float | None
    largest_batch_seconds: float | None
    """Micro-batch that would about fill nine tenths of the memory."""
    wer: tuple[float, float] | None
    """Test-clean and test-other, %, as published for so many hours; None: fewer hours than any published run."""
    utilisation: float | None
    """Of the device's peak FLOP/s."""
    warnings: tuple[str, ...]
    command: str
    measured: Measured


def settle(
    recipe: PretrainConfig,
    config: PretrainConfig,
    *,
    devices: int,
    hours_per_update: float | None,
    given: Sequence[str],
) -> PretrainConfig:
    """The configuration with devices, accumulation and learning rate for the batch that is wanted.

    Args:
        recipe: the recipe as it is, whose batch and learning rate belong together.
        config: the same with the user's overrides.
        devices: processes in all.
        hours_per_update: audio of an optimiser step; None: the recipe's.
        given: options on the command line; accumulation or peak among them stay as they are.
    """
    config = copy.deepcopy(config)
    names = {word.split("=")[0].replace("_", "-") for word in given}
    config.train.num_nodes = -(-devices // 8)
    config.train.devices = -(-devices // config.train.num_nodes)
    if config.train.devices * config.train.num_nodes != devices:
        raise UsageError(f"--gpus must be 8 at most, or divide evenly over machines of 8 at most, got {devices}")
    wanted = hours_per_update or batch_hours(recipe)
    if "--train.accumulate" not in names:
        micro = crops(config.data, config.data.max_seconds) * config.data.max_seconds / 3600
        config.train.accumulate = max(round(wanted / (micro * devices)), 1)
    if "--optim.schedule.peak" not in names:
        config.optim.schedule.peak = float(f"{_scaled_peak(recipe, config):.3g}")
    return config


def batch_hours(config: PretrainConfig) -> float:
    """Audio of an optimiser step, hours, of whole crops: 1.39 for ``base``, of 1.56 that the limit allows."""
    data, train = config.data, config.train
    return crops(data, data.max_seconds) * data.max_seconds * train.accumulate * train.devices * train.num_nodes / 3600


def _scaled_peak(recipe: PretrainConfig, config: PretrainConfig) -> float:
    return recipe.optim.schedule.peak * math.sqrt(batch_hours(config) / batch_hours(recipe))


def make_plan(recipe: PretrainConfig, config: PretrainConfig, measured: Measured, memory: float | None) -> Plan:
    """Reckon what a settled configuration costs and gives, from what was measured.

    Args:
        recipe: the recipe as it is.
        config: from :func:`settle`.
        measured: with the same micro-batch.
        memory: of a device, GB (1e9 bytes).
    """
    train = config.train
    devices = train.devices * train.num_nodes
    seconds = measured.seconds_per_update(train.accumulate)
    heard = measured.micro_seconds * train.accumulate * devices
    updates = train.max_steps or config.optim.schedule.total_steps
    fixed = 16e-9 * measured.parameters
    if train.shard:
        fixed /= devices
    # Across processes DDP keeps the gradient a second time, in its buckets.
    needed = measured.reserved_gb + (4e-9 * measured.parameters if devices > 1 and not train.shard else 0)
    needed -= 16e-9 * measured.parameters - fixed
    largest = None
    if memory is not None:
        share = max(0.9 * memory - fixed, 0) / max(needed - fixed, 1e-9)
        largest = float(f"{config.data.batch_seconds * share:.2g}")
    peak_speed = peak_flops(measured.device)
    speed = heard / seconds
    flops = training_flops(config.model, config.data.max_seconds)
    hours = heard * updates / 3600
    return Plan(
        recipe=config.recipe,
        devices=devices,
        accumulate=train.accumulate,
        batch_seconds=config.data.batch_seconds,
        hours_per_update=heard / 3600,
        recipe_hours_per_update=batch_hours(recipe),
        peak=config.optim.schedule.peak,
        scaled_peak=_scaled_peak(recipe, config),
        updates=updates,
        seconds_per_update=seconds,
        cpu_seconds_per_update=measured.cpu_seconds_per_update(train.accumulate),
        audio_seconds_per_second=speed,
        hours_to_finish=seconds * updates / 3600,
        hours_heard=hours,
        passes=hours / measured.corpus_hours if measured.corpus_hours else None,
        memory_gb=needed,
        memory_limit_gb=memory,
        largest_batch_seconds=largest,
        wer=published_wer(hours) if measured.parameters >= _BASE_SIZE else None,
        utilisation=utilisation(flops, speed, devices, peak_speed) if peak_speed else None,
        warnings=tuple(_warnings(recipe, config, measured.parameters, hours, needed, memory)),
        command=_command(recipe, config),
        measured=measured,
    )


def published_wer(hours: float) -> tuple[float, float] | None:
    """WER on test-clean and test-other (greedy, fine-tuned on 100 h) of BASE after so many hours heard; None: too few.

    Linear in the logarithm of the hours; beyond the last published run, its.
    """
    if hours < _WER[0][0]:
        return None
    logs = np.log([row[0] for row in _WER])
    clean, other = (float(np.interp(math.log(hours), logs, [row[i] for row in _WER])) for i in (1, 2))
    return clean, other


def _warnings(
    recipe: PretrainConfig,
    config: PretrainConfig,
    parameters: int,
    hours: float,
    needed: float,
    memory: float | None,
) -> list[str]:
    """Where published runs failed. All are of BASE; smaller models are held to their recipe alone."""
    found = []
    base = parameters >= _BASE_SIZE
    batch, peak, scaled = batch_hours(config), config.optim.schedule.peak, _scaled_peak(recipe, config)
    one = config.train.accumulate * config.train.devices * config.train.num_nodes == 1
    advice = f"use {scaled:.2g} (root scaling), or accumulate more"
    if one and base and peak > 1.5 * scaled:
        found.append(
            f"one device, accumulation 1 and a peak of {peak:g}: published runs stay at chance, 6.65 bits, or collapse "
            f"(fairseq #3744, #3842, #3869); {advice}"
        )
    elif batch < 0.9 * batch_hours(recipe) and peak > 1.5 * scaled:
        found.append(
            f"{batch:.2f} h of audio per update where the recipe has {batch_hours(recipe):.2f}, at a peak of {peak:g}: "
            f"too high for so small a batch; {advice}"
        )
    if base and 3600 * batch < _SAFE_SECONDS:
        found.append(
            f"{3600 * batch:.0f} s of audio per update: from {_SAFE_SECONDS} s on, published runs are safe; at 87.5 s "
            "two rates gave 44.7 / 70.4 and 21.4 / 48.3 % WER after 9,722 h (nikvaessen/w2v2-batch-size)"
        )
    if peak < scaled / 4:
        found.append(
            f"a peak of {peak:g} is low for {3600 * batch:.0f} s of audio per update: 7.3e-6 at 87.5 s gave 44.7 / "
            f"70.4 % WER where a higher one gave 21.4 / 48.3 (nikvaessen/w2v2-batch-size); use {scaled:.2g}"
        )
    if base and hours < _WER[0][0]:
        found.append(
            f"{hours:,.0f} h heard are fewer than any published run has; the shortest, {_WER[0][0]:,} h, gave 37 / 65 "
            "% WER after 100 h of labels; without pretraining 70 / 84"
        )
    if memory is not None and needed > memory:
        found.append(f"{needed:.1f} GB are needed on each device, {memory:g} are there; lower --data.batch-seconds")
    return found


def _command(recipe: PretrainConfig, config: PretrainConfig) -> str:
    """What starts the run that was planned: every setting in which it differs from its recipe."""
    words = ["w2v2", "pretrain", config.recipe]
    for source in config.data.sources or ("DIR",):
        words += ["--data", source]
    usual = dict(_settings(to_dict(recipe)))
    for name, value in _settings(to_dict(config)):
        if value != usual[name] and name not in ("--recipe", "--data.sources"):
            words += [name, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _settings(values: dict[str, Any], under: str = "--") -> Iterator[tuple[str, Any]]:
    """Flag and value of each field of a configuration, as ``to_dict`` gives it."""
    for name, value in values.items():
        flag = under + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _settings(value, f"{flag}.")
        elif name != "_type":
            yield flag, value


def plan_table(plan: Plan) -> list[str]:
    """Lines for a person."""
    limit = f" of {plan.memory_limit_gb:g}" if plan.memory_limit_gb is not None else ""
    fill = f"; micro-batches of about {plan.largest_batch_seconds:g} s would fill it" if limit else ""
    days = plan.hours_to_finish / 24
    rows = [
        ("devices", f"{plan.devices} ({plan.measured.device}), {plan.accumulate} micro-batches each per update"),
        ("audio per update", f"{plan.hours_per_update:.4g} h (the recipe's: {plan.recipe_hours_per_update:.4g})"),
        ("peak learning rate", f"{plan.peak:g} (the recipe's times the root of the ratio: {plan.scaled_peak:.3g}; "
         "arXiv:2402.13723)"),
        ("memory per device", f"{plan.memory_gb:.2f}{limit} GB{fill}"),
        ("seconds per update", f"{plan.seconds_per_update:.4g}, {plan.audio_seconds_per_second:.4g} audio-s/s "
         f"({plan.measured.steps} steps measured, middle half within {plan.measured.spread:.0%})"),
        ("time to finish", f"{plan.hours_to_finish:.4g} h ({days:.3g} days) for {plan.updates:,} updates; validation "
         "and transfers between devices not counted"),
        ("audio heard", f"{plan.hours_heard:,.1f} h" + (f", {plan.passes:.1f} passes" if plan.passes else "")),
    ]  # fmt: skip
    if plan.cpu_seconds_per_update is not None:
        busy = "on the CPU's cores: what one thread would take if nobody else used the machine"
        rows.insert(5, ("of these", f"{plan.cpu_seconds_per_update:.4g} {busy}"))
    if plan.utilisation is not None:
        rows.append(("utilisation", f"{plan.utilisation:.1%} of the device's peak FLOP/s"))
    if plan.wer is not None:
        wer = f"about {plan.wer[0]:.1f} / {plan.wer[1]:.1f} % WER on test-clean / test-other after 100 h of labels"
        rows.append(("what that buys", f"{wer}, greedy: BASE, LibriSpeech, arXiv:2402.13723"))
    elif plan.measured.parameters < _BASE_SIZE:
        rows.append(("what that buys", f"not published for {plan.measured.parameters / 1e6:.1f} M parameters"))
    lines = [f"{name:20} {value}" for name, value in rows]
    return [*lines, *(f"warning: {text}" for text in plan.warnings), plan.command]


if __name__ == "__main__":
    _measure_here(Path(sys.argv[1]), sys.argv[2])
