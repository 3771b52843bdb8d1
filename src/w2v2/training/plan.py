"""What a pretraining run will take: time and memory from a few measured steps of it, its batch and rate, its masks."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import nn

from w2v2.data.batch import Batch
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Split, read_run
from w2v2.errors import UsageError
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.training.config import PretrainConfig
from w2v2.training.mask_preview import Masks, crops, preview_masks
from w2v2.training.optim import WarmupLinear
from w2v2.training.pretrain import pretrain

WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Measured:
    """What a short run took, on one device."""

    device: str
    steps: int
    micro_seconds: float
    """Audio in a micro-batch, mean."""
    plain: float
    """Seconds per second of audio of a micro-batch without an update, median."""
    updating: float
    """The same with the update."""
    spread: float
    """Width of its middle half over the median."""
    cores: float
    """Cores of the CPU that the process kept busy, median: what it takes is hardly changed by other processes."""
    memory_gb: float
    """Peak that the process took, GB (1e9 bytes): of the GPU, or resident on a CPU."""
    parameters: int
    corpus_hours: float | None = None
    """Of the training split, when real audio was given."""


def measure(config: PretrainConfig, steps: int = 20) -> Measured:
    """Pretrain for so many steps after a few, on the run's audio, or on noise of its crops' shape if it names none.

    More than two accumulated micro-batches are not measured but reckoned. On a CPU the memory is the peak of this
    process since it began: call it in a process of its own.
    """
    cuda = torch.cuda.is_available() and config.train.accelerator != "cpu"
    clock = _Clock()
    with tempfile.TemporaryDirectory(prefix="w2v2-plan-") as folder:
        short = _shortened(config, steps, Path(folder))
        splits = read_run(short.data)
        few = {"train": splits["train"], "valid": Split.of(islice(splits["valid"], 32))}
        build, every = short.model.build, short.train.accumulate

        def timed() -> Any:
            model = build()
            if not cuda and isinstance(config.model, ContrastiveConfig):
                _meet_other_lengths(model, config.data)
            model.register_forward_pre_hook(clock)
            return model

        short.model.build = timed  # type: ignore[method-assign]
        model = pretrain(short, few, Path(folder) / "run")
    wall, cpu, audio = clock.read()[:, WARM_UP_STEPS * every :]
    updates = np.arange(len(wall)) % every == every - 1
    low, updating, high = np.quantile((wall / audio)[updates], [0.25, 0.5, 0.75]).tolist()
    return Measured(
        device=torch.cuda.get_device_name() if cuda else f"CPU, {config.threads} threads",
        steps=int(updates.sum()),
        micro_seconds=float(audio.mean()),
        plain=float(np.median((wall / audio)[~updates])) if every > 1 else updating,
        updating=updating,
        spread=(high - low) / updating,
        cores=float(np.median(cpu / wall)),
        memory_gb=torch.cuda.max_memory_reserved() / 1e9 if cuda else _peak_rss(),
        parameters=sum(p.numel() for p in model.parameters()),
        corpus_hours=sum(p.seconds * p.weight for p in splits["train"].pieces) / 3600 if config.data.sources else None,
    )


def _shortened(config: PretrainConfig, steps: int, folder: Path) -> PretrainConfig:
    """The run on one device for so many steps; without audio, on noise: one file, and links."""
    short = copy.deepcopy(config)
    short.train.max_steps = WARM_UP_STEPS + steps + 1  # a step ends where the next one begins
    short.optim.schedule = WarmupLinear(warmup_steps=0)  # the rate takes no time
    short.train.accumulate = min(config.train.accumulate, 2)
    short.train.wandb, short.probe.every = "", 0
    short.train.devices = short.train.num_nodes = 1
    short.train.val_every = short.train.checkpoint_every = 10**6
    short.warm_start.updates = min(config.warm_start.updates, 1)  # a stage of its own, which nobody measures
    if not short.data.sources:
        noise = 0.1 * np.random.default_rng(0).standard_normal(math.ceil(config.data.max_seconds * SAMPLE_RATE))
        soundfile.write(folder / "noise.wav", noise, SAMPLE_RATE, subtype="PCM_16")
        batches = (short.train.max_steps + 2) * short.train.accumulate
        for split, count in (("train", batches * crops(config.data, config.data.max_seconds)), ("valid", 4)):
            (folder / "noise" / split / split).mkdir(parents=True)
            for i in range(count):
                os.link(folder / "noise.wav", folder / "noise" / split / split / f"{split}-{i}.wav")
        short.data.sources, short.data.weights, short.data.train_split = (str(folder / "noise"),), (), "train"
    short.check()
    return short


class _Clock:
    """Notes when each training forward pass begins: on a GPU by the device's own clock, so that nothing waits."""

    def __init__(self) -> None:
        self.marks: list[tuple[Any, float, float]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            return
        audio = args[0]
        samples = audio.numel() if len(args) < 3 or args[2] is None else sum(args[2])
        now: Any = torch.cuda.Event(enable_timing=True) if audio.is_cuda else time.perf_counter()
        if audio.is_cuda:
            now.record()
        self.marks.append((now, time.process_time(), samples / SAMPLE_RATE))

    def read(self) -> npt.NDArray[np.float64]:
        """(3, N) seconds from each mark to the next, seconds on the CPU's cores meanwhile, seconds of audio."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        marks, cpu, audio = zip(*self.marks, strict=True)
        took = [
            now - then if isinstance(now, float) else then.elapsed_time(now) / 1000 for then, now in pairwise(marks)
        ]
        return np.array([took, np.diff(cpu), audio[:-1]])


def _meet_other_lengths(model: Any, data: DataConfig) -> None:
    """Passes over batches of crops of some lengths: kernels are kept for each, and gaps between buffers of each size.

    Twenty steps meet few lengths, or one, a run meets many; what they add is a tenth of a small model's memory.
    """
    for seconds in np.linspace(data.min_seconds, data.max_seconds, 16):
        n, samples = crops(data, data.max_seconds), round(seconds * SAMPLE_RATE)
        ids = [str(i) for i in range(n)]
        batch = Batch(torch.randn(n, samples), torch.full((n,), samples), torch.zeros(n), ids, [0] * n)
        losses = model(batch.audio, model.draw(batch, (0, 0))).losses
        torch.stack(list(losses.values())).sum().backward()
    model.zero_grad(set_to_none=True)


def _peak_rss() -> float:
    """GB. Linux counts the parent's into ``ru_maxrss`` of a process that was started by ``vfork``, not into this."""
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return peak_memory("self") / 1e9


def peak_memory(*whose: str) -> float:
    """Largest resident set of this process ("self") or of those that it started ("children"), bytes; nan: not told."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        kinds = (getattr(resource, f"RUSAGE_{who.upper()}") for who in whose)
        return float(max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit)
    return math.nan


@dataclass(frozen=True)
class Plan:
    """A run before it starts; hours and seconds of audio are of all devices."""

    devices: int
    accumulate: int
    hours_per_update: float
    peak: float
    scaled_peak: float
    """The recipe's peak times the root of the ratio of the two batches (arXiv:2402.13723)."""
    updates: int
    seconds_per_update: float
    cpu_seconds_per_update: float
    audio_seconds_per_second: float
    hours_to_finish: float
    hours_heard: float
    passes: float | None
    """Over the training split; None without data."""
    memory_gb: float
    largest_batch_seconds: float | None
    """Micro-batch that would about fill nine tenths of the memory."""
    masks: tuple[Masks, ...]
    """Of the shortest and of the longest crops; empty for an objective that draws none."""
    measured: Measured


def settle(
    recipe: PretrainConfig, config: PretrainConfig, *, devices: int, hours: float | None, fixed: Collection[str]
) -> PretrainConfig:
    """The configuration on so many devices, with accumulation and learning rate for so many hours of audio per update.

    ``hours`` None are the recipe's; fields named in ``fixed`` stay: ``train.accumulate``, ``optim.schedule.peak``.
    """
    config = copy.deepcopy(config)
    config.train.num_nodes = -(-devices // 8)
    config.train.devices = devices // config.train.num_nodes
    if config.train.devices * config.train.num_nodes != devices:
        raise UsageError(f"devices must be 8 at most, or divide evenly over machines of 8 at most, got {devices}")
    if "train.accumulate" not in fixed:
        config.train.accumulate = 1
        config.train.accumulate = max(round((hours or batch_hours(recipe)) / batch_hours(config)), 1)
    if "optim.schedule.peak" not in fixed:
        config.optim.schedule.peak = float(f"{_scaled_peak(recipe, config):.3g}")
    return config


def batch_hours(config: PretrainConfig) -> float:
    """Audio of an optimiser step, hours, of whole crops: 1.39 for ``base``, of 1.56 that the limit allows."""
    data, train = config.data, config.train
    return crops(data, data.max_seconds) * data.max_seconds * train.accumulate * train.devices * train.num_nodes / 3600


def _scaled_peak(recipe: PretrainConfig, config: PretrainConfig) -> float:
    return recipe.optim.schedule.peak * math.sqrt(batch_hours(config) / batch_hours(recipe))


def make_plan(recipe: PretrainConfig, config: PretrainConfig, measured: Measured, memory: float | None) -> Plan:
    """Reckon what a configuration from :func:`settle` takes; ``memory`` is a device's, GB (1e9 bytes)."""
    train, data = config.train, config.data
    devices = train.devices * train.num_nodes
    seconds = measured.micro_seconds * ((train.accumulate - 1) * measured.plain + measured.updating)
    heard = measured.micro_seconds * train.accumulate * devices
    updates = config.max_steps
    hours = heard * updates / 3600
    needed, largest = _memory(config, measured, memory)
    lengths = sorted({data.min_seconds, data.max_seconds}) if isinstance(config.model, ContrastiveConfig) else []
    return Plan(
        devices=devices,
        accumulate=train.accumulate,
        hours_per_update=heard / 3600,
        peak=config.optim.schedule.peak,
        scaled_peak=_scaled_peak(recipe, config),
        updates=updates,
        seconds_per_update=seconds,
        cpu_seconds_per_update=seconds * measured.cores,
        audio_seconds_per_second=heard / seconds,
        hours_to_finish=seconds * updates / 3600,
        hours_heard=hours,
        passes=hours / measured.corpus_hours if measured.corpus_hours else None,
        memory_gb=needed,
        largest_batch_seconds=largest,
        masks=tuple(preview_masks(config, length) for length in lengths),
        measured=measured,
    )


def _memory(config: PretrainConfig, measured: Measured, limit: float | None) -> tuple[float, float | None]:
    """GB needed on each device, and seconds of a micro-batch that would about fill nine tenths of the limit."""
    train, devices = config.train, config.train.devices * config.train.num_nodes
    state = 16e-9 * measured.parameters  # float32 weights, gradients, and two moments of Adam
    fixed = state / devices if train.shard else state
    buckets = state / 4 if devices > 1 and not train.shard else 0.0  # DDP keeps the gradient a second time
    needed = measured.memory_gb - state + fixed + buckets
    if limit is None:
        return needed, None
    share = max(0.9 * limit - fixed, 0) / max(needed - fixed, 1e-9)
    return needed, float(f"{config.data.batch_seconds * share:.2g}")
