import hashlib
import io
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import Faults, Server, s3_server, serve

from w2v2.data import storage
from w2v2.errors import UsageError
from w2v2.preparation import download
from w2v2.preparation.download import PARTS, download_librispeech

MINI = "dev-clean-2"


def make_part(part: str, seed: int, files: int = 24, size: int = 20_000) -> bytes:
    """An archive as OpenSLR packs them, with random bytes for audio."""
    rng, buffer = random.Random(seed), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        put(tar, "LibriSpeech/README.TXT", b"about")
        put(tar, "LibriSpeech/SPEAKERS.TXT", b"14 | F")
        for i in range(files):
            chapter = f"LibriSpeech/{part}/{100 + i % 3}/{i % 2}"
            put(tar, f"{chapter}/{100 + i % 3}-{i % 2}-{i:04d}.flac", rng.randbytes(size))
        put(tar, f"{chapter}/100-1.trans.txt", b"100-1-0000 MOON\n")
    return buffer.getvalue()


def put(tar: tarfile.TarFile, name: str, data: bytes = b"", **attributes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def add(root: Path, part: str, data: bytes, *, flat: bool = False, listed: bool = True) -> None:
    folder = root if flat else root / str(PARTS[part].resource)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.tar.gz").write_bytes(data)
    if listed:
        with (folder / "md5sum.txt").open("a") as file:
            file.write(f"{hashlib.md5(data).hexdigest()}  {part}.tar.gz\n")


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder but markers."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def expected(*archives: bytes) -> dict[str, bytes]:
    files = {}
    for archive in archives:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            files |= {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    return files


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BLOCK", 32 * 1024)
    monkeypatch.setattr(storage, "BACKOFF", 0.001)


@pytest.fixture
def mini() -> bytes:
    return make_part(MINI, seed=0)


@pytest.fixture
def mirror(tmp_path: Path, mini: bytes) -> Path:
    root = tmp_path / "mirror"
    add(root, MINI, mini)
    return root


def archives_asked_for(server: Server) -> list[str]:
    return [request.path for request in server.log if request.path.endswith(".tar.gz")]


def test_parts_are_those_of_openslr_with_their_sums() -> None:
    assert {part for part, it in PARTS.items() if it.resource == 31} == {"dev-clean-2", "train-clean-5"}
    assert len([part for part, it in PARTS.items() if it.resource == 12]) == 7
    assert len({it.md5 for it in PARTS.values()}) == 9
    assert all(len(bytes.fromhex(it.md5)) == 16 for it in PARTS.values())


def test_parts_of_both_resources_come_into_one_folder_and_are_not_fetched_again(
    tmp_path: Path, mini: bytes, mirror: Path
) -> None:
    other = make_part("test-other", seed=1)
    add(mirror, "test-other", other)
    out, seen = tmp_path / "deep" / "out", []
    show = lambda stage, share: seen.append(share)  # noqa: E731
    with serve(mirror) as server:
        got = download_librispeech([MINI, "test-other", MINI], out, base_url=server.url, show=show)
        assert got == out / "LibriSpeech"
        assert tree(out) == expected(mini, other)
        assert seen == sorted(seen) and 0 <= seen[0] < 0.1 and seen[-1] == 1.0 and len(set(seen)) > 20
        before = server.requests
        assert download_librispeech(["test-other", MINI], out, base_url=server.url, show=show) == got
        assert server.requests == before
    download_librispeech([MINI], out, base_url="http://127.0.0.1:9")
    assert tree(out) == expected(mini, other)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_mirrors_may_be_flat_and_of_any_kind_of_storage(tmp_path: Path, mini: bytes, flat: bool, kind: str) -> None:
    add(tmp_path / "mirror", MINI, mini, flat=flat)
    if kind == "s3":
        with s3_server() as s3:
            base = s3.upload(tmp_path / "mirror", f"libri{flat}")
            download_librispeech([MINI], tmp_path / "out", base_url=base)
    else:
        download_librispeech([MINI], tmp_path / "out", base_url=str(tmp_path / "mirror"))
    assert tree(tmp_path / "out") == expected(mini)


def test_a_flat_mirror_over_http(tmp_path: Path, mini: bytes) -> None:
    add(tmp_path / "mirror", MINI, mini, flat=True)
    with serve(tmp_path / "mirror") as server:
        download_librispeech([MINI], tmp_path / "out", base_url=server.url + "/")
    assert tree(tmp_path / "out") == expected(mini)


def test_a_missing_archive_is_said_before_any_download(tmp_path: Path, mirror: Path) -> None:
    with serve(mirror) as server:
        with pytest.raises(FileNotFoundError) as caught:
            download_librispeech([MINI, "test-clean"], tmp_path / "out", base_url=server.url)
        one_line(caught, f"{server.url}/12/test-clean.tar.gz", f"{server.url}/test-clean.tar.gz")
        assert server.bytes < 1000


SCRIPT = """
import sys
from pathlib import Path
from w2v2.preparation import download
download.BLOCK = int(sys.argv[3])
download.download_librispeech([sys.argv[4]], Path(sys.argv[1]), base_url=sys.argv[2])
"""


def start(out: Path, url: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), url, str(download.BLOCK), MINI])


def wait_for(true, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_ten_kills_cost_a_block_each_and_change_nothing(tmp_path: Path) -> None:
    data, out, rng = make_part(MINI, seed=3, files=40, size=40_000), tmp_path / "out", random.Random(0)
    add(tmp_path / "mirror", MINI, data)
    partial, sizes = out / f"{MINI}.tar.gz.partial", []
    with serve(tmp_path / "mirror", Faults(bytes_per_second=200_000)) as server:
        for number in range(10):
            before, size = len(archives_asked_for(server)), sizes[-1] if sizes else 0
            process = start(out, server.url)
            # The second request is that for the first block.
            wait_for(lambda before=before: len(archives_asked_for(server)) > before + 1, process)
            if number % 2:  # however busy the machine is, some come after a block
                wait_for(lambda size=size: partial.stat().st_size > size, process)
            time.sleep(rng.uniform(0, 0.2))
            kill(process)
            sizes.append(partial.stat().st_size)
            assert data.startswith(partial.read_bytes())
            assert not (out / "LibriSpeech").exists()
        server.faults = Faults()
        assert start(out, server.url).wait() == 0
        fetched = sum(request.sent for request in server.log if request.path.endswith(".tar.gz"))
    assert sizes == sorted(sizes) and len(set(sizes)) > 3
    assert tree(out) == expected(data)
    assert len(data) <= fetched <= len(data) + 10 * download.BLOCK


def test_a_kill_while_unpacking_leaves_no_part_that_looks_whole(tmp_path: Path) -> None:
    data, out, rng = make_part(MINI, seed=4, files=3000, size=10), tmp_path / "out", random.Random(0)
    add(tmp_path / "mirror", MINI, data)
    with serve(tmp_path / "mirror") as server:
        for _ in range(4):
            process = start(out, server.url)
            wait_for((out / f"{MINI}.unpacking").exists, process)
            time.sleep(rng.uniform(0, 0.1))
            kill(process)
            assert not (out / "LibriSpeech" / MINI).exists()
            assert (out / f"{MINI}.unpacking").exists()
        assert start(out, server.url).wait() == 0
        assert sum(request.sent for request in server.log if request.path.endswith(".tar.gz")) == len(data)
    assert tree(out) == expected(data)
    assert sorted(path.name for path in out.iterdir()) == ["LibriSpeech"]


def test_what_a_kill_after_the_move_leaves_is_cleared(tmp_path: Path, mini: bytes, mirror: Path) -> None:
    out = tmp_path / "out"
    download_librispeech([MINI], out, base_url=str(mirror))
    (out / f"{MINI}.tar.gz").write_bytes(mini)
    (out / f"{MINI}.unpacking").mkdir()
    download_librispeech([MINI], out, base_url=str(mirror))
    assert sorted(path.name for path in out.iterdir()) == ["LibriSpeech"]


def test_a_faulty_server_delays_but_does_not_spoil(
    tmp_path: Path, mini: bytes, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "TIMEOUT", 0.2)
    monkeypatch.setattr(storage, "ATTEMPTS", 30)
    with serve(mirror, Faults(error=0.2, cut=0.3, stall=0.1, stall_seconds=0.6, seed=2)) as server:
        download_librispeech([MINI], tmp_path / "out", base_url=server.url)
        assert {request.outcome for request in server.log} >= {"ok", "error", "cut", "stall"}
    assert tree(tmp_path / "out") == expected(mini)


def test_a_server_that_goes_away_leaves_what_was_fetched_and_finished(
    tmp_path: Path, mini: bytes, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    other, out = make_part("train-clean-5", seed=5), tmp_path / "out"
    add(mirror, "train-clean-5", other)

    with serve(mirror) as server:

        def break_it(stage: str, fraction: float) -> None:
            if fraction > 0.7:
                server.faults = Faults(error=1.0)

        with pytest.raises(OSError, match="HTTP 500") as caught:
            download_librispeech([MINI, "train-clean-5"], out, base_url=server.url, show=break_it)
        one_line(caught, "train-clean-5.tar.gz", "2 attempts")
        assert tree(out / "LibriSpeech") == {
            name.removeprefix("LibriSpeech/"): data for name, data in expected(mini).items()
        }
        had = (out / "train-clean-5.tar.gz.partial").stat().st_size
        assert had > len(other) // 4
        server.faults = Faults()
        server.log.clear()
        download_librispeech([MINI, "train-clean-5"], out, base_url=server.url)
        assert sum(r.sent for r in server.log if r.path.endswith(".tar.gz")) == len(other) - had
    assert tree(out) == expected(mini, other)


def test_a_partial_longer_than_the_archive_is_started_again(tmp_path: Path, mini: bytes, mirror: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{MINI}.tar.gz.partial").write_bytes(b"x" * (len(mini) + 1))
    download_librispeech([MINI], out, base_url=str(mirror))
    assert tree(out) == expected(mini)


@pytest.mark.parametrize("told_by", ["the mirror", "a file", "openslr"])
def test_a_wrong_checksum_is_refused_and_the_next_call_starts_afresh(tmp_path: Path, mini: bytes, told_by: str) -> None:
    wrong, out, mirror = "0" * 32, tmp_path / "out", tmp_path / "mirror"
    add(mirror, MINI, mini, listed=told_by == "a file")
    sums = None
    if told_by == "the mirror":
        (mirror / "31" / "md5sum.txt").write_text(f"{wrong} *./{MINI}.tar.gz\n")
    elif told_by == "a file":
        sums = tmp_path / "sums"
        sums.write_text(f"{'1' * 32}  other.tar.gz\n\n{wrong}  31/{MINI}.tar.gz\n")
    else:
        wrong = PARTS[MINI].md5
    with serve(mirror) as server:
        with pytest.raises(OSError, match="broken") as caught:
            download_librispeech([MINI], out, base_url=server.url, checksums=sums)
        right = hashlib.md5(mini).hexdigest()
        one_line(caught, f"{MINI}.tar.gz", wrong, right)
        assert tree(out) == {}
        sums = tmp_path / "right"
        sums.write_text(f"{right.upper()}  {MINI}.tar.gz\n")
        download_librispeech([MINI], out, base_url=server.url, checksums=sums)
    assert tree(out) == expected(mini)


def test_an_archive_that_was_brought_along_needs_no_server(tmp_path: Path, mini: bytes) -> None:
    out, sums = tmp_path / "out", tmp_path / "sums"
    out.mkdir()
    (out / f"{MINI}.tar.gz").write_bytes(mini)
    sums.write_text(f"{hashlib.md5(mini).hexdigest()}  {MINI}.tar.gz\n")
    download_librispeech([MINI], out, base_url="http://127.0.0.1:9", checksums=sums)
    assert tree(out) == expected(mini)


@pytest.mark.parametrize("content", [None, "", "0000  x.tar.gz\n"])
def test_checksums_that_lack_the_part_are_a_usage_error(tmp_path: Path, mirror: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sums").write_text(content)
    with pytest.raises(UsageError) as caught:
        download_librispeech([MINI], tmp_path / "out", base_url=str(mirror), checksums=tmp_path / "sums")
    one_line(caught, str(tmp_path / "sums"))


EVIL = {
    "up": ("LibriSpeech/../../evil", {}),
    "up at once": ("../evil", {}),
    "absolute": ("/tmp/w2v2-evil/evil", {}),
    "symlink": ("LibriSpeech/dev-clean-2/evil", {"type": tarfile.SYMTYPE, "linkname": "../../../../evil"}),
    "absolute symlink": ("LibriSpeech/dev-clean-2/evil", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("LibriSpeech/dev-clean-2/evil", {"type": tarfile.LNKTYPE, "linkname": "../../secret"}),
    "device": ("LibriSpeech/dev-clean-2/evil", {"type": tarfile.CHRTYPE}),
    "pipe": ("LibriSpeech/dev-clean-2/evil", {"type": tarfile.FIFOTYPE}),
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_archive_that_reaches_outside_is_refused_and_nothing_of_it_left(tmp_path: Path, kind: str) -> None:
    name, attributes = EVIL[kind]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        put(tar, f"LibriSpeech/{MINI}/1/1/1-1-0000.flac", b"good")
        put(tar, name, **attributes)
    add(tmp_path / "mirror", MINI, buffer.getvalue())
    (tmp_path / "secret").write_bytes(b"secret")
    before = tree(tmp_path)
    with pytest.raises(UsageError) as caught:
        download_librispeech([MINI], tmp_path / "out", base_url=str(tmp_path / "mirror"))
    one_line(caught, f"{MINI}.tar.gz", repr(name))
    assert tree(tmp_path) == before
    assert list((tmp_path / "out").iterdir()) == []
    assert not Path("/tmp/w2v2-evil").exists()


@pytest.mark.parametrize("kind", ["no archive", "cut off", "another part"])
def test_an_archive_of_something_else_is_refused(tmp_path: Path, mini: bytes, kind: str) -> None:
    data = {"no archive": b"<html>", "cut off": mini[:-5000], "another part": make_part("dev-clean", 0)}[kind]
    add(tmp_path / "mirror", MINI, data)
    with pytest.raises((OSError, UsageError)) as caught:
        download_librispeech([MINI], tmp_path / "out", base_url=str(tmp_path / "mirror"))
    one_line(caught, f"{MINI}.tar.gz", "removed")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_space_is_said_before_the_download(
    tmp_path: Path, mini: bytes, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(mirror) as server:
        for free in (0, int(2.1 * len(mini)) - 1):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            with pytest.raises(OSError, match="too little space") as caught:
                download_librispeech([MINI], tmp_path / "out", base_url=server.url)
            one_line(caught, str(tmp_path / "out"), f"{MINI}.tar.gz")
        assert server.bytes < 1000
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(2.1 * len(mini))))
        download_librispeech([MINI], tmp_path / "out", base_url=server.url)


def test_unknown_parts_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        download_librispeech(["dev-clean", "train-clean"], tmp_path / "out")
    one_line(caught, "train-clean of", *PARTS)
    assert not (tmp_path / "out").exists()


def test_a_part_that_someone_else_put_there_is_left_alone(tmp_path: Path, mirror: Path) -> None:
    mine = tmp_path / "out" / "LibriSpeech" / MINI / "mine.flac"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UsageError) as caught:
        download_librispeech([MINI], tmp_path / "out", base_url=str(mirror))
    one_line(caught, str(mine.parent))
    assert tree(tmp_path / "out") == {f"LibriSpeech/{MINI}/mine.flac": b"mine"}


@pytest.mark.parametrize(("faults", "said"), [({}, "ignores range requests"), ({"length": False}, "does not tell")])
def test_servers_without_ranges_or_sizes_are_refused(tmp_path: Path, mirror: Path, faults: dict, said: str) -> None:
    with serve(mirror, Faults(ranges=False, **faults)) as server, pytest.raises(OSError, match=said) as caught:
        download_librispeech([MINI], tmp_path / "out", base_url=server.url)
    one_line(caught, f"{MINI}.tar.gz")
