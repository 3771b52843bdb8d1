"""Whatever README and docs show is run: each page's shell and Python blocks, one after the other, in one folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run
from conftest import write_corpus
from hub import hub_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)

# What makes a command small enough for a test; nothing that changes what it does.
FEWER = "--train.max-steps 2 --train.log-every 1 --train.val-every 2 --train.checkpoint-every 2 --data.num-workers 0"
THIN = (
    "--model.n-layer 1 --model.n-embd 48 --model.ffn-dim 48 --model.pos-conv-groups 4 --model.n-head 4 "
    "--model.conv-channels 16 16 16 16 16 16 16 --model.conv-norm group:8"
)
SHORT = "--data.batch-seconds 5 --data.max-seconds 3 --train.accumulate 1"
SHRINK = {
    "demo": "--shrink 200",
    "pretrain": f"{FEWER} {SHORT}",
    "finetune": FEWER,
    "plan": f"--steps 1 {SHORT}",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def small(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    if words[0] != "w2v2":
        return words
    if words[1] == "pretrain" and "--init-from" not in words:
        words = [*words, "--warm-start.updates", "1"]
    if words[1:3] == ["finetune", "ctc_1h"]:  # its published encoder is a narrow one here
        words = [*words, "--channel-mask-length", "16"]
    shape = THIN if words[1] in ("pretrain", "finetune", "plan") and "--init-from" not in words else ""
    return words + shlex.split(f"{SHRINK.get(words[1], '')} {shape}")  # what it starts from has its own shape


def start(words: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if words[0] == "w2v2":
        return run(words[1:], folder, env=env)
    return subprocess.run(words, cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Published models by their names, small ones, in place of the hub's."""
    pytest.importorskip("transformers")
    from published import build_all

    root = tmp_path_factory.mktemp("hub")
    build_all(root)
    with hub_of(root) as server:
        yield {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("cache")), "HF_TOKEN": ""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_corpus(tmp_path / "my_speech", {"train-clean-100": 4, "dev-clean": 1, "test-clean": 1})
    shutil.copytree(tmp_path / "my_speech", tmp_path / "LibriSpeech")
    env = {"OMP_NUM_THREADS": "1"}
    if "facebook/" in page.read_text():
        env |= request.getfixturevalue("hub")
    ran = 0
    for language, text in blocks(page):
        if language == "python" and text.startswith("# "):  # a file to write, named in its first line
            (tmp_path / text.split("\n")[0].removeprefix("# ")).write_text(text)
            continue
        if language == "python":
            done = [run(None, tmp_path, script=text, env=env)]
        else:
            lines = text.replace("\\\n", " ").splitlines()
            shown = [line for line in lines if line.strip() and not line.startswith(("make ", "git ", "cd "))]
            done = [start(small(line), tmp_path, env) for line in shown]
        for process in done:
            command = " ".join(map(str, process.args))
            assert process.returncode == 0, f"{command}\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}"
            ran += 1
    assert ran or page.name not in ("README.md", "extending.md")


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))["cells"]
    script = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert script.startswith("UPDATES = ")
    script = script.replace(script.splitlines()[0], "UPDATES = 2")
    done = run(None, tmp_path, script=script, env={"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters" in done.stdout and "heard:" in done.stdout
