"""Dataclasses to JSON and back, and what differs between two of them.

The package's own types are stored by bare name, so that files outlive the modules which the types live in; a type of a
user's is stored as ``module:Class``.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from w2v2.errors import UsageError, check_range, shown
from w2v2.files import open_text, read_bytes, write_json

T = TypeVar("T")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def to_dict(config: Any) -> Any:
    """Dataclasses to JSON values; each keeps its type as ``_type``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = type(config)
        name = kind.__name__ if _is_ours(kind.__module__) else f"{kind.__module__}:{kind.__qualname__}"
        return {"_type": name, **values}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def from_dict(values: Any, kinds: type[T] | tuple[type[T], ...], where: str = "") -> T:
    """Inverse of ``to_dict``, for one of some dataclasses or a subclass of theirs.

    No code is imported for it: a type must be one of ``kinds``, a subclass that is loaded already, or a user's type
    whose module is. A field that an older version did not have yet gets its default, which therefore has to mean what
    that version did.

    Args:
        where: file and place in it, for messages.

    Raises:
        UsageError: an unknown type, a field that the type does not have or one that it lacks, a value of another type
            or out of its range.
    """
    prefix = f"{where}: " if where else ""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(values, dict) or not isinstance(values.get("_type", ""), str):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{prefix}expected a saved {names} with its _type, got {shown(values)}")
    kind: Any = _resolve(values.get("_type", ""), kinds, prefix)
    known = {field.name: field for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in values.items() if name != "_type"}
    if unknown := fields.keys() - known:
        raise UsageError(
            f"{prefix}saved {kind.__name__} has fields that this version does not know: {', '.join(sorted(unknown))}; "
            "use the version that wrote it, or a newer one"
        )
    missing = dataclasses.MISSING
    if lacking := [n for n in known.keys() - fields if known[n].default is known[n].default_factory is missing]:
        raise UsageError(f"{prefix}saved {kind.__name__} lacks {', '.join(sorted(lacking))}; get the file again")
    hints = typing.get_type_hints(kind, include_extras=True)
    path = f"{where}." if where.partition(": ")[2] else prefix
    config: T = kind(**{name: _from_value(value, hints[name], f"{path}{name}") for name, value in fields.items()})
    return config


def checked(value: Any, kind: Any, name: str) -> Any:
    """Return a value of a file as what it must be: lists as tuples, whole numbers as floats where those are wanted.

    Args:
        value: as JSON has it.
        kind: type, which may have ranges, dataclasses and typed dictionaries in it.
        name: file and field, for messages.

    Raises:
        UsageError: it is something else.
    """
    import msgspec  # late: a model is built without

    try:
        converted = msgspec.convert(value, kind, strict=True)
    except (
        msgspec.ValidationError,
        UnicodeEncodeError,
        TypeError,
    ) as error:  # which of several dataclasses, it does not know
        reason = str(error).replace("`", "")
        raise UsageError(f"{name}: {reason[:1].lower()}{reason[1:]} ({shown(value)})") from None
    check_range(converted, kind, name)
    return converted


_RENAMED = {"w2v2.model.wav2vec2:Wav2Vec2Config": "ContrastiveConfig"}
"""What types that older versions stored are called today: until December 2026 that one held the objective, too."""


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __package__


def _resolve(name: str, kinds: tuple[type[T], ...], prefix: str) -> type[T]:
    name = _RENAMED.get(name, name)
    module, _, qualname = name.rpartition(":")
    kind: Any = None
    if module and not _is_ours(module):
        kind = getattr(sys.modules.get(module), qualname, None)
    else:  # before December 2026 the package's own were stored with their module, too
        kind = next((k for k in _with_subclasses(kinds) if _is_ours(k.__module__) and k.__name__ == qualname), None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, kinds)):
        raise UsageError(
            f"{prefix}saved configuration needs the type {shown(name)}, which is not known here; "
            "name its recipe file (FILE.py:FUNCTION) on the command line, or import it first"
        )
    return kind


def _with_subclasses(kinds: typing.Iterable[type]) -> typing.Iterator[type]:
    for kind in kinds:
        yield kind
        yield from _with_subclasses(kind.__subclasses__())


def _from_value(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds: tuple[Any, ...] = tuple(option for option in options if dataclasses.is_dataclass(option))
    return from_dict(value, kinds, where) if kinds and value is not None else checked(value, hint, where)


def differences(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves of two ``to_dict`` values that differ, by dotted name."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {prefix.removesuffix("."): (one, other)}
    leaves: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*one, *other]):
        leaves |= differences(one.get(name), other.get(name), f"{prefix}{name}.")
    return leaves


def save_config(config: Any, path: Path) -> None:
    """Write a configuration as JSON."""
    write_json(path, to_dict(config))


def load_config(path: Path, kinds: type[T] | tuple[type[T], ...]) -> T:
    """Read a configuration written by ``save_config``.

    Raises:
        UsageError: no such file, not JSON, or not one of these kinds.
    """
    return from_dict(read_json(path), kinds, str(path))


def parse_json(content: str | bytes, where: object) -> Any:
    """Return what a text in JSON says; :class:`UsageError`: it is none, nested too deep, or has half a character."""
    try:
        value = json.loads(content)
        if _SURROGATE.search(content if isinstance(content, bytes) else content.encode()):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); get it again, or check the path") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UsageError: no such file, or something else in it.
    """
    values = parse_json(read_bytes(path), path)
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def read_checked(path: Path, kind: type[T]) -> T:
    """Return what a JSON file holds, as the type that it must have; errors as of ``read_json`` and ``checked``."""
    value: T = checked(parse_json(read_bytes(path), path), kind, str(path))
    return value


def read_figures(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and figures by name of each row of ``metrics.csv``; those of empty fields are missing.

    Raises:
        UsageError: no such file, or something else in it.
    """
    with open_text(path, newline="") as lines:
        try:
            ended = (line for line in lines if line.endswith("\n"))  # the last one may have been torn
            for row in csv.DictReader(ended, strict=True):
                step = int(row.pop("step"))
                yield step, {name: float(value) for name, value in row.items() if value}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            if isinstance(error, (UnicodeDecodeError, UsageError)):
                raise
            got = f"{type(error).__name__} {error}"
            raise UsageError(f"{path}: expected a column step and numbers, got {got}; have the run write it") from None


@contextlib.contextmanager
def files_of(folder: Path, verb: str) -> Iterator[None]:
    """Make a page of a folder's files inside; :class:`UsageError`: they are not as a verb leaves them."""
    try:
        yield
    except (UsageError, OSError):
        raise
    except Exception as error:
        reason = shown(f"{type(error).__name__} {error}")
        raise UsageError(f"{folder} holds other files than '{verb}' leaves: {reason}; run it again") from error
