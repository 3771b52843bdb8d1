"""Commands and scripts in processes of their own, forked with everything imported: the same, seconds earlier."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["w2v2.cli.main", "w2v2.training.finetune", "w2v2.training.pretrain", "w2v2.demo"])


def _work(argv: list[str] | None, script: str, cwd: str, env: dict[str, str], out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    sys.path.insert(0, "")
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
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


def run(
    argv: list[str] | None, cwd: Path, *, script: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``w2v2 ARGV``, or a Python script, in a folder; what it printed, and its exit code."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        arguments = (argv, script, str(cwd), env or {}, out.name, err.name)
        process = CONTEXT.Process(target=_work, args=arguments)
        process.start()
        process.join()
        texts = [Path(file.name).read_text(errors="replace") for file in (out, err)]
    return subprocess.CompletedProcess(argv or [script], process.exitcode or 0, *texts)
