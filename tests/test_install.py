"""What is shipped: the wheel by itself, the Dockerfile, the site."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def call(*words: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """What a command printed; fails with it if the command does."""
    done = subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_alone_runs_the_demo(tmp_path: Path) -> None:
    """Installed away from the clone: nothing that the package needs has been left in it."""
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("w2v2/")}
    there = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/w2v2").rglob("*") if path.is_file()}
    assert shipped == {name for name in there if "__pycache__" not in name}
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    where = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    assert str(tmp_path) in call(sys.executable, "-c", "import w2v2; print(w2v2.__file__)", cwd=tmp_path, **where)
    words = ["demo", "--hours", "0.15", "--shrink", "400", "--out", "demo"]
    call(sys.executable, tmp_path / "site/bin/w2v2", *words, cwd=tmp_path, **where)
    assert (tmp_path / "demo/report.html").is_file()


def test_the_dockerfile_has_no_fault_that_its_linter_knows() -> None:
    assert call(BIN / "hadolint", "Dockerfile") == ""


def test_the_site_is_built_and_each_of_its_links_leads_somewhere(tmp_path: Path) -> None:
    call(sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path, NO_MKDOCS_2_WARNING="1")
    start = (tmp_path / "index.html").read_text()
    assert 'href="data/"' in start and 'href="docs/' not in start  # README's links, as the site has them
