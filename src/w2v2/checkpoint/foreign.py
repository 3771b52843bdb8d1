"""What the two other formats have in common: tables of settings and of names, and how strictly a file is taken.

Both keep the same model, wav2vec 2.0 as published: what of a configuration of ours has no place in theirs is kept
beside it, under a key of our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from w2v2.checkpoint.contents import Checkpoint, check_config, check_finite, check_fit
from w2v2.errors import UsageError, shown
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig, Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from w2v2.serial import checked
from w2v2.text.vocabulary import Vocabulary

# --- Settings ---------------------------------------------------------------------------------------------------------

Fields = Sequence[tuple[str, str, Any]]
"""Our field, the other format's name for the same thing in the same unit, and its default, for files without it."""


_TYPES = get_type_hints(ContrastiveConfig, include_extras=True)
"""Of our fields, with their ranges."""


def to_settings(config: Wav2Vec2Config, table: Fields) -> dict[str, Any]:
    """Return the fields of a table by the other format's names."""
    return {theirs: getattr(config, ours) for ours, theirs, _ in table}


def from_settings(settings: Mapping[str, Any], table: Fields, where: Path) -> dict[str, Any]:
    """Return the fields of a table by our names; :class:`UsageError` names a setting that it cannot be."""
    return {ours: setting(settings, theirs, _TYPES[ours], default, where) for ours, theirs, default in table}


def setting(settings: Mapping[str, Any], name: str, kind: Any, default: Any, where: Path) -> Any:
    """Return one setting, checked against its type, or its default."""
    return checked(settings.get(name, default), kind, f"{where}: {name}")


def published(ours: dict[str, Any], *, layer_norm: bool, kept: Any, where: Path) -> ContrastiveConfig:
    """Return the configuration of a model as published.

    Args:
        ours: fields by our names.
        layer_norm: LayerNorm after each convolution, else a group norm of one channel each after the first.
        kept: what ``differing_fields`` kept of ours; None: nothing.
        where: the file.
    """
    channels = ours["conv_channels"]
    config = ContrastiveConfig(
        **ours,
        conv_paddings=(0,) * len(channels),
        conv_norm="layer" if layer_norm else f"group:{(*channels, 1)[0]}",
        target_features="encoder",
    )
    return config if kept is None else _restored(config, kept, where)


def differing_fields(config: Wav2Vec2Config, again: Wav2Vec2Config) -> dict[str, Any]:
    """Return the fields that came back differently from another format: what it has no place for."""
    names = [f.name for f in fields(ContrastiveConfig)]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(again, name)}


def _restored(config: ContrastiveConfig, kept: Any, where: Path) -> ContrastiveConfig:
    if not isinstance(kept, dict) or not kept.keys() <= _TYPES.keys():
        raise UsageError(f"{where} has settings of w2v2 that this version does not know: {shown(kept)}")
    return replace(config, **{name: checked(value, _TYPES[name], f"{where}: {name}") for name, value in kept.items()})


def refuse_other_settings(settings: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]], where: Path) -> None:
    """Refuse settings of a file that make another network than ours: :class:`UsageError` names all of them."""
    faults = [
        f"{name} {shown(settings[name])} (expected {' or '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in settings and settings[name] not in values
    ]
    if faults:
        raise UsageError(f"{where} describes a model that is not to be had here: {', '.join(faults)}")


def contrastive(checkpoint: Checkpoint) -> ContrastiveConfig:
    """Return the configuration of a model that ``misfits`` lets pass."""
    assert isinstance(checkpoint.config, ContrastiveConfig)
    return checkpoint.config


def misfits(checkpoint: Checkpoint) -> list[str]:
    """Return every reason why transformers' and fairseq's wav2vec 2.0 cannot be this model; empty: they can."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    if type(config) is not ContrastiveConfig:
        return [f"its configuration is a {type(config).__name__}, which may build modules of its own"]
    one_each = f"group:{config.conv_channels[0]}"
    paddings = " ".join(map(str, config.conv_paddings))
    pretraining = checkpoint.kind is Wav2Vec2ForPretraining
    reasons = {
        f"its vocabulary is a {type(vocabulary).__name__}: theirs spell words by characters": (
            vocabulary is not None and type(vocabulary) is not Vocabulary
        ),
        f"conv_paddings {paddings}: their convolutions have none": any(config.conv_paddings),
        f"conv_norm {config.conv_norm}: theirs is layer or one group a channel, {one_each}": (
            config.conv_norm not in ("layer", one_each)
        ),
        "utterance_norm: they do not normalise features over the utterance": config.utterance_norm,
        f"target_features {config.target_features}: they quantise the normalised conv features (encoder)": (
            pretraining and config.target_features != "encoder"
        ),
        "similarity_dim none: they always project the quantised targets": pretraining and config.similarity_dim is None,
    }
    return [reason for reason, holds in reasons.items() if holds]


_OTHER_MODELS = {
    "hubert": "HuBERT predicts clusters: it has no quantizer and no contrast",
    "wavlm": "WavLM's attention has gated relative positions",
    "data2vec": "data2vec has five positional convolutions, and predicts a teacher's states",
    "conformer": "its blocks are conformers, with convolutions and relative positions in them",
    "wav2vec2-bert": "w2v-BERT hears mel spectra, by conformers",
}
"""Part of the name of models that are near, and why they are not to be had here."""


def other_model(name: Any, expected: str, where: Path) -> str:
    """Return the line that refuses a model which is no wav2vec 2.0, by the name that its file gives it."""
    why = next((why for part, why in _OTHER_MODELS.items() if part in str(name)), "")
    return f"{where} is of a model called {shown(name)}, expected {expected!r}{why and ': '}{why}"


# --- Tensors ----------------------------------------------------------------------------------------------------------

Rules = Sequence[tuple[str, str]]
"""Start of our name (a regular expression), and what the other format has in its place."""


def kind_of(names: Iterable[str]) -> type[Wav2Vec2]:
    """Return the model, of those that other formats have, which tensors of these names belong to."""
    modules = {name.partition(".")[0] for name in names}
    if "lm_head" in modules:
        return Wav2Vec2ForCTC
    return Wav2Vec2ForPretraining if "quantizer" in modules else Wav2Vec2


def blank_of(config: ContrastiveConfig, kind: type[Wav2Vec2], n_labels: int, where: Path) -> Wav2Vec2:
    """Return a model whose tensors have shapes but no memory; :class:`UsageError`: no model can be so."""
    check_config(config, where)
    with torch.device("meta"):
        return Wav2Vec2ForCTC(config, n_labels) if kind is Wav2Vec2ForCTC else kind(config)


def renamed(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Return the other format's name of each of ours, by the first rule that fits; weight norms as before torch 2.1."""
    other = {}
    for name in names:
        fitting = [rule for rule in rules if re.match(rule[0], name)]
        assert fitting, name
        other[name] = _old_spelling(re.sub(*fitting[0], name, count=1))
    return other


def _old_spelling(name: str) -> str:
    """Return a name with ``weight_g`` and ``weight_v`` for ``parametrizations.weight.original0`` and ``original1``."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = re.sub(rf"(?<=\.)parametrizations\.weight\.{new}$", old, name)
    return name


_CODEBOOK = "quantizer.codebook"


def _as_theirs(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the other formats' shape: the codebook (G, V, D) is (1, G V, D) in both."""
    return tensor.flatten(0, 1)[None] if name == _CODEBOOK else tensor


def put(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return our tensors under another format's names, in its shapes."""
    return {names[name]: _as_theirs(name, tensor).contiguous() for name, tensor in state.items()}


def take(tensors: Mapping[str, Tensor], model: Wav2Vec2, names: Mapping[str, str], where: Path) -> dict[str, Tensor]:
    """Return a file's tensors by our names, float32: all of them, or none.

    Args:
        tensors: by the file's names, either spelling of the weight-normed ones.
        model: what they are for.
        names: ours and the file's, of every tensor of the model.
        where: the file.

    Raises:
        UsageError: tensors missing, left over, of another shape, not floats of at most 32 bits, or not finite; all are
            listed, by the file's names.
    """
    theirs = {_old_spelling(name): tensor for name, tensor in tensors.items()}
    if len(theirs) < len(tensors):
        twice = [name for name in tensors if _old_spelling(name) != name and _old_spelling(name) in tensors]
        raise UsageError(f"{where} holds {', '.join(twice)} in the old spelling as well; expected one of the two")
    ours = model.state_dict()
    check_fit(theirs, {names[name]: _as_theirs(name, tensor) for name, tensor in ours.items()}, where)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    strange = [f"{name} ({tensor.dtype})" for name, tensor in theirs.items() if tensor.dtype not in floats]
    if strange:
        raise UsageError(f"{where} has weights that are not float32, float16 or bfloat16: {', '.join(strange)}")
    check_finite(theirs, where)
    return {name: theirs[names[name]].reshape(tensor.shape).float().contiguous() for name, tensor in ours.items()}
