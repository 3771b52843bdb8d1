import gzip
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from w2v2 import files
from w2v2.checkpoint.native import CONFIG
from w2v2.data.corpora import Split
from w2v2.errors import UsageError
from w2v2.files import whole, whole_folder, write_json, write_text
from w2v2.serial import load_config
from w2v2.training.config import PretrainConfig
from w2v2.training.folder import start_folder


def test_a_file_takes_its_place_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 250}.gz"
    path.write_bytes(b"old")
    with whole(path) as partial:
        assert partial.parent == path.parent and partial.suffix == ".gz"
        with gzip.open(partial, "wt", encoding="utf-8") as file:
            file.write("new")
        assert path.read_bytes() == b"old"
    assert gzip.decompress(path.read_bytes()) == b"new" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(error), whole(tmp_path / "a.txt") as partial:
        fail(partial)
    with pytest.raises(error), whole_folder(tmp_path / "folder") as folder:
        fail(folder / "half")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="has no name of its own"), whole_folder(Path(".")):
        pass


def test_a_writer_that_is_killed_leaves_the_old_file_and_the_next_one_clears_up(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    code = (
        "import os, sys; from pathlib import Path; from w2v2.files import whole, whole_folder\n"
        "with whole(Path('a.txt')) as partial, whole_folder(Path('folder')) as folder:\n"
        "    partial.write_text('half'), (folder / 'half').touch(), os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old" and len(os.listdir(tmp_path)) == 3
    write_text(tmp_path / "a.txt", "new")
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "b").touch()
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "folder"] and os.listdir(tmp_path / "folder") == ["b"]
    with pytest.raises(UsageError, match="not an empty folder"), whole_folder(tmp_path / "folder"):
        pass


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    for mask in (0o022, 0o027, 0o077):
        before = os.umask(mask)
        try:
            write_json(tmp_path / "a.json", 1)
            with whole_folder(tmp_path / f"{mask}"):
                pass
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == 0o777 & ~mask


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    code = (
        "import locale; from pathlib import Path; from w2v2.files import write_json, write_text\n"
        "print(locale.getpreferredencoding()); "
        f"text = {'Ærøskøbing 北京'!a}\n"
        "write_text(Path('a.txt'), text), write_json(Path('a.json'), text)"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert b"UTF-8" not in done.stdout
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Ærøskøbing 北京"
    assert json.loads((tmp_path / "a.json").read_text(encoding="ascii")) == "Ærøskøbing 北京"


def test_resume_on_a_full_disk_leaves_the_configuration(tmp_path: Path) -> None:
    """A limit on the size of a file fails where a full disk does, in the write."""
    config, splits = PretrainConfig(), {"train": Split.of([]), "valid": Split.of([])}
    start_folder(tmp_path, config, splits, resume=False)
    config.train.max_steps = 7
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        try:
            start_folder(tmp_path, config, splits, resume=True)
        except OSError:
            os._exit(3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert load_config(tmp_path / CONFIG, PretrainConfig) == PretrainConfig()
    assert sorted(os.listdir(tmp_path)) == [CONFIG, "environment.json"]


def test_nobody_else_writes_or_reads_text_in_a_way_of_his_own() -> None:
    ways = re.compile(
        r"os\.replace\(|\.write_text\(|\.read_text\((?!.*encoding=)|(?<!_)open\((.*, )?\"[wa]t?\"(?!.*encoding=)"
    )
    folder = Path(files.__file__).parent
    for path in folder.rglob("*.py"):
        if path != Path(files.__file__):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert [line for line in lines if ways.search(line)] == [], path
