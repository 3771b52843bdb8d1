"""What is shipped beside the wheel, which ``test_demo.py`` runs by itself: the Dockerfile, the site."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def call(*words: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """What a command printed; fails with it if the command does."""
    done = subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_dockerfile_has_no_fault_that_its_linter_knows() -> None:
    assert call(BIN / "hadolint", "Dockerfile") == ""


def test_the_site_is_built_and_each_of_its_links_leads_somewhere(tmp_path: Path) -> None:
    call(sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path, NO_MKDOCS_2_WARNING="1")
    start = (tmp_path / "index.html").read_text()
    assert 'href="data/"' in start and 'href="docs/' not in start  # README's links, as the site has them
