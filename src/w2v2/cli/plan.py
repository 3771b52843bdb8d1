"""``w2v2 plan``: what a run will take."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from w2v2.cli.options import Settings, default
from w2v2.cli.train import Recipe
from w2v2.errors import Count, Positive, UsageError, public
from w2v2.recipes import load_recipe
from w2v2.serial import differences, from_dict, to_dict
from w2v2.training.config import PretrainConfig

if TYPE_CHECKING:
    from w2v2.training.plan import Measured
    from w2v2.training.plan import Plan as Reckoning


@dataclass(kw_only=True)
class Plan:
    """See ``main.VERBS``."""

    recipe: Recipe = ""
    """Name of a recipe, or FILE.py:FUNCTION."""
    gpus: Count = 1
    """Devices in all."""
    memory: Annotated[Positive | None, default("not asked", "GB")] = None
    """Of each device, GB."""
    data: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="DIR")] = ()
    """Audio to measure on; without, noise of the recipe's crops."""
    hours_per_update: Annotated[Positive | None, default("the recipe's", "HOURS")] = None
    """Audio of an optimiser step, hours."""
    steps: Count = 20
    """Optimiser steps to measure."""
    json: bool = False
    """Print JSON instead of a table."""
    config: Settings[PretrainConfig] = field(default_factory=PretrainConfig)

    def run(self, named: Collection[str]) -> None:
        """Measure, reckon and print."""
        from w2v2.training.plan import make_plan, settle

        recipe, config = load_recipe(self.recipe, PretrainConfig), self.config
        if self.data:
            config.data.sources = self.data
        config = settle(recipe, config, devices=self.gpus, hours=self.hours_per_update, fixed=named)
        config.check()
        plan = make_plan(recipe, config, _measured(config, self.steps), self.memory)
        command = _command(recipe, config)
        as_json = json.dumps(asdict(plan) | {"command": command}, indent=2)
        lines = [as_json] if self.json else [*_plan_table(plan, self.memory), command]
        sys.stdout.write(public("\n".join(lines)) + "\n")


def _measured(config: PretrainConfig, steps: int) -> Measured:
    """Measure in a process of its own, whose memory is that of the run alone, and which may be killed."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(_measure, to_dict(config), steps).result()
    except (BrokenProcessPool, RuntimeError) as error:
        if isinstance(error, BrokenProcessPool) or "memory" in str(error):
            raise UsageError(
                "the steps to measure ran out of memory, or were killed; lower `data.batch_seconds` "
                f"{config.data.batch_seconds:g}, or set `train.activation_checkpointing` True"
            ) from error
        raise


def _measure(values: dict[str, Any], steps: int) -> Measured:
    from w2v2.training.plan import measure

    load_recipe(values["recipe"], PretrainConfig)  # so that the types of a user's file are known
    return measure(from_dict(values, PretrainConfig), steps)


def _command(recipe: PretrainConfig, config: PretrainConfig) -> str:
    """What starts the run that was planned: every setting in which it differs from its recipe."""
    words = ["w2v2", "pretrain", config.recipe]
    for source in config.data.sources or ("DIR",):
        words += ["--data", source]
    for name, (_, value) in differences(to_dict(recipe), to_dict(config)).items():
        if name != "data.sources":
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _plan_table(plan: Reckoning, memory: float | None) -> list[str]:
    limit, measured = "", plan.measured
    if memory is not None:
        fits = "" if plan.memory_gb <= memory else " (does not fit)"
        limit = f" of {memory:g}{fits}; micro-batches of about {plan.largest_batch_seconds:g} s would fill it"
    rows = {
        "devices": f"{plan.devices} ({measured.device}), {plan.accumulate} micro-batches each per update",
        "audio per update": f"{plan.hours_per_update:.4g} h",
        "peak learning rate": f"{plan.peak:g} (the recipe's, scaled by the root of the batch: {plan.scaled_peak:.3g})",
        "memory per device": f"{plan.memory_gb:.2f} GB{limit}",
        "seconds per update": f"{plan.seconds_per_update:.4g}, {plan.audio_seconds_per_second:.4g} audio-s/s "
        f"({measured.steps} steps measured, middle half within {measured.spread:.0%})",
        "of these": f"{plan.cpu_seconds_per_update:.4g} on the CPU's cores, whatever else the machine does",
        "time to finish": f"{plan.hours_to_finish:.4g} h ({plan.hours_to_finish / 24:.3g} days) for {plan.updates:,} "
        "updates; validation and transfers between devices not counted",
        "audio heard": f"{plan.hours_heard:,.1f} h" + (f", {plan.passes:.1f} passes" if plan.passes else ""),
    }
    for masks in plan.masks:
        low, middle, high = masks.spans
        rows[f"masked of {masks.seconds:g} s"] = (
            f"{masks.trained:.1%} of {masks.frames} frames ({masks.drawn:.1%} before rows are made equal), in spans of "
            f"{middle} frames, {low} to {high} in eight of ten"
        )
    return [f"{name:20} {text}" for name, text in rows.items()]
