"""The demo, whole and small; and what is shipped, the wheel by itself, gives its numbers."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_install import ROOT, call

from w2v2.demo import run_demo

SIZE = {"hours": 0.15, "shrink": 200}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_demo(out, **SIZE)
    torch.set_num_threads(threads)
    return out


def test_the_demo_leaves_its_summary_report_and_runs(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["pretrain"].keys() == {
        "accuracy", "accuracy_all_masked", "loss", "code_perplexity", "prob_perplexity", "codes_per_utterance",
    }  # fmt: skip
    assert summary["schema"] == 2 and summary["warm_start_only"].keys() == {"wer", "cer"}
    assert summary["warm_start"].keys() == {"seconds", "r2"} and summary["warm_start"]["seconds"] > 0
    assert summary["probe"].keys() == {"log_mel", "random", "pretrained"}
    for accuracies in summary["probe"].values():
        assert 0.1 < accuracies["one"] < 1 and 0.1 < accuracies["five"] < 1
    for arm in ("finetuned", "scratch"):
        assert summary[arm].keys() == {"wer", "cer", "cer_interval", "wer_trigram", "cer_trigram"}
        low, high = summary[arm]["cer_interval"] or (0, 1)
        assert low <= summary[arm]["cer"] <= high
    stages = summary["seconds"]
    assert stages.keys() == {
        "synthesise", "prepare", "pretrain", "probe", "finetune", "evaluate", "total",
    }  # fmt: skip
    assert stages["total"] == pytest.approx(sum(v for k, v in stages.items() if k != "total"))
    assert 0.1 < summary["peak_memory_gib"] < 4
    page = (demo / "report.html").read_text()
    assert page.count("<audio controls") == 3 and "What the layers know" in page
    heard = json.loads((demo / "listening.json").read_text())
    assert len({item["speaker"] for item in heard}) == 3
    for item in heard:
        assert [word for word, _, _ in item["words"]] == item["reference"].split()
        assert item["words"][0][1] >= 0 and item["words"][-1][2] <= item["seconds"]
    assert json.loads((demo / "probe.json").read_text())["rows"][0]["features"] == "log-mel"
    assert len(json.loads((demo / "hypotheses.json").read_text())) == 10


def test_both_arms_see_the_same_labels_for_the_same_updates(demo: Path) -> None:
    runs = [json.loads((demo / arm / "config.json").read_text()) for arm in ("finetuned", "scratch")]
    data = [json.loads((demo / arm / "environment.json").read_text())["data"] for arm in ("finetuned", "scratch")]
    assert data[0] == data[1]
    assert runs[0]["optim"]["schedule"]["total_steps"] == runs[1]["optim"]["schedule"]["total_steps"]
    for run in runs:  # rate, masks and what is frozen are each arm's own, chosen in a study; nothing else may differ
        run["optim"]["schedule"].pop("peak")
        run.pop("recipe")
        del run["model"]["mask_prob"], run["model"]["conv_gradient_scale"]
    assert runs[0] == runs[1]


def numbers(folder: Path) -> dict[str, Any]:
    """A summary without how long things took and how much memory."""
    summary = json.loads((folder / "summary.json").read_text())
    summary["warm_start"].pop("seconds")
    return {name: value for name, value in summary.items() if name not in ("seconds", "peak_memory_gib")}


def test_the_wheel_alone_gives_the_same_numbers_with_the_same_seed(demo: Path, tmp_path: Path) -> None:
    """Installed away from the clone: nothing that the package needs has been left in it, and no number is luck."""
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("w2v2/")}
    there = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/w2v2").rglob("*") if path.is_file()}
    assert shipped == {name for name in there if "__pycache__" not in name}
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    where = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    assert str(tmp_path) in call(sys.executable, "-c", "import w2v2; print(w2v2.__file__)", cwd=tmp_path, **where)
    words = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]
    call(sys.executable, tmp_path / "site/bin/w2v2", "demo", *words, "--out", "again", cwd=tmp_path, **where)
    assert numbers(tmp_path / "again") == numbers(demo)
    assert (tmp_path / "again" / "report.html").is_file()


def test_the_demo_runs_on_a_folder_of_real_speech_too_where_another_has_been(
    demo: Path, corpus: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(demo, tmp_path / "out")
    run_demo(out, data=corpus, shrink=400)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["train"]["utterances"] == 16
    assert "synthesise" not in summary["seconds"] and summary["probe"] is None
    assert "What the layers know" not in (out / "report.html").read_text()
    (kept,) = out.glob("corpus-*")
    assert subprocess.run(["diff", "-r", kept, demo / kept.name], check=False).returncode == 0
