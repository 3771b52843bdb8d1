"""A checkpoint of one format to a folder of another, with a certificate, or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from w2v2.checkpoint.certificate import certify, has_transformers
from w2v2.checkpoint.contents import Contents, differing_fields, empty_model, kind_of, read_json, refuse_bad_values
from w2v2.checkpoint.fairseq import fairseq_misfits, read_fairseq, write_fairseq
from w2v2.checkpoint.huggingface import hf_misfits, read_huggingface, write_huggingface
from w2v2.checkpoint.native import CONFIG, VOCABULARY, WEIGHTS, check_fit, model_config, read_weights, save_weights
from w2v2.errors import JobError, Show, UsageError, quiet
from w2v2.files import new_folder
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.serial import save_config
from w2v2.text.vocabulary import load_vocabulary

log = logging.getLogger(__name__)


CERTIFICATE = "certificate.json"


@dataclass(frozen=True)
class Format:
    """How a format is read and written."""

    name: str
    title: str
    read: Callable[[Path], Contents]
    write: Callable[[Contents, Path], None]
    misfits: Callable[[Contents], list[str]]
    """Why it cannot hold a model; empty: it can."""


def read_ours(folder: Path) -> Contents:
    """A run folder, or a folder of weights, of an encoder, a pretraining or a CTC model."""
    config, run = model_config(folder), read_json(folder / CONFIG)
    found = read_weights(folder)
    kind = kind_of(found)
    vocabulary = load_vocabulary(folder / VOCABULARY) if kind is Wav2Vec2ForCTC else None
    n_labels = len(vocabulary.labels) if vocabulary else 0
    if vocabulary and "lm_head.bias" in found and len(found["lm_head.bias"]) != n_labels:
        raise UsageError(
            f"{folder / VOCABULARY} has {n_labels} labels, {folder / WEIGHTS} {len(found['lm_head.bias'])} outputs; "
            "expected those that the model was trained with"
        )
    model = empty_model(config, kind, n_labels)
    check_fit(found, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    refuse_bad_values(found, folder / WEIGHTS)
    state = {name: found[name].float() for name in model.state_dict()}
    contents = Contents(config=config, state=state, vocabulary=vocabulary)
    if "channel_mask_prob" in run:  # of a fine-tuning
        contents.channel_mask_prob, contents.channel_mask_length = run["channel_mask_prob"], run["channel_mask_length"]
    return contents


def write_ours(contents: Contents, folder: Path) -> None:
    """A folder of weights: ``config.json`` of the model, ``model.safetensors``, ``vocab.json`` of a CTC model."""
    save_config(contents.config, folder / CONFIG)
    save_weights(contents.build(), folder)
    if contents.vocabulary is not None:
        contents.vocabulary.save(folder / VOCABULARY)


OURS = Format("ours", "w2v2", read_ours, write_ours, lambda contents: [])


HUGGINGFACE = Format("hf", "Hugging Face", read_huggingface, write_huggingface, hf_misfits)


FAIRSEQ = Format("fairseq", "fairseq", read_fairseq, write_fairseq, fairseq_misfits)


FORMATS = {form.name: form for form in (OURS, HUGGINGFACE, FAIRSEQ)}


def recognize(path: Path) -> tuple[Format, Path]:
    """The format of a checkpoint, by what it holds, and what to give its reader.

    Raises:
        UsageError: nothing there, or none of the three.
    """
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
        f"no {path / CONFIG}: expected a folder of w2v2 or Hugging Face, or a .pt file of fairseq; a model of the Hub "
        "has to be downloaded first: hf download NAME --local-dir DIR"
    )


def read(path: Path) -> Contents:
    """A checkpoint of any format, without a certificate."""
    form, place = recognize(path)
    return form.read(place)


def convert(source: Path, out: Path, to: str, show: Show = quiet) -> dict[str, Any]:
    """Write a checkpoint in another format, and compare both.

    Args:
        source: of any format.
        out: folder; new or empty.
        to: ``ours``, ``hf`` or ``fairseq``.
        show: told how far it is.

    Returns:
        The certificate, as written to ``certificate.json``.

    Raises:
        UsageError: a source that cannot be read or has no twin in that format; ``out`` is not touched.
        JobError: the two do not compute the same; ``out`` is not touched.
    """
    form, place = recognize(source)
    target = FORMATS[to]
    if form is target:
        raise UsageError(f"{source} is {form.title}'s already; nothing to convert")
    contents = form.read(place)
    show("read", 1.0)
    for note in contents.notes:
        log.warning("%s: %s", source, note)
    faults = target.misfits(contents)
    if faults:
        raise UsageError(
            f"{source} has no twin at {target.title}: {'; '.join(faults)}; 'w2v2 export' takes it as it is"
        )
    with new_folder(out) as folder:
        target.write(contents, folder)
        again = target.read(recognize(folder)[1])
        _check_round_trip(contents, again)
        show("write", 1.0)
        with _transformers_folder(form, target, contents, source, folder) as theirs:
            certificate = certify(again, theirs, show)
        certificate |= {
            "source": {"format": form.title, "files": file_hashes(place)},
            "target": {"format": target.title, "files": file_hashes(folder)},
            "round_trip": "bitwise",
            "notes": contents.notes,
        }
        (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n")
    return certificate


def _check_round_trip(contents: Contents, again: Contents) -> None:
    """What was written, read again, must be what was to be written, bit by bit."""
    assert again.state.keys() == contents.state.keys()
    changed = [name for name, tensor in contents.state.items() if not torch.equal(tensor, again.state[name])]
    if changed or again.config != contents.config or again.vocabulary != contents.vocabulary:
        raise JobError(
            f"what was written is not what comes back: weights {changed}, "
            f"settings {differing_fields(contents.config, again.config)}, "
            f"vocabulary {'the same' if again.vocabulary == contents.vocabulary else 'another'}; nothing is left"
        )


@contextlib.contextmanager
def _transformers_folder(
    form: Format, target: Format, contents: Contents, source: Path, folder: Path
) -> Iterator[Path | None]:
    """A folder for transformers to load: of the two sides the one that is its own, else made for the purpose.

    None where neither side is and transformers is not installed.
    """
    if HUGGINGFACE in (form, target):
        yield source if form is HUGGINGFACE else folder
    elif not has_transformers():
        yield None
    else:
        with tempfile.TemporaryDirectory() as made:
            write_huggingface(contents, Path(made))
            yield Path(made)


def file_hashes(place: Path) -> dict[str, str]:
    """SHA-256 of a file, or of each file of a folder that a format may consist of."""
    kinds = (".json", ".safetensors", ".bin", ".pt", ".txt")
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix in kinds)
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
