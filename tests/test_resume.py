"""Runs that are killed, stopped, damaged or short of disk, and go on to the very same numbers."""

import csv
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Running, run, start

from w2v2.training.metrics import CSVMetrics

MODULE = [sys.executable, "-m", "w2v2.cli.main"]
"""For runs that start processes by their own command line, and for what is about the process itself."""


def command(recipe: str, corpus: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", recipe, "--data", str(corpus), "--out", str(out), *more]


def launch(argv: list[str], **kwargs) -> subprocess.Popen[str]:
    """A program by its command line, in a session of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs)


def launched(argv: list[str], **kwargs) -> tuple[int, str]:
    process = launch(argv, **kwargs)
    _, message = process.communicate()
    return process.returncode, message


def finish(argv: list[str], cwd: Path | str = ".") -> tuple[int, str]:
    """``w2v2 ARGV``: its exit code, and what it said."""
    done = run(argv, Path(cwd))
    return done.returncode, done.stderr


def losses(out: Path) -> dict[int, str]:
    """Every column of every training row but speed, as written: equal strings are equal bits."""
    path = out / "metrics.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = ("train/audio_seconds_per_second", "train/wait_share", "train/flops_utilisation")
    return {int(row["step"]): repr([value for name, value in row.items() if name not in timed]) for row in rows}


@pytest.fixture(scope="module")
def whole(recipe: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said = finish(command(recipe, corpus, out))
    assert code == 0, said
    rows = losses(out)
    assert list(rows) == list(range(1, 91))
    return rows


def until(process: Running | subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait for a step to be logged."""
    while max(losses(out), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_run_that_is_ended_at_any_step_goes_on_to_the_same_bits(
    recipe: str, corpus: Path, tmp_path: Path, whole: dict[int, str], number: int, code: int
) -> None:
    out = tmp_path / "run"
    process = start(command(recipe, corpus, out))
    until(process, out, random.Random(number).randint(9, 24))
    os.killpg(process.pid, number)  # the workers too, as from a terminal or a scheduler
    _, said = process.communicate(timeout=300)
    assert process.returncode == code
    if number != signal.SIGKILL:
        last = said.strip().splitlines()[-1]
        assert last.startswith(f"w2v2: {signal.Signals(number).name} at step ") and "--resume" in last
    reached = max(losses(out))
    assert reached < 50
    done, said = finish(command(recipe, corpus, out, "--resume", "--data.num-workers", "1"))
    assert done == 0, said
    assert losses(out) == whole  # 40 steps and more after the end, of two validations too


def test_auto_starts_what_is_not_there_and_resumes_what_is(recipe: str, corpus: Path, tmp_path: Path) -> None:
    argv = command(recipe, corpus, tmp_path / "run", "--resume", "auto", "--train.max-steps")
    assert finish([*argv, "3"])[0] == 0
    assert finish([*argv, "5"])[0] == 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]


SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


def test_a_slurm_job_saves_itself_when_it_is_warned_and_lightning_does_not_requeue_it_too(
    recipe: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run of Lightning, which it would take up")
    out = tmp_path / "run"
    process = start(command(recipe, corpus, out, "--resume", "auto"), cwd=tmp_path)
    until(process, out, 9)
    os.killpg(process.pid, signal.SIGUSR1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("w2v2: SIGUSR1 at step ") and "requeu" not in said
    step = int(last.split("step ")[1].split(":")[0])
    assert (out / "checkpoints" / f"step={step:08d}.ckpt").exists()
    assert not list(out.rglob("hpc_ckpt*"))


def test_w_and_b_gets_the_figures_too(
    recipe: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    options = ["--train.wandb", "probe", "--train.max-steps", "3", "--data.num-workers", "0"]
    code, said = finish(command(recipe, corpus, out, *options), cwd=tmp_path)
    assert code == 0, said
    assert list(losses(out)) == [1, 2, 3]
    (written,) = out.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    for name in (b"train/loss", b"train/code_perplexity", b"valid/accuracy_all_masked", b"n_entries"):
        assert name in content, name


def test_rows_that_a_resumed_run_has_forgotten_are_not_in_the_file(tmp_path: Path) -> None:
    before = CSVMetrics(tmp_path / "metrics.csv")
    for step in (50, 100, 150, 200):
        before.log_metrics({"train/loss": 1.0}, step)
    resumed = CSVMetrics(before.path)
    resumed.resume_at(100)
    for step in (150, 175):
        resumed.log_metrics({"train/loss": 2.0}, step)
    with before.path.open(newline="") as file:
        found = [(row["step"], float(row["train/loss"])) for row in csv.DictReader(file)]
    assert found == [("50", 1.0), ("100", 1.0), ("150", 2.0), ("175", 2.0)]


@pytest.fixture(scope="module")
def stopped(recipe: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert finish(command(recipe, corpus, out, "--train.max-steps", "20"))[0] == 0
    return out


def copy(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
    return to


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    recipe: str, corpus: Path, tmp_path: Path, stopped: Path, whole: dict[int, str], damage: str
) -> None:
    out = copy(stopped, tmp_path / "run")
    files = sorted((out / "checkpoints").iterdir())
    assert [file.name for file in files] == ["step=00000007.ckpt", "step=00000014.ckpt", "step=00000020.ckpt"]
    content = bytearray(files[-1].read_bytes())
    if damage == "flipped":
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    files[-1].write_bytes(content if damage == "flipped" else content[: len(content) // 2] if damage == "cut" else b"")
    code, said = finish(command(recipe, corpus, out, "--resume", "--train.max-steps", "24"))
    assert code == 0, said
    assert "step=00000020.ckpt is damaged" in said
    assert {step: row for step, row in losses(out).items() if step <= 19} == {s: whole[s] for s in range(1, 20)}
    assert list(losses(out)) == list(range(1, 25))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.n-layer", "3"], "model.n_layer was 2, is 3"),
        (["--optim.schedule.peak", "0.5"], "optim.schedule.peak was 0.0012, is 0.5"),
        (["--data.batch-seconds", "5"], "data.batch_seconds was 4.0, is 5.0"),
        (["--loss-weights.diversity", "1"], "loss_weights.diversity was 0.25, is 1.0"),
        (["--train.seed", "5", "--train.accumulate", "2"], "train.accumulate was 1, is 2; train.seed was 0, is 5"),
        (["--data", "OTHER"], "train "),
    ],
)
def test_another_run_is_refused_naming_the_difference(
    recipe: str, corpus: Path, tmp_path: Path, stopped: Path, options: list[str], said: str
) -> None:
    from conftest import write_corpus

    if "OTHER" in options:
        corpus = write_corpus(tmp_path / "other", {"train-clean": 4, "dev-clean": 1}, utterances=5)
        options = []
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    code, line = finish(command(recipe, corpus, stopped, "--resume", *options))
    assert code == 2
    assert line.startswith("w2v2: error: cannot resume ") and said in line and line.count("\n") == 1
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_disk_that_is_full_ends_the_run_with_its_state_safe(
    recipe: str, corpus: Path, tmp_path: Path, stopped: Path, whole: dict[int, str]
) -> None:
    out = copy(stopped, tmp_path / "run")
    size = (out / "checkpoints" / "step=00000020.ckpt").stat().st_size

    def limit() -> None:  # no file may grow beyond this: the system refuses the write, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    full = command(recipe, corpus, out, "--resume", "--train.max-steps", "40")
    code, said = launched([*MODULE, *full], preexec_fn=limit)
    assert code == 1
    assert "w2v2: failed: " in said.strip().splitlines()[-1] and "step=00000021.ckpt" in said
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == "step=00000020.ckpt"
    assert finish(command(recipe, corpus, out, "--resume"))[0] == 0
    after = losses(out)
    assert after.keys() == whole.keys()
    assert {step: row for step, row in after.items() if step > 20} == {s: whole[s] for s in range(21, 91)}


def test_a_checkpoint_that_would_run_code_is_not_read(recipe: str, corpus: Path, tmp_path: Path, stopped: Path) -> None:
    import torch

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/exploded",))

    out = copy(stopped, tmp_path / "run")
    torch.save({"bomb": Bomb()}, out / "checkpoints" / "step=00000030.ckpt")
    code, said = finish(command(recipe, corpus, out, "--resume", "--train.max-steps", "21"))
    assert code == 0
    assert "step=00000030.ckpt is damaged" in said
    assert not (tmp_path / "exploded").exists()
