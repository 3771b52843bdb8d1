"""Native checkpoints: a folder with ``model.safetensors`` and ``config.json``; a CTC model also has ``vocab.json``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from w2v2.errors import UsageError
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from w2v2.serial import from_dict

if TYPE_CHECKING:
    from w2v2.text.vocabulary import Vocabulary


M = TypeVar("M", bound=torch.nn.Module)


log = logging.getLogger(__name__)


WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocab.json"


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write a model's ``model.safetensors``."""
    save_state(model.state_dict(), folder)


def save_state(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``model.safetensors``, whole or not at all."""
    partial = folder / (WEIGHTS + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    os.replace(partial, folder / WEIGHTS)


def load_weights(model: M, folder: Path) -> M:
    """Fill a model from ``FOLDER/model.safetensors``.

    Raises:
        UsageError: no such file, a damaged one, or tensors missing, left over or of another shape; all are listed.
    """
    return _fill(model, _read(folder), folder)


def _fill(model: M, state: Mapping[str, torch.Tensor], folder: Path) -> M:
    check_fit(state, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    model.load_state_dict(state)
    return model


def check_fit(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Refuse tensors that are not exactly those a model has.

    Raises:
        UsageError: some missing, left over or of another shape; all are listed.
    """
    faults = [f"missing {name}" for name in shapes if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in shapes]
    faults += [
        f"{name} has {tuple(state[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if faults:
        raise UsageError(f"{where} does not fit the model: {'; '.join(faults)}")


def load_encoder(model: Wav2Vec2, folder: Path) -> None:
    """Fill the encoder part of any model from any run's weights; heads on either side are left out, nothing else is."""
    names = Wav2Vec2(model.config).state_dict().keys()
    heads = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
    state = {name: tensor for name, tensor in _read(folder).items() if not name.startswith(_HEADS)}
    missing, unexpected = sorted(names - state.keys()), sorted(state.keys() - names)
    own = model.state_dict()
    reshaped = [name for name in names & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        raise UsageError(
            f"{folder / WEIGHTS} does not fit the encoder: missing {missing}, unexpected {unexpected}, "
            f"of another shape {sorted(reshaped)}; use the same model settings as in pretraining"
        )
    model.load_state_dict(state | heads)


_HEADS = ("quantizer.", "project_q.", "out_linear.", "lm_head.")


def _read(folder: Path) -> dict[str, torch.Tensor]:
    if is_foreign(folder):
        from w2v2.checkpoint.formats import read

        return read(folder).state
    return read_weights(folder)


def is_foreign(path: Path) -> bool:
    """Whether a checkpoint is for ``convert`` to read: a file of fairseq's, or a folder of transformers'."""
    if not (path / CONFIG).is_file():
        return path.is_file() or len(list(path.glob("*.pt"))) == 1
    try:
        values = json.loads((path / CONFIG).read_text())
    except ValueError:
        return False
    return isinstance(values, dict) and "model_type" in values and "_type" not in values


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of ``FOLDER/model.safetensors``.

    Raises:
        UsageError: no such file, or a damaged one.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"no {path}: expected a run folder of 'w2v2 pretrain' or 'w2v2 finetune'")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged: {error}; use another checkpoint") from error


def load_pretrained(run: Path) -> Wav2Vec2ForPretraining:
    """The model of a pretraining run, or of a folder of weights of one, in evaluation mode."""
    model = model_config(run).build()
    if not isinstance(model, Wav2Vec2ForPretraining):
        raise UsageError(f"{run} holds a {type(model).__name__}; expected a contrastive model of 'w2v2 pretrain'")
    return load_weights(model, run).eval()


def load_model(folder: Path) -> Wav2Vec2:
    """The model of a folder, of whatever kind its weights are, in evaluation mode: pretraining, CTC, encoder alone."""
    config, state = model_config(folder), _read(folder)
    model = Wav2Vec2(config)
    if "lm_head.weight" in state:
        model = Wav2Vec2ForCTC(config, len(state["lm_head.weight"]))
    elif state.keys() - model.state_dict().keys():
        model = config.build()
    return _fill(model, state, folder).eval()


def model_config(folder: Path) -> Wav2Vec2Config:
    """The model configuration of a run folder, of a folder of weights, or of a checkpoint of another format."""
    if is_foreign(folder):
        from w2v2.checkpoint.formats import read

        contents = read(folder)
        for note in contents.notes:
            log.warning("%s: %s", folder, note)
        return contents.config
    expect_file(folder, CONFIG)
    try:
        values = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UsageError(f"{folder / CONFIG} is not JSON ({error}); expected what 'w2v2' wrote") from error
    return from_dict(values.get("model", values), Wav2Vec2Config)


def vocabulary_of(path: Path) -> Vocabulary | None:
    """The vocabulary of a CTC model of ours or of another format; None: a model without."""
    from w2v2.text.vocabulary import load_vocabulary

    if is_foreign(path):
        from w2v2.checkpoint.formats import read

        return read(path).vocabulary
    return load_vocabulary(path / VOCABULARY) if (path / VOCABULARY).is_file() else None


def expect_file(run: Path, name: str) -> None:
    """Refuse a folder without some file."""
    if not (run / name).is_file():
        raise UsageError(f"no {run / name}: expected a finished run folder; check the path")
