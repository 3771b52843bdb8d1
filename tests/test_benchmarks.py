"""The benchmark of a card, tried without one."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_benchmark_of_a_card_runs_on_a_cpu(tmp_path: Path) -> None:
    call = [sys.executable, str(SCRIPT), "--device", "cpu", "--model", "tiny", "--seconds", "4", "--crop", "2.5"]
    call += ["--rounds", "1", "--variants", "eager", "activation_checkpointing", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    kinds = [f"{kind} {way}" for kind in ("equal", "unequal") for way in ("eager", "activation_checkpointing")]
    assert set(results) == {f"tiny {kind}" for kind in [*kinds, "equal hubert"]}
    assert all(figures["audio_seconds_per_second"] > 0 for figures in results.values())
