import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from serving import Faults, s3_server, serve

from w2v2.data import storage
from w2v2.errors import UsageError

SIZE = 1_000_003


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    (root / "deep").mkdir()
    (root / "deep" / "a.bin").write_bytes(np.random.default_rng(0).bytes(SIZE))
    (root / "b c.jsonl.gz").write_bytes(np.random.default_rng(1).bytes(3000))
    (root / "empty").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def content(folder: Path) -> bytes:
    return (folder / "deep" / "a.bin").read_bytes()


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture(params=["local", "http", "s3"])
def root(request: pytest.FixtureRequest, folder: Path):
    """The same folder as three kinds of location."""
    if request.param == "local":
        yield str(folder)
    elif request.param == "http":
        with serve(folder) as server:
            yield server.url
    else:
        yield request.getfixturevalue("s3").upload(folder, "some/prefix")


@contextmanager
def as_s3(url: str) -> Iterator[str]:
    """A plain HTTP server is one for S3 too, as far as reading goes; its folders are the buckets."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ENDPOINT_URL", url), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
            patch.setenv(f"AWS_{name}", value)
        storage._opened.cache_clear()
        yield "s3:/"
    storage._opened.cache_clear()


@pytest.fixture(params=["http", "s3"])
def address(request: pytest.FixtureRequest):
    """From a server's URL to that of its files."""
    with ExitStack() as stack:
        yield lambda server: server.url if request.param == "http" else stack.enter_context(as_s3(server.url))


def some_ranges(location: str, n: int, seed: int = 0) -> list[tuple[str, int, int]]:
    rng = np.random.default_rng(seed)
    starts = rng.choice(SIZE - 20_000, n, replace=False)
    return [(location, int(start), int(rng.integers(1, 20_000))) for start in starts]


def cut_out(content: bytes, ranges: list[tuple[str, int, int]]) -> list[bytes]:
    return [content[start : start + size] for _, start, size in ranges]


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said


def test_all_three_kinds_of_storage_give_the_same_bytes(root: str, folder: Path, content: bytes) -> None:
    location = storage.join(root, "deep", "a.bin")
    assert storage.is_remote(root) == (root != str(folder))
    assert storage.size_of(location) == SIZE
    assert storage.read_bytes(location) == content
    ranges = [*some_ranges(location, 40), (location, 0, SIZE), (location, SIZE - 1, 1), (location, 5, 0)]
    assert storage.read_ranges(ranges) == cut_out(content, ranges)
    assert storage.read_range(location, 17, 4) == content[17:21]
    assert storage.read_bytes(storage.join(root, "b c.jsonl.gz")) == (folder / "b c.jsonl.gz").read_bytes()
    empty = storage.join(root, "empty")
    assert storage.read_bytes(empty) == b"" and storage.size_of(empty) == 0 and storage.read_range(empty, 0, 0) == b""
    with storage.open_binary(empty) as file:
        assert file.read() == b""


def test_ranges_of_all_kinds_may_be_mixed_and_keep_their_order(folder: Path, content: bytes, s3) -> None:
    with serve(folder) as server:
        roots = [str(folder), server.url, s3.upload(folder, "mixed")]
        ranges = [
            (storage.join(roots[i % 3], "deep/a.bin"), start, size)
            for i, (_, start, size) in enumerate(some_ranges("", 30))
        ]
        assert storage.read_ranges(ranges) == cut_out(content, ranges)
    assert storage.read_ranges([]) == []


def test_an_open_file_reads_and_seeks_like_a_local_one(root: str, folder: Path, content: bytes) -> None:
    with storage.open_binary(storage.join(root, "deep/a.bin")) as file, (folder / "deep/a.bin").open("rb") as local:
        rng = np.random.default_rng(0)
        for _ in range(30):
            position, size = int(rng.integers(0, SIZE + 1000)), int(rng.integers(0, 5000))
            for whence, offset in ((0, position), (2, -position % SIZE), (1, int(rng.integers(0, 9)))):
                assert file.seek(offset, whence) == local.seek(offset, whence)
                assert file.read(size) == local.read(size)
                assert file.tell() == local.tell()
        file.seek(SIZE - 700_000)
        assert file.read() == content[-700_000:]
        assert file.read(3) == b""
        with pytest.raises((ValueError, OSError)):
            file.seek(-1)


def test_an_open_file_asks_for_a_quarter_of_a_megabyte_at_a_time(folder: Path) -> None:
    with serve(folder) as server, storage.open_binary(f"{server.url}/deep/a.bin") as file:
        pieces = [file.read(100) for _ in range(2000)]
        assert b"".join(pieces) == (folder / "deep/a.bin").read_bytes()[:200_000]
        assert server.requests == 2


def test_a_range_beyond_the_end_is_an_error_at_once(root: str, impatient: None) -> None:
    for start in (SIZE - 10, SIZE + 10):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            storage.read_range(storage.join(root, "deep/a.bin"), start, 20)
        one_line(caught, "a.bin")


def test_a_folder_is_no_file(root: str) -> None:
    for read in (storage.read_bytes, storage.size_of, storage.open_binary):
        if storage.is_remote(root) or read is not storage.size_of:
            with pytest.raises((FileNotFoundError, IsADirectoryError)):
                read(storage.join(root, "deep"))


def test_a_file_that_is_not_there_is_said_to_be_missing(root: str) -> None:
    location = storage.join(root, "deep", "none.bin")
    for read in (storage.read_bytes, storage.size_of, storage.open_binary, lambda it: storage.read_range(it, 0, 5)):
        with pytest.raises(FileNotFoundError) as caught:
            read(location)
        one_line(caught, "none.bin")


def test_sizes_are_never_stale(tmp_path: Path, s3) -> None:
    for data in (b"one", b"three", b""):
        (tmp_path / "x").write_bytes(data)
        location = s3.upload(tmp_path, "changing") + "/x"
        for place in (location, str(tmp_path / "x")):
            assert storage.size_of(place) == len(data)
            assert storage.read_bytes(place) == data
            assert storage.read_range(place, 0, len(data)) == data


def test_a_local_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"old", b"new", b"longer than that"):
        (tmp_path / "y").write_bytes(data)
        (tmp_path / "y").rename(path)
        assert storage.read_range(str(path), 0, len(data)) == data


def test_local_descriptors_are_few_and_serve_many_threads(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 1000)
    before = len(os.listdir("/proc/self/fd"))
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 200, 1000):
            if storage.read_range(str(tmp_path / str(i)), 3, 900) != bytes([i]) * 900:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) <= before + 70


def test_ranges_are_exact_whatever_the_server_does_and_only_failed_ones_are_asked_for_again(
    address, folder: Path, content: bytes, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 30)
    # Far above what a healthy answer takes on a busy machine: none may count as failed.
    monkeypatch.setattr(storage, "TIMEOUT", 4.0)
    with serve(folder, Faults(error=0.2, cut=0.2, stall=0.1, stall_seconds=10.0, seed=1)) as server:
        location = f"{address(server)}/deep/a.bin"
        ranges = some_ranges(location, 60)
        assert storage.read_ranges(ranges) == cut_out(content, ranges)
        assert Counter(request.outcome for request in server.log).keys() == {"ok", "error", "cut", "stall"}
        for _, start, size in ranges:
            outcomes = [r.outcome for r in server.log if r.range == f"bytes={start}-{start + size - 1}"]
            assert outcomes[-1] == "ok" and outcomes.count("ok") == 1
        assert storage.read_bytes(location) == content
        assert storage.size_of(location) == SIZE


def test_requests_are_made_at_the_same_time_but_not_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(folder) as server:
        busy, most, lock, send = 0, 0, threading.Lock(), server.RequestHandlerClass._send
        two = threading.Event()

        def counted(handler, *args) -> None:
            nonlocal busy, most
            if handler.server is not server:  # one that an earlier test left to stall
                return send(handler, *args)
            with lock:
                busy += 1
                most = max(most, busy)
                if busy > 1:
                    two.set()
            two.wait(60)  # the first for another, however long that takes to come
            threading.Event().wait(0.02)
            with lock:
                busy -= 1
            return send(handler, *args)

        monkeypatch.setattr(server.RequestHandlerClass, "_send", counted)
        storage.read_ranges(some_ranges(f"{server.url}/deep/a.bin", 80))
    assert 1 < most <= storage.REQUESTS


def test_attempts_come_to_an_end(address, folder: Path, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    with serve(folder, Faults(error=1.0)) as server:
        location = f"{address(server)}/deep/a.bin"
        with pytest.raises(OSError, match="attempts") as caught:
            storage.read_range(location, 0, 5)
        one_line(caught, location, "500", "3 attempts")
        assert server.requests == 3


def test_a_server_that_stalls_for_good_or_is_not_there_is_given_up(
    folder: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(storage, "TIMEOUT", 0.5)
    with serve(folder, Faults(stall=1.0, stall_seconds=1.5)) as server:
        location = f"{server.url}/deep/a.bin"
        with pytest.raises(OSError, match="2 attempts") as caught:
            storage.read_ranges(some_ranges(location, 20))
        one_line(caught, location, "imeout")
    with pytest.raises(OSError, match="2 attempts") as caught:
        storage.read_bytes(location)
    one_line(caught, location)


@pytest.mark.parametrize(
    ("status", "error"), [(403, PermissionError), (401, PermissionError), (404, FileNotFoundError)]
)
def test_a_refusal_is_final(status: int, error: type[OSError], address, folder: Path) -> None:
    with serve(folder, Faults(statuses={"/deep/a.bin": status})) as server:
        location = f"{address(server)}/deep/a.bin"
        with pytest.raises(error) as caught:
            storage.read_range(location, 0, 5)
        one_line(caught, location, str(status))
        assert server.requests == 1


def test_a_server_without_ranges_is_refused_before_it_sends_all(address, tmp_path: Path) -> None:
    size = 50_000_000
    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / "big").open("wb") as file:
        file.truncate(size)
    with serve(tmp_path, Faults(ranges=False)) as server:
        location = f"{address(server)}/store/big"
        with pytest.raises(OSError, match="ignores range requests") as caught:
            storage.read_range(location, 1000, 10)
        one_line(caught, location)
        assert storage.size_of(location) == size
        assert server.bytes < size / 2


def test_a_server_that_tells_no_size_is_refused(folder: Path) -> None:
    with serve(folder, Faults(ranges=False, length=False)) as server:
        assert len(storage.read_bytes(f"{server.url}/deep/a.bin")) == SIZE
        with pytest.raises(OSError, match="does not tell its size") as caught:
            storage.size_of(f"{server.url}/deep/a.bin")
    one_line(caught, f"{server.url}/deep/a.bin")


def in_child(task, *args) -> object:
    """What a forked process, which inherits all connections, sends back."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(task(*args)))
    process.start()
    assert ours.poll(120), "the forked process hangs"
    answer = ours.recv()
    process.join(120)
    assert process.exitcode == 0
    return answer


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_read_too_and_do_not_disturb_their_parent(
    root: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A connection that a child has closed for its parent stalls, which further attempts would hide.
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(storage, "TIMEOUT", 8.0)
    ranges = some_ranges(storage.join(root, "deep/a.bin"), 20)
    for _ in range(3):
        assert storage.read_ranges(ranges) == cut_out(content, ranges)
        assert in_child(storage.read_ranges, ranges) == cut_out(content, ranges)
    assert in_child(in_child, storage.read_ranges, ranges) == cut_out(content, ranges)
    assert storage.read_ranges(ranges) == cut_out(content, ranges)


def test_s3_without_credentials_or_with_an_unknown_bucket_is_refused_in_one_line(
    s3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        storage.read_bytes("s3://no-such-bucket/x")
    one_line(caught, "s3://no-such-bucket/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    storage._opened.cache_clear()
    with pytest.raises(PermissionError) as caught:
        storage.read_bytes(f"s3://{s3.bucket}/x")
    one_line(caught, "s3://bucket/x", "AWS_ACCESS_KEY_ID")
    storage._opened.cache_clear()


def test_unknown_kinds_and_addresses_are_usage_errors() -> None:
    for location in ("gs://bucket/x", "http://", "http://[/x"):
        with pytest.raises(UsageError) as caught:
            storage.read_bytes(location)
        one_line(caught, location)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_local_reading_imports_nothing_heavy(folder: Path) -> None:
    code = f"""
import sys
from w2v2.data import storage
assert storage.read_range({str(folder / "empty")!r}, 0, 0) == b""
heavy = {{"fsspec", "aiohttp", "s3fs", "botocore", "torch", "lhotse", "lightning", "pytorch_lightning", "numpy"}}
print(heavy & set(sys.modules))
"""
    assert run(code) == "set()\n"


def test_s3_without_s3fs_says_what_to_install() -> None:
    code = """
import sys
sys.modules["s3fs"] = None
from w2v2.data import storage
from w2v2.errors import UsageError
try:
    storage.read_bytes("s3://bucket/x")
except UsageError as error:
    print(error)
"""
    assert run(code) == "reading s3://... needs s3fs: pip install s3fs\n"


def test_a_process_that_has_read_ends_without_noise(folder: Path, content: bytes) -> None:
    with serve(folder) as server:
        code = f"from w2v2.data import storage; print(len(storage.read_bytes('{server.url}/deep/a.bin')))"
        assert run(code) == f"{SIZE}\n"


class Endless:
    """A server that answers whatever it is asked with bytes that never end, so many at a time."""

    def __init__(self, head: bytes, block: bytes, pause: float, context: ssl.SSLContext | None = None) -> None:
        self.head, self.block, self.pause, self.context, self.sent = head, block, pause, context, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=self.socket.accept()[:1], daemon=True).start()

    def answer(self, client: socket.socket) -> None:
        with suppress(OSError), self.context.wrap_socket(client, server_side=True) if self.context else client as peer:
            peer.recv(1 << 16)
            peer.sendall(self.head)
            while True:
                peer.sendall(self.block)
                self.sent += len(self.block)
                time.sleep(self.pause)


RANGE = b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-99999/100000\r\n\r\n"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", RANGE])
def test_a_server_that_trickles_is_given_up_by_name(head: bytes, impatient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes well within the time without one, on a busy machine too."""
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(storage, "TIMEOUT", 1.0)
    monkeypatch.setattr(storage, "SLOWEST", 1e9)
    server = Endless(head, b"x", 0.05)
    with pytest.raises(OSError, match=r"no whole answer within [23] s, at the last of 2 attempts") as caught:
        storage.read_range(f"{server.url}/x", 0, 100_000) if head is RANGE else storage.read_bytes(f"{server.url}/x")
    one_line(caught, f"{server.url}/x")


@pytest.mark.parametrize("range_", [True, False])
def test_a_body_without_an_end_does_not_fill_memory(range_: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MOST_BYTES", 1_000_000)
    server = Endless(RANGE if range_ else b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0)
    with pytest.raises(OSError, match=f"sends more than {100_000 if range_ else 1_000_000} bytes") as caught:
        storage.read_range(f"{server.url}/x", 0, 100_000) if range_ else storage.read_bytes(f"{server.url}/x")
    one_line(caught, f"{server.url}/x")
    assert server.sent < 20_000_000


def test_a_certificate_that_does_not_verify_is_called_so(tmp_path: Path) -> None:
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    options = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(["openssl", *options, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = Endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 1, context)
    for read in (storage.read_bytes, storage.size_of, lambda location: storage.read_range(location, 0, 5)):
        with pytest.raises(OSError, match="certificate verify failed: self-signed certificate") as caught:
            read(f"{server.url}/x")
        one_line(caught, f"{server.url}/x", "no secure connection", "check its certificate")
