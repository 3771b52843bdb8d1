"""Hugging Face's folder of a wav2vec 2.0: its names, its configuration, its weights in whatever files.

Reading and writing need no transformers; what is written is compared with it by ``certificate.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file

from w2v2.checkpoint import foreign
from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.extractor import normalizes, write_extractor
from w2v2.checkpoint.native import CONFIG, WEIGHTS
from w2v2.checkpoint.tokenizer import read_tokenizer, settle_case, tokenizer_misfits, write_tokenizer
from w2v2.checkpoint.weights import read_weights
from w2v2.errors import Range, ShareBelowOne, UsageError, Width
from w2v2.files import write_json
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig, Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2
from w2v2.serial import read_json
from w2v2.text.vocabulary import Vocabulary

EPSILON = 1e-7
"""That transformers' feature extractor adds to the variance of audio."""

_ENCODER: foreign.Rules = (
    (r"feature_encoder\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_encoder\.conv_layers\.(\d+)\.1\.", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"feature_projection\.norm\.", "feature_projection.layer_norm."),
    (r"feature_projection\.linear\.", "feature_projection.projection."),
    (r"mask_vector$", "masked_spec_embed"),
    (r"positional_embedding\.conv\.", "encoder.pos_conv_embed.conv."),
    (r"transformer\.(\d+)\.attn\.", r"encoder.layers.\1.attention."),
    (r"transformer\.(\d+)\.ln_1\.", r"encoder.layers.\1.layer_norm."),
    (r"transformer\.(\d+)\.mlp\.fc_1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (r"transformer\.(\d+)\.mlp\.fc_2\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (r"transformer\.(\d+)\.ln_2\.", r"encoder.layers.\1.final_layer_norm."),
    (r"transformer\.(\d+)\.adapter\.", r"encoder.layers.\1.adapter_layer."),
    (r"ln_f\.", "encoder.layer_norm."),
)
_HEADS: foreign.Rules = (
    (r"quantizer\.projector\.", "quantizer.weight_proj."),
    (r"quantizer\.codebook$", "quantizer.codevectors"),
    (r"project_q\.", "project_q."),
    (r"out_linear\.", "project_hid."),
    (r"lm_head\.", "lm_head."),
)
_CLASSES: dict[type[Wav2Vec2], str] = {
    Wav2Vec2: "Wav2Vec2Model",
    Wav2Vec2ForPretraining: "Wav2Vec2ForPreTraining",
    Wav2Vec2ForCTC: "Wav2Vec2ForCTC",
}
FIELDS: foreign.Fields = (
    ("n_layer", "num_hidden_layers", 12),
    ("n_head", "num_attention_heads", 12),
    ("n_embd", "hidden_size", 768),
    ("ffn_dim", "intermediate_size", 3072),
    ("conv_channels", "conv_dim", (512,) * 7),
    ("conv_kernel_sizes", "conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
    ("conv_strides", "conv_stride", (5, 2, 2, 2, 2, 2, 2)),
    ("conv_bias", "conv_bias", False),
    ("norm_first", "do_stable_layer_norm", False),
    ("dropout", "hidden_dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("activation_dropout", "activation_dropout", 0.1),
    ("dropout_input", "feat_proj_dropout", 0.0),
    ("dropout_features", "feat_quantizer_dropout", 0.0),
    ("layer_drop", "layerdrop", 0.1),
    ("pos_conv_kernel", "num_conv_pos_embeddings", 128),
    ("pos_conv_groups", "num_conv_pos_embedding_groups", 16),
    ("mask_prob", "mask_time_prob", 0.05),
    ("mask_length", "mask_time_length", 10),
    ("n_groups", "num_codevector_groups", 2),
    ("n_entries", "num_codevectors_per_group", 320),
    ("similarity_dim", "proj_codevector_dim", 256),
    ("num_distractors", "num_negatives", 100),
    ("logit_temperature", "contrastive_logits_temperature", 0.1),
)
"""Our field, transformers' name for the same thing in the same unit, and its default, for files that leave it out."""
OTHERS: dict[str, Any] = {
    "feat_extract_norm": "group",
    "codevector_dim": 256,
    "apply_spec_augment": True,
    "mask_feature_prob": 0.0,
    "mask_feature_length": 10,
    "vocab_size": 32,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "add_adapter": False,
    "adapter_attn_dim": None,
}
"""Fields with no single counterpart, and their defaults."""
_FIXED = ("hidden_act", "feat_extract_activation", "layer_norm_eps", "add_adapter")
_ALLOWED = {name: (OTHERS[name],) for name in _FIXED} | {"feat_extract_norm": ("group", "layer")}
_START_PROB = 0.1
"""Below it ``mask_time_prob`` is no share of frames of pretraining: it is SpecAugment's, or fairseq's former share of
starts, as XLS-R has it."""
_KEPT = "w2v2"
"""Key of their configuration for the fields that it has no place for."""


_TYPES: dict[str, Any] = {
    "codevector_dim": Width,
    "apply_spec_augment": bool,
    "mask_feature_prob": ShareBelowOne,
    "mask_feature_length": Width,
    "vocab_size": Annotated[int, Range(1, 1_000_000)],
}


def _other(values: dict[str, Any], name: str, where: Path) -> Any:
    return foreign.setting(values, name, _TYPES[name], OTHERS[name], where)


def class_name(kind: type[Wav2Vec2]) -> str:
    """Return the name of transformers' class of a model."""
    return _CLASSES[kind]


def hf_names(names: Iterable[str], kind: type[Wav2Vec2]) -> dict[str, str]:
    """Return transformers' name, with ``weight_g`` and ``weight_v``, of each tensor of a model, by ours."""
    prefix = "" if kind is Wav2Vec2 else "wav2vec2."
    return foreign.renamed(names, [*((ours, prefix + theirs) for ours, theirs in _ENCODER), *_HEADS])


def hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the values of ``config.json`` for a model that fits.

    The mask vector is only there in transformers where something is masked: where nothing is here, ``mask_time_prob``
    says otherwise and ``apply_spec_augment`` is off.
    """
    config, vocabulary = foreign.contrastive(checkpoint), checkpoint.vocabulary
    values = foreign.to_settings(config, FIELDS) | {
        "model_type": "wav2vec2",
        "architectures": [_CLASSES[checkpoint.kind]],
        "dtype": "float32",
        "feat_extract_norm": "layer" if config.conv_norm == "layer" else "group",
        "codevector_dim": config.n_groups * config.codebook_dim,
        "proj_codevector_dim": config.similarity_dim or config.n_groups * config.codebook_dim,
        "apply_spec_augment": config.mask_prob > 0 or checkpoint.channel_mask_prob > 0,
        "mask_time_prob": config.mask_prob or 0.05,
        "mask_feature_prob": checkpoint.channel_mask_prob,
        "mask_feature_length": checkpoint.channel_mask_length,
        "adapter_attn_dim": config.adapter_dim or None,
        "final_dropout": 0.0,
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": True,
        **{name: OTHERS[name] for name in _FIXED},
    }
    if vocabulary is not None:
        silent = dict(zip(("bos_token_id", "eos_token_id"), vocabulary.silent, strict=False))
        values |= {"bos_token_id": None, "eos_token_id": None, **silent}
        values |= {"vocab_size": len(vocabulary.labels), "pad_token_id": vocabulary.blank}
    again = _model_config(values, checkpoint.kind, config.normalize_audio, Path(CONFIG))
    return values | {_KEPT: foreign.differing_fields(config, again)}


def hf_misfits(checkpoint: Checkpoint) -> list[str]:
    """Return every reason why transformers cannot have this model; empty: it can."""
    vocabulary = checkpoint.vocabulary
    return foreign.misfits(checkpoint) + ([] if vocabulary is None else tokenizer_misfits(vocabulary))


def write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the processor's files into a folder."""
    config = checkpoint.config
    write_json(folder / CONFIG, hf_config(checkpoint))
    tensors = foreign.put(checkpoint.state, hf_names(checkpoint.state, checkpoint.kind))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # transformers lets padding into GroupNorm's statistics, with an attention mask or without
    write_extractor(folder, normalize=config.normalize_audio, attention_mask=config.conv_norm == "layer")
    if checkpoint.vocabulary is not None:
        write_tokenizer(checkpoint.vocabulary, folder)


def read_huggingface(folder: Path, language: str | None = None) -> Checkpoint:
    """Read a folder of transformers' ``save_pretrained``, or one of the Hub's.

    Args:
        folder: with configuration, weights and, of a CTC model, the tokenizer's files.
        language: of a model with adapters (MMS), if not the one whose adapter is among the weights.

    Raises:
        UsageError: another model than wav2vec 2.0, settings that we do not have, weights that do not fit.
    """
    values, where = read_json(folder / CONFIG), folder / CONFIG
    if values.get("model_type") != "wav2vec2":
        raise UsageError(foreign.other_model(values.get("model_type"), "wav2vec2", where))
    foreign.refuse_other_settings(values, _ALLOWED, where)
    tensors, file = read_weights(folder, language)
    kind = foreign.kind_of(tensors)
    normalize, notes = normalizes(folder, layer_norm=values.get("feat_extract_norm") == "layer")
    config = _model_config(values, kind, normalize, where)
    if kind is not Wav2Vec2ForCTC and _KEPT not in values and config.mask_prob < _START_PROB:
        # In pretraining transformers is given its masks from outside.
        masked, config = config.mask_prob, replace(config, mask_prob=ContrastiveConfig.mask_prob)
        notes.append(f"mask_time_prob {masked:g} is not the share masked in pretraining: {config.mask_prob} here")
    prefix = "" if kind is Wav2Vec2 else "wav2vec2."
    if not prefix:  # some encoders keep the names that they had inside a model with a head
        tensors = {name.removeprefix("wav2vec2."): tensor for name, tensor in tensors.items()}
    if kind is not Wav2Vec2ForPretraining and f"{prefix}masked_spec_embed" not in tensors:
        tensors[f"{prefix}masked_spec_embed"] = torch.zeros(config.n_embd)
        config = replace(config, mask_prob=0.0)
        notes.append("the file has no mask vector, which only training uses: zeros here, and mask_prob 0")
    n_labels = _other(values, "vocab_size", where) if kind is Wav2Vec2ForCTC else 0
    if language is not None:
        n_labels = len(tensors["lm_head.weight"])  # an output layer of its own
    blank = foreign.blank_of(config, kind, n_labels, where)
    state, vocabulary = foreign.take(tensors, blank, hf_names(blank.state_dict(), kind), file), None
    if kind is Wav2Vec2ForCTC:
        vocabulary, choices = settle_case(_read_vocabulary(folder, values, n_labels, language))
        notes += choices
    return Checkpoint(
        source=folder,
        config=config,
        state=state,
        vocabulary=vocabulary,
        channel_mask_prob=_other(values, "mask_feature_prob", where),
        channel_mask_length=_other(values, "mask_feature_length", where),
        notes=notes,
    )


def _read_vocabulary(folder: Path, values: dict[str, Any], n_labels: int, language: str | None) -> Vocabulary:
    """Return the tokenizer's vocabulary, if its blank is the one that ``config.json`` trains with."""
    vocabulary = read_tokenizer(folder, n_labels, language)
    blank = values.get("pad_token_id", OTHERS["pad_token_id"])
    if blank != vocabulary.blank:
        raise UsageError(
            f"{folder / CONFIG} has the blank (pad_token_id) at {blank}, its tokenizer at {vocabulary.blank} "
            f"({vocabulary.labels[vocabulary.blank]}); expected the same; correct the one that is wrong"
        )
    return vocabulary


def _model_config(values: dict[str, Any], kind: type[Wav2Vec2], normalize: bool, where: Path) -> ContrastiveConfig:
    ours = foreign.from_settings(values, FIELDS, where) | {"normalize_audio": normalize, "audio_epsilon": EPSILON}
    width, groups = _other(values, "codevector_dim", where), ours["n_groups"]
    if width % groups and kind is Wav2Vec2ForPretraining:
        raise UsageError(f"{where}: codevector_dim must be a multiple of num_codevector_groups ({groups}), got {width}")
    ours["codebook_dim"] = width // groups
    ours["adapter_dim"] = foreign.setting(values, "adapter_attn_dim", Width | None, None, where) or 0
    if not _other(values, "apply_spec_augment", where):
        ours["mask_prob"] = 0.0
    return foreign.published(
        ours, layer_norm=values.get("feat_extract_norm") == "layer", kept=values.get(_KEPT), where=where
    )
