"""The tensors of a folder of Hugging Face: in one file or in parts, and the adapters that MMS has for its languages."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor

from w2v2.checkpoint.native import WEIGHTS, read_safetensors
from w2v2.checkpoint.pickles import read_pickle, tensors_of
from w2v2.errors import UsageError
from w2v2.serial import checked, read_json

BINARY = "pytorch_model.bin"


def read_weights(folder: Path, language: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors by transformers' names, and the file that they are in.

    Args:
        folder: with ``model.safetensors`` or ``pytorch_model.bin``, whole or in parts.
        language: whose adapter, and output layer, to put in the place of those that the file has.

    Raises:
        UsageError: files missing or damaged, or an adapter that does not fit.
    """
    for name in (WEIGHTS, BINARY):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            tensors, file = _read_file(folder / name), folder / name
            break
        if index.is_file():
            tensors, file = _read_parts(index), index
            break
    else:
        raise UsageError(
            f"no weights in {folder}: expected {WEIGHTS} or {BINARY}, whole or in parts with an .index.json"
        )
    return tensors if language is None else tensors | _read_adapter(folder, language, tensors), file


def _read_adapter(folder: Path, language: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(".adapter_layer." in name for name in tensors):
        raise UsageError(f"{folder} has no adapters of languages; leave `language` out")
    files = [folder / f"adapter.{language}{ending}" for ending in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(f"no adapter of `language` {language} in {folder}: expected {files[0].name}")
    adapter = _read_file(file)
    replaced = {name for name in tensors if ".adapter_layer." in name or name.startswith("lm_head.")}
    if adapter.keys() != replaced:
        missing, unexpected = sorted(replaced - adapter.keys()), sorted(adapter.keys() - replaced)
        raise UsageError(f"{file} is no adapter of this model: {missing=}, {unexpected=}")
    return adapter


def choose_language(tokens: dict[str, Any], language: str | None, usual: str | None, path: Path) -> dict[str, Any]:
    """Return the tokens of one language, of a ``vocab.json`` that may have those of several.

    Args:
        tokens: of the file, by language or not.
        language: that is asked for; None: ``usual``, whose the weights are.

    Raises:
        UsageError: no such language, or none to choose from.
    """
    several = bool(tokens) and all(isinstance(value, dict) for value in tokens.values())
    if not several:
        if language is not None:
            raise UsageError(f"{path} is of one language; leave `language` out")
        return tokens
    chosen = language or usual
    if chosen in tokens:
        own: dict[str, Any] = tokens[chosen]
        return own
    near = difflib.get_close_matches(chosen or "", tokens, 3, 0.3) or sorted(tokens)[:3]
    raise UsageError(
        f"{path} is of {len(tokens)} languages, got {chosen}; name one with `language`, such as {', '.join(near)}"
    )


def _read_parts(index: Path) -> dict[str, Tensor]:
    """All tensors of parts, which hold what their index says and nothing else."""
    places: dict[str, str] = checked(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    tensors: dict[str, Tensor] = {}
    for part in sorted(set(places.values())):
        if Path(part).name != part or not (index.parent / part).is_file():
            raise UsageError(f"no {part} in {index.parent}, where {index.name} has tensors; get all parts")
        shard = _read_file(index.parent / part)
        wanted = {name for name, place in places.items() if place == part}
        if wanted != shard.keys():
            missing, unexpected = sorted(wanted - shard.keys()), sorted(shard.keys() - wanted)
            raise UsageError(f"{index.parent / part} is not what {index.name} says: {missing=}, {unexpected=}")
        tensors |= shard
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return tensors_of(read_pickle(path), path)
