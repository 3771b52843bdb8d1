"""Two processes on one machine, started by torchrun and by Lightning, from the command line on."""

import csv
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from test_resume import MODULE, command, finish, launch, launched, losses, until

from w2v2.data.corpora import read_corpus
from w2v2.training.pretrain import evaluate_pretrained
from w2v2.training.resume import newest_good


def torchrun() -> list[str]:
    """What starts two processes of the command whose words follow, on a port that is free."""
    launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    return [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "w2v2.cli.main"]


def both(recipe: str, corpus: Path, out: Path, *more: str) -> list[str]:
    return [*torchrun(), *command(recipe, corpus, out, "--train.devices", "2", *more)]


# Checkpoints, every seventh step, fall between rows, so that sums of either process are half full.
THIRTY = ("--train.max-steps", "30", "--train.val-every", "30", "--train.log-every", "3")


@pytest.fixture(scope="module")
def whole(recipe: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said = launched(both(recipe, corpus, out, *THIRTY))
    assert code == 0, said
    assert list(losses(out)) == list(range(3, 31, 3))
    return out


def test_validation_by_two_processes_is_that_of_one(whole: Path, corpus: Path) -> None:
    alone = evaluate_pretrained(whole, read_corpus(corpus), "valid")
    with (whole / "metrics.csv").open() as file:
        names, *_, last = (line.strip().split(",") for line in file)
    together = {name: float(value) for name, value in zip(names, last, strict=True) if value}
    assert together["step"] == 30
    for name, value in alone.items():
        assert together[f"valid/{name}"] == pytest.approx(value, rel=1e-6), name


def test_two_processes_killed_go_on_to_the_same_bits_under_either_launcher(
    recipe: str, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    process = launch(both(recipe, corpus, out, *THIRTY))
    until(process, out, 15)
    os.killpg(process.pid, signal.SIGKILL)
    for worker in ranks(out).values():
        os.kill(worker, signal.SIGKILL)
    process.communicate()
    lightning = ["--data", str(corpus), "--out", str(out), "--train.devices", "2", *THIRTY, "--resume"]
    code, said = launched([*MODULE, "pretrain", recipe, *lightning])
    assert code == 0, said
    assert losses(out) == losses(whole)


@pytest.fixture(scope="module")
def sharded(recipe: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "run"
    code, said = launched(both(recipe, corpus, out, *THIRTY, "--train.shard", "True"))
    assert code == 0, said
    return out


def test_two_sharded_processes_give_the_figures_of_two_whole_ones(whole: Path, sharded: Path) -> None:
    ours, theirs = figures(sharded), figures(whole)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - SPEED:
            assert one[name] == pytest.approx(other[name], rel=1e-5), f"{name} at step {one['step']}"


SPEED = {"train/audio_seconds_per_second", "train/wait_share"}


def figures(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_sharded_run_is_resumed_to_the_same_bits(recipe: str, corpus: Path, tmp_path: Path, sharded: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(sharded, out)
    for later in ("21", "28", "30"):
        (out / "checkpoints" / f"step=000000{later}.ckpt").unlink(missing_ok=True)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step=00000014.ckpt"]
    code, said = launched(both(recipe, corpus, out, *THIRTY, "--train.shard", "True", "--resume"))
    assert code == 0, said
    assert losses(out) == losses(sharded)


def test_the_files_of_a_sharded_run_are_those_of_one_process(whole: Path, sharded: Path, corpus: Path) -> None:
    alone = evaluate_pretrained(sharded, read_corpus(corpus), "valid")
    assert alone["loss"] == pytest.approx(figures(sharded)[-1]["valid/loss"], rel=1e-6)
    ours, theirs = newest_good(sharded)[1], newest_good(whole)[1]
    assert ours.keys() == theirs.keys()
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in ours["state_dict"].items():
        torch.testing.assert_close(tensor, theirs["state_dict"][name], rtol=1e-4, atol=1e-6)
    (mine,), (other,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert mine["state"].keys() == other["state"].keys()
    for number, moments in mine["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(tensor, other["state"][number][name], rtol=1e-3, atol=1e-6)


def ranks(out: Path) -> dict[int, int]:
    """Process of each rank of a run, by its command line and environment."""
    found: dict[int, int] = {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        rank = next((value.partition("=")[2] for value in environment if value.startswith("LOCAL_RANK=")), None)
        if rank is not None and str(out) in command and "torch.distributed.run" not in command:
            found.setdefault(int(rank), int(folder.name))  # its data workers have higher numbers
    return found


def test_a_rank_that_dies_takes_the_others_down_and_is_named(recipe: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch(both(recipe, corpus, out, "--train.max-steps", "400", "--train.val-every", "400"))
    until(process, out, 5)
    os.kill(ranks(out)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=300)  # and no hang
    assert process.returncode == 1
    root_cause = said[said.index("Root Cause") :]
    assert "rank      : 1" in root_cause and "SIGKILL" in root_cause
    deadline = time.monotonic() + 300
    while ranks(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ranks(out)


def test_more_processes_than_utterances_are_refused(recipe: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "data", {"train": 1, "dev": 1}, utterances=1)
    out = tmp_path / "run"
    code, said = finish(command(recipe, corpus, out, "--train.devices", "2"))
    assert code == 2
    assert said.strip().splitlines()[-1].startswith("w2v2: error: the train split has 1 utterances for 2 processes")
    assert not out.exists()


def test_the_figures_of_a_run_say_how_much_was_heard_by_all(whole: Path, corpus: Path) -> None:
    with (whole / "metrics.csv").open() as file:
        names, *rows = (line.strip().split(",") for line in file)
    heard = [float(row[names.index("train/hours_heard")]) for row in rows]
    data = json.loads((whole / "environment.json").read_text())["data"]["train"]
    steps_a_pass = data["hours"] / (heard[0] / 3)
    assert 0 < heard[0] <= 3 * 2 * 4.0 / 3600  # three steps, two ranks, 4 s each at most
    assert all(a < b for a, b in itertools.pairwise(heard))
    assert steps_a_pass < 30  # so passes were crossed
