"""What a user is told in one line, and the ranges of settings.

A message names a setting as the field that it is, in backticks: `` `train.max_steps` ``. The command line prints it
with the options that it knows these by, and exits with the code named here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

Show = Callable[[str, float], None]
"""Told a stage of a piece of work and the share of it that is done."""


def quiet(stage: str, share: float) -> None:
    """Show nothing."""


class UsageError(ValueError):
    """Something that the user can put right (exit code 2). The message says what, expected, got, and what to do."""


class StoppedError(Exception):
    """A signal ended the work, and everything is saved. ``exit_code`` tells a scheduler to run it again, or not."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)  # all of it, to cross to another process
        self.exit_code = 130 if number == signal.SIGINT else 75  # what shells give for Ctrl-C; EX_TEMPFAIL

    def __str__(self) -> str:
        return str(self.args[1])


class JobError(RuntimeError):
    """The work itself could not be done (exit code 1). The message is one line; what was finished is kept."""


class AudioError(Exception):
    """Audio that cannot be had; the message says which and why."""


class TruncatedError(AudioError):
    """Audio that lacks its end."""


@dataclass(frozen=True)
class Range:
    """What a number in a configuration may be, beside its field: ``Annotated[int, Range(1)]``."""

    low: float
    high: float = math.inf
    above: bool = False
    """Whether ``low`` itself is too low."""
    below: bool = False
    """Whether ``high`` itself is too high."""

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or not self.low <= value <= self.high or value == math.inf:
            return False
        return not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.above or self.below:
            low = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
            return f"{low}, {'less than' if self.below else 'at most'} {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Width = Annotated[int, Range(1, 100_000)]
"""Of a part of a network: more is no mistake in a number, but a file that is not what it seems."""
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]


def check_ranges(config: Any, name: str = "") -> None:
    """Check every number of a configuration, those of configurations in it too, against the range beside its field.

    Raises:
        UsageError: naming the field.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{name}.{field.name}" if name else field.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, path)
        else:
            check_range(value, hints[field.name], f"`{path}`")


def check_range(value: Any, hint: Any, name: str) -> None:
    """Check a number, or each of some, against the range in its type; :class:`UsageError` names it."""
    for bounds in _ranges(hint) if value is not None else ():
        if any(number not in bounds for number in (value if isinstance(value, (tuple, list)) else [value])):
            raise UsageError(f"{name} must be {bounds}, got {shown(value)}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, ``public``, 200 signs at most; of one that says nothing, its type."""
    return public((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def shown(value: Any) -> str:
    """A value of whatever kind and size, to be shown in a message."""
    try:
        text = str(value) if isinstance(value, (int, float, tuple)) else repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes; a list in itself
        text = f"some {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _ranges(hint: Any) -> list[Range]:
    own = [bounds for bounds in getattr(hint, "__metadata__", ()) if isinstance(bounds, Range)]
    return own + [bounds for inner in get_args(hint) for bounds in _ranges(inner)]


_URL = re.compile(
    r"""(\b[a-z][\w+.-]*://)(?:[^\s/"'<>]*@)?([^\s?"'<>]*)"""
    r"""(?:\?[^\s"'<>]*?(?=[:;,.)]*(?:[\s"'<>]|$)))?""",  # punctuation after an address is not of it
    re.IGNORECASE,
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")


def public(text: str) -> str:
    """Text to be kept or shown: its addresses without user, password and query, which may be a signature."""
    return _URL.sub(r"\1\2", text) if "://" in text else text


def printable(text: str) -> str:
    """Text in one line, to be shown: ``public``, and what would move a terminal's cursor or break the line escaped."""
    return _UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), public(text))
