"""fairseq's checkpoint of a wav2vec 2.0: its names, its settings in either of their forms, its dictionary.

Facts from fairseq at 3d262bb: ``models/wav2vec/wav2vec2.py``, ``wav2vec2_asr.py``, ``checkpoint_utils.py``,
``data/dictionary.py``. None of its code is needed to read or write a file.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2v2.checkpoint import foreign
from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.pickles import plain, read_pickle, tensors_of
from w2v2.checkpoint.tokenizer import dictionary_misfits, read_dictionary, settle_case, write_dictionary
from w2v2.errors import Positive, ShareBelowOne, UsageError, Width, shown
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from w2v2.serial import checked

MODEL = "model.pt"

_ENCODER: foreign.Rules = (
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
_HEADS: foreign.Rules = (
    (r"quantizer\.projector\.", "quantizer.weight_proj."),
    (r"quantizer\.codebook$", "quantizer.vars"),
    (r"project_q\.", "project_q."),
    (r"out_linear\.", "final_proj."),
    (r"lm_head\.", "w2v_encoder.proj."),
)
_CTC_PREFIX = "w2v_encoder.w2v_model."
FIELDS: foreign.Fields = (
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
_CTC_FIELDS: foreign.Fields = (
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
_FIXED: dict[str, tuple[Any, ...]] = {
    "layer_type": ("transformer",),
    "activation_fn": ("gelu",),
    "quantize_input": (False,),
    "target_glu": (False,),
    "quantizer_depth": (1,),
    "pos_conv_depth": (1,),
    "crop_seq_to_multiple": (1,),
}
_ALLOWED = _FIXED | {"conv_pos_batch_norm": (False,), "extractor_mode": ("default", "layer_norm")}
"""Settings that change what the network computes, with the values that we have."""
_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


def fairseq_names(state: Mapping[str, Tensor], config: Wav2Vec2Config, kind: type[Wav2Vec2]) -> dict[str, str]:
    """Return fairseq's name of each tensor of a model, by ours."""
    norm = r"feature_extractor.conv_layers.\1.2." + ("1." if config.conv_norm == "layer" else "")
    encoder = [(r"feature_encoder\.conv_layers\.(\d+)\.1\.", norm), *_ENCODER]
    prefix = _CTC_PREFIX if kind is Wav2Vec2ForCTC else ""
    return foreign.renamed(state, [*((ours, prefix + theirs) for ours, theirs in encoder), *_HEADS])


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_fairseq(path: Path) -> Checkpoint:
    """Read a pretraining or CTC checkpoint of fairseq, of before hydra (``args``) or after (``cfg``).

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
    tensors = tensors_of(checkpoint["model"], path)
    kind = Wav2Vec2ForCTC if any(name.startswith("w2v_encoder.") for name in tensors) else foreign.kind_of(tensors)
    model, task, tuned = _settings(checkpoint, kind, path)
    foreign.refuse_other_settings(model, _ALLOWED, path)
    foreign.refuse_other_settings(tuned, {"blank_weight": (0,)}, path)
    extra = plain(checkpoint.get("extra_state"), path)
    config = _model_config(model, task, tuned, extra.get("w2v2") if isinstance(extra, dict) else None, path)
    vocabulary, notes = None, [] if kind is not Wav2Vec2 else ["no quantizer in the file: the encoder alone"]
    if kind is Wav2Vec2ForCTC:
        vocabulary, notes = settle_case(read_dictionary(checkpoint.get("task_state"), path))
    blank = foreign.blank_of(config, kind, len(vocabulary.labels) if vocabulary else 0, path)
    return Checkpoint(
        source=path,
        config=config,
        state=foreign.take(tensors, blank, fairseq_names(blank.state_dict(), config, kind), path),
        vocabulary=vocabulary,
        channel_mask_prob=foreign.setting(tuned, "mask_channel_prob", ShareBelowOne, 0.0, path),
        channel_mask_length=foreign.setting(tuned, "mask_channel_length", Width, 10, path),
        notes=notes,
    )


_Settings = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _settings(checkpoint: dict[str, Any], kind: type[Wav2Vec2], path: Path) -> _Settings:
    """Return settings of the pretrained model, of its task, and of fine-tuning: none of a pretraining model."""
    saved = plain(checkpoint.get("cfg"), path) or plain(checkpoint.get("args"), path)
    if not isinstance(saved, dict):
        raise UsageError(f"{path} has neither 'cfg' nor 'args': expected the settings that the model was trained with")
    model, task = _parts(saved)
    name = model.get("_name") or model.get("arch")
    expected = "wav2vec_ctc" if kind is Wav2Vec2ForCTC else "wav2vec2"
    if name != expected:
        raise UsageError(foreign.other_model(name, expected, path))
    if kind is not Wav2Vec2ForCTC:
        return model, task, {}
    if not isinstance(model.get("w2v_args"), dict):
        raise UsageError(
            f"{path} has no settings of the model it was fine-tuned from (w2v_args), only a path, "
            f"{shown(model.get('w2v_path'))}; have fairseq save it again, with that file in place"
        )
    return *_parts(model["w2v_args"]), model


def _parts(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model and task settings, of a nested configuration or of one flat namespace, without those left open."""
    nested = isinstance(saved.get("model"), dict)
    model, task = (saved["model"], saved.get("task")) if nested else (saved, saved)
    parts = [part if isinstance(part, dict) else {} for part in (model, task)]
    model, task = ({name: value for name, value in part.items() if value is not None} for part in parts)
    return model, task


def _model_config(
    model: dict[str, Any], task: dict[str, Any], tuned: dict[str, Any], kept: Any, path: Path
) -> ContrastiveConfig:
    ours = foreign.from_settings(model, FIELDS, path)
    if tuned:
        ours |= foreign.from_settings(tuned, _CTC_FIELDS, path)
        ours["mask_prob"] = ours["mask_prob"] if tuned.get("apply_mask") else 0.0
    layers = conv_layers(model.get("conv_feature_layers") or _CONV_LAYERS, path)
    ours |= zip(("conv_channels", "conv_kernel_sizes", "conv_strides"), zip(*layers, strict=True), strict=True)
    temperatures = _temperature(model.get("latent_temp", (2, 0.5, 0.999995)), path)
    ours |= zip(("gumbel_start", "gumbel_end", "gumbel_decay"), temperatures, strict=True)
    # zero or less means the width of the thing before it
    widths = [max(foreign.setting(model, name, int, 0, path), 0) for name in ("final_dim", "latent_dim")]
    ours["similarity_dim"] = widths[0] or ours["n_embd"]
    latent, groups = widths[1] or ours["similarity_dim"], ours["n_groups"]
    if latent % groups:
        raise UsageError(f"{path}: latent_dim must be a multiple of latent_groups ({groups}), got {latent}")
    ours["codebook_dim"] = latent // groups
    ours["normalize_audio"] = foreign.setting(model | task, "normalize", bool, False, path)
    return foreign.published(ours, layer_norm=model.get("extractor_mode") == "layer_norm", kept=kept, where=path)


def conv_layers(text: Any, path: Path) -> list[tuple[int, ...]]:
    """Return (channels, kernel, stride) of each convolution of ``[(512, 10, 5)] + [(512, 3, 2)] * 4``, parsed, not run.

    Raises:
        UsageError: anything but lists of three whole numbers, added and repeated, up to a hundred.
    """
    layers: list[tuple[int, ...]] = []
    try:
        for term in str(text).split("+"):
            listed, _, times = term.partition("*")
            layers += ast.literal_eval(listed.strip()) * min(int(times or 1), 101)
        whole = all(len(layer) == 3 and all(isinstance(n, int) and n > 0 for n in layer) for layer in layers)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        whole = False
    if not whole or not 0 < len(layers) <= 100:
        raise UsageError(
            f"{path}: conv_feature_layers must be such as [(512, 10, 5)] + [(512, 3, 2)] * 4, got {shown(text)}"
        )
    return layers


def _temperature(value: Any, path: Path) -> tuple[float, ...]:
    """Return (start, end, decay), which old files have as text."""
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        value = ast.literal_eval(value) if isinstance(value, str) else value
    temperatures: tuple[float, ...] = checked(value, tuple[Positive, Positive, Positive], f"{path}: latent_temp")
    return temperatures


# --- Writing ----------------------------------------------------------------------------------------------------------


def fairseq_misfits(checkpoint: Checkpoint) -> list[str]:
    """Return every reason why fairseq cannot have this model; empty: it can."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    faults = foreign.misfits(checkpoint)
    if config.conv_channels[-1] == config.n_embd:
        faults.append(f"n_embd {config.n_embd} equal to the conv channels: it makes no feature projection then")
    if config.adapter_dim:
        faults.append("adapters, which its wav2vec 2.0 has in another order")
    if checkpoint.kind is Wav2Vec2:
        faults.append("no heads: a pretraining model of fairseq has quantizer and projections")
    return faults + ([] if vocabulary is None else dictionary_misfits(vocabulary))


def write_fairseq(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``model.pt``, with its settings as plain dictionaries, and ``dict.ltr.txt`` for a CTC model.

    fairseq reads the dictionary from its ``data`` folder: ``load_model_ensemble_and_task([...], {"data": FOLDER})``.
    """
    config, kind = foreign.contrastive(checkpoint), checkpoint.kind
    settings = _ctc_settings(checkpoint) if kind is Wav2Vec2ForCTC else _pretraining_settings(config)
    again = _model_config(*_settings({"cfg": settings}, kind, folder), None, folder)
    saved = {
        "args": None,
        "cfg": settings,
        "model": foreign.put(checkpoint.state, fairseq_names(checkpoint.state, config, kind)),
        "criterion": None,
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}, "w2v2": foreign.differing_fields(config, again)},
        "last_optimizer_state": None,
    }
    torch.save(saved, folder / MODEL)
    if checkpoint.vocabulary is not None:
        write_dictionary(checkpoint.vocabulary, folder)


def _pretraining_settings(config: ContrastiveConfig) -> dict[str, Any]:
    layers = zip(config.conv_channels, config.conv_kernel_sizes, config.conv_strides, strict=True)
    model = foreign.to_settings(config, FIELDS) | {
        "_name": "wav2vec2",
        **{name: values[0] for name, values in _FIXED.items()},
        "extractor_mode": "layer_norm" if config.conv_norm == "layer" else "default",
        "conv_feature_layers": str(list(layers)),
        "quantize_targets": True,
        "final_dim": config.similarity_dim or 0,
        "latent_dim": config.n_groups * config.codebook_dim,
        "latent_temp": [config.gumbel_start, config.gumbel_end, config.gumbel_decay],
    }
    task = {"_name": "audio_pretraining", "data": "", "normalize": config.normalize_audio}
    return {"_name": None, "model": model, "task": task}


def _ctc_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    config = foreign.contrastive(checkpoint)
    pretraining = _pretraining_settings(config)
    model = foreign.to_settings(config, _CTC_FIELDS) | {
        "_name": "wav2vec_ctc",
        "apply_mask": config.mask_prob > 0,
        "mask_channel_prob": checkpoint.channel_mask_prob,
        "mask_channel_length": checkpoint.channel_mask_length,
        "normalize": config.normalize_audio,
        "data": "",
        "w2v_path": "",
        "w2v_args": pretraining,
    }
    task = {**pretraining["task"], "_name": "audio_finetuning", "labels": "ltr"}
    return {"_name": None, "model": model, "task": task}
