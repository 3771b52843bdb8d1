"""Dataclasses to JSON and back, and what differs between two of them.

The package's own types are stored by bare name, so that files outlive the modules which the types live in; a type of a
user's is stored as ``module:Class``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from w2v2.errors import UsageError
from w2v2.files import write_json

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """Dataclasses to JSON values; each keeps its type as ``_type``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"_type": _type_name(type(config)), **values}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def from_dict(values: Any, kinds: type[T] | tuple[type[T], ...]) -> T:
    """Inverse of ``to_dict``, for one of some dataclasses or a subclass of theirs.

    No code is imported for it: a type must be one of ``kinds``, a subclass that is loaded already, or a user's type
    whose module is. A field that an older version did not have yet gets its default, which therefore has to mean what
    that version did.

    Raises:
        UsageError: an unknown type, or a field that the type does not have.
    """
    kind = _resolve(values.get("_type", ""), kinds if isinstance(kinds, tuple) else (kinds,))
    hints = typing.get_type_hints(kind)
    fields = {name: value for name, value in values.items() if name != "_type"}
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(kind)}:  # type: ignore[arg-type]
        raise UsageError(
            f"saved {kind.__name__} has fields that this version does not know: {', '.join(sorted(unknown))}; "
            "use the version that wrote it, or a newer one"
        )
    config: T = kind(**{name: _from_value(value, hints[name]) for name, value in fields.items()})
    return config


_RENAMED = {"w2v2.model.wav2vec2:Wav2Vec2Config": "ContrastiveConfig"}
"""What types that older versions stored are called today: until December 2026 that one held the objective, too."""


def _type_name(kind: type) -> str:
    return kind.__name__ if _is_ours(kind.__module__) else f"{kind.__module__}:{kind.__qualname__}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __package__


def _resolve(name: str, kinds: tuple[type[T], ...]) -> type[T]:
    name = _RENAMED.get(name, name)
    module, _, qualname = name.rpartition(":")
    kind: Any = None
    if module and not _is_ours(module):
        kind = getattr(sys.modules.get(module), qualname, None)
    else:  # before December 2026 the package's own were stored with their module, too
        kind = next((k for k in _with_subclasses(kinds) if _is_ours(k.__module__) and k.__name__ == qualname), None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and issubclass(kind, kinds)):
        raise UsageError(
            f"saved configuration needs the type '{name}', which is not known here; "
            "name its recipe file (FILE.py:FUNCTION) on the command line, or import it first"
        )
    return kind


def _with_subclasses(kinds: typing.Iterable[type]) -> typing.Iterator[type]:
    for kind in kinds:
        yield kind
        yield from _with_subclasses(kind.__subclasses__())


def _from_value(value: Any, hint: Any) -> Any:
    if isinstance(value, dict) and "_type" in value:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        return from_dict(value, options)
    if isinstance(value, list):
        return tuple(value)
    return value


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
    return from_dict(read_json(path), kinds)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UsageError: no such file, or something else in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); get it again, or check the path") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values
