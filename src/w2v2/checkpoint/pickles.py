"""Reads what ``torch.save`` wrote without running any of it.

``torch.load(weights_only=True)`` does the reading, and refuses whatever is not a tensor or a plain container. fairseq's
checkpoints also hold settings and dictionaries of classes of its own, of argparse, omegaconf and numpy. Those become
inert objects here that keep what was saved of them: none of these packages is imported, no function of theirs called.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from w2v2.errors import UsageError, first_line

_INERT = ("argparse", "enum", "fairseq", "numpy", "omegaconf", "pathlib", "typing")
_TENSORS = re.compile(
    r"torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|\w*Storage|storage\.\w+Storage|nn\.parameter\.Parameter"
    r"|Size|device|Tensor|serialization\._get_layout|u?int\d+|bfloat16|float\w+|double|half|long|bool)"
    r"|collections\.(OrderedDict|Counter|defaultdict)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|bytearray|complex|bool|bytes|dict|float|int|list|object|str|tuple)"
)
"""What tensors and containers are made of; ``torch.load`` has the last word on it."""
_PLAIN_TYPES = ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")
"""As values: omegaconf keeps the types of its keys and elements."""
_LEGACY_PICKLES = 5
"""Before torch 1.6 a file was so many pickles, and then the storages: magic, version, system, object, storage keys."""

_MOST_VALUES, _DEEPEST = 1_000_000, 100
"""Of settings."""


class Inert:
    """Stands for an object of a class that is not to be had: ``state`` is what was saved of it, or its arguments."""

    state: Any

    def __new__(cls, *args: Any) -> Inert:  # noqa: D102
        instance = super().__new__(cls)
        instance.state = args
        return instance

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def plain(value: Any, path: Path) -> Any:
    """Return dictionaries, lists and numbers of what was read: of namespaces, omegaconf's containers, enumerations.

    Raises:
        UsageError: what refers to itself, or unfolds to more than any settings are.
    """
    left = iter(range(_MOST_VALUES))

    def walk(value: Any, depth: int) -> Any:
        if depth > _DEEPEST or next(left, None) is None:
            raise UsageError(f"{path} holds settings that refer to themselves or unfold without end; do not use it")
        if isinstance(value, Inert):
            state = value.state
            if isinstance(state, dict):
                return walk(next((state[name] for name in ("_content", "_val") if name in state), state), depth + 1)
            return walk(state[0], depth + 1) if isinstance(state, tuple) and len(state) == 1 else None
        if isinstance(value, dict):
            return {_name(key): walk(inside, depth + 1) for key, inside in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(inside, depth + 1) for inside in value]
        return value

    return walk(value, 0)


def _name(key: Any) -> str:
    return str(key) if isinstance(key, (str, int, float, bool)) else type(key).__name__


def tensors_of(values: Any, path: Path) -> dict[str, Tensor]:
    """Return tensors by name, each with memory of its own size.

    Raises:
        UsageError: anything else.
    """
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} must hold tensors by name, got {type(values).__name__} with other keys; get it again")
    for name, tensor in values.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise UsageError(f"{path} must hold tensors by name and nothing else, got a {type(tensor).__name__} {name}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UsageError(f"{path} holds fewer numbers than the {tuple(tensor.shape)} of {name}; get it again")
    return dict(values)


def _plain_dict(*args: Any) -> dict[Any, Any]:
    """For ``collections.defaultdict``, whose factory is not to be called."""
    return {}


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors on the host, foreign objects as :class:`Inert`.

    Raises:
        UsageError: a class or function that has no place in a checkpoint; all are named. Or a damaged file.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        names = sorted(set(_zipped_names(path) if zipped else _legacy_names(path)))
    except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UsageError(f"{path} is damaged, or not a checkpoint of torch.save: {error}") from error
    inert = {name for name in names if name.split(".")[0] in _INERT and name.isprintable()}
    refused = [name for name in names if name not in inert and not _TENSORS.fullmatch(name)]
    if refused:
        raise UsageError(
            f"{path} would run or build {', '.join(refused)} when read, which a checkpoint has no need of; "
            "nothing was run; do not use this file"
        )
    known: list[Any] = [(type(name, (Inert,), {}), name) for name in inert]
    known += [(type(name, (Inert,), {}), f"builtins.{name}") for name in _PLAIN_TYPES]
    known.append((_plain_dict, "collections.defaultdict"))
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} cannot be read without running it: {_reason(error)}; do not use this file") from error
    except Exception as error:  # a damaged file can fail in any way that its bytes please
        raise UsageError(f"{path} is damaged: {first_line(error)}; get it again") from error


def _reason(error: Exception) -> str:
    """What torch found, without its advice on how to let it through."""
    message = " ".join(str(error).split())
    for start in ("Unsupported global: ", "Trying to load unsupported ", "Unsupported operand", "Can only "):
        if start in message:
            return message[message.index(start) :].split(" by default.")[0].split(" whose module")[0]
    return message[:200]


def _zipped_names(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for record in archive.namelist():
            if record.endswith(".pkl"):
                with archive.open(record) as file:
                    yield from _names(file)


def _legacy_names(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            if not file.peek(1):
                return
            yield from _names(file)


def _names(file: IO[bytes]) -> Iterator[str]:
    """Dotted names of the classes and functions that one pickle asks for."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
