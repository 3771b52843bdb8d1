import json
from pathlib import Path

import pytest

from w2v2.demo import run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    run_demo(out, hours=0.15, shrink=100)
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
        assert summary[arm].keys() == {"wer", "cer", "cer_interval", "wer_trigram"}
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


def test_again_with_the_same_seed_the_demo_gives_the_same_numbers(demo: Path) -> None:
    first = json.loads((demo / "summary.json").read_text())
    run_demo(demo, hours=0.15, shrink=100)
    again = json.loads((demo / "summary.json").read_text())
    for summary in (first, again):
        summary.pop("seconds")
        summary["warm_start"].pop("seconds")
        summary.pop("peak_memory_gib")
    assert again == first


def test_the_demo_runs_on_a_folder_of_real_speech_too(corpus: Path, tmp_path: Path) -> None:
    run_demo(tmp_path / "out", data=corpus, shrink=200)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["data"]["train"]["utterances"] == 16
    assert "synthesise" not in summary["seconds"] and summary["probe"] is None
    assert "What the layers know" not in (tmp_path / "out" / "report.html").read_text()
