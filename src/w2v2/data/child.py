"""Processes of their own that hostile files may end: how one is started and asked, and how it answers.

They talk by standard input and output: a line of JSON each way, followed by so many bytes as its ``bytes`` says. What a
child needs of the file it asks its parent for.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from w2v2.errors import AudioError
from w2v2.files import Positioned

PATIENCE_SECONDS = 30.0
"""A process that works longer than this on one step is ended, and its file refused."""
MEMORY_BYTES = 4 << 30


class Child:
    """A Python that runs a module of this package."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.input, self.output = self.popen.stdin, self.popen.stdout

    def wakes(self) -> bool:
        """Whether it still answers: one that was ended a moment ago seems to run."""
        try:
            self._send({"do": "wake"})
            self._receive()
        except (OSError, ValueError):
            self.end()
            return False
        return True

    def ask(self, command: dict[str, Any], file: BinaryIO) -> tuple[dict[str, Any], bytes]:
        """The answer to a command, with its data; meanwhile the process is given what it wants of the file.

        Raises:
            AudioError: it has crashed, or works for longer than ``PATIENCE_SECONDS``.
        """
        try:
            self._send(command)
            while True:
                answer, data = self._receive()
                if "need" not in answer:
                    return answer, data
                start, count = answer["need"]
                file.seek(start)
                piece = file.read(count)
                self._send({"bytes": len(piece)}, piece)
        except (OSError, ValueError) as error:
            self.end()
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise
            raise AudioError(
                f"the decoder crashed on it, or took more than {PATIENCE_SECONDS:g} s for a step"
            ) from error

    def _send(self, message: dict[str, Any], data: bytes = b"") -> None:
        self.input.write(json.dumps(message).encode() + b"\n" + data)
        self.input.flush()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        watch = threading.Timer(PATIENCE_SECONDS, self.popen.kill)
        watch.daemon = True
        watch.start()
        try:
            answer = json.loads(self.output.readline())  # of nothing, if it has ended: a ValueError
            data = self.output.read(answer["bytes"])
            if len(data) < answer["bytes"]:
                raise ValueError("cut off")
            return answer, data
        finally:
            watch.cancel()

    def end(self) -> None:
        """End it."""
        self.popen.kill()
        self.popen.wait()
        for stream in (self.input, self.output):
            with contextlib.suppress(OSError):
                stream.close()


_idle: dict[tuple[int, str], list[Child]] = {}
"""Processes that wait for a file, by the process that started them (what a fork has inherited is its parent's)."""


def child(module: str) -> Child:
    """A process that runs a module, which waits already or starts now."""
    waiting = _idle.setdefault((os.getpid(), module), [])
    with contextlib.suppress(IndexError):  # several threads take of them
        while True:
            if (process := waiting.pop()).wakes():
                return process
    return Child(module)


def rest(process: Child) -> None:
    """Let a process wait for the next file."""
    _idle.setdefault((os.getpid(), process.module), []).append(process)


@atexit.register
def _end_all() -> None:
    for (pid, _), waiting in _idle.items():
        for process in waiting if pid == os.getpid() else ():
            process.end()


# --- In the child -----------------------------------------------------------------------------------------------------


def send(answer: dict[str, Any], data: bytes = b"") -> None:
    """One message to the parent."""
    sys.stdout.buffer.write(json.dumps({**answer, "bytes": len(data)}).encode() + b"\n")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def receive(stream: BinaryIO) -> dict[str, Any]:
    """One line from the parent, to be answered; it ends the process if there is none."""
    while line := stream.readline():
        message: dict[str, Any] = json.loads(line)
        if message.get("do") != "wake":
            return message
        send({})
    sys.exit(0)


class ParentsFile(Positioned):
    """The file that the parent has open."""

    def __init__(self, size: int, name: str) -> None:
        super().__init__(size)
        self.name = name

    def readinto(self, buffer: Any) -> int:
        """Ask the parent for bytes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.end - self.position))
        if not count:
            return 0
        send({"need": [self.position, count]})
        data = sys.stdin.buffer.read(receive(sys.stdin.buffer)["bytes"])
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def limit_memory() -> None:
    """Let the system end this process rather than another one, where it can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
