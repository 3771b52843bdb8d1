"""A checkpoint of one format to a folder of another, with a certificate, or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from w2v2.checkpoint.certificate import certify, has_transformers
from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.fairseq import fairseq_misfits, read_fairseq, write_fairseq
from w2v2.checkpoint.foreign import differing_fields
from w2v2.checkpoint.hub import locate
from w2v2.checkpoint.huggingface import hf_misfits, read_huggingface, write_huggingface
from w2v2.checkpoint.native import CONFIG, WEIGHTS, read_native, write_native
from w2v2.errors import JobError, Show, UsageError, quiet
from w2v2.files import whole_folder, write_json
from w2v2.serial import read_json

log = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
GRAPH, INT8_GRAPH = "model.onnx", "model.int8.onnx"


@dataclass(frozen=True)
class Format:
    """How a format is read and written."""

    name: str
    title: str
    read: Callable[[Path], Checkpoint]
    write: Callable[[Checkpoint, Path], None]
    misfits: Callable[[Checkpoint], list[str]]
    """Why it cannot hold a model; empty: it can."""


OURS = Format("ours", "w2v2", read_native, write_native, lambda checkpoint: [])
HUGGINGFACE = Format("hf", "Hugging Face", read_huggingface, write_huggingface, hf_misfits)
FAIRSEQ = Format("fairseq", "fairseq", read_fairseq, write_fairseq, fairseq_misfits)
FORMATS = {form.name: form for form in (OURS, HUGGINGFACE, FAIRSEQ)}


def onnx_file(path: Path) -> Path | None:
    """Return the exported graph that a file is, or a folder without weights holds; None: there is none."""
    if path.suffix == ".onnx" and path.is_file():
        return path
    files = [path / name for name in (GRAPH, INT8_GRAPH) if (path / name).is_file() and not (path / WEIGHTS).exists()]
    return files[0] if files else None


def recognize(path: Path) -> tuple[Format, Path]:
    """Return the format of a checkpoint, by what it holds, and what to give its reader.

    Raises:
        UsageError: nothing there, or none of the three.
    """
    if onnx_file(path) is not None:
        raise UsageError(f"{path} is an exported graph, which has no weights to take; name what it was made of")
    if path.is_file():
        return FAIRSEQ, path
    if (path / CONFIG).is_file():
        values = read_json(path / CONFIG)
        if "_type" in values:
            return OURS, path
        if "model_type" in values:
            return HUGGINGFACE, path
        raise UsageError(f"{path / CONFIG} is neither of w2v2 (_type) nor of Hugging Face (model_type); check the path")
    files = sorted(path.glob("*.pt"))
    if len(files) == 1:
        return FAIRSEQ, files[0]
    raise UsageError(
        f"no {path / CONFIG}: expected a finished run folder, a folder of Hugging Face, a .pt file of fairseq, or a "
        "name of the hub such as facebook/wav2vec2-base-960h"
    )


def read(name: str | PathLike[str], language: str | None = None) -> Checkpoint:
    """Read a model: a run folder, a folder of weights, a folder of Hugging Face, or a file of fairseq.

    What the file left open is logged.

    Args:
        name: anything that ``locate`` finds.
        language: of a model of Hugging Face with an adapter for each language (MMS).

    Raises:
        UsageError: nothing there, something else, or a model that is not whole.
    """
    form, place = recognize(locate(name, language))
    checkpoint = _read(form, place, language)
    for note in checkpoint.notes:
        log.warning("%s: %s", name, note)
    return checkpoint


def _read(form: Format, place: Path, language: str | None) -> Checkpoint:
    if language is None:
        return form.read(place)
    if form is not HUGGINGFACE:
        raise UsageError(f"{place} has no adapters; leave `language` out")
    return read_huggingface(place, language)


def convert(
    source: str | PathLike[str], out: Path, to: str, show: Show = quiet, language: str | None = None
) -> dict[str, Any]:
    """Write a checkpoint in another format, and compare both.

    Args:
        source, language: as of ``read``.
        out: folder; new or empty.
        to: ``ours``, ``hf`` or ``fairseq``.
        show: told how far it is.

    Returns:
        The certificate, as written to ``certificate.json``.

    Raises:
        UsageError: a source that cannot be read or has no twin in that format; ``out`` is not touched.
        JobError: the two do not compute the same; ``out`` is not touched.
    """
    form, place = recognize(locate(source, language))
    target = FORMATS[to]
    if form is target:
        raise UsageError(f"{source} is {form.title}'s already; nothing to convert")
    checkpoint = read(source, language)
    show("read", 1.0)
    if checkpoint.classes:
        raise UsageError(f"{source} is a classifier, which is not converted; use it by w2v2.load")
    if faults := target.misfits(checkpoint):
        raise UsageError(
            f"{source} has no twin at {target.title}: {'; '.join(faults)}; 'w2v2 export' takes it as it is"
        )
    with whole_folder(out) as folder:
        target.write(checkpoint, folder)
        again = target.read(recognize(folder)[1])
        _check_round_trip(checkpoint, again)
        show("write", 1.0)
        with _transformers_folder(form, target, checkpoint, folder) as theirs:
            certificate = certify(again, theirs, show, language if form is HUGGINGFACE else None)
        certificate |= {
            "source": {"format": form.title, "files": file_hashes(place)},
            "target": {"format": target.title, "files": file_hashes(folder)},
            "round_trip": "bitwise",
            "notes": checkpoint.notes,
        }
        write_json(folder / CERTIFICATE, certificate)
    return certificate


def _check_round_trip(checkpoint: Checkpoint, again: Checkpoint) -> None:
    """What was written, read again, must be what was to be written, bit by bit."""
    assert again.state.keys() == checkpoint.state.keys()
    changed = [name for name, tensor in checkpoint.state.items() if not torch.equal(tensor, again.state[name])]
    # What case text is given is no part of the other formats.
    vocabularies = [v and replace(v, case="", language="") for v in (checkpoint.vocabulary, again.vocabulary)]
    same = vocabularies[0] == vocabularies[1]
    if changed or again.config != checkpoint.config or not same:
        raise JobError(
            f"what was written is not what comes back: weights {changed}, "
            f"settings {differing_fields(checkpoint.config, again.config)}, "
            f"vocabulary {'the same' if same else 'another'}; nothing is left"
        )


@contextlib.contextmanager
def _transformers_folder(form: Format, target: Format, checkpoint: Checkpoint, folder: Path) -> Iterator[Path | None]:
    """A folder for transformers to load: of the two sides the one that is its own, else made for the purpose.

    None where neither side is and transformers is not installed.
    """
    if HUGGINGFACE in (form, target):
        yield checkpoint.source if form is HUGGINGFACE else folder
    elif not has_transformers():
        yield None
    else:
        with tempfile.TemporaryDirectory() as name:
            write_huggingface(checkpoint, Path(name))
            yield Path(name)


def file_hashes(place: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each file of a folder that a format may consist of."""
    kinds = (".json", ".safetensors", ".bin", ".pt", ".txt")
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix in kinds)
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
