"""What the failure of a request means: whether another attempt may help, and what a person is told."""

from __future__ import annotations

from w2v2.errors import UsageError


class RangeError(OSError):
    """An answer to a request for a range that no further attempt would mend; says what is wrong with it."""


class TransientError(Exception):
    """What went wrong, in words; worth another attempt."""


def check_range(asked: str, sent: str | None) -> None:
    """Compare the header Content-Range of an answer with Range of its request."""
    if sent is None:
        raise RangeError("its server ignores range requests and sends the whole file; use one that supports them")
    start, last = map(int, asked.removeprefix("bytes=").split("-"))
    total = sent.rpartition("/")[2]
    if total.isdigit() and int(total) <= last:
        raise RangeError(beyond(start, last + 1, int(total)))
    if not sent.startswith(f"bytes {start}-{last}/"):
        raise TransientError(f"got the range '{sent}' instead of {asked}")


def beyond(start: int, end: int, total: int) -> str:
    """Say that a range goes beyond the end of its file."""
    return f"expected bytes {start} to {end}, got a file of {total} bytes; it is cut off, or not the file meant"


def meaning(location: str, error: BaseException) -> BaseException:
    """What an error means to a reader of ``location``; a ``TransientError`` if it may pass."""
    # fsspec and s3fs put one of Python's errors above the one that knows what happened.
    error = error.__cause__ if type(error).__module__ == "builtins" and error.__cause__ else error
    # By name, since botocore is there only with s3fs.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    line = " ".join(str(error).split()) or type(error).__name__
    if "ClientResponseError" in kinds and not error.__cause__:
        return _failure(location, getattr(error, "status", 0), line)
    if answer := getattr(error, "response", None):
        return _failure(location, answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 400), line)
    if kinds & {"ClientSSLError", "SSLError"}:
        return OSError(f"no secure connection to {location}: {line}; check its certificate")
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}:
        return PermissionError(f"no access to {location}: {line}; set AWS_ACCESS_KEY_ID and the like")
    if "ValueError" in kinds:
        return UsageError(f"not a valid address: {location} ({line}); expected http(s)://HOST/PATH")
    passing = {"TimeoutError", "ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"}
    if kinds & {"ClientError", *passing}:
        return TransientError(line)
    if "BotoCoreError" in kinds:
        return OSError(f"cannot read {location}: {line}; check the address and the AWS_... settings")
    return OSError(f"cannot read {location}: {line}") if isinstance(error, RangeError) else error


def _failure(location: str, status: int, line: str) -> Exception:
    if status in (404, 410):
        return FileNotFoundError(f"no file {location} (HTTP {status}); check the address")
    if status in (401, 403):
        return PermissionError(f"no access to {location} (HTTP {status}); check the address and the credentials")
    if status in (408, 429) or status >= 500:
        return TransientError(f"HTTP {status}: {line}")
    return OSError(f"cannot read {location}: HTTP {status}: {line}; check the address")
