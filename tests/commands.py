"""Commands and scripts in processes of their own, forked with everything imported: the same, seconds earlier."""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
ENTRANCES = ["w2v2.cli.main", "w2v2.training.finetune", "w2v2.training.pretrain", "w2v2.demo"]
CONTEXT.set_forkserver_preload([*ENTRANCES, "torch.utils.tensorboard"])


def _take(env: dict[str, str]) -> None:
    """The caller's environment; what reads it when it is imported is imported anew."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    if any(name.startswith("HF_") for name, _ in before.items() ^ env.items()):
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("huggingface_hub", "transformers", "datasets"):
                del sys.modules[name]
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))


def _work(argv: list[str] | None, script: str, cwd: str, env: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the system's, for its workers; not that of this process
    os.chdir(cwd)
    sys.path.insert(0, "")
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    _take(env)
    try:
        if argv is None:
            exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
            return
        from w2v2.cli.main import main

        code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


class Running:
    """What :class:`subprocess.Popen` tells of a process, of one that leads a session of its own."""

    def __init__(self, argv: Sequence[str | Path] | None, script: str, cwd: Path | str, env: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        files = [Path(self.folder.name, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        arguments = (argv and [*map(str, argv)], script, str(cwd), environment, *map(str, files))
        self.process = CONTEXT.Process(target=_work, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid, self.files = self.process.pid, files
        self.returncode: int | None = None
        atexit.register(self.process.kill)  # before multiprocessing's own, which waits for it

    def poll(self) -> int | None:
        return self.process.exitcode if self.returncode is None else self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, once; what it printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0.0)
        self.returncode = self.process.exitcode
        atexit.unregister(self.process.kill)
        self.process.close()
        out, err = (file.read_text(errors="replace") for file in self.files)
        self.folder.cleanup()
        return out, err


def start(argv: Sequence[str | Path], cwd: Path | str = ".", env: dict[str, str] | None = None) -> Running:
    """``w2v2 ARGV`` in a folder, going on."""
    return Running(argv, "", cwd, env or {})


def run(
    argv: Sequence[str | Path] | None, cwd: Path, *, script: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``w2v2 ARGV``, or a Python script, in a folder; what it printed, and its exit code."""
    running = Running(argv, script, cwd, env or {})
    printed = running.communicate()
    return subprocess.CompletedProcess([*map(str, argv or [script])], running.returncode or 0, *printed)
