"""Our own folder of a model: ``model.safetensors``, ``config.json`` and, of a CTC model, ``vocab.json``.

A run folder is one too; its ``config.json`` holds the configuration of the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from w2v2.checkpoint.contents import Checkpoint, blank_model, check_config, check_finite, check_fit
from w2v2.errors import Count, ShareBelowOne, UsageError
from w2v2.files import whole
from w2v2.model.warm_start import SpectralConfig
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.serial import checked, from_dict, read_json, save_config

WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocab.json"


def read_native(folder: Path) -> Checkpoint:
    """Read a run folder, or a folder of weights.

    Raises:
        UsageError: files missing or damaged, a configuration whose type is not known here, tensors that are not the
            model's, another number of labels than of outputs.
    """
    values, where = read_json(folder / CONFIG), folder / WEIGHTS
    part = f"{folder / CONFIG}: model" if "model" in values else str(folder / CONFIG)
    config = from_dict(values.get("model", values), (Wav2Vec2Config, SpectralConfig), part)
    tensors = read_safetensors(where)
    checkpoint = Checkpoint(source=folder, config=config, state={})
    heads = ("lm_head.", "classifier.output.")
    outputs = {name: len(tensor) for name, tensor in tensors.items() if name.startswith(heads)}
    n_outputs = next(iter(outputs.values()), 0)
    if n_outputs:
        from w2v2.text.classes import load_classes  # late: pretraining has no labels
        from w2v2.text.vocabulary import load_vocabulary

        if not (folder / VOCABULARY).is_file():
            raise UsageError(f"no {folder / VOCABULARY}: expected the labels of this model; copy it from its run")
        if next(iter(outputs)).startswith(heads[0]):
            checkpoint.vocabulary = load_vocabulary(folder / VOCABULARY)
        else:
            checkpoint.classes = load_classes(folder / VOCABULARY)
        assert checkpoint.names is not None
        n_labels = len(checkpoint.names.labels)
        if n_labels != n_outputs:
            raise UsageError(
                f"{folder / VOCABULARY} has {n_labels} labels, {where} {n_outputs} outputs; "
                "expected those that the model was trained with"
            )
        for name, kind in (("channel_mask_prob", ShareBelowOne), ("channel_mask_length", Count)):
            if name in values:
                setattr(checkpoint, name, checked(values[name], kind, f"{folder / CONFIG}: {name}"))
    check_config(config, folder / CONFIG)
    expected = blank_model(config, tensors, n_outputs).state_dict()
    check_fit(tensors, expected, where)
    check_finite(tensors, where)
    half = (torch.float16, torch.bfloat16)
    checkpoint.state = {n: tensors[n].float() if tensors[n].dtype in half else tensors[n] for n in expected}
    return checkpoint


def write_native(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder of weights."""
    save_config(checkpoint.config, folder / CONFIG)
    save_state(checkpoint.state, folder)
    if checkpoint.names is not None:
        checkpoint.names.save(folder / VOCABULARY)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's ``model.safetensors``."""
    save_state(model.state_dict(), folder)


def save_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``model.safetensors``, whole or not at all."""
    with whole(folder / WEIGHTS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, on the host.

    Raises:
        UsageError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise UsageError(f"no {path}: expected a folder with a model; check the path, or wait for the run to finish")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged: {error}; use another checkpoint") from error
