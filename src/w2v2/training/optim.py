"""Learning-rate schedules as pure functions of the optimiser step, and the optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from w2v2.errors import Count, NotNegative, Positive, ShareBelowOne, Whole


@dataclass(kw_only=True)
class WarmupCosine:
    """Linear warm-up, then a cosine down to a share of the peak, then constant (GPT-3 paper, appendix B)."""

    peak: NotNegative = 5e-4
    """Highest learning rate."""
    warmup_steps: Whole = 32_000
    """Optimiser steps until the peak."""
    total_steps: Count = 400_000
    """Optimiser steps until the floor."""
    floor: NotNegative = 0.1
    """Final learning rate, as a share of the peak."""

    def __call__(self, step: int) -> float:
        """Learning rate of update number ``step``; the first is 1."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(kw_only=True)
class WarmupLinear:
    """Linear warm-up, then linearly to zero (wav2vec 2.0; fairseq ``polynomial_decay``, power 1)."""

    peak: NotNegative = 5e-4
    """Highest learning rate."""
    warmup_steps: Whole = 32_000
    """Optimiser steps until the peak."""
    total_steps: Count = 400_000
    """Optimiser steps until zero."""

    def __call__(self, step: int) -> float:
        """Learning rate of update number ``step``; the first is 1."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        return self.peak * max(self.total_steps - step, 0) / max(self.total_steps - self.warmup_steps, 1)


@dataclass(kw_only=True)
class TriStage:
    """Linear warm-up from 1 %, constant, exponential decay to 5 % (fairseq ``tri_stage``; fine-tuning)."""

    peak: NotNegative = 5e-5
    """Highest learning rate."""
    total_steps: Count = 20_000
    """Optimiser steps of all three stages."""
    warmup: NotNegative = 0.1
    """Share of the steps in the first stage (``phase_ratio[0]``)."""
    hold: NotNegative = 0.4
    """Share of the steps in the second stage (``phase_ratio[1]``)."""
    initial_scale: NotNegative = 0.01
    """Learning rate at step 0, as a share of the peak (``init_lr_scale``)."""
    final_scale: NotNegative = 0.05
    """Learning rate at the end, as a share of the peak (``final_lr_scale``)."""

    def __call__(self, step: int) -> float:
        """Learning rate of update number ``step``; the first is 1."""
        warmup, hold = self.warmup * self.total_steps, self.hold * self.total_steps
        if step < warmup:
            return self.peak * (self.initial_scale + (1 - self.initial_scale) * step / warmup)
        if step < warmup + hold:
            return self.peak
        progress = min((step - warmup - hold) / max(self.total_steps - warmup - hold, 1e-9), 1.0)
        return self.peak * float(self.final_scale**progress)


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, its schedule, and clipping. Defaults are those of `base`, on the paper's figures."""

    schedule: WarmupCosine | WarmupLinear | TriStage = field(default_factory=WarmupCosine)
    """Learning rate by optimiser step; the recipe chooses which."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.98)
    """Adam's (fairseq ``adam_betas``)."""
    eps: Positive = 1e-6
    """Adam's (``adam_eps``)."""
    weight_decay: NotNegative = 0.01
    """Decoupled, on all parameters, biases and norms too, as fairseq does."""
    clip_norm: Positive | None = 1.0
    """Largest norm of the gradient; longer ones are scaled down. None: off, as published."""

    def build(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW over parameters, or groups of them, fused into one kernel (5 times faster than the loop, also on CPU).

        A group's ``lr_scale`` is its learning rate, as a share of the schedule's.
        """
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.schedule(0),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
        # Gradients have to be normalised and clipped before the step, so fp16 must not leave their scale to the kernel.
        optimizer._step_supports_amp_scaling = False
        return optimizer
