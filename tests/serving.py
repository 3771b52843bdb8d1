"""Real servers for tests: HTTP with ranges and seeded faults, and S3 by moto."""

import base64
import os
import random
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

BLOCK = 64 * 1024


@dataclass
class Faults:
    """What goes wrong; the chances are drawn for each GET, in this order, from one seeded generator."""

    error: float = 0.0
    """Chance of an answer 500."""
    cut: float = 0.0
    """Chance that the connection ends in the middle of the body."""
    stall: float = 0.0
    """Chance of a pause in the middle of the body."""
    stall_seconds: float = 2.0
    ranges: bool = True
    """Without: Range is ignored, and the whole file sent with status 200."""
    length: bool = True
    """Without: no Content-Length, the connection's end is the body's."""
    bytes_per_second: float | None = None
    """For each connection by itself."""
    password: str = ""
    """``user:password`` without which nothing is given out (basic authentication)."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Paths, such as ``/a/b``, always answered with this status."""
    seed: int = 0


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    outcome: str
    """ok, error, cut, stall, or the status if that is not 200 or 206."""
    sent: int = 0
    """Bytes of the body."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, folder: Path, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults = folder, faults
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.log: list[Request] = []
        self._random, self._lock = random.Random(faults.seed), threading.Lock()

    @property
    def requests(self) -> int:
        return len(self.log)

    @property
    def bytes(self) -> int:
        return sum(request.sent for request in self.log)

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are part of the play."""

    def draw(self) -> str:
        with self._lock:
            chance = self._random.random()
        for fault in ("error", "cut", "stall"):
            if chance < getattr(self.faults, fault):
                return fault
            chance -= getattr(self.faults, fault)
        return "ok"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    TYPES: ClassVar = {".html": "text/html", ".txt": "text/plain"}

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path)
        faults = self.server.faults
        record = Request(self.command, name, self.headers.get("Range"), "ok")
        self.server.log.append(record)
        path = self.server.folder / name.lstrip("/")
        status = faults.statuses.get(name, 200 if path.is_file() else 404)
        if faults.password:
            given = self.headers.get("Authorization", "").removeprefix("Basic ")
            status = status if base64.b64decode(given).decode() == faults.password else 401
        if status == 200 and self.command == "GET":
            record.outcome = self.server.draw()
        if record.outcome == "error":
            status = 500
        if status != 200:
            record.outcome = "error" if status == 500 else str(status)
            return self._head(status, {"Content-Length": "0"})
        size = path.stat().st_size
        start, stop = 0, size
        headers = {"Content-Type": self.TYPES.get(path.suffix, "application/octet-stream")}
        if faults.ranges:
            headers["Accept-Ranges"] = "bytes"
            if record.range:
                first, last = record.range.removeprefix("bytes=").split("-")
                start = int(first) if first else max(0, size - int(last))
                stop = min(size, int(last) + 1) if first and last else size
                if start >= size:
                    record.outcome = "416"
                    return self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
        if faults.length:
            headers["Content-Length"] = str(stop - start)
        self.close_connection |= not faults.length
        self._head(status, headers)
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(start)
                self._body(file, stop - start, record)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _body(self, file, size: int, record: Request) -> None:
        if record.outcome in ("cut", "stall"):
            self._send(file, size // 2, record)
            if record.outcome == "cut":
                self.close_connection = True
                return
            time.sleep(self.server.faults.stall_seconds)
        self._send(file, size - record.sent, record)

    def _send(self, file, size: int, record: Request) -> None:
        speed = self.server.faults.bytes_per_second
        block = min(BLOCK, max(1, int(speed / 50))) if speed else BLOCK
        while size > 0:
            data = file.read(min(block, size))
            self.wfile.write(data)
            record.sent += len(data)
            size -= len(data)
            if speed:
                time.sleep(len(data) / speed)


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    """Let a server answer in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(folder: Path, faults: Faults | None = None) -> Iterator[Server]:
    """Serve a folder on a free port; ``faults`` of what is yielded may be replaced while it runs."""
    server = Server(folder, faults or Faults())
    with running(server):
        yield server


@dataclass
class S3:
    url: str
    """Endpoint."""
    bucket: str

    def upload(self, folder: Path, prefix: str) -> str:
        """Put all files of a folder below a prefix; its location."""
        import boto3

        client = boto3.session.Session().client("s3")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                client.upload_file(str(path), self.bucket, key)
        return f"s3://{self.bucket}/{prefix}"


@contextmanager
def s3_server() -> Iterator[S3]:
    """An S3 server on a free port with one bucket; endpoint and credentials are in the environment meanwhile."""
    import boto3
    from moto.server import ThreadedMotoServer

    from w2v2.data import storage

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    # An open connection keeps the endpoint that it was made for.
    storage._opened.cache_clear()
    try:
        client = boto3.session.Session().client("s3")
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="bucket")
        yield S3(settings["AWS_ENDPOINT_URL"], "bucket")
    finally:
        storage._opened.cache_clear()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        server.stop()
