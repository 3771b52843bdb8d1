"""Bytes from local disk, HTTP(S) and S3-compatible storage; nothing is kept on disk.

A location with ``://`` in it is remote: ``http``, ``https``, or ``s3``, with endpoint and credentials as botocore takes
them from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...). Anything else is a local path. Requests
are made by fsspec; what it leaves out is here: ranges are checked, what may pass is retried, what lasts is one line.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from w2v2.data.answers import RangeError, TransientError, beyond, check_range, meaning
from w2v2.errors import UsageError
from w2v2.files import MOST_BYTES, open_file, read_most

if TYPE_CHECKING:
    import aiohttp

TIMEOUT = 20.0
"""Seconds without a connection, or without a byte from it, until a request counts as failed."""
ATTEMPTS = 8
"""How often a request is made that fails for no lasting reason."""
BACKOFF = 0.25
"""Seconds before the second attempt, at most; doubled for each one after, up to 8 s."""
SLOWEST = 16 * 1024
"""Bytes a second; an answer that takes longer than at this speed, and twice ``TIMEOUT``, counts as failed, too."""
LONGEST = 600.0
"""Seconds that any answer may take."""
REQUESTS = 16
"""Simultaneous requests of one call."""
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
    contents: dict[int, bytes] = {}
    remote = {i: _filesystem(location) for i, (location, _, size) in enumerate(ranges) if is_remote(location) and size}
    for filesystem in set(remote.values()):
        part = [i for i in remote if remote[i] == filesystem]
        paths, starts, sizes = (list(column) for column in zip(*(ranges[i] for i in part), strict=True))
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        answers = filesystem.cat_ranges(paths, starts, ends, batch_size=REQUESTS, on_error="raise")
        contents |= zip(part, answers, strict=True)
    return [contents[i] if i in contents else _read_local(*ranges[i]) for i in range(len(ranges))]


def read_range(location: str, start: int, size: int) -> bytes:
    """``size`` bytes from ``start`` on; errors as for ``read_ranges``."""
    return read_ranges([(location, start, size)])[0]


def read_bytes(location: str) -> bytes:
    """A whole file; errors as for ``read_ranges``. For small ones, such as manifests: a failure starts it again."""
    if not is_remote(location):
        with open_file(location) as file:
            return read_most(file)
    content: bytes = _filesystem(location).cat_file(location)
    return content


def size_of(location: str) -> int:
    """Size in bytes, asked anew each time; errors as for ``read_ranges``, and OSError if the server does not tell."""
    if not is_remote(location):
        return os.stat(location).st_size
    if (size := _filesystem(location).size(location)) is None:
        raise OSError(f"the server of {location} does not tell its size; use one that supports range requests")
    return int(size)


def open_binary(location: str) -> BinaryIO:
    """A file to read and seek in; remote ones through a buffer of 256 KiB. Errors as for ``read_ranges``."""
    if not is_remote(location):
        return open_file(location)
    from fsspec.spec import AbstractBufferedFile

    class Remote(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return read_range(location, start, end - start)

    file: BinaryIO = Remote(None, location, block_size=_BUFFER, size=size_of(location))
    return file


# --- Local ------------------------------------------------------------------------------------------------------------


def _read_local(path: str, start: int, size: int) -> bytes:
    if not size:
        return b""
    with open_file(path) as file:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"cannot read {path}: {beyond(start, start + size, os.stat(path).st_size)}")
    return content


# --- Remote -----------------------------------------------------------------------------------------------------------


class UnreachableError(OSError):
    """A server that does not answer, however often it is asked: no fault of the file."""


def _filesystem(location: str) -> Any:
    scheme = location.partition("://")[0].lower()
    if scheme not in ("http", "https", "s3"):
        raise UsageError(f"cannot read {location}: expected http://, https://, s3:// or a local path, got {scheme}://")
    return _opened("s3" if scheme == "s3" else "http", os.getpid(), TIMEOUT)


@functools.cache
def _opened(kind: str, process: int, timeout: float) -> Any:
    # One for each process, and never forgotten: were a forked worker to drop those of its parent, it would close them,
    # and so take their sockets out of the epoll set that it shares with the parent. fsspec's own cache drops them.
    return _s3(timeout) if kind == "s3" else _http(timeout)


def _http(timeout: float) -> Any:
    from aiohttp import ClientTimeout
    from fsspec.implementations.http import HTTPFileSystem

    async def check(response: aiohttp.ClientResponse) -> None:
        """Refuse an answer before its body, which without ranges would be the whole file."""
        try:
            sent = response.headers.get("Content-Range")
            if response.status != 416 or not sent:
                response.raise_for_status()
            if asked := response.request_info.headers.get("Range"):
                check_range(asked, sent if response.status != 200 else None)
        except Exception:
            response.close()
            raise

    class BoundedHTTP(HTTPFileSystem):
        async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
            # fsspec's own reads as long as anything comes.
            headers = {} if end is None else {"Range": await self._process_limits(url, start, end)}
            content, most = bytearray(), _most(start, end)
            async with (await self.set_session()).get(self.encode_url(url), headers=headers) as answer:
                async for part in answer.content.iter_chunked(_BUFFER):
                    content += part
                    if len(content) > most:
                        raise RangeError(f"its server sends more than {most} bytes, without an end")
            return bytes(content)

    client = {
        "timeout": ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
        "raise_for_status": check,
        # Bytes as they are stored: a server may declare a .gz file to be compressed on the way.
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
        "trust_env": True,
    }
    return _patient(BoundedHTTP)(client_kwargs=client, skip_instance_cache=True)


def _s3(timeout: float) -> Any:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise UsageError("reading s3://... needs s3fs: pip install s3fs") from error

    class CheckedS3(S3FileSystem):
        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None) -> Any:
            # s3fs's own reads all that a server without ranges sends, and tells nothing of the range that it got.
            bucket, key, _ = self.split_path(path)
            asked = {} if end is None else {"Range": await self._process_limits(path, start, end)}
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **asked)
            async with answer["Body"] as body:
                if asked:
                    check_range(asked["Range"], answer.get("ContentRange"))
                content, most = bytearray(), _most(start, end)
                while len(content) <= most and (part := await body.read(_BUFFER)):  # it gives what has come
                    content += part
                return bytes(content)

        async def _info(self, path: str, **options: Any) -> dict[str, Any]:
            # s3fs's own takes a prefix of names for an empty file.
            bucket, key, _ = self.split_path(path)
            answer = await self._call_s3("head_object", Bucket=bucket, Key=key)
            return {"name": path, "type": "file", "size": answer["ContentLength"]}

    config: dict[str, Any] = {"connect_timeout": timeout, "read_timeout": timeout, "max_pool_connections": REQUESTS}
    config["retries"] = {"total_max_attempts": 1}
    filesystem = _patient(CheckedS3)(config_kwargs=config, skip_instance_cache=True)
    filesystem.retries = 1
    return filesystem


def _patient(kind: Any) -> Any:
    """A kind of file system whose requests are made again where that may help, and whose ranges have their length."""

    class Patient(kind):
        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            async def read() -> bytes:
                most = _most(start, end)
                content: bytes = await _in_time(super(Patient, self)._cat_file(path, start=start, end=end), most)
                if len(content) > most:
                    raise RangeError(f"its server sends more than {most} bytes")
                if start is not None and end is not None and len(content) != end - start:
                    raise TransientError(f"got {len(content)} bytes instead of {end - start}")
                return content

            return await _persist(path, read)

        async def _info(self, path: str) -> dict[str, Any]:
            get = super()._info
            return await _persist(path, lambda: _in_time(get(path), 0))

    return Patient


def _most(start: int | None, end: int | None) -> int:
    """Bytes of a range, or that a whole file may have."""
    return MOST_BYTES if start is None or end is None else end - start


async def _in_time(work: Coroutine[Any, Any, T], size: int) -> T:
    limit = min(2 * TIMEOUT + size / SLOWEST, LONGEST)
    try:
        async with asyncio.timeout(limit) as clock:
            return await work
    except TimeoutError:
        if clock.expired():
            raise TransientError(f"no whole answer within {limit:.0f} s") from None
        raise


async def _persist(location: str, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(min(BACKOFF * 2 ** (attempt - 1), 8.0) * _random.uniform(0.5, 1.0))
        try:
            return await request()
        except Exception as error:
            failure = meaning(location, error)
            if not isinstance(failure, TransientError):
                raise failure from error
    raise UnreachableError(
        f"cannot read {location}: {failure}, at the last of {ATTEMPTS} attempts; check the connection"
    )
