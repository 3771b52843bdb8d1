"""What a checkpoint of any format holds, in this package's names; how strictly it is taken from a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2v2.checkpoint.native import check_fit
from w2v2.errors import UsageError
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig, Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from w2v2.text.vocabulary import Vocabulary


@dataclass(kw_only=True)
class Contents:
    """A model with all that other formats keep beside it."""

    config: Wav2Vec2Config
    state: dict[str, Tensor]
    """float32 tensors by our names."""
    vocabulary: Vocabulary | None = None
    """Of a CTC model, and only of one."""
    channel_mask_prob: float = 0.0
    channel_mask_length: int = 64
    """Of fine-tuning, as in ``FinetuneConfig``: other formats keep them with the model."""
    notes: list[str] = field(default_factory=list)
    """What the file left open and how it was settled."""

    @property
    def kind(self) -> type[Wav2Vec2]:
        """The class of the model: encoder, pretraining or CTC."""
        return kind_of(self.state)

    @property
    def contrastive(self) -> ContrastiveConfig:
        """The configuration of a model that other formats can hold, by ``misfits``."""
        assert isinstance(self.config, ContrastiveConfig)
        return self.config

    def build(self) -> Wav2Vec2:
        """The model, in evaluation mode; it shares the tensors."""
        model = empty_model(self.config, self.kind, len(self.vocabulary.labels) if self.vocabulary else 0)
        model.load_state_dict(self.state, assign=True)
        return model.eval()


def kind_of(names: Iterable[str]) -> type[Wav2Vec2]:
    """The model that tensors of these names, ours or another format's, belong to."""
    heads = {name.split(".")[0] for name in names}
    if "lm_head" in heads:
        return Wav2Vec2ForCTC
    return Wav2Vec2ForPretraining if "quantizer" in heads else Wav2Vec2


def empty_model(config: Wav2Vec2Config, kind: type[Wav2Vec2], n_labels: int) -> Wav2Vec2:
    """A model whose tensors have shapes but no memory.

    Raises:
        UsageError: a configuration that no model can have.
    """
    config.check()
    with torch.device("meta"):
        return Wav2Vec2ForCTC(config, n_labels) if issubclass(kind, Wav2Vec2ForCTC) else kind(config)


def misfits(contents: Contents) -> list[str]:
    """Why transformers' and fairseq's wav2vec 2.0 cannot be this model, every reason of them; empty: they can."""
    config = contents.config
    if not isinstance(config, ContrastiveConfig) or type(config) is not ContrastiveConfig:
        return [f"its configuration is a {type(config).__name__}, which may build modules of its own"]
    found = []
    if contents.vocabulary is not None and type(contents.vocabulary) is not Vocabulary:
        found.append(f"its vocabulary is a {type(contents.vocabulary).__name__}: theirs spell words by characters")
    if any(config.conv_paddings):
        found.append(f"conv_paddings {_listed(config.conv_paddings)}: their convolutions have none")
    if config.conv_norm not in ("layer", f"group:{config.conv_channels[0]}"):
        found.append(
            f"conv_norm {config.conv_norm}: theirs is layer or one group a channel, group:{config.conv_channels[0]}"
        )
    if config.utterance_norm:
        found.append("utterance_norm: they do not normalise features over the utterance")
    if contents.kind is Wav2Vec2ForPretraining and config.target_features != "encoder":
        found.append(f"target_features {config.target_features}: they quantise the normalised conv features (encoder)")
    if contents.kind is Wav2Vec2ForPretraining and config.similarity_dim is None:
        found.append("similarity_dim none: they always project the quantised targets")
    return found


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


Rules = Sequence[tuple[str, str]]
"""Start of our name (a regular expression), and what the other format has in its place."""


def renamed(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Our names and another format's, by the first rule that fits; the weight-normed ones as before torch 2.1."""
    found = {}
    for name in names:
        fitting = [(pattern, theirs) for pattern, theirs in rules if re.match(pattern, name)]
        assert fitting, name
        found[name] = old_spelling(re.sub(*fitting[0], name, count=1))
    return found


_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def old_spelling(name: str) -> str:
    """``weight_g`` and ``weight_v`` for what torch 2.1 and later call ``parametrizations.weight.original0`` and 1."""
    for new, old in _WEIGHT_NORM.items():
        name = name.removesuffix(new) + old if name.endswith("." + new) else name
    return name


CODEBOOK = "quantizer.codebook"


def put(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Our tensors under another format's names; the codebook as (1, G V, D), which both of them have."""
    return {
        names[name]: (tensor.flatten(0, 1)[None] if name == CODEBOOK else tensor).contiguous()
        for name, tensor in state.items()
    }


def take(found: dict[str, Tensor], model: Wav2Vec2, names: dict[str, str], where: Path) -> dict[str, Tensor]:
    """A file's tensors by our names, float32: all of them, or none.

    Args:
        found: tensors by the file's names, either spelling of the weight-normed ones.
        model: what they are for.
        names: ours and the file's, of every tensor of the model.

    Raises:
        UsageError: tensors missing, left over, of another shape, not floats of at most 32 bits, or not finite; all are
            listed, by the file's names.
    """
    theirs = _respelled(found, where)
    own = model.state_dict()
    shapes = {
        names[name]: (1, tensor.shape[0] * tensor.shape[1], tensor.shape[2])
        if name == CODEBOOK
        else tuple(tensor.shape)
        for name, tensor in own.items()
    }
    check_fit(theirs, shapes, where)
    refuse_bad_values(theirs, where)
    return {name: theirs[names[name]].reshape(own[name].shape).float().contiguous() for name in own}


def _respelled(found: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    theirs = {old_spelling(name): tensor for name, tensor in found.items()}
    if len(theirs) < len(found):
        twice = [name for name in found if old_spelling(name) != name and old_spelling(name) in found]
        raise UsageError(f"{where} holds {', '.join(twice)} in the old spelling as well; expected one of the two")
    return theirs


def refuse_bad_values(tensors: dict[str, Tensor], where: Path) -> None:
    """Refuse tensors that are not floats of at most 32 bits, or not finite; :class:`UsageError` lists all."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    strange = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in floats]
    if strange:
        raise UsageError(f"{where} has weights that are not float32, float16 or bfloat16: {', '.join(strange)}")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UsageError(f"{where} has NaN or infinite weights: {', '.join(bad)}; use another checkpoint")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; :class:`UsageError` where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def differing_fields(config: Wav2Vec2Config, again: Wav2Vec2Config) -> dict[str, Any]:
    """Fields that came back differently from another format: what that has no place for, to be kept beside it."""
    both = [(f.name, getattr(config, f.name), getattr(again, f.name)) for f in fields(ContrastiveConfig)]
    return {name: value for name, value, other in both if value != other}


def restored(config: ContrastiveConfig, kept: Any, where: Path) -> ContrastiveConfig:
    """A configuration with the fields that ``differing_fields`` kept."""
    names = {f.name for f in fields(ContrastiveConfig)}
    if not isinstance(kept, dict) or not kept.keys() <= names:
        raise UsageError(f"{where} has settings of w2v2 that this version does not know: {sorted(kept)}")
    default = ContrastiveConfig()
    values: dict[str, Any] = {
        name: None if value is None and name in _OPTIONAL else checked(value, _like(name, default), name, where)
        for name, value in kept.items()
    }
    return ContrastiveConfig(**{f.name: values.get(f.name, getattr(config, f.name)) for f in fields(ContrastiveConfig)})


_OPTIONAL = {"similarity_dim": 256, "sub_batch_seconds": 87.5}
"""Fields that may be None, and what they are like otherwise."""


def _like(name: str, default: ContrastiveConfig) -> Any:
    return _OPTIONAL.get(name, getattr(default, name))


def checked(value: Any, like: Any, name: str, where: Path) -> Any:
    """A setting of a file, as what it should be like; lists become tuples.

    Args:
        value: as it was found.
        like: yes or no; a whole number, where 1 or more means that it must be so too; a share or other number, 0 or
            more; a text; some whole numbers.
        name: of the setting.
        where: its file.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(like, bool):
        fits, what = isinstance(value, bool), "true or false"
    elif isinstance(like, int):
        fits, what = _is_whole(value) and (value > 0 or like == 0), "a whole number" + (", 1 or more" if like else "")
    elif isinstance(like, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        what = "a number, 0 or more"
    elif isinstance(like, str):
        fits, what = isinstance(value, str), "text"
    else:
        least = min(like)
        fits = (
            isinstance(value, (list, tuple))
            and len(value) > 0
            and all(_is_whole(n) and n >= min(least, 1) for n in value)
        )
        what = f"a list of whole numbers, {min(least, 1)} or more"
    if not fits:
        raise UsageError(f"{where}: {name} must be {what}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
