"""Bytes from local disk, HTTP(S) and S3-compatible storage; nothing is kept on disk.

A location with ``://`` in it is remote: ``http``, ``https``, or ``s3``, with endpoint and credentials as botocore takes
them from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...). Anything else is a local path.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar

from w2v2.errors import UsageError

if TYPE_CHECKING:
    import aiohttp

TIMEOUT = 20.0
"""Seconds without a connection, or without a byte from it, until a request counts as failed."""
ATTEMPTS = 8
"""How often a request is made that fails for no lasting reason."""
BACKOFF = 0.25
"""Seconds before the second attempt, at most; doubled for each one after, up to 8 s."""
REQUESTS = 16
"""Connections, and so simultaneous requests, of one process to each kind of storage."""
_BUFFER = 256 * 1024

T = TypeVar("T")
# Not the module's own generator: reading must not change what a seeded run draws, and forked workers must not march
# in step.
_random = random.SystemRandom()


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a local path."""
    return "://" in location


def join(root: str, *parts: str) -> str:
    """The location of something below ``root``. Parts are taken as they are, not percent-encoded."""
    if not is_remote(root):
        return os.path.join(root, *parts)
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of each (location, start, size), remote ones fetched at the same time.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: the server refuses, or credentials are missing.
        OSError: a range goes beyond the end of its file, or the server ignores ranges.
        UnreachableError: ``ATTEMPTS`` were in vain.
        UsageError: a kind of storage that is unknown or not installed.
    """
    remote = [i for i, (location, _, size) in enumerate(ranges) if is_remote(location) and size]
    calls = [(ranges[i][0], functools.partial(_store(ranges[i][0]).read, *ranges[i])) for i in remote]
    fetched = dict(zip(remote, _run(calls), strict=True)) if calls else {}
    return [fetched[i] if i in fetched else _read_local(*ranges[i]) for i in range(len(ranges))]


def read_range(location: str, start: int, size: int) -> bytes:
    """``size`` bytes from ``start`` on; errors as for ``read_ranges``."""
    return read_ranges([(location, start, size)])[0]


def read_bytes(location: str) -> bytes:
    """A whole file; errors as for ``read_ranges``. For small ones, such as manifests: a failure starts it again."""
    if not is_remote(location):
        return Path(location).read_bytes()
    return _run([(location, functools.partial(_store(location).read, location))])[0]


def size_of(location: str) -> int:
    """Size in bytes, asked anew each time; errors as for ``read_ranges``, and OSError if the server does not tell."""
    if not is_remote(location):
        return os.stat(location).st_size
    return _run([(location, functools.partial(_store(location).size, location))])[0]


def open_binary(location: str) -> BinaryIO:
    """A file to read and seek in; remote ones through a buffer of 256 KiB. Errors as for ``read_ranges``."""
    return io.BufferedReader(_Remote(location), _BUFFER) if is_remote(location) else Path(location).open("rb")


class _Remote(io.RawIOBase):
    def __init__(self, location: str) -> None:
        self._location, self._size, self._position = location, size_of(location), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"seek to {position} in {self._location}: expected 0 or more")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._size - self._position))
        view[:size] = read_range(self._location, self._position, size)
        self._position += size
        return size

    def readall(self) -> bytes:
        # RawIOBase would ask for 8 KiB at a time.
        return self.read(max(0, self._size - self._position)) or b""


# --- Local ------------------------------------------------------------------------------------------------------------


class _Descriptor:
    """Closed when neither the cache nor a reader holds it any more: another thread may evict it in mid-read."""

    fd = -1

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@functools.lru_cache(maxsize=64)
def _descriptor(path: str, device: int, inode: int, size: int, changed: int) -> _Descriptor:
    # The file's identity is part of the key, so that a file put in its place is opened anew.
    return _Descriptor(path)


def _read_local(path: str, start: int, size: int) -> bytes:
    if not size:
        return b""
    info = os.stat(path)
    file = _descriptor(path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    pieces, done = [], 0
    # pread keeps no position, so that forked processes may share a descriptor; it may return less than asked for.
    while done < size and (piece := os.pread(file.fd, size - done, start + done)):
        pieces.append(piece)
        done += len(piece)
    if done < size:
        raise _beyond(path, start, size, start + done if done else info.st_size)
    return b"".join(pieces) if len(pieces) > 1 else pieces[0]


# --- Remote -----------------------------------------------------------------------------------------------------------


class UnreachableError(OSError):
    """A server that does not answer, however often it is asked: no fault of the file."""


class _TransientError(Exception):
    """What went wrong, in words; worth another attempt."""


class _Store(Protocol):
    """One attempt at each; what may pass is a ``_TransientError``."""

    async def read(self, location: str, start: int = 0, size: int | None = None) -> bytes: ...

    async def size(self, location: str) -> int: ...


def _store(location: str) -> _Store:
    scheme = location.partition("://")[0].lower()
    kind = {"http": _Http, "https": _Http, "s3": _S3}.get(scheme)
    if kind is None:
        raise UsageError(f"cannot read {location}: expected http://, https://, s3:// or a local path, got {scheme}://")
    return _opened(kind, os.getpid(), TIMEOUT)


@functools.cache
def _opened(kind: type[_Http | _S3], process: int, timeout: float) -> _Http | _S3:
    # One for each process, and never forgotten: were a forked worker to drop those of its parent, it would close them,
    # and so take their sockets out of the epoll set that it shares with the parent.
    return kind(timeout)


def _run(calls: Sequence[tuple[str, Callable[[], Coroutine[Any, Any, T]]]]) -> list[T]:
    from fsspec.asyn import get_loop, sync

    async def gather() -> list[T]:
        tasks = [asyncio.ensure_future(_attempts(location, call)) for location, call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    results: list[T] = sync(get_loop(), gather)
    return results


async def _attempts(location: str, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    for attempt in range(ATTEMPTS):
        try:
            return await call()
        except _TransientError as error:
            last = str(error)
        if attempt < ATTEMPTS - 1:
            await asyncio.sleep(min(BACKOFF * 2**attempt, 8.0) * _random.uniform(0.5, 1.0))
    raise UnreachableError(f"cannot read {location}: {last}, at the last of {ATTEMPTS} attempts; check the connection")


def _failure(location: str, status: int, reason: str | None) -> Exception:
    if status in (404, 410):
        return FileNotFoundError(f"no file {location} (HTTP {status}); check the address")
    if status in (401, 403):
        return PermissionError(f"no access to {location} (HTTP {status}); check the address and the credentials")
    if status in (408, 429) or status >= 500:
        return _TransientError(f"HTTP {status} {_line(reason)}")
    return OSError(f"cannot read {location}: HTTP {status} {_line(reason)}; check the address")


def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _beyond(location: str, start: int, size: int, total: int) -> OSError:
    return OSError(
        f"{location} is too short: expected bytes {start} to {start + size}, got a file of {total} bytes; "
        "it is cut off, or not the file meant"
    )


def _check_range(location: str, sent: str | None, start: int, size: int) -> None:
    """Compare the header Content-Range with what was asked for."""
    if sent is None:
        raise OSError(
            f"cannot read bytes {start} to {start + size} of {location}: its server ignores range requests and sends "
            "the whole file; use a server that supports them"
        )
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", sent)
    if match and match[3] != "*" and int(match[3]) < start + size:
        raise _beyond(location, start, size, int(match[3]))
    if not match or (int(match[1]), int(match[2])) != (start, start + size - 1):
        raise _TransientError(f"got the range '{sent}' instead of bytes {start}-{start + size - 1}")


def _header(start: int, size: int) -> str:
    return f"bytes={start}-{start + size - 1}"


class _Http:
    def __init__(self, timeout: float) -> None:
        import fsspec
        from aiohttp import ClientSession, ClientTimeout, TCPConnector

        async def client(**options: Any) -> ClientSession:
            return ClientSession(
                connector=TCPConnector(limit=REQUESTS),
                timeout=ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
                # Bytes as they are stored: a server may declare a .gz file to be compressed on the way.
                auto_decompress=False,
                headers={"Accept-Encoding": "identity"},
                trust_env=True,
                **options,
            )

        self._fs = fsspec.filesystem("http", get_client=client, skip_instance_cache=True)

    @asynccontextmanager
    async def _get(self, location: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        from aiohttp import ClientError, ClientSSLError

        try:
            session: aiohttp.ClientSession = await self._fs.set_session()
            async with session.get(self._fs.encode_url(location), headers=headers) as response:
                if response.status >= 400 and response.status != 416:
                    raise _failure(location, response.status, response.reason)
                yield response
        except ValueError as error:
            raise UsageError(f"not a valid address: {location}; expected http(s)://HOST/PATH") from error
        except ClientSSLError as error:
            raise OSError(f"no secure connection to {location}: {_line(error)}; check its certificate") from error
        except (ClientError, TimeoutError, ConnectionError) as error:
            raise _TransientError(_line(error)) from error

    async def read(self, location: str, start: int = 0, size: int | None = None) -> bytes:
        async with self._get(location, {} if size is None else {"Range": _header(start, size)}) as response:
            if size is not None:
                if response.status == 416:
                    raise _beyond(location, start, size, _total(response) or 0)
                # Before the body: without ranges that would be the whole file.
                sent = response.headers.get("Content-Range") if response.status == 206 else None
                _check_range(location, sent, start, size)
            data = await response.read()
        if size is not None and len(data) != size:
            raise _TransientError(f"got {len(data)} bytes instead of {size}")
        return data

    async def size(self, location: str) -> int:
        # Not HEAD, which signed URLs and some servers refuse.
        async with self._get(location, {"Range": _header(0, 1)}) as response:
            total = response.content_length if response.status == 200 else _total(response)
        if total is None:
            raise OSError(f"the server of {location} does not tell its size; use one that supports range requests")
        return total


def _total(response: aiohttp.ClientResponse) -> int | None:
    match = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


class _S3:
    def __init__(self, timeout: float) -> None:
        import fsspec

        config = {
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "max_pool_connections": REQUESTS,
            "retries": {"total_max_attempts": 1},
        }
        try:
            self._fs = fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True)
        except ImportError as error:
            raise UsageError("reading s3://... needs s3fs: pip install 'w2v2[s3]'") from error
        self._fs.retries = 1

    async def _call(self, method: str, location: str, **options: str) -> Any:
        # Below s3fs's own reading, which knows sizes from its listings and cuts a range short without a word.
        bucket, key, _ = self._fs.split_path(location)
        return await self._fs._call_s3(method, Bucket=bucket, Key=key, **options)

    async def read(self, location: str, start: int = 0, size: int | None = None) -> bytes:
        with _s3_errors(location):
            answer = await self._call(
                "get_object", location, **({} if size is None else {"Range": _header(start, size)})
            )
            async with answer["Body"] as body:
                if size is not None:
                    _check_range(location, answer.get("ContentRange"), start, size)
                data: bytes = await body.read()
        if size is not None and len(data) != size:
            raise _TransientError(f"got {len(data)} bytes instead of {size}")
        return data

    async def size(self, location: str) -> int:
        with _s3_errors(location):
            return int((await self._call("head_object", location))["ContentLength"])


@contextmanager
def _s3_errors(location: str) -> Iterator[None]:
    from aiohttp import ClientError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    try:
        yield
    except boto.SSLError as error:
        raise OSError(f"no secure connection to {location}: {_line(error)}; check its certificate") from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise PermissionError(f"no access to {location}: {_line(error)}; set AWS_ACCESS_KEY_ID and the like") from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError) as error:
        raise _TransientError(_line(error)) from error
    except (ClientError, TimeoutError, ConnectionError) as error:
        raise _TransientError(_line(error)) from error
    except boto.BotoCoreError as error:
        raise OSError(f"cannot read {location}: {_line(error)}; check the address and the AWS_... settings") from error
    except OSError as error:
        # s3fs has put botocore's error, which knows the status, below one of Python's.
        if (answer := getattr(error.__cause__, "response", None)) is None:
            raise
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 400)
        raise _failure(location, status, str(error)) from error
