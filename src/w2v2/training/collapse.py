"""The signatures of a collapse in a run's figures, and what cures each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Figures = dict[str, float]


@dataclass(frozen=True)
class Signature:
    """One way in which contrastive training with a quantizer dies.

    Thresholds were set on recorded runs (``tests/curves``) with a factor of about two between healthy and dead; they
    are per codebook or relative to chance, so that they hold for other numbers of groups, entries and distractors.
    """

    name: str
    """What is seen."""
    cure: str
    """What usually helps."""
    steps: int
    """Optimiser steps for which it must last."""
    seen: Callable[[Figures, int], bool]
    """Of the figures of an interval, and the number of codebooks."""


def _at_chance(figures: Figures) -> bool:
    """Whether nothing is told from anything: accuracy near 1 / (K + 1), the loss near ln(K + 1)."""
    share = figures["contrastive_of_chance"]
    return share > 0.99 and figures["accuracy"] < 4 * math.exp(-figures["contrastive"] / share)


SIGNATURES = (
    Signature(
        "uniform logits: the contrastive loss is ln(K+1) and does not move, accuracy is chance, the gradient is gone",
        "lower `optim.schedule.peak` or lengthen the warm-up, hear more audio per step (`train.accumulate`), and check "
        "that the audio is not constant or silent",
        80,
        # Published runs stay at chance for thousands of updates, with a gradient norm of 0.2 to 5.
        lambda f, groups: _at_chance(f) and f["grad_norm"] < 0.08,
    ),
    Signature(
        "few codes: targets use a handful of entries, and many distractors are identical to the target",
        "raise `loss_weights.diversity`, hear more audio per step (`train.accumulate`, `data.batch_seconds`), lower "
        "`optim.schedule.peak`",
        100,
        lambda f, groups: f["identical_distractors"] > (0.15 if f["code_perplexity"] < 4.5 * groups else 0.5),
    ),
    Signature(
        "chosen codes no longer follow the probabilities: code_perplexity is far below prob_perplexity",
        "lower `optim.schedule.peak` or lengthen the warm-up, and check that the audio is not constant or silent; "
        "without content the diversity loss is met by probabilities that are all equal",
        60,
        lambda f, groups: f["code_perplexity"] < 0.5 * f["prob_perplexity"] and f["contrastive_of_chance"] > 0.95,
    ),
    Signature(
        "perplexity has fallen to a few entries of each codebook, and much of the accuracy is there with every frame "
        "masked: which of them comes next is guessed from no context",
        "raise `loss_weights.diversity`, hear more audio per step (`train.accumulate`, `data.batch_seconds`), lower "
        "`optim.schedule.peak`",
        200,
        # Healthy runs pass through so few in 20 steps; one that stayed there read two thirds from context all the same.
        lambda f, groups: f["code_perplexity"] < 8 * groups and f["accuracy"] > 0.1 and f["blind_share"] > 0.4,
    ),
    Signature(
        "perplexity has fallen to almost nothing: about one entry of each codebook is left",
        "raise `loss_weights.diversity`, lower `optim.schedule.peak`, hear more audio per step (`train.accumulate`)",
        60,
        lambda f, groups: f["prob_perplexity"] < 2 * groups,
    ),
    Signature(
        "the gradient norm is gone: nothing is learned any more",
        "lower `optim.schedule.peak`, lengthen the warm-up, or start again from weights that are not dead",
        60,
        lambda f, groups: f["grad_norm"] < 0.02,
    ),
)  # fmt: skip


_NEEDED = {
    "contrastive", "contrastive_of_chance", "accuracy", "identical_distractors", "code_perplexity", "grad_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Alarm:
    """A signature that has lasted long enough to be sure of."""

    name: str
    cure: str
    since: int
    """Last step at which the run did not show it."""
    step: int

    def __str__(self) -> str:
        return (
            f"collapsed since step {self.since}, seen at step {self.step}: {self.name}; "
            f"what usually cures it: {self.cure}"
        )


class CollapseDetector:
    """Takes a run's figures in order of steps and says when a signature has lasted too long.

    Figures without perplexities, such as those of fine-tuning, are of another kind of training and never alarm.
    Intervals in which something was not finite say nothing of the rest and are passed over, but for the loss itself.
    Of a validation it keeps which share of the accuracy was there with every frame masked (``blind_share``) until the
    next one.
    """

    def __init__(self, first_step: int = 0) -> None:
        self.step = first_step
        self.since: dict[str, int] = {}
        """Signatures that the last interval showed, with the step at which each began."""
        self.blind_share = 0.0

    def validated(self, figures: Figures) -> None:
        """Take the figures of a validation."""
        if {"accuracy", "accuracy_all_masked"} <= figures.keys():
            self.blind_share = figures["accuracy_all_masked"] / max(figures["accuracy"], 1e-9)

    @property
    def trusted(self) -> int:
        """Last step at which no signature that now shows was there."""
        return min([self.step, *self.since.values()])

    def look(self, step: int, figures: Figures) -> Alarm | None:
        """Take the figures of the interval that ends with a step; an alarm if one is due."""
        before, self.step = self.step, step
        if not math.isfinite(figures["loss"]):
            # Of a step that was left out, the budget of these takes care.
            if not figures.get("steps_left_out"):
                return Alarm("the loss is not finite", "lower `optim.schedule.peak`, train in bf16-mixed", before, step)
            return None
        if not figures.keys() >= _NEEDED:
            return None
        groups = sum(name.startswith("code_perplexity_") for name in figures)
        # A quantizer without probabilities shows no signature of them: nothing is true of nan.
        figures = {"prob_perplexity": math.nan, **figures, "blind_share": self.blind_share}
        for signature in SIGNATURES:
            if not signature.seen(figures, groups):
                self.since.pop(signature.name, None)
                continue
            since = self.since.setdefault(signature.name, before)
            if step - since >= signature.steps:
                return Alarm(signature.name, signature.cure, since, step)
        return None
