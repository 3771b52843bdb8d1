"""The page of results is what the recorded figures give; the script for lent machines goes on where it was ended."""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_docs import FEWER, THIN

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import results  # noqa: E402


def test_the_page_holds_what_is_recorded() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == results.page(), "run python docs/results.py"


def test_the_readme_tells_what_is_recorded() -> None:
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    summary, probe = results.seeds("demo")[0], results.seeds("probe")[0]
    finetuned, warm, scratch = (results.arm(summary, name) for name in ("finetuned", "warm_start_only", "scratch"))
    told = {
        kind: max(row["phones_one"] for row in probe["rows"] if row["features"] == kind)
        for kind in ("model", "log-mel")
    }
    cer = [results.percent(rate).replace(" (", " % (") for rate in (finetuned, warm, scratch)]
    assert f"a character error rate of {cer[0]} against {cer[1]} and {cer[2]}, and a linear probe that tells" in readme
    assert f"tells {results.percent(told['model'])} % of the phones" in readme
    assert f"shows {results.percent(told['log-mel'])} %" in readme
    wrong = [results.percent(summary[name]["wer_trigram"]) for name in ("finetuned", "scratch")]
    assert f"With a trigram {wrong[0]} % of the words are wrong, and {wrong[1]} % from random weights" in readme
    mean = results.demo_rows(results.seeds("demo"))[-1]
    pretrained, warm, scratch = (results.percent(mean[name]) for name in results.RATES)
    assert f"three seeds have {pretrained}, {warm} and {scratch} % on average" in readme


def test_the_readme_tells_how_fast_a_step_is() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())["results"]
    both = [recorded[lengths]["equal_dropouts"] for lengths in ("equal", "unequal")]
    peers = {name: " / ".join(f"{one['speed_against'][name]:.2f}" for one in both) for name in both[0]["speed_against"]}
    ours = " / ".join(f"{one['speed']:.2f} x ({one['range'][0]:.2f} to {one['range'][1]:.2f})" for one in both)
    speechbrain = " / ".join(f"{one['speed'] / one['speed_against']['speechbrain']:.2f} x" for one in both)
    readme = (ROOT / "README.md").read_text().replace("\N{MULTIPLICATION SIGN}", "x").replace("\n", " ")
    assert f"| {ours} | not measured here | 1 | {speechbrain}, its own architecture |" in readme
    assert (
        f"{peers['torchaudio']} x as fast as one with torchaudio's encoder, {peers['spidr']} x with SpidR's" in readme
    )


def test_the_readme_tells_how_fast_a_transcription_is() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "inference.json").read_text())
    jobs = [job for job in recorded.values() if isinstance(job, dict) and "texts" in job]
    assert len(jobs) == 4
    ratios = [[job[kind]["times_pipeline"] for job in jobs] for kind in ("pytorch", "int8")]
    told = " / ".join(f"{min(kind):.2f} to {max(kind):.2f} x" for kind in ratios)
    readme = (ROOT / "README.md").read_text().replace("\N{MULTIPLICATION SIGN}", "x")
    assert f"one CPU thread: float32 / 8 bits | {told}: " in readme


def test_another_seed_needs_only_its_files() -> None:
    summary = {
        "finetuned": {"cer": 0.4, "wer": 0.9, "cer_interval": [0.37, 0.43], "wer_trigram": 0.5, "cer_trigram": 0.3},
        "warm_start_only": {"cer": 0.5, "wer": 0.95},
        "scratch": {"cer": 0.6, "wer": 1.0, "cer_interval": [0.58, 0.62], "wer_trigram": 0.8, "cer_trigram": 0.5},
    }
    other = json.loads(json.dumps(summary))
    other["finetuned"] |= {"cer": 0.5, "cer_interval": [0.45, 0.59]}
    demos = {0: summary, 1: other}
    rows = results.demo_rows(demos)
    assert [row["name"] for row in rows] == ["seed 0", "seed 1", "mean"]
    assert rows[0]["ratio"] == "0.67" and rows[2]["ratio"] == "0.75" and rows[2]["to_warm"] == "0.90"
    assert results.apart(demos) == 1
    table = results.table(rows, {"name": "", "finetuned": "CER"})
    assert "| seed 0 | 40.0 (37.0 to 43.0) |" in table and "| mean | 45.0 |" in table
    assert results.percent([-0.143, -0.171, -0.116, 0.0005], "{:+.1f}") == "-14.3 (-17.1 to -11.6), p = .0005"


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_run_in_slices_goes_on_where_it_was_ended(corpus: Path, tmp_path: Path) -> None:
    """Ended by a signal in pretraining, as by the end of a slice; called again it goes on to the error rate."""
    few = FEWER.replace("--train.max-steps 2 ", "")
    pretrain = (
        f"tiny tiny_ctc {tmp_path} {few} {THIN} --warm-start.updates 1 --train.max-steps 40 --data.batch-seconds 5"
    )
    command = [str(ROOT / "scripts" / "gpu_run.sh"), *shlex.split(f"{pretrain} --data.max-seconds 3")]
    env = os.environ | {
        "W2V2": f"{sys.executable} -m w2v2.cli.main", "DATA": str(corpus), "OMP_NUM_THREADS": "1", "FINETUNE": FEWER,
    }  # fmt: skip
    metrics = tmp_path / "pretrain" / "metrics.csv"
    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not metrics.exists():
        time.sleep(0.05)
    first.terminate()
    assert first.communicate()[1] and first.returncode == 75
    assert not (tmp_path / "pretrain" / "model.safetensors").exists()

    again = subprocess.run(command, env=env | {"SLICE": "3600"}, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    with metrics.open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, 41))
    assert json.loads((tmp_path / "evaluation.json").read_text())["words"]["reference"] > 0

    late = subprocess.run(command, env=env | {"SLICE": "30"}, capture_output=True, text=True, check=False)
    assert late.returncode == 75


def test_a_run_in_slices_says_how_it_is_called() -> None:
    process = subprocess.run([ROOT / "scripts" / "gpu_run.sh"], capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "scripts/gpu_run.sh base ctc_10m" in process.stderr
