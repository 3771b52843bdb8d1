"""A stand-in for the Hugging Face hub on loopback: repositories are folders ``OWNER/NAME/REVISION``."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serving import running

GATED = "gated"
"""A file whose presence in a repository's folder makes it one that has to be asked for."""


def commit_of(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.sent: list[str] = []
        """Files of which the contents were given out."""

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, verb, revision = [*parts[2 if api else 0 :], "", ""][:4]
        repository = self.server.root / owner / name
        if not repository.is_dir():
            return self._refuse(404, "RepoNotFound")
        folders = {key: path for path in repository.iterdir() for key in (path.name, commit_of(path))}
        if revision not in folders:
            return self._refuse(404, "RevisionNotFound")
        folder = folders[revision]
        if api:
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            about = {"id": f"{owner}/{name}", "sha": commit_of(folder), "private": False, "gated": False, "tags": []}
            about |= {"modelId": about["id"], "siblings": [{"rfilename": file} for file in files], "downloads": 0}
            if verb == "tree":
                sizes = {file: (folder / file).stat().st_size for file in files}
                about = [{"type": "file", "path": f, "size": n, "oid": commit_of(folder)} for f, n in sizes.items()]
            return self._send(json.dumps(about).encode(), {"Content-Type": "application/json"})
        if (folder / GATED).exists():
            return self._refuse(403, "GatedRepo")
        assert verb == "resolve"
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.sent.append(f"{owner}/{name}/{file.relative_to(folder)}")
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(folder)})

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub_of(root: Path) -> Iterator[Hub]:
    server = Hub(root)
    with running(server):
        yield server
