"""Models of transformers' own making and ours, in both directions: states of every layer, losses, gradients, files.

Compared with transformers loaded from the files by itself. fairseq's files are written here in its own layout, by a
key map of this test's own (facts from fairseq's modules and transformers' former conversion script).
"""

import argparse
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RATE

from w2v2 import recipes
from w2v2.checkpoint.formats import convert, read
from w2v2.checkpoint.huggingface import FIELDS, OTHERS, read_huggingface, write_huggingface
from w2v2.checkpoint.native import save_weights, write_native
from w2v2.checkpoint.processor import compare_processor
from w2v2.cli.main import main
from w2v2.errors import JobError, UsageError
from w2v2.inference.recognizer import load_recognizer
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.masking import draw_targets, keyed_generator
from w2v2.model.pretraining import ContrastiveConfig, Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2
from w2v2.serial import load_config, save_config
from w2v2.text.vocabulary import PhonemeVocabulary, Vocabulary
from w2v2.training.config import FinetuneConfig, PretrainConfig

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "D", "'")
THEIR_LETTERS = Vocabulary(labels=LETTERS, blank=0, unknown=3, boundary=4, silent=(1, 2))
OUR_LETTERS = Vocabulary.from_texts(["ABBA", "CAB'D"])
SAMPLES = (16_000, 9_300, 4_321)
# (feat_extract_norm, do_stable_layer_norm, conv_bias): BASE, LARGE, and each setting once more without its companions
SHAPES = [("group", False, False), ("layer", True, True), ("group", True, True), ("layer", False, False)]
KINDS = ["Wav2Vec2Model", "Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC"]
OURS = dict(zip(KINDS, (Wav2Vec2, Wav2Vec2ForPretraining, Wav2Vec2ForCTC), strict=True))


def stirred(model):
    """Every parameter away from its initial value, so that none can hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def theirs(kind, shape, **options):
    norm, stable, bias = shape
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        feat_extract_norm=norm, do_stable_layer_norm=stable, conv_bias=bias, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7, num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4, num_codevectors_per_group=10, codevector_dim=16, proj_codevector_dim=24,
        num_negatives=12, vocab_size=options.pop("vocab_size", len(LETTERS)), mask_time_prob=0.65,
        attn_implementation="eager", **options,
    )  # fmt: skip
    return stirred(getattr(transformers, kind)(config)).eval()


def ours(kind, shape, vocabulary=OUR_LETTERS):
    norm, stable, bias = shape
    config = replace(
        recipes.paper_base().model, n_layer=2, n_head=4, n_embd=48, ffn_dim=64, conv_channels=(16,) * 7,
        conv_norm="layer" if norm == "layer" else "group:16", conv_bias=bias, norm_first=stable, pos_conv_kernel=32,
        pos_conv_groups=4, n_entries=10, codebook_dim=8, similarity_dim=24, num_distractors=12, max_seq_len=900,
    )  # fmt: skip
    torch.manual_seed(1)
    if kind == "Wav2Vec2ForCTC":
        return stirred(Wav2Vec2ForCTC(config, len(vocabulary.labels))).eval()
    return stirred(OURS[kind](config)).eval()


def save_ours(model, folder, vocabulary=OUR_LETTERS):
    folder.mkdir(parents=True)
    save_config(model.config, folder / "config.json")
    save_weights(model, folder)
    if isinstance(model, Wav2Vec2ForCTC):
        vocabulary.save(folder / "vocab.json")
    return folder


def save_theirs(model, folder, **options):
    model.save_pretrained(folder, **options)
    if isinstance(model, transformers.Wav2Vec2ForCTC):
        ids = {label: i for i, label in enumerate(LETTERS)}
        (folder / "vocab.json").write_text(json.dumps(ids))
    return folder


def noise(samples, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def padded():
    rows = [noise(n, seed=n) for n in SAMPLES]
    attention = torch.stack([torch.arange(max(SAMPLES)) < n for n in SAMPLES]).long()
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), list(SAMPLES), attention


def their_states(hf, audio, attention=None):
    out = getattr(hf, "wav2vec2", hf)(audio, attention_mask=attention, output_hidden_states=True)
    return [*out.hidden_states[:-1], out.last_hidden_state]


def assert_same_states(model, hf):
    """Alone for every norm; in a padded batch with theirs in the batch too, where transformers is invariant."""
    invariant = model.config.conv_norm == "layer"
    batch, lengths, attention = padded()
    with torch.no_grad():
        mine, frames = model.hidden_states(batch, lengths)
        together = their_states(hf, batch, attention) if invariant else None
        assert len(mine) == model.config.n_layer + 1
        for b, (n, t) in enumerate(zip(lengths, frames, strict=True)):
            alone = their_states(hf, batch[b : b + 1, :n])
            for layer, state in enumerate(model.hidden_states(batch[b : b + 1, :n])[0]):
                assert (state - alone[layer]).abs().max() <= 1e-5
                assert (mine[layer][b, :t] - alone[layer][0]).abs().max() <= 1e-5
                if together is not None:
                    assert (mine[layer][b, :t] - together[layer][b, :t]).abs().max() <= 1e-5


def both_losses(model, hf, blank=0):
    """The loss of each on the same audio, masks, negatives and targets."""
    audio = noise((2, SAMPLES[0]))
    if isinstance(model, Wav2Vec2ForPretraining):
        t = model.config.frames([audio.shape[1]])[0]
        rngs = [keyed_generator(b) for b in range(2)]
        masks = [model.config.sample_mask(t, rng) for rng in rngs]
        draws = draw_targets(masks, rngs, model.config.num_distractors)
        negatives = torch.zeros(2, t, model.config.num_distractors, dtype=torch.long)
        parts = zip(masks, draws.distractors.split(draws.counts), strict=True)
        for b, (mask, places) in enumerate(parts):
            negatives[b, mask] = mask.nonzero().flatten()[places] + b * t
        out = hf(audio, mask_time_indices=torch.stack(masks), sampled_negative_indices=negatives)
        return model(audio, draws).losses["contrastive"], out.contrastive_loss
    if isinstance(model, Wav2Vec2ForCTC):
        targets = torch.tensor([[5, 4, 6, 6, 5], [7, 7, 4, 5, 6]])
        hf.config.ctc_loss_reduction = "sum"
        log_probs, frames = model(audio)
        sizes = torch.tensor(frames), torch.tensor([5, 5])
        mine = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), targets, *sizes, blank, reduction="sum")
        return mine, hf(audio, labels=targets).loss
    weight = noise((2, model.config.frames([audio.shape[1]])[0], model.config.n_embd), seed=3)
    return (model(audio)[0] * weight).sum(), (hf(audio).last_hidden_state * weight).sum()


THEIR_NAMES = {
    "feature_encoder.conv_layers.3.0.weight": "feature_extractor.conv_layers.3.conv.weight",
    "feature_encoder.conv_layers.0.1.bias": "feature_extractor.conv_layers.0.layer_norm.bias",
    "transformer.1.attn.v_proj.weight": "encoder.layers.1.attention.v_proj.weight",
    "transformer.0.mlp.fc_1.weight": "encoder.layers.0.feed_forward.intermediate_dense.weight",
    "positional_embedding.conv.parametrizations.weight.original1": (
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    ),
    "ln_f.weight": "encoder.layer_norm.weight",
}


def assert_same_losses_and_gradients(model, hf, blank=0):
    mine, other = both_losses(model, hf, blank)
    assert (mine - other).abs() <= 1e-5 * other.abs().clamp(min=1)
    model.feature_encoder.gradient_scale = 1.0  # which transformers does not have
    model.feature_encoder.requires_grad_(True)
    mine, other = both_losses(model, hf, blank)
    mine.backward(), other.backward()
    target = dict(getattr(hf, "wav2vec2", hf).named_parameters())
    own = dict(model.named_parameters())
    total = torch.stack([p.grad.norm() for p in hf.parameters() if p.grad is not None]).norm()
    for a, b in THEIR_NAMES.items():
        mine, other = own[a].grad, target[b].grad
        assert other.norm() > 0
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-7 * total, a
    sizes = [
        torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).sort().values for m in (model, hf)
    ]
    torch.testing.assert_close(*sizes, atol=float(1e-6 * total), rtol=1e-4)  # of every parameter, whatever its name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_their_models_read_from_their_files_compute_the_same_here(tmp_path, kind, shape):
    hf = theirs(kind, shape)
    contents = read(save_theirs(hf, tmp_path / "hf"))
    model = contents.build()
    assert type(model) is OURS[kind]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf.parameters())
    assert_same_states(model, hf)
    assert_same_losses_and_gradients(model, hf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_our_models_written_as_theirs_compute_the_same_there(tmp_path, kind, shape):
    model = ours(kind, shape)
    contents = read(save_ours(model, tmp_path / "ours"))
    folder = tmp_path / "hf"
    folder.mkdir()
    write_huggingface(contents, folder)
    hf, info = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert_same_states(model, hf.eval())
    assert_same_losses_and_gradients(model, hf)


def test_the_tables_of_fields_have_the_defaults_of_transformers():
    default = transformers.Wav2Vec2Config()
    for _, name, value in FIELDS:
        found = getattr(default, name)
        assert (tuple(found) if isinstance(found, list) else found) == value, name
    assert {name: getattr(default, name) for name in OTHERS} == OTHERS


def test_settings_are_read_as_they_are_and_written_back(tmp_path):
    hf = theirs(
        "Wav2Vec2ForCTC", SHAPES[1], hidden_dropout=0.2, activation_dropout=0.3, feat_proj_dropout=0.15, layerdrop=0.4,
        mask_time_length=7, mask_feature_prob=0.5, mask_feature_length=8, contrastive_logits_temperature=0.2,
    )  # fmt: skip
    folder = save_theirs(hf, tmp_path / "hf")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    contents = read(folder)
    config = contents.config
    assert (config.dropout, config.activation_dropout, config.dropout_input, config.layer_drop) == (0.2, 0.3, 0.15, 0.4)
    assert (config.mask_prob, config.mask_length, config.logit_temperature) == (0.65, 7, 0.2)
    assert (contents.channel_mask_prob, contents.channel_mask_length) == (0.5, 8)
    assert config.normalize_audio and not contents.notes
    assert (config.conv_paddings, config.conv_norm, config.norm_first) == ((0,) * 7, "layer", True)
    (tmp_path / "again").mkdir()
    write_huggingface(contents, tmp_path / "again")
    written = json.loads(transformers.Wav2Vec2Config.from_pretrained(tmp_path / "again").to_json_string())
    expected = json.loads(hf.config.to_json_string())
    for name in [theirs for _, theirs, _ in FIELDS] + [name for name in OTHERS if name in expected]:
        assert written.get(name) == expected[name], name


def test_a_fine_tuning_run_takes_its_channel_masks_along(tmp_path):
    source = save_ours(ours("Wav2Vec2ForCTC", SHAPES[0]), tmp_path / "run")
    run = FinetuneConfig(model=read(source).config, channel_mask_prob=0.5, channel_mask_length=8)
    save_config(run, source / "config.json")
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 0
    written = transformers.Wav2Vec2Config.from_pretrained(tmp_path / "hf")
    assert (written.mask_feature_prob, written.mask_feature_length) == (0.5, 8)
    assert (written.pad_token_id, written.vocab_size) == (OUR_LETTERS.blank, len(OUR_LETTERS.labels))


def test_what_their_configuration_has_no_place_for_comes_back(tmp_path):
    model = ours("Wav2Vec2ForPreTraining", SHAPES[0])
    model.config = replace(model.config, max_seq_len=77, gumbel_end=0.3, sub_batch_seconds=None, mask_prob=0.5)
    source = save_ours(model, tmp_path / "ours")
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["convert", str(source), str(tmp_path / "fs"), "--to", "fairseq"]) == 0
    assert read(tmp_path / "hf").config == read(tmp_path / "fs").config == model.config


# --- Files ------------------------------------------------------------------------------------------------------------


def old_names(state):
    return {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in state.items()
    }


def sharded_bin(state, folder):
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["shards", "bin", "old bin", "legacy bin", "bin shards", "old safetensors"])
def test_weights_in_every_kind_of_file_are_the_same_weights(tmp_path, form):
    hf = theirs("Wav2Vec2ForPreTraining", SHAPES[0])
    expected = read(save_theirs(hf, tmp_path / "hf")).state
    folder, state = tmp_path / "other", hf.state_dict()
    hf.config.save_pretrained(folder)
    if form == "shards":
        hf.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif form == "bin shards":
        sharded_bin(state, folder)
    elif form == "old safetensors":
        import safetensors.torch

        safetensors.torch.save_file(old_names(state), folder / "model.safetensors")
    else:
        state = old_names(state) if form == "old bin" else state
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy bin")
    found = read(folder).state
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_encoder_may_keep_the_names_it_had_inside_a_model_with_a_head(tmp_path):
    hf = theirs("Wav2Vec2Model", SHAPES[0])
    expected = read(save_theirs(hf, tmp_path / "hf")).state
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({f"wav2vec2.{n}": t for n, t in hf.state_dict().items()}, tmp_path / "hf" / "pytorch_model.bin")
    found = read(tmp_path / "hf").state
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_half_precision_is_read_as_float32(tmp_path):
    hf = theirs("Wav2Vec2Model", SHAPES[1]).half()
    state = read(save_theirs(hf, tmp_path / "hf")).state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["ln_f.weight"], hf.encoder.layer_norm.weight.float())
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours"), "--to", "ours"]) == 0


@pytest.mark.parametrize(("kind", "to"), [(kind, "hf") for kind in KINDS] + [(kind, "fairseq") for kind in KINDS[1:]])
def test_there_and_back_is_bitwise_the_same_with_a_certificate_each_way(tmp_path, kind, to, caplog):
    vocabulary = THEIR_LETTERS if to == "fairseq" else OUR_LETTERS
    source = save_ours(ours(kind, SHAPES[1], vocabulary), tmp_path / "ours", vocabulary)
    caplog.set_level("INFO")
    assert main(["convert", str(source), str(tmp_path / "there"), "--to", to]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back"), "--to", "ours"]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert read(tmp_path / "back").config == read(source).config
    assert read(tmp_path / "back").vocabulary == (vocabulary if kind == "Wav2Vec2ForCTC" else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "there"]
    assert sum("compared with transformers" in record.getMessage() for record in caplog.records) == 2
    found = json.loads((tmp_path / "back" / "certificate.json").read_text())
    assert (found["model"], found["round_trip"], found["tolerance"]) == (kind, "bitwise", 1e-5)
    assert found["schema"] == 3 and len({*found["audio"]["samples"]}) == 3
    assert {"python", "w2v2", "torch", "transformers"} == found["versions"].keys()
    assert {"config.json", "model.safetensors"} <= found["target"]["files"].keys()
    losses = {"Wav2Vec2Model": set(), "Wav2Vec2ForCTC": {"log_probs", "ctc"}}
    losses["Wav2Vec2ForPreTraining"] = {"contrastive"}
    for part in ("alone", "padded"):
        rows = {row["what"]: row for row in found[part]}
        assert rows.keys() == {"last_hidden_state"} | losses[kind]
        assert all(row["same"] and row["largest_value"] > 0 for row in rows.values())
        assert rows["last_hidden_state"]["difference"] <= 1e-5
    assert 0 < found["largest"] <= 1e-5


def test_group_norm_is_compared_without_padding_and_the_certificate_says_so(tmp_path):
    source = save_ours(ours("Wav2Vec2ForCTC", SHAPES[0]), tmp_path / "ours")
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "hf"]) == 0
    found = json.loads((tmp_path / "hf" / "certificate.json").read_text())
    assert "one by one without padding in transformers" in found["padding"]
    hf = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "hf").eval()
    batch, lengths, _ = padded()
    with torch.no_grad():  # the reason
        alone, together = their_states(hf, batch[2:, : lengths[2]])[-1][0], their_states(hf, batch)[-1][2]
    assert (together[: len(alone)] - alone).abs().max() > 1e-3


# --- fairseq ----------------------------------------------------------------------------------------------------------


def in_fairseq_names(hf):
    """A model of transformers as fairseq's state dict."""
    pairs = [
        ("wav2vec2.", ""), ("feature_projection.projection", "post_extract_proj"), ("masked_spec_embed", "mask_emb"),
        ("feature_projection.layer_norm", "layer_norm"), ("encoder.pos_conv_embed.conv", "encoder.pos_conv.0"),
        ("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"),
        (".attention.", ".self_attn."), ("feed_forward.intermediate_dense", "fc1"),
        ("feed_forward.output_dense", "fc2"),
        ("quantizer.codevectors", "quantizer.vars"), ("project_hid", "final_proj"), (".conv.weight", ".0.weight"),
        (".conv.bias", ".0.bias"),
    ]  # fmt: skip
    ctc, layer_norm = isinstance(hf, transformers.Wav2Vec2ForCTC), hf.config.feat_extract_norm == "layer"
    found = {}
    for name, tensor in hf.state_dict().items():
        pos_conv = "pos_conv_embed" in name
        for a, b in pairs:
            if not (pos_conv and a.startswith(".conv.")):
                name = name.replace(a, b)
        if name.startswith("feature_extractor") and "layer_norm" in name:
            name = name.replace("layer_norm", "2.1" if layer_norm else "2")
        elif name.startswith("encoder.layers") and ".layer_norm" in name:
            name = name.replace(".layer_norm", ".self_attn_layer_norm")
        if ctc:
            name = "w2v_encoder.proj." + name.split(".")[1] if "lm_head" in name else "w2v_encoder.w2v_model." + name
        found[name] = tensor
    return found


def fairseq_settings(hf):
    """Settings of the pretrained model, as fairseq names them."""
    c = hf.config
    return {
        "extractor_mode": "layer_norm" if c.feat_extract_norm == "layer" else "default",
        "encoder_layers": 2, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4,
        "activation_fn": "gelu", "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0,
        "encoder_layerdrop": 0.05, "dropout_input": 0.1, "dropout_features": 0.1, "final_dim": 24,
        "layer_norm_first": c.do_stable_layer_norm, "conv_bias": c.conv_bias,
        "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16,2,2)] + [(16,2,2)]",
        "logit_temp": 0.1, "quantize_targets": True, "quantize_input": False, "same_quantizer": False,
        "target_glu": False, "feature_grad_mult": 0.1, "latent_vars": 10, "latent_groups": 2, "latent_dim": 16,
        "mask_length": 10, "mask_prob": 0.65, "num_negatives": 12, "conv_pos": 32, "conv_pos_groups": 4,
    }  # fmt: skip


TUNED = {
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.1, "dropout_input": 0.0, "final_dropout": 0.0,
    "apply_mask": True, "mask_length": 10, "mask_prob": 0.5, "mask_channel_length": 64, "mask_channel_prob": 0.25,
    "layerdrop": 0.1, "feature_grad_mult": 0.0, "blank_weight": 0,
}  # fmt: skip


def checkpoint(hf, args, cfg, task_state):
    return {
        "args": args, "cfg": cfg, "model": in_fairseq_names(hf), "criterion": None,
        "optimizer_history": [{"criterion_name": "X", "optimizer_name": "A", "lr_scheduler_state": {"best": None}}],
        "task_state": task_state, "extra_state": {"metrics": {}, "val_loss": np.float64(1.5), "epoch": 3},
        "last_optimizer_state": {"state": {0: {"step": 9, "exp_avg": torch.zeros(3)}}},
    }  # fmt: skip


def stand_in(monkeypatch, module, name):
    """A class of a package that is not installed here, as pickle sees it when a file is written."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        above = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, above, sys.modules.get(above) or types.ModuleType(above))
    made = sys.modules[module]
    kind = type(name, (), {"__module__": module})
    monkeypatch.setattr(made, name, kind, raising=False)
    return kind


def made_of(kind, **attributes):
    instance = kind()
    instance.__dict__.update(attributes)
    return instance


def omegaconf(monkeypatch, values):
    """A DictConfig as omegaconf pickles one: nodes inside nodes, with their parents."""
    container = stand_in(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    leaf, listed = (
        stand_in(monkeypatch, "omegaconf.nodes", "AnyNode"),
        stand_in(monkeypatch, "omegaconf.listconfig", "ListConfig"),
    )
    metadata = stand_in(monkeypatch, "omegaconf.base", "ContainerMetadata")

    def node(value, parent):
        if isinstance(value, dict):
            made = made_of(container, _metadata=made_of(metadata, key_type=dict), _parent=parent)
            made._content = {key: node(inside, made) for key, inside in value.items()}
        elif isinstance(value, list):
            made = made_of(listed, _metadata=made_of(metadata), _parent=parent)
            made._content = [node(inside, made) for inside in value]
        else:
            made = made_of(leaf, _metadata=made_of(metadata), _parent=parent, _val=value)
        return made

    return node(values, None)


def save_fairseq(hf, path, style, monkeypatch):
    """A checkpoint in one of the styles that fairseq has had."""
    ctc, normalize = isinstance(hf, transformers.Wav2Vec2ForCTC), hf.config.feat_extract_norm == "layer"
    pretrained, task = fairseq_settings(hf), {"normalize": normalize, "data": "/elsewhere", "sample_rate": RATE}
    state = {}
    if style == "args":
        inner = argparse.Namespace(
            arch="wav2vec2", task="audio_pretraining", latent_temp="(2,0.5,0.999995)", **pretrained, **task
        )
        outer = argparse.Namespace(arch="wav2vec_ctc", w2v_path="/elsewhere.pt", w2v_args=inner, **TUNED, **task)
        saved = checkpoint(hf, outer if ctc else inner, None, state)
        torch.save(saved, path, _use_new_zipfile_serialization=False)
    else:
        inner = {
            "_name": None, "common": {"fp16": True}, "task": {"_name": "audio_pretraining", **task},
            "model": {"_name": "wav2vec2", "latent_temp": [2, 0.5, 0.999995], **pretrained},
        }  # fmt: skip
        model = {
            "_name": "wav2vec_ctc",
            "w2v_path": "/elsewhere.pt",
            "w2v_args": inner,
            "normalize": normalize,
            **TUNED,
        }
        outer = {"_name": None, "model": model, "task": {"_name": "audio_finetuning", "labels": "ltr", **task}}
        cfg = outer if ctc else inner
        if ctc:
            dictionary = stand_in(monkeypatch, "fairseq.data.dictionary", "Dictionary")
            symbols = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS[4:]]
            indices = {symbol: i for i, symbol in enumerate(symbols)}
            state = {"target_dictionary": made_of(dictionary, symbols=symbols, indices=indices, count=[1] * 10)}
        saved = checkpoint(hf, None, omegaconf(monkeypatch, cfg) if style == "omegaconf" else cfg, state)
        torch.save(saved, path)
    if ctc and style == "args":
        (path.parent / "dict.ltr.txt").write_text(
            "".join(f"{letter} {9 - i}\n" for i, letter in enumerate(LETTERS[4:]))
        )
    for name in [name for name in sys.modules if name.split(".")[0] in ("fairseq", "omegaconf")]:
        monkeypatch.delitem(sys.modules, name)  # nobody has them who reads the file


@pytest.mark.parametrize("style", ["args", "cfg", "omegaconf"])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_fairseq_files_in_its_own_layout_compute_what_transformers_does(tmp_path, monkeypatch, shape, kind, style):
    hf = theirs(kind, shape)
    save_fairseq(hf, tmp_path / "checkpoint_best.pt", style, monkeypatch)
    contents = read(tmp_path / "checkpoint_best.pt")
    assert contents.kind is OURS[kind]
    assert_same_states(contents.build(), hf)
    assert_same_losses_and_gradients(contents.build(), hf)
    config = contents.config
    assert config.normalize_audio == (shape[0] == "layer")
    assert (config.gumbel_start, config.gumbel_end, config.gumbel_decay) == (2, 0.5, 0.999995)
    if kind == "Wav2Vec2ForCTC":
        assert contents.vocabulary == THEIR_LETTERS
        assert (config.mask_prob, config.layer_drop, config.activation_dropout) == (0.5, 0.1, 0.1)
        assert (config.conv_gradient_scale, contents.channel_mask_prob) == (0.0, 0.25)
    else:
        assert (config.mask_prob, config.layer_drop, config.conv_gradient_scale) == (0.65, 0.05, 0.1)


def test_fairseq_to_hugging_face_and_back_by_the_command(tmp_path, monkeypatch):
    hf = theirs("Wav2Vec2ForCTC", SHAPES[0])
    save_fairseq(hf, tmp_path / "base.pt", "args", monkeypatch)
    assert main(["convert", str(tmp_path / "base.pt"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    loaded = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in hf.state_dict().items())
    assert json.loads((tmp_path / "hf" / "vocab.json").read_text()) == {label: i for i, label in enumerate(LETTERS)}
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "fairseq"]) == 0
    again = torch.load(tmp_path / "again" / "model.pt", weights_only=True)  # nothing but tensors and plain containers
    expected = in_fairseq_names(hf)
    assert again["model"].keys() == expected.keys()
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in expected.items())
    assert again["cfg"]["model"]["w2v_args"]["model"]["encoder_attention_heads"] == 4
    assert (tmp_path / "again" / "dict.ltr.txt").read_text() == "".join(f"{letter} 1\n" for letter in LETTERS[4:])


# --- Tokenizer and processor ------------------------------------------------------------------------------------------

TEXTS = ["AB BA", "CAB'D A", "A B C D", "", "DAD", "XAX"]


@pytest.mark.parametrize("vocabulary", [OUR_LETTERS, THEIR_LETTERS], ids=["ours", "theirs"])
def test_the_exported_processor_spells_and_reads_like_the_vocabulary(tmp_path, vocabulary):
    source = save_ours(ours("Wav2Vec2ForCTC", SHAPES[1], vocabulary), tmp_path / "ours", vocabulary)
    (tmp_path / "hf").mkdir()
    write_huggingface(read(source), tmp_path / "hf")
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "hf")
    tokenizer = processor.tokenizer
    assert type(tokenizer) is transformers.Wav2Vec2CTCTokenizer
    assert len(tokenizer) == len(vocabulary.labels)  # no token is added that the model has no output for
    for text in TEXTS:
        mine = vocabulary.encode(text)
        assert tokenizer(text).input_ids == mine[:-1]  # no boundary after the last word there
        assert tokenizer.decode(mine, group_tokens=False) == vocabulary.decode(mine)
    blank, a, b = vocabulary.blank, vocabulary.labels.index("A"), vocabulary.labels.index("B")
    path = [blank, a, a, blank, a, vocabulary.boundary, b, blank, vocabulary.boundary]
    assert tokenizer.decode(path) == "AA B"
    assert tokenizer.pad_token_id == vocabulary.blank
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    again.save_pretrained(tmp_path / "saved")  # by transformers itself, with its own additions
    (tmp_path / "hf" / "vocab.json").write_text((tmp_path / "saved" / "vocab.json").read_text())
    (tmp_path / "hf" / "tokenizer_config.json").write_text((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert read(tmp_path / "hf").vocabulary == vocabulary


def test_the_exported_extractor_normalises_as_the_model_was_trained(tmp_path):
    for i, normalize in enumerate((False, True)):
        model = ours("Wav2Vec2Model", SHAPES[1])
        model.config = replace(model.config, normalize_audio=normalize)
        folder = tmp_path / str(i)
        folder.mkdir()
        write_huggingface(read(save_ours(model, tmp_path / f"ours{i}")), folder)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        audio = 0.3 * noise(4000).numpy() + 0.1
        heard = extractor(audio, sampling_rate=RATE).input_values[0]
        expected = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-5) if normalize else audio
        np.testing.assert_allclose(heard, expected, atol=5e-4)  # they add 1e-7 to the variance, fairseq and we 1e-5


def test_tokens_that_were_added_later_are_labels_where_the_model_was_widened_for_them(tmp_path):
    """As many fine-tuned models on the Hub: ``<s>`` and ``</s>`` come after the letters, not from vocab.json."""
    hf = theirs("Wav2Vec2ForCTC", SHAPES[0], pad_token_id=7)
    folder = save_theirs(hf, tmp_path / "hf")
    labels = ["|", "a", "b", "c", "d", "'", "[UNK]", "[PAD]"]
    (folder / "vocab.json").write_text(json.dumps({label: i for i, label in enumerate(labels)}))
    (folder / "added_tokens.json").write_text('{"<s>": 8, "</s>": 9}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]", "unk_token": {"content": "[UNK]"}}')
    found = read(folder).vocabulary
    assert found == Vocabulary(labels=(*labels, "<s>", "</s>"), blank=7, unknown=6, boundary=0, silent=(8, 9))
    assert found.encode("AB d") == [1, 2, 0, 4, 0]  # in the case of its labels


# --- Starting from them -----------------------------------------------------------------------------------------------

FEW = [
    "--train.max-steps", "1", "--train.log-every", "1", "--train.val-every", "1", "--train.checkpoint-every", "1",
    "--data.num-workers", "0", "--data.batch-seconds", "4", "--data.max-seconds", "2", "--train.accumulate", "1",
    "--optim.schedule.peak", "0", "--optim.weight-decay", "0",
]  # fmt: skip


def test_pretraining_starts_from_a_model_of_theirs_all_of_it(tmp_path, corpus):
    hf = theirs("Wav2Vec2ForPreTraining", SHAPES[0])
    source = save_theirs(hf, tmp_path / "hf")
    out = tmp_path / "run"
    call = ["pretrain", "adapt", "--init-from", str(source), "--data", str(corpus), "--out", str(out)]
    assert main([*call, *FEW, "--train.accelerator", "cpu"]) == 0
    trained, expected = read(out).state, read(source).state
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in trained)  # at rate 0
    assert load_config(out / "config.json", PretrainConfig).model.mask_prob == 0.65


def test_finetuning_takes_the_encoder_of_a_fairseq_file(tmp_path, monkeypatch):
    hf = theirs("Wav2Vec2ForPreTraining", SHAPES[1])
    save_fairseq(hf, tmp_path / "vox.pt", "cfg", monkeypatch)
    contents = read(tmp_path / "vox.pt")
    model = Wav2Vec2ForCTC(contents.config, 7)
    head = model.lm_head.weight.clone()
    contents.fill_encoder(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], contents.state[name]) for name in Wav2Vec2(contents.config).state_dict())
    assert torch.equal(state["lm_head.weight"], head)


@pytest.mark.parametrize("to", ["hf", "fairseq"])
def test_finetuning_goes_on_with_the_output_layer_of_a_ctc_model_of_theirs(tmp_path, corpus, to):
    alphabet = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    vocabulary = Vocabulary(labels=alphabet, blank=0, unknown=3, boundary=4, silent=(1, 2))
    source = save_ours(ours("Wav2Vec2ForCTC", SHAPES[0], vocabulary), tmp_path / "ours", vocabulary)
    assert main(["convert", str(source), str(tmp_path / "theirs"), "--to", to]) == 0
    out = tmp_path / "run"
    call = ["finetune", "tiny_ctc", "--init-from", str(tmp_path / "theirs"), "--data", str(corpus), "--out", str(out)]
    assert main([*call, *FEW[:8], *FEW[14:]]) == 0
    trained, expected = read(out), read(source)
    assert trained.vocabulary == vocabulary
    assert all(torch.equal(trained.state[name], tensor) for name, tensor in expected.state.items())  # at rate 0


def test_a_converted_recognizer_is_one_of_ours(tmp_path):
    hf = theirs("Wav2Vec2ForCTC", SHAPES[0])
    source = save_theirs(hf, tmp_path / "hf")
    assert main(["convert", str(source), str(tmp_path / "ours"), "--to", "ours"]) == 0
    recognizer = load_recognizer(tmp_path / "ours")
    assert recognizer.vocabulary == THEIR_LETTERS
    with torch.no_grad():
        expected = hf(noise(SAMPLES[0])[None]).logits.log_softmax(-1)[0]
    torch.testing.assert_close(recognizer.emissions([noise(SAMPLES[0])])[0], expected, atol=1e-5, rtol=1e-5)


def test_reading_what_was_written_by_hand_uses_both_readers(tmp_path):
    """The readers on their own, without the command around them."""
    contents = read_huggingface(save_theirs(theirs("Wav2Vec2Model", SHAPES[3]), tmp_path / "hf"))
    (tmp_path / "ours").mkdir()
    write_native(contents, tmp_path / "ours")
    assert read(tmp_path / "ours").config == contents.config
    assert isinstance(contents.config, ContrastiveConfig)


# --- Tokenizers of phonemes -------------------------------------------------------------------------------------------


def phoneme_folder(tmp_path: Path, **settings: Any) -> Path:
    hf = theirs("Wav2Vec2ForCTC", SHAPES[0], pad_token_id=0)
    folder = save_theirs(hf, tmp_path / "hf")
    labels = ["<pad>", "<s>", "</s>", "<unk>", "t\u0283", "\u026a", "p", "s", "t", "\u0283"]
    (folder / "vocab.json").write_text(json.dumps({label: i for i, label in enumerate(labels)}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Wav2Vec2PhonemeCTCTokenizer", "pad_token": "<pad>"} | settings)
    )
    return folder


def test_a_tokenizer_of_phonemes_is_a_vocabulary_of_phonemes(tmp_path: Path) -> None:
    folder = phoneme_folder(tmp_path)
    vocabulary = read(folder).vocabulary
    assert type(vocabulary) is PhonemeVocabulary
    assert (vocabulary.blank, vocabulary.unknown, vocabulary.silent) == (0, 3, (1, 2))
    text = "t\u0283 \u026a p s"
    assert vocabulary.encode(text) == [4, 5, 6, 7]  # not t and \u0283
    theirs_too = transformers.Wav2Vec2PhonemeCTCTokenizer(str(folder / "vocab.json"), do_phonemize=False)
    path = [0, 4, 4, 0, 5, 6, 0, 7]
    assert theirs_too.decode(path) == text == vocabulary.decode([4, 5, 6, 7])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [({"phone_delimiter_token": "-"}, "phonemes between '-'"), ({"tokenizer_class": "MyCTC"}, "'MyCTC'; expected")],
)
def test_a_tokenizer_that_spells_otherwise_is_refused(tmp_path: Path, settings: dict, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        read(phoneme_folder(tmp_path, **settings))


# --- transformers 5: the processor's own file -------------------------------------------------------------------------


def save_processor(folder: Path, *, normalize: bool) -> Path:
    """As transformers 5 saves a processor: one file that says what the feature extractor does."""
    processor = transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=False),
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")),
    )
    processor.save_pretrained(folder)
    assert (folder / "processor_config.json").is_file() and not (folder / "preprocessor_config.json").exists()
    return folder


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_processor_file_of_transformers_5_says_how_audio_is_normalised(tmp_path, shape, normalize):
    folder = save_processor(save_theirs(theirs("Wav2Vec2ForCTC", shape), tmp_path / "hf"), normalize=normalize)
    recognizer = load_recognizer(folder)
    assert recognizer.model.config.normalize_audio == normalize
    audio = 0.5 * noise(SAMPLES[0]) + 0.2
    processor = transformers.Wav2Vec2Processor.from_pretrained(folder)
    hf = transformers.Wav2Vec2ForCTC.from_pretrained(folder, attn_implementation="eager").eval()
    heard = processor(audio.numpy(), sampling_rate=RATE, return_tensors="pt").input_values
    with torch.no_grad():
        expected = hf(heard).logits[0].log_softmax(-1)
    torch.testing.assert_close(recognizer.emissions([audio])[0], expected, atol=2e-4, rtol=0)
    certificate = convert(folder, tmp_path / "ours", "ours")
    assert certificate["notes"] == [] and certificate["processor"]["audio"]["normalized"] == normalize
    assert certificate["processor"]["text"] == {"labels": 6, "same": True}


def test_a_certificate_is_refused_where_audio_or_labels_are_taken_otherwise(tmp_path):
    folder = save_processor(save_theirs(theirs("Wav2Vec2ForCTC", SHAPES[0]), tmp_path / "hf"), normalize=True)
    checkpoint = read(folder)
    audio = noise(SAMPLES[0])
    compare_processor(transformers, folder, checkpoint, audio)
    deaf = replace(checkpoint, config=replace(checkpoint.config, normalize_audio=False))
    with pytest.raises(JobError, match=r"feature extractor gives other audio, by 0\.1"):
        compare_processor(transformers, folder, deaf, audio)
    labels = list(LETTERS)
    labels[5], labels[6] = labels[6], labels[5]
    exchanged = replace(checkpoint, vocabulary=replace(THEIR_LETTERS, labels=tuple(labels)))
    with pytest.raises(JobError, match="tokenizer does not spell as the vocabulary here"):
        compare_processor(transformers, folder, exchanged, audio)


def test_a_tokenizer_with_a_stray_capital_folds_its_text_and_says_so(tmp_path, caplog):
    letters = ("<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijE")
    folder = save_theirs(theirs("Wav2Vec2ForCTC", SHAPES[0], vocab_size=len(letters)), tmp_path / "hf")
    (folder / "vocab.json").write_text(json.dumps({label: i for i, label in enumerate(letters)}))
    vocabulary = read(folder).vocabulary
    assert vocabulary.normalize("ACE bad") == "ace bad" and not vocabulary.strange("ACE BAD")
    assert "its letters are in lower case but for E" in caplog.text
    assert convert(folder, tmp_path / "ours", "ours")["processor"]["text"]["same"]
    assert read(tmp_path / "ours").vocabulary == vocabulary
