"""Healthy seeds are inside the bands of the others, collapsed runs outside; the shipped bands are what was recorded."""

import csv
import json
from pathlib import Path

import pytest

from w2v2 import recipes
from w2v2.cli import main
from w2v2.compare import BANDS, Curve, compare_curve, read_curve, record
from w2v2.errors import UsageError
from w2v2.serial import save_config

CURVES = Path(__file__).parent / "curves"
SEEDS = sorted(path.stem for path in CURVES.glob("h-syn-*.csv"))
BROKEN = sorted(path.stem for path in CURVES.glob("c-*.csv"))
RECORDED = (
    f"{len(SEEDS)} seeds of 800 steps, w2v2 pretrain tiny on w2v2 prepare synthetic --hours 0.5, 2026-11-22, one CPU "
    "thread, float32"
)


def curve(name: str) -> Curve:
    return read_curve(CURVES / f"{name}.csv", prefix="")


def shipped() -> dict:
    return json.loads((BANDS / "tiny.json").read_text())


def test_the_shipped_bands_are_those_of_the_recorded_seeds() -> None:
    assert len(SEEDS) >= 5
    assert shipped() == record([curve(name) for name in SEEDS], "tiny", RECORDED)


@pytest.mark.parametrize("left_out", SEEDS)
def test_a_healthy_seed_is_inside_the_bands_of_the_others_at_every_step(left_out: str) -> None:
    bands = record([curve(name) for name in SEEDS if name != left_out], "tiny", "")
    outside = {
        step: [one.metric for one in compare_curve(curve(left_out), bands, step).metrics if not one.inside]
        for step in bands["steps"]
    }
    assert len(outside) >= 15
    assert not any(outside.values()), outside


@pytest.mark.parametrize("name", BROKEN)
def test_collapsed_runs_are_outside(name: str) -> None:
    assert not compare_curve(curve(name), shipped()).inside


def test_margins_say_how_far_in_or_out_a_value_is() -> None:
    bands = {
        "recipe": "r", "recorded": "", "steps": [100],
        "metrics": {name: {"median": [1.0], "low": [1.0], "high": [1.0]} for name in shipped()["metrics"]},
    }  # fmt: skip
    figures = dict.fromkeys(bands["metrics"], 1.0)
    for loss, margin in ((1.0, 0.5), (1.15, 0.0), (1.45, -1.0), (0.55, -1.0)):
        verdict = compare_curve([(100, figures | {"contrastive": loss})], bands)
        assert verdict.metrics[0].margin == pytest.approx(margin, abs=1e-9)
    verdict = compare_curve([(100, figures | {"contrastive": float("nan"), "grad_norm": 0.0})], bands)
    assert [one.metric for one in verdict.metrics if not one.inside] == ["contrastive", "grad_norm"]


def test_a_run_is_compared_at_its_latest_step_or_where_the_bands_end() -> None:
    rows = curve(SEEDS[0])
    assert compare_curve([row for row in rows if row[0] <= 340], shipped()).step == 300
    later = compare_curve([*rows, (5000, rows[-1][1])], shipped())
    assert (later.step, later.latest) == (800, 5000)
    with pytest.raises(UsageError, match="begin at step 100, the run has 90"):
        compare_curve([row for row in rows if row[0] <= 90], shipped())


def run_folder(out: Path, name: str, recipe: str = "tiny") -> Path:
    out.mkdir()
    config = recipes.tiny()
    config.recipe = recipe
    save_config(config, out / "config.json")
    with (CURVES / f"{name}.csv").open() as file, (out / "metrics.csv").open("w", newline="") as copy:
        header, *rows = csv.reader(file)
        csv.writer(copy).writerows([["step", *(f"train/{column}" for column in header[1:])], *rows])
    return out


def test_the_command_prints_a_verdict_and_exits_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run_folder(tmp_path / "good", SEEDS[0]))]) == 0
    good = capsys.readouterr().out
    assert good.splitlines()[-1] == "inside" and RECORDED in good and "OUTSIDE" not in good
    assert main(["compare", str(run_folder(tmp_path / "bad", "c-lr")), "--json"]) == 1
    said = capsys.readouterr()
    verdict = json.loads(said.out)
    assert (verdict["inside"], verdict["step"]) == (False, 400)
    assert {one["metric"] for one in verdict["metrics"] if not one["inside"]} >= {"grad_norm", "codes_follow"}
    assert said.err.count("\n") == 1 and "outside the bands of tiny at step 400" in said.err


def test_a_recipe_without_bands_is_refused_naming_those_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(run_folder(tmp_path / "run", SEEDS[0], "base"))]) == 2
    assert "no bands for the recipe 'base'" in (said := capsys.readouterr().err) and "there are some for tiny" in said
