"""How runs begin and end beside the plain way: deaths before a checkpoint, launchers, memory, other systems."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Running, run, start
from conftest import NANO, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import MODULE, command, launch, losses, until

from w2v2 import recipes
from w2v2.data.corpora import read_corpus
from w2v2.data.loader import SpeechLoader, dead_workers_named
from w2v2.errors import JobError, UsageError
from w2v2.training.config import FinetuneConfig, PretrainConfig, RunConfig
from w2v2.training.folder import clear_begun, environment
from w2v2.training.resume import Checkpoints
from w2v2.training.run import _failures_named, check_run, check_world

ROOT = Path(__file__).parents[1]


def words(recipe: str, corpus: Path, out: Path, *more: str) -> list[str]:
    """Of a short run without validation on its way."""
    return command(recipe, corpus, out, "--train.val-every", "100", *more)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_with_auto(
    recipe: str, corpus: Path, tmp_path: Path
) -> None:
    whole, died = tmp_path / "whole", tmp_path / "died"
    assert run(words(recipe, corpus, whole, "--train.max-steps", "4"), tmp_path).returncode == 0
    late = ["--train.checkpoint-every", "1000", "--resume", "auto"]
    process = start(command(recipe, corpus, died, *late))
    until(process, died, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (died / ".0badcafe.partial.csv").write_text("step")
    assert run(words(recipe, corpus, died, "--train.max-steps", "4"), tmp_path).returncode == 2  # only auto does
    again = run(words(recipe, corpus, died, "--train.max-steps", "4", "--resume", "auto"), tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(died) == losses(whole)
    assert not list(died.glob(".*.partial*"))


@pytest.mark.parametrize("kept", ["notes.txt", "model.safetensors", "best"])
def test_nothing_is_removed_but_what_such_a_run_left(tmp_path: Path, kept: str) -> None:
    (tmp_path / "config.json").write_text('{"train": {"checkpoint_every": 5}}')
    if kept == "best":  # of a run whose checkpoints were taken away
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / "best.json").write_text('{"step": 5}')
    else:
        (tmp_path / kept).touch()
    clear_begun(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", kept}


def test_checkpoints_of_somebody_else_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "config.json").write_text('{"train": {"checkpoint_every": 5}}')
    clear_begun(tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() and (tmp_path / "config.json").exists()


def test_without_git_a_run_has_no_revision(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment(read_corpus(corpus), 1)["git_revision"] is None


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(("launcher", "env"), [("torchrun", TORCHRUN), ("SLURM", SLURM)])
def test_other_processes_than_the_launchers_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path, launcher: str, env: dict[str, str]
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    train = recipes.tiny().train
    check_world(train)
    train.num_nodes = 2  # and nobody there to start the processes of the other machine
    with pytest.raises(UsageError, match="without torchrun or SLURM started 1 processes on 1 machines"):
        check_world(train)
    monkeypatch.setenv("MASTER_ADDR", "203.0.113.1")  # started by hand, on each machine
    check_world(train)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    fault = rf"{launcher} started 4 processes on 2 machines.*give `train.devices` 2, `train.num_nodes` 2"
    for devices, nodes in ((1, 1), (4, 1), (1, 4), (2, 1)):
        train.devices, train.num_nodes = devices, nodes
        with pytest.raises(UsageError, match=fault):
            check_world(train)
    config = recipes.tiny()
    with pytest.raises(UsageError, match=fault):
        check_run(config, read_corpus(corpus), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train.devices, train.num_nodes = 2, 2
    check_world(train)


def test_torchrun_without_devices_writes_nothing(recipe: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    done = subprocess.run(
        [*torchrun, "-m", "w2v2.cli.main", *command(recipe, corpus, out)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "give --train.devices 2" in done.stderr and "Traceback" not in done.stderr.split("ChildFailedError")[0][:200]
    assert not out.exists()


def test_tensorboard_has_every_step_once_after_a_killed_run(recipe: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(command(recipe, corpus, out, "--train.val-every", "100"))
    until(process, out, 10)  # the checkpoint is of step 7
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run(words(recipe, corpus, out, "--resume", "--train.max-steps", "16"), tmp_path)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, 17))
    for value, row in zip(events.Scalars("train/loss"), csv.DictReader((out / "metrics.csv").open()), strict=False):
        assert value.value == pytest.approx(float(row["train/loss"]), rel=1e-6)

    before = (out / "config.json").read_bytes()
    done = run(words(recipe, corpus, out, "--resume", "--train.max-steps", "3"), tmp_path)
    assert done.returncode == 2 and "has done 16 steps, --train.max-steps is 3" in done.stderr
    assert (out / "config.json").read_bytes() == before
    done = run(words(recipe, corpus, out, "--resume", "auto", "--train.max-steps", "16"), tmp_path)
    assert done.returncode == 0 and "has done its 16 steps" in done.stderr


def test_a_warm_up_longer_than_the_run_is_mentioned(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, splits = recipes.tiny(), read_corpus(corpus)
    check_run(config, splits)
    assert not caplog.records
    config.train.max_steps = 20
    check_run(config, splits)
    assert "warm-up of `optim.schedule` is longer than the run, which has 20 steps" in caplog.text


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_no_recipe_pins_the_cpu(kind: type[RunConfig]) -> None:
    for name in recipes.recipe_names(kind):
        assert recipes.load_recipe(name, kind).train.accelerator == "auto"


def test_no_memory_is_one_line_that_says_what_to_lower(tmp_path: Path) -> None:
    unasked = Checkpoints(tmp_path, recipes.tiny(), 1)
    with (
        pytest.raises(JobError, match=r"out of memory.*`data.batch_seconds`") as caught,
        _failures_named(unasked, None),
    ):
        torch.empty(1 << 55)
    assert "\n" not in str(caught.value)
    with pytest.raises(JobError, match="out of memory"), _failures_named(unasked, None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    with pytest.raises(RuntimeError, match="shape") as other, _failures_named(unasked, None):
        raise RuntimeError("shape")
    assert type(other.value) is RuntimeError


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_data_worker_is_one_line(recipe: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch([*MODULE, *command(recipe, corpus, out)])
    until(process, out, 3)
    workers = [pid for pid in children(process.pid) if b"w2v2.cli.main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in log
    assert "a process that reads audio has died" in log.splitlines()[-1] and "--data.num-workers" in log


def torn() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


class Torn:
    """What cannot be taken over, as from a worker that is just dying; or not even be read."""

    def __init__(self, read: bool) -> None:
        self.read = read

    def __reduce__(self):
        return torn, ()

    def __getitem__(self, index: int) -> "Torn":
        return self if self.read else torn()

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        (True, JobError, r"reads audio has died .while it handed over a batch: .*reset by peer.*lower `data.num_w"),
        (False, ConnectionResetError, "Caught ConnectionResetError in DataLoader worker"),
    ],
)
def test_a_worker_that_hangs_up_has_died_and_one_whose_server_does_has_not(
    read: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(SpeechLoader(Torn(read), batch_size=None, num_workers=1, allowed=0, limit=""))


def test_another_fault_of_a_worker_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="nothing of the kind") as caught, dead_workers_named():
        raise RuntimeError("nothing of the kind")
    assert type(caught.value) is RuntimeError


def test_a_second_ctrl_c_ends_at_once_with_130_and_a_line(recipe: str, corpus: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    path = recipe.rpartition(":")[0]
    slow.write_text(Path(path).read_text() + SLOW)
    out = tmp_path / "run"
    process = launch([*MODULE, *command(f"{slow}:slow", corpus, out)])
    assert process.stderr is not None
    for line in process.stderr:
        if "in a step" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    for line in process.stderr:
        if "once more to end at once" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=300) == 130, rest
    assert re.fullmatch(r"w2v2: SIGINT again: ended at once.*--resume.*", rest.strip().splitlines()[-1])
    assert "Traceback" not in rest


SLOW = """
import sys, time
from dataclasses import dataclass
from w2v2.model.pretraining import ContrastiveConfig, Wav2Vec2ForPretraining

class Slow(Wav2Vec2ForPretraining):
    def forward(self, *args, **kwargs):
        print("in a step", file=sys.stderr, flush=True)
        for _ in range(600):
            time.sleep(0.1)
        return super().forward(*args, **kwargs)

@dataclass(kw_only=True)
class SlowConfig(ContrastiveConfig):
    def build(self):
        return Slow(self)

def slow():
    import dataclasses
    config = nano()
    values = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    config.model = SlowConfig(**values)
    return config
"""

ELSEWHERE = """
import os, select, signal, sys
import lhotse, matplotlib, pytorch_lightning, torch, transformers, tyro, soundfile, fsspec, filelock
import tensorboard, concurrent.futures.process, pkgutil, importlib
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for name in ("SIGUSR1", "alarm", "SIGALRM"):
    delattr(signal, name)
del os.sched_getaffinity, select.poll
import w2v2
for info in pkgutil.walk_packages(w2v2.__path__, "w2v2."):
    importlib.import_module(info.name)
from w2v2.cli.main import VERBS, main
for argv in (["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)):
    assert main(argv) == 0, argv
from w2v2.data.loader import _leave_signals_to_the_run
from w2v2.cli.prepare import _cores
_leave_signals_to_the_run(0)
assert _cores() >= 1
from w2v2.training.plan import peak_memory
assert peak_memory("self") != peak_memory("self")
"""


def test_what_other_systems_lack_is_not_needed(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "usage: w2v2" in done.stdout


def test_a_run_works_where_those_are_lacking(corpus: Path, recipe: str, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    argv = ["pretrain", recipe, "--data", str(tmp_path / "corpus"), "--out", "run", "--train.max-steps", "2"]
    argv += ["--train.val-every", "2", "--data.num-workers", "0"]
    # Lightning knows by the platform that Windows lacks SIGUSR1.
    windows = "from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector\n"
    windows += "_SignalConnector.register_signal_handlers = lambda self: None\n"
    script = ELSEWHERE.split("import w2v2\n")[0] + windows + f"from w2v2.cli.main import main\nsys.exit(main({argv!r}))"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


MARKED = """
from dataclasses import dataclass
from pathlib import Path
from w2v2 import ContrastiveConfig, Wav2Vec2ForPretraining

class Marked(Wav2Vec2ForPretraining):
    def baseline(self, draws):
        Path(__file__).with_name("validates").touch()
        return super().baseline(draws)

@dataclass(kw_only=True)
class MarkedConfig(ContrastiveConfig):
    def build(self):
        return Marked(self)

def marked():
    config = nano()
    config.model = MarkedConfig(**vars(config.model))
    return config
"""


def terminated(process: Running | subprocess.Popen[str], mark: Path, kill: Callable[[int, int], None]) -> str:
    """What a command says that gets SIGTERM, by ``kill``, as soon as a file is there."""
    while not mark.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    kill(process.pid, signal.SIGTERM)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 75
    return message


def test_sigterm_in_a_validation_of_two_processes_ends_both(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train-clean": 2, "dev-clean": 12})
    (tmp_path / "marked.py").write_text(NANO + MARKED)
    often = ["--train.val-every", "3", "--train.checkpoint-every", "1000", "--train.max-steps", "6"]
    words = command(f"{tmp_path / 'marked.py'}:marked", corpus, tmp_path / "run", *often, "--train.devices", "2")
    process = subprocess.Popen([sys.executable, "-m", "w2v2.cli.main", *words], stderr=subprocess.PIPE, text=True)
    message = terminated(process, tmp_path / "validates", os.kill)  # the first of them alone
    assert "Traceback" not in message and "SIGTERM in the validation of step 3: saved; go on with --resume" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=00000003.ckpt"]


def test_sigterm_in_a_validation_ends_it_promptly_with_its_step_kept(tmp_path: Path) -> None:
    """The validation takes many batches, of which the first is the last."""
    corpus = write_corpus(tmp_path / "corpus", {"train-clean": 2, "dev-clean": 5})
    (tmp_path / "marked.py").write_text(NANO + MARKED)
    often = ["--train.val-every", "3", "--train.checkpoint-every", "1000", "--train.max-steps", "4"]
    whole, ended = (
        command(f"{tmp_path / 'marked.py'}:marked", corpus, tmp_path / n, *often) for n in ("whole", "ended")
    )
    message = terminated(start(ended), tmp_path / "validates", os.killpg)
    assert message.splitlines()[-1] == "w2v2: SIGTERM in the validation of step 3: saved; go on with --resume"
    assert [path.name for path in (tmp_path / "ended" / "checkpoints").iterdir()] == ["step=00000003.ckpt"]
    assert not (tmp_path / "ended" / "best").exists()  # it has not been validated
    assert run([*ended, "--resume"], tmp_path).returncode == 0
    assert run(whole, tmp_path).returncode == 0
    assert losses(tmp_path / "ended")[4] == losses(tmp_path / "whole")[4]


@pytest.fixture(scope="module")
def one_step(recipe: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_step") / "run"
    assert run(words(recipe, corpus, out, "--train.max-steps", "1"), out.parent).returncode == 0
    return out


@pytest.mark.parametrize("change", ["optimizer_states", "loops", "state_dict", "shapes"])
def test_a_checkpoint_that_is_whole_and_wrong_is_one_line(
    recipe: str, corpus: Path, tmp_path: Path, one_step: Path, change: str
) -> None:
    out = shutil.copytree(one_step, tmp_path / "run")
    (path,) = (out / "checkpoints").iterdir()
    saved = torch.load(path, weights_only=True)
    if change == "shapes":  # of which the kernels of an optimiser would write beyond the end
        for state in saved["optimizer_states"][0]["state"].values():
            state["exp_avg"] = state["exp_avg"].flatten()[:1]
    torch.save(saved | ({} if change == "shapes" else {change: {"x": torch.zeros(3)}}), path)
    result = run(words(recipe, corpus, out, "--train.max-steps", "2", "--resume"), tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert path.name in result.stderr.splitlines()[-1] or "no checkpoint in" in result.stderr.splitlines()[-1]
