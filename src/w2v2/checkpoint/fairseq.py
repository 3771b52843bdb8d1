"""fairseq's checkpoint of a wav2vec 2.0: its names, its settings in either of their forms, its dictionary.

Facts from fairseq at 3d262bb: ``models/wav2vec/wav2vec2.py``, ``wav2vec2_asr.py``, ``checkpoint_utils.py``,
``data/dictionary.py``. None of its code is needed to read or write a file. The first four labels of its dictionaries
are ``<s> <pad> </s> <unk>``, and CTC's blank is the first; here they are called ``<pad> <s> </s> <unk>``, as in the
Hugging Face versions of the same models, so that the blank bears its usual name there. Ids stay what they are.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import torch

from w2v2.checkpoint.contents import (
    Contents,
    Rules,
    checked,
    differing_fields,
    empty_model,
    kind_of,
    misfits,
    put,
    renamed,
    restored,
    take,
)
from w2v2.checkpoint.pickles import Inert, read_pickle
from w2v2.errors import UsageError
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import Wav2Vec2
from w2v2.text.vocabulary import Vocabulary

MODEL, DICTIONARY = "model.pt", "dict.ltr.txt"


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""Our names of the labels that fairseq calls ``<s> <pad> </s> <unk>``."""


_THEIR_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


_ENCODER: Rules = (
    (r"feature_encoder\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.0."),
    (r"feature_projection\.norm\.", "layer_norm."),
    (r"feature_projection\.linear\.", "post_extract_proj."),
    (r"mask_vector$", "mask_emb"),
    (r"positional_embedding\.conv\.", "encoder.pos_conv.0."),
    (r"transformer\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"transformer\.(\d+)\.ln_1\.", r"encoder.layers.\1.self_attn_layer_norm."),
    (r"transformer\.(\d+)\.mlp\.fc_1\.", r"encoder.layers.\1.fc1."),
    (r"transformer\.(\d+)\.mlp\.fc_2\.", r"encoder.layers.\1.fc2."),
    (r"transformer\.(\d+)\.ln_2\.", r"encoder.layers.\1.final_layer_norm."),
    (r"ln_f\.", "encoder.layer_norm."),
)


_HEADS: Rules = (
    (r"quantizer\.projector\.", "quantizer.weight_proj."),
    (r"quantizer\.codebook$", "quantizer.vars"),
    (r"project_q\.", "project_q."),
    (r"out_linear\.", "final_proj."),
    (r"lm_head\.", "w2v_encoder.proj."),
)


_CTC_PREFIX = "w2v_encoder.w2v_model."


FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("n_layer", "encoder_layers", 12),
    ("n_head", "encoder_attention_heads", 12),
    ("n_embd", "encoder_embed_dim", 768),
    ("ffn_dim", "encoder_ffn_embed_dim", 3072),
    ("conv_bias", "conv_bias", False),
    ("norm_first", "layer_norm_first", False),
    ("dropout", "dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("activation_dropout", "activation_dropout", 0.0),
    ("dropout_input", "dropout_input", 0.0),
    ("dropout_features", "dropout_features", 0.0),
    ("layer_drop", "encoder_layerdrop", 0.0),
    ("conv_gradient_scale", "feature_grad_mult", 1.0),
    ("pos_conv_kernel", "conv_pos", 128),
    ("pos_conv_groups", "conv_pos_groups", 16),
    ("mask_prob", "mask_prob", 0.65),
    ("mask_length", "mask_length", 10),
    ("n_groups", "latent_groups", 2),
    ("n_entries", "latent_vars", 320),
    ("num_distractors", "num_negatives", 100),
    ("logit_temperature", "logit_temp", 0.1),
)
"""Our field, fairseq's name for the same thing in the same unit, and its default, for files older than the setting."""


_CTC_FIELDS = (
    ("dropout", "dropout", 0.0),
    ("attention_dropout", "attention_dropout", 0.0),
    ("activation_dropout", "activation_dropout", 0.0),
    ("dropout_input", "dropout_input", 0.0),
    ("layer_drop", "layerdrop", 0.0),
    ("conv_gradient_scale", "feature_grad_mult", 0.0),
    ("mask_prob", "mask_prob", 0.5),
    ("mask_length", "mask_length", 10),
)
"""What fine-tuning sets anew."""


_FIXED: dict[str, Any] = {
    "layer_type": "transformer",
    "activation_fn": "gelu",
    "quantize_input": False,
    "target_glu": False,
    "quantizer_depth": 1,
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
    "crop_seq_to_multiple": 1,
}
"""Settings that change what the network computes, with the one value that we have."""


_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


def fairseq_names(names: list[str], config: ContrastiveConfig, kind: type[Wav2Vec2]) -> dict[str, str]:
    """Ours of each tensor of a model, and fairseq's."""
    norm = r"feature_extractor.conv_layers.\1.2." + ("1." if config.conv_norm == "layer" else "")
    encoder = [(r"feature_encoder\.conv_layers\.(\d+)\.1\.", norm), *_ENCODER]
    prefix = _CTC_PREFIX if kind is Wav2Vec2ForCTC else ""
    return renamed(names, [*((ours, prefix + theirs) for ours, theirs in encoder), *_HEADS])


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_fairseq(path: Path) -> Contents:
    """A pretraining or CTC checkpoint of fairseq, of before hydra (``args``) or after (``cfg``).

    The dictionary of a CTC model comes from the checkpoint itself, or from a ``dict.*.txt`` beside it.

    Raises:
        UsageError: not such a file, one that needs code to be read, settings that we do not have, weights that do not
            fit.
    """
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UsageError(
            f"{path} is not a checkpoint of fairseq: expected a dictionary with 'model', and 'cfg' or 'args'"
        )
    found = {str(name): tensor for name, tensor in checkpoint["model"].items()}
    if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise UsageError(f"{path} must hold tensors by name under 'model' and nothing else")
    kind = Wav2Vec2ForCTC if any(name.startswith("w2v_encoder.") for name in found) else kind_of(found)
    model, task, tuned = _settings(checkpoint, kind, path)
    _refuse_what_is_not_ours(model, tuned, path)
    config = _model_config(model, task, tuned, path)
    extra = plain(checkpoint.get("extra_state"))
    if isinstance(extra, dict) and "w2v2" in extra:
        config = restored(config, extra["w2v2"], path)
    labels = _dictionary(checkpoint, path) if kind is Wav2Vec2ForCTC else ()
    blank = empty_model(config, kind, len(labels))
    state = take(found, blank, fairseq_names(list(blank.state_dict()), config, kind), path)
    return Contents(
        config=config,
        state=state,
        vocabulary=_vocabulary(labels) if labels else None,
        channel_mask_prob=_value(tuned, "mask_channel_prob", 0.0, path),
        channel_mask_length=_value(tuned, "mask_channel_length", 10, path),
        notes=[] if kind is not Wav2Vec2 else ["no quantizer in the file: the encoder alone"],
    )


def plain(value: Any) -> Any:
    """Dictionaries, lists and numbers of what a checkpoint held: namespaces, omegaconf's containers, enumerations."""
    if isinstance(value, Inert):
        state = value.state
        if isinstance(state, dict):
            inside = next((state[name] for name in ("_content", "_val") if name in state), state)
            return plain(inside)
        return plain(state[0]) if isinstance(state, tuple) and len(state) == 1 else None
    if isinstance(value, dict):
        return {str(key): plain(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inside) for inside in value]
    return value


def _settings(checkpoint: dict[str, Any], kind: type[Wav2Vec2], path: Path) -> _Settings:
    """Settings of the pretrained model, of its task, and of fine-tuning, which is empty for a pretraining model."""
    saved = plain(checkpoint.get("cfg")) or plain(checkpoint.get("args"))
    if not isinstance(saved, dict):
        raise UsageError(f"{path} has neither 'cfg' nor 'args': expected the settings that the model was trained with")
    model, task = _parts(saved)
    name = model.get("_name") or model.get("arch")
    expected = "wav2vec_ctc" if kind is Wav2Vec2ForCTC else "wav2vec2"
    if name != expected:
        raise UsageError(f"{path} is of a model called {name!r}, expected {expected!r}")
    if kind is not Wav2Vec2ForCTC:
        return model, task, {}
    pretrained = model.get("w2v_args")
    if not isinstance(pretrained, dict):
        raise UsageError(
            f"{path} has no settings of the model it was fine-tuned from (w2v_args), only a path, "
            f"{model.get('w2v_path')!r}; have fairseq save it again, with that file in place"
        )
    inner, inner_task = _parts(pretrained)
    return inner, inner_task, model


_Settings = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _parts(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and task settings, of a nested configuration or of one flat namespace."""
    model, task = saved.get("model"), saved.get("task")
    return (model, task if isinstance(task, dict) else {}) if isinstance(model, dict) else (saved, saved)


def _refuse_what_is_not_ours(model: dict[str, Any], tuned: dict[str, Any], path: Path) -> None:
    faults = [
        f"{name} {model[name]!r} (expected {value!r})"
        for name, value in _FIXED.items()
        if model.get(name, value) not in (value, None)
    ]
    if model.get("extractor_mode", "default") not in ("default", "layer_norm"):
        faults.append(f"extractor_mode {model['extractor_mode']!r} (expected 'default' or 'layer_norm')")
    if tuned.get("blank_weight", 0):
        faults.append(f"blank_weight {tuned['blank_weight']!r} (expected 0)")
    if faults:
        raise UsageError(f"{path} holds a model that is not to be had here: {', '.join(faults)}")


def _model_config(model: dict[str, Any], task: dict[str, Any], tuned: dict[str, Any], path: Path) -> ContrastiveConfig:
    ours = {name: _value(model, theirs, default, path) for name, theirs, default in FIELDS}
    if tuned:
        ours |= {name: _value(tuned, theirs, default, path) for name, theirs, default in _CTC_FIELDS}
        ours["mask_prob"] = ours["mask_prob"] if tuned.get("apply_mask") else 0.0
    layers = conv_layers(model.get("conv_feature_layers") or _CONV_LAYERS, path)
    channels, kernels, strides = zip(*layers, strict=True)
    # fairseq: zero or less means the width of the thing before it
    final = max(_value(model, "final_dim", 0, path), 0) or ours["n_embd"]
    latent = max(_value(model, "latent_dim", 0, path), 0) or final
    if latent % ours["n_groups"]:
        raise UsageError(f"{path}: latent_dim must be a multiple of latent_groups ({ours['n_groups']}), got {latent}")
    start, end, decay = _temperature(model.get("latent_temp", (2, 0.5, 0.999995)), path)
    layer_norm = model.get("extractor_mode") == "layer_norm"
    return ContrastiveConfig(
        **ours,
        conv_channels=channels,
        conv_kernel_sizes=kernels,
        conv_strides=strides,
        conv_paddings=(0,) * len(layers),
        conv_norm="layer" if layer_norm else f"group:{channels[0]}",
        normalize_audio=_value({**model, **task}, "normalize", False, path),
        target_features="encoder",
        codebook_dim=latent // ours["n_groups"],
        similarity_dim=final,
        gumbel_start=start,
        gumbel_end=end,
        gumbel_decay=decay,
    )


def conv_layers(text: Any, path: Path) -> list[tuple[int, ...]]:
    """``[(512, 10, 5)] + [(512, 3, 2)] * 4`` as (channels, kernel, stride) of each convolution; nothing is evaluated.

    Raises:
        UsageError: anything but lists of three whole numbers, added and repeated, up to a hundred.
    """
    try:
        layers = _sum_of_lists(ast.parse(str(text).strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise UsageError(
            f"{path}: conv_feature_layers must be such as [(512, 10, 5)] + [(512, 3, 2)] * 4, got {text!r}"
        ) from error
    return layers


def _sum_of_lists(node: ast.expr) -> list[tuple[int, ...]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        layers = _sum_of_lists(node.left) + _sum_of_lists(node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = ast.literal_eval(node.right)
        layers = _sum_of_lists(node.left) * (times if isinstance(times, int) and 0 < times <= 100 else 0)
    else:
        layers = [tuple(layer) for layer in ast.literal_eval(node)]
    whole = all(len(layer) == 3 and all(isinstance(n, int) and n > 0 for n in layer) for layer in layers)
    if not whole or not 0 < len(layers) <= 100:
        raise ValueError(node)
    return layers


def _temperature(value: Any, path: Path) -> tuple[float, float, float]:
    """(start, end, decay), which old files have as text."""
    try:
        start, end, decay = (float(n) for n in (ast.literal_eval(value) if isinstance(value, str) else value))
    except (ValueError, SyntaxError, TypeError) as error:
        raise UsageError(f"{path}: latent_temp must be three numbers, got {value!r}") from error
    return start, end, decay


def _value(settings: dict[str, Any], name: str, default: Any, path: Path) -> Any:
    value = settings.get(name)
    return checked(default if value is None else value, default, name, path)


def _dictionary(checkpoint: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Labels after renaming the first four."""
    task = plain(checkpoint.get("task_state"))
    saved = task.get("target_dictionary") if isinstance(task, dict) else None
    if isinstance(saved, dict) and isinstance(saved.get("symbols"), list):
        symbols = [str(symbol) for symbol in saved["symbols"]]
        if symbols[:4] != _THEIR_SPECIAL:
            raise UsageError(f"{path}: its dictionary must begin with {' '.join(_THEIR_SPECIAL)}, got {symbols[:4]}")
        return (*SPECIAL, *symbols[4:])
    files = sorted(path.parent.glob("dict.*.txt"))
    if len(files) != 1:
        said = "none" if not files else ", ".join(file.name for file in files)
        raise UsageError(
            f"{path} does not hold its dictionary: expected one dict.*.txt beside it, such as {DICTIONARY}, got {said}"
        )
    return (*SPECIAL, *_read_dictionary(files[0]))


def _read_dictionary(path: Path) -> list[str]:
    """Labels of a file with a label and its count on each line."""
    symbols = []
    for line in path.read_text(encoding="utf-8").splitlines():
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not count.isdigit():
            raise UsageError(f"{path} must have a label and a count on each line, got {line!r}")
        symbols.append(symbol)
    return symbols


def _vocabulary(labels: tuple[str, ...]) -> Vocabulary:
    return Vocabulary(
        labels=labels, blank=0, unknown=3, boundary=labels.index("|") if "|" in labels else None, silent=(1, 2)
    )


# --- Writing ----------------------------------------------------------------------------------------------------------


def fairseq_misfits(contents: Contents) -> list[str]:
    """Why fairseq cannot have this model; empty: it can."""
    config, vocabulary = contents.contrastive, contents.vocabulary
    found = misfits(contents)
    if config.conv_channels[-1] == config.n_embd:
        found.append(f"n_embd {config.n_embd} equal to the conv channels: it makes no feature projection then")
    if contents.kind is Wav2Vec2:
        found.append("no heads: a pretraining model of fairseq has quantizer and projections")
    if vocabulary is not None and (vocabulary.blank, vocabulary.unknown, sorted(vocabulary.silent)) != (0, 3, [1, 2]):
        found.append(
            "the vocabulary: its dictionaries begin with the blank, two labels that are never said (<pad> </s>) and "
            f"the unknown label, got {' '.join(vocabulary.labels[:4])}"
        )
    return found


def write_fairseq(contents: Contents, folder: Path) -> None:
    """Write ``model.pt``, with its settings as plain dictionaries, and ``dict.ltr.txt`` for a CTC model.

    fairseq reads the dictionary from its ``data`` folder: ``load_model_ensemble_and_task([...], {"data": FOLDER})``.
    """
    config, kind = contents.contrastive, contents.kind
    names = fairseq_names(list(contents.state), config, kind)
    settings = _ctc_settings(contents) if kind is Wav2Vec2ForCTC else _pretraining_settings(config)
    again = _model_config(*_settings({"cfg": settings}, kind, folder), folder)
    checkpoint = {
        "args": None,
        "cfg": settings,
        "model": put(contents.state, names),
        "criterion": None,
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}, "w2v2": differing_fields(config, again)},
        "last_optimizer_state": None,
    }
    torch.save(checkpoint, folder / MODEL)
    if contents.vocabulary is not None:
        lines = [f"{label} 1\n" for label in contents.vocabulary.labels[4:]]
        (folder / DICTIONARY).write_text("".join(lines), encoding="utf-8")


def _pretraining_settings(config: ContrastiveConfig) -> dict[str, Any]:
    layers = zip(config.conv_channels, config.conv_kernel_sizes, config.conv_strides, strict=True)
    model = {theirs: getattr(config, ours) for ours, theirs, _ in FIELDS} | {
        "_name": "wav2vec2",
        **{name: value for name, value in _FIXED.items() if name != "conv_pos_batch_norm"},
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "default",
        "conv_feature_layers": str(list(layers)),
        "quantize_targets": True,
        "final_dim": config.similarity_dim or 0,
        "latent_dim": config.n_groups * config.codebook_dim,
        "latent_temp": [config.gumbel_start, config.gumbel_end, config.gumbel_decay],
    }
    task = {"_name": "audio_pretraining", "data": "", "normalize": config.normalize_audio}
    return {"_name": None, "model": model, "task": task}


def _ctc_settings(contents: Contents) -> dict[str, Any]:
    config = contents.contrastive
    pretraining = _pretraining_settings(config)
    model = {theirs: getattr(config, ours) for ours, theirs, _ in _CTC_FIELDS} | {
        "_name": "wav2vec_ctc",
        "apply_mask": config.mask_prob > 0,
        "mask_channel_prob": contents.channel_mask_prob,
        "mask_channel_length": contents.channel_mask_length,
        "normalize": config.normalize_audio,
        "data": "",
        "w2v_path": "",
        "w2v_args": pretraining,
    }
    task = {**pretraining["task"], "_name": "audio_finetuning", "labels": "ltr"}
    return {"_name": None, "model": model, "task": task}
