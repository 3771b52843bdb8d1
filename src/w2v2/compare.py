"""Is this run healthy so far? Its figures against bands recorded from healthy runs of the same recipe.

A band is the range over seeds, and over the steps from two thirds to one and a half times each step, for seeds leave
chance at different steps; it is widened by half on both sides, since a handful of seeds does not show the whole range.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w2v2.checkpoint import CONFIG, expect_file
from w2v2.errors import UsageError

BANDS = Path(__file__).parent / "bands"

EVERY = 50
"""Optimiser steps that a point of a band is the mean of."""

_EARLY_OR_LATE = 1.5

METRICS = {
    "contrastive": False,
    "accuracy": False,
    "prob_perplexity": True,
    "code_perplexity": True,
    "codes_follow": True,
    "grad_norm": True,
}
"""What is compared, and whether its differences are ratios: columns of metrics.csv, and ``codes_follow``, which is
code_perplexity divided by prob_perplexity."""

SLACK = {
    "contrastive": 0.15,
    "accuracy": 0.05,
    "prob_perplexity": 0.3,
    "code_perplexity": 0.3,
    "codes_follow": 0.1,
    "grad_norm": 0.7,
}
"""What a band is widened by at least on each side; of those whose differences are ratios, its natural logarithm."""

Curve = list[tuple[int, dict[str, float]]]
"""Steps and figures, in order."""


@dataclass(frozen=True)
class Comparison:
    """One metric of a run against its band."""

    metric: str
    value: float
    """Mean over the last ``EVERY`` steps."""
    median: float
    """Of the healthy seeds."""
    low: float
    """Lower bound, widened."""
    high: float
    """Upper bound, widened."""
    margin: float
    """Distance to the nearer bound as a share of the band's width; negative outside, 0.5 in the middle."""

    @property
    def inside(self) -> bool:
        """Whether the value is in the band; one that is not finite never is."""
        return self.margin >= 0


@dataclass(frozen=True)
class Verdict:
    """A run against the bands of its recipe."""

    recipe: str
    recorded: str
    """How the bands were recorded."""
    step: int
    """At which they were compared."""
    latest: int
    """The run's latest step: later than ``step`` if the bands end before it."""
    metrics: list[Comparison]

    @property
    def inside(self) -> bool:
        """Whether every metric is inside."""
        return all(one.inside for one in self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; what is not finite as null."""
        values = asdict(self)
        values["metrics"] = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(one).items()}
            | {"inside": one.inside}
            for one in self.metrics
        ]
        return {**values, "inside": self.inside}


def read_curve(path: Path, prefix: str = "train/") -> Curve:
    """The metrics of ``metrics.csv`` that bands know, of the rows that have them all."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in METRICS if name != "codes_follow"]
    curve: Curve = []
    for row in rows:
        if all(row.get(prefix + name) for name in columns):
            figures = {name: float(row[prefix + name]) for name in columns}
            figures["codes_follow"] = figures["code_perplexity"] / figures["prob_perplexity"]
            curve.append((int(row["step"]), figures))
    return curve


def record(curves: Sequence[Curve], recipe: str, recorded: str) -> dict[str, Any]:
    """Bands of some healthy runs of one recipe, as they are kept in ``bands/``: per metric a row for each step."""
    last = min(curve[-1][0] for curve in curves)
    steps = list(range(2 * EVERY, last + 1, EVERY))
    points = [[_mean(curve, step) for step in steps] for curve in curves]

    def summary(name: str, of: Callable[[list[float]], float], times: float) -> list[float]:
        near = [[i for i, at in enumerate(steps) if step / times <= at <= step * times] for step in steps]
        return [float(f"{of([run[i][name] for run in points for i in some]):.4g}") for some in near]

    metrics = {
        name: {
            "median": summary(name, statistics.median, 1),
            "low": summary(name, min, _EARLY_OR_LATE),
            "high": summary(name, max, _EARLY_OR_LATE),
        }
        for name in METRICS
    }
    return {"recipe": recipe, "recorded": recorded, "seeds": len(curves), "steps": steps, "metrics": metrics}


def _mean(curve: Curve, step: int) -> dict[str, float]:
    """Mean over the ``EVERY`` steps up to one; the last row before it where none is as young."""
    near = [figures for at, figures in curve if step - EVERY < at <= step]
    near = near or [figures for at, figures in curve if at <= step][-1:]
    return {name: statistics.fmean(figures[name] for figures in near) for name in METRICS}


def compare_curve(curve: Curve, bands: dict[str, Any], step: int | None = None) -> Verdict:
    """A run against bands, at its latest step or an earlier one.

    Raises:
        UsageError: the run is shorter than the first point of the bands.
    """
    latest = curve[-1][0] if curve else 0
    points = [i for i, at in enumerate(bands["steps"]) if at <= (latest if step is None else min(step, latest))]
    if not points:
        raise UsageError(f"bands begin at step {bands['steps'][0]}, the run has {latest}; compare it later")
    at = bands["steps"][points[-1]]
    figures = _mean(curve, at)
    compared = []
    for name, ratio in METRICS.items():
        median, low, high = (bands["metrics"][name][kind][points[-1]] for kind in ("median", "low", "high"))
        scale, back = (math.log, math.exp) if ratio else (float, float)
        slack = max(0.5 * (scale(high) - scale(low)), SLACK[name])
        low, high = back(scale(low) - slack), back(scale(high) + slack)
        compared.append(Comparison(name, figures[name], median, low, high, _margin(figures[name], low, high, ratio)))
    return Verdict(bands["recipe"], bands["recorded"], at, latest, compared)


def _margin(value: float, low: float, high: float, ratio: bool) -> float:
    if not math.isfinite(value) or (ratio and value <= 0):
        return -math.inf
    if ratio:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(value - low, high - value) / (high - low)


def compare(run: Path) -> Verdict:
    """A run folder against the bands of its recipe, at its latest step.

    Raises:
        UsageError: not a pretraining run, or no bands of its recipe, naming those there are.
    """
    expect_file(run, CONFIG)
    expect_file(run, "metrics.csv")
    # Read as JSON: a run of another version, or with types of its user's own, can be compared too.
    config = json.loads((run / CONFIG).read_text())
    if not config.get("_type", "").endswith(":PretrainConfig"):
        raise UsageError(f"{run} is no pretraining run, and there are bands for these only")
    recipe = config["recipe"]
    path = BANDS / f"{recipe}.json"
    known = sorted(file.stem for file in BANDS.glob("*.json"))
    if recipe not in known:
        raise UsageError(f"no bands for the recipe {recipe!r} of {run}: there are some for {', '.join(known)}")
    return compare_curve(read_curve(run / "metrics.csv"), json.loads(path.read_text()))


def verdict_table(verdict: Verdict) -> list[str]:
    """Lines for a terminal."""
    later = f" (the run has {verdict.latest}, the bands end before)" if verdict.latest >= verdict.step + EVERY else ""
    lines = [
        f"{verdict.recipe} at step {verdict.step}{later}; bands: {verdict.recorded}",
        f"{'':16} {'run':>9} {'median':>9} {'band':>19} {'margin':>7}",
    ]
    for one in verdict.metrics:
        band = f"{one.low:.3g} to {one.high:.3g}"
        where = "inside" if one.inside else "OUTSIDE"
        lines.append(f"{one.metric:16} {one.value:9.4g} {one.median:9.4g} {band:>19} {one.margin:7.2f}  {where}")
    lines.append("inside" if verdict.inside else "OUTSIDE: not what healthy runs of this recipe look like")
    return lines
