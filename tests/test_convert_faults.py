"""What convert must refuse: each in one line, with exit code 2, and nothing written; and a conversion gone wrong."""

import argparse
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refuse
from test_convert import KINDS, LETTERS, OUR_LETTERS, SHAPES, ours, save_fairseq, save_ours, save_theirs, theirs

from w2v2.checkpoint import certificate, fairseq, huggingface
from w2v2.checkpoint import formats as conversion
from w2v2.checkpoint.fairseq import conv_layers
from w2v2.checkpoint.foreign import renamed
from w2v2.checkpoint.pickles import read_pickle
from w2v2.cli.main import main
from w2v2.errors import UsageError
from w2v2.model.masking import keyed_generator
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.text.vocabulary import Vocabulary

FIRST = "wav2vec2.encoder.layers.0.attention.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good ones, to be spoiled: folders of transformers and of ours, files of fairseq."""
    root = tmp_path_factory.mktemp("models")
    for name, kind in zip(("encoder", "pretraining", "ctc"), KINDS, strict=True):
        save_theirs(theirs(kind, SHAPES[1]), root / "hf" / name)
        save_ours(ours(kind, SHAPES[1]), root / "ours" / name)
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in zip(("pretraining", "ctc"), KINDS[1:], strict=True):
            (root / "fairseq" / name).mkdir(parents=True)
            save_fairseq(theirs(kind, SHAPES[1]), root / "fairseq" / name / "model.pt", "cfg", patch)
    return root


def refused(capsys, source, out, to="ours"):
    line = refuse(capsys, "convert", str(source), str(out), "--to", to)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return line


def edit(path, **values):
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | values))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def spoil(folder, **values):
    return lambda: edit(folder / "config.json", **values)


CONFIG_FAULTS = {
    "another model": ({"model_type": "hubert"}, "of a model called 'hubert', expected 'wav2vec2'"),
    "width": ({"hidden_size": 64}, "layers.1.final_layer_norm.bias has (48,), expected (64,)"),
    "layers": ({"num_hidden_layers": 3}, "missing wav2vec2.encoder.layers.2.attention.q_proj.weight"),
    "fewer layers": ({"num_hidden_layers": 1}, "unexpected wav2vec2.encoder.layers.1.attention.k_proj.bias"),
    "bias": ({"conv_bias": False}, "unexpected wav2vec2.feature_extractor.conv_layers.0.conv.bias"),
    "norm": ({"feat_extract_norm": "group"}, "unexpected wav2vec2.feature_extractor.conv_layers.1.layer_norm.bias"),
    "codebook": ({"num_codevectors_per_group": 11}, "quantizer.codevectors has (1, 20, 8), expected (1, 22, 8)"),
    "heads": ({"num_attention_heads": 5}, "must be a multiple of `model.n_head` (5), got 48"),
    "text": ({"hidden_size": "48"}, "hidden_size: expected int, got str ('48')"),
    "list": ({"conv_dim": []}, "`model.conv_channels` needs 1 to 100 numbers, got 0"),
    "unequal": ({"conv_stride": [5, 2]}, "need one number for each of the 7 `model.conv_channels`"),
    "activation": ({"hidden_act": "relu", "layer_norm_eps": 1e-6}, "hidden_act 'relu' (expected 'gelu'), layer_n"),
    "adapter": ({"add_adapter": True}, "add_adapter True (expected False)"),
    "odd codebook": ({"codevector_dim": 15}, "codevector_dim must be a multiple of num_codevector_groups (2), got 15"),
    "ours": ({"w2v2": {"n_layers": 3}}, "settings of w2v2 that this version does not know: {'n_layers': 3}"),
    "ours again": ({"w2v2": {"n_layer": "many"}}, "n_layer: expected int, got str ('many')"),
    "ours once more": ({"w2v2": {"sub_batch_seconds": [1]}}, "sub_batch_seconds: expected float | null, got array"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_configuration_that_contradicts_the_weights(models, tmp_path, capsys, fault):
    values, said = CONFIG_FAULTS[fault]
    folder = shutil.copytree(models / "hf" / "pretraining", tmp_path / "hf")
    edit(folder / "config.json", **values)
    assert said in refused(capsys, folder, tmp_path / "out")


def test_all_tensors_that_do_not_fit_are_listed(models, tmp_path, capsys):
    folder = shutil.copytree(models / "hf" / "ctc", tmp_path / "hf")

    def change(tensors):
        del tensors[FIRST], tensors["lm_head.bias"]
        tensors["wav2vec2.masked_spec_embed"] = torch.zeros(47)
        tensors["lm_head.scale"] = torch.zeros(1)

    edit_tensors(folder, change)
    line = refused(capsys, folder, tmp_path / "out")
    for said in (
        f"missing {FIRST}",
        "missing lm_head.bias",
        "unexpected lm_head.scale",
        "wav2vec2.masked_spec_embed has (47,), expected (48,)",
    ):
        assert said in line


@pytest.mark.parametrize("where", ["hf", "ours"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(models, tmp_path, capsys, where, value):
    folder = shutil.copytree(models / where / "encoder", tmp_path / "model")
    name = "encoder.layers.1.layer_norm.bias" if where == "hf" else "transformer.1.ln_1.bias"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    line = refused(capsys, folder, tmp_path / "out", "ours" if where == "hf" else "hf")
    assert f"NaN or infinite weights: {name}" in line


@pytest.mark.parametrize("kind", ["hf", "ours", "fairseq", "bin"])
@pytest.mark.parametrize("share", [0.3, 0.999])
def test_truncated_files(models, tmp_path, capsys, kind, share):
    folder = shutil.copytree(models / ("hf" if kind == "bin" else kind) / "pretraining", tmp_path / "model")
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    path = next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".bin"))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    line = refused(capsys, path if kind == "fairseq" else folder, tmp_path / "out", "hf" if kind == "ours" else "ours")
    assert str(path) in line and "damaged" in line


def test_other_kinds_of_numbers(models, tmp_path, capsys):
    folder = shutil.copytree(models / "hf" / "encoder", tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({"masked_spec_embed": torch.zeros(48, dtype=torch.int64)}))
    assert "not float32, float16 or bfloat16: masked_spec_embed (torch.int64)" in refused(
        capsys, folder, tmp_path / "out"
    )


def test_a_tensor_in_both_spellings(models, tmp_path, capsys):
    folder = shutil.copytree(models / "hf" / "encoder", tmp_path / "model")
    new = "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    old = "encoder.pos_conv_embed.conv.weight_g"
    edit_tensors(folder, lambda tensors: tensors.update({old: tensors[new].clone()}))
    assert f"holds {new} in the old spelling as well" in refused(capsys, folder, tmp_path / "out")


@pytest.mark.parametrize("fault", ["lost", "elsewhere", "lies", "none"])
def test_parts_that_are_not_what_their_index_says(tmp_path, capsys, fault):
    folder = tmp_path / "hf"
    theirs(KINDS[0], SHAPES[0]).save_pretrained(folder, max_shard_size="30KB")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    part = sorted(set(places.values()))[1]
    if fault == "lost":
        (folder / part).unlink()
    elif fault == "elsewhere":
        shutil.copy(folder / part, tmp_path / "secret.safetensors")
        edit(index, weight_map={n: "../secret.safetensors" if p == part else p for n, p in places.items()})
    elif fault == "lies":
        edit(index, weight_map={n: p for n, p in places.items() if n != "masked_spec_embed"})
    else:
        edit(index, weight_map=None)
    said = {
        "lost": f"no {part}",
        "elsewhere": "no ../secret",
        "lies": "is not what",
        "none": "weight_map: expected",
    }
    assert said[fault] in refused(capsys, folder, tmp_path / "out")


# --- Pickles ----------------------------------------------------------------------------------------------------------


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


def zipped(value, path):
    torch.save(value, path)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [plain_pickle, zipped, legacy])
@pytest.mark.parametrize("place", ["fairseq", "bin"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (__import__, "__import__"),
        (getattr, "getattr"),
        (shutil.rmtree, "shutil.rmtree"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
    ],
)
def test_code_in_a_pickle_is_not_run_and_is_named(models, tmp_path, capsys, monkeypatch, place, write, function, name):
    monkeypatch.chdir(tmp_path)
    touched = tmp_path / "touched"
    argument = "open('touched', 'w')" if function is eval else "touch touched"
    value = {"model": {"a": 1 if write is plain_pickle else torch.zeros(2)}, "cfg": Evil(function, argument)}
    if place == "fairseq":
        source = tmp_path / "model.pt"
        write(value, source)
    else:
        source = shutil.copytree(models / "hf" / "encoder", tmp_path / "hf")
        (source / "model.safetensors").unlink()
        write(value, source / "pytorch_model.bin")
    line = refused(capsys, source, tmp_path / "out")
    assert name in line and not touched.exists()
    assert "add_safe_globals" not in line  # no advice on how to run it after all


def test_every_refused_name_is_in_the_line(tmp_path):
    torch.save([Evil(os.system, "true"), Evil(shutil.rmtree, "x")], tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"posix\.system, shutil\.rmtree"):
        read_pickle(tmp_path / "a.pt")


def test_a_name_that_no_class_can_have_is_refused(tmp_path):
    torch.save(Evil(argparse.ArgumentParser, "prog"), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"ArgumentParser", b"Argument\0arser"))
    with pytest.raises(UsageError, match=r"would run or build argparse\.Argument"):
        read_pickle(tmp_path / "b.pt")


def test_names_that_only_look_like_fairseqs_are_inert(tmp_path, monkeypatch):
    """A checkpoint may name any function of a package whose classes are let through: nothing of it is called."""
    text = b"\x80\x02cargparse\n_sys\nq\x00(cnumpy\nfromfile\nq\x01X\x07\x00\x00\x00touchedq\x02\x85q\x03Rq\x04tq\x05."
    monkeypatch.chdir(tmp_path)
    Path("touched").write_text("abc")
    Path("a.pt").write_bytes(text)
    with pytest.raises(UsageError, match="damaged"):  # a bare pickle is no checkpoint, and yet its names are read
        read_pickle(Path("a.pt"))
    torch.save(Evil(argparse.ArgumentParser, "prog"), "b.pt")
    found = read_pickle(Path("b.pt"))
    assert type(found).__name__ == "argparse.ArgumentParser" and not isinstance(found, argparse.ArgumentParser)


# --- Vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: edit(folder / "config.json", pad_token_id=4), "has the blank (pad_token_id) at 4, its token"),
        (lambda folder: (folder / "vocab.json").unlink(), "a CTC model needs its tokenizer's files"),
        (lambda folder: edit(folder / "vocab.json", Z=10), "has 'Z' at 10; expected ids 0 to 9"),
        (lambda folder: edit(folder / "vocab.json", Z=9), "has 'Z' at 9; expected ids 0 to 9, each once"),
        (lambda folder: (folder / "vocab.json").write_text('{"<pad>": 0}'), "no token for 9 of the model's 10 outputs"),
        (lambda folder: (folder / "vocab.json").write_text('{"en": {"A": 0}, "de": {}}'), "is of 2 languages"),
        (lambda folder: edit(folder / "config.json", vocab_size=11), "lm_head.weight has (10, 48), expected (11, 48)"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_does_not_fit_the_outputs(models, tmp_path, capsys, change, said):
    folder = shutil.copytree(models / "hf" / "ctc", tmp_path / "hf")
    change(folder)
    assert said in refused(capsys, folder, tmp_path / "out")


def test_our_own_vocabulary_must_fit_too(models, tmp_path, capsys):
    folder = shutil.copytree(models / "ours" / "ctc", tmp_path / "run")
    replace(OUR_LETTERS, labels=(*OUR_LETTERS.labels, "Q")).save(folder / "vocab.json")
    line = refused(capsys, folder, tmp_path / "out", "hf")
    assert "vocab.json has 9 labels" in line and "8 outputs" in line


def test_fairseqs_dictionary_beside_the_file(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "a.pt"
    save_fairseq(theirs(KINDS[2], SHAPES[1]), path, "args", monkeypatch)
    dictionary = path.parent / "dict.ltr.txt"
    lines = dictionary.read_text()
    dictionary.write_text(lines + "Z 1\n")
    assert "w2v_encoder.proj.weight has (10, 48), expected (11, 48)" in refused(capsys, path, tmp_path / "out")
    dictionary.write_text(lines.replace("A 8", "A"))
    assert "a label and a count on each line, got 'A'" in refused(capsys, path, tmp_path / "out")
    dictionary.unlink()
    assert "expected one dict.*.txt beside it" in refused(capsys, path, tmp_path / "out")


# --- fairseq's settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer_type": "conformer"}, "layer_type 'conformer' (expected 'transformer')"),
        ({"quantizer_depth": 2, "target_glu": True}, "target_glu True (expected False), quantizer_depth 2"),
        ({"encoder_layers": 3}, "missing encoder.layers.2.self_attn.q_proj.weight"),
        ({"encoder_layers": "2"}, "encoder_layers: expected int, got str ('2')"),
        ({"conv_feature_layers": "__import__('os').system('touch x')"}, "conv_feature_layers must be such as"),
        ({"_name": "hubert"}, "of a model called 'hubert', expected 'wav2vec2'"),
        ({"latent_temp": "2"}, "latent_temp: expected array, got int (2)"),
        ({"latent_dim": 15}, "latent_dim must be a multiple of latent_groups (2), got 15"),
    ],
)
def test_settings_of_fairseq_that_are_not_to_be_had(models, tmp_path, capsys, values, said):
    saved = torch.load(models / "fairseq" / "pretraining" / "model.pt", weights_only=False)
    saved["cfg"]["model"] |= values
    torch.save(saved, tmp_path / "a.pt")
    assert said in refused(capsys, tmp_path / "a.pt", tmp_path / "out")


def test_a_fine_tuned_file_without_the_settings_it_was_pretrained_with(models, tmp_path, capsys, monkeypatch):
    saved = read_pickle(models / "fairseq" / "ctc" / "model.pt")
    saved["cfg"]["model"]["w2v_args"] = None
    torch.save({"model": saved["model"], "cfg": saved["cfg"]}, tmp_path / "a.pt")
    assert "only a path, '/elsewhere.pt'" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")
    torch.save({"model": saved["model"]}, tmp_path / "a.pt")
    assert "neither 'cfg' nor 'args'" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")
    torch.save([1, 2], tmp_path / "a.pt")
    assert "not a checkpoint of fairseq" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")


def test_conv_layers_are_parsed_not_run():
    path = Path("a.pt")
    assert conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2", path) == [
        (512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2,
    ]  # fmt: skip
    for text in (
        "[]",
        "[(1, 2)]",
        "[(1, 2, -3)]",
        "[(1,2,3)] * 10**9",
        "[(1,2,3)] * 101",
        "1",
        "a",
        "[(1,2,'x')]",
        "(",
    ):
        with pytest.raises(UsageError, match="conv_feature_layers"):
            conv_layers(text, path)


# --- Models without a twin, and calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "fairseq"])
def test_the_pages_own_base_has_no_twin_and_all_reasons_are_given(tmp_path, capsys, to):
    config = replace(ContrastiveConfig(), n_layer=1, n_embd=32, ffn_dim=32, conv_channels=(32,) * 7,
                     conv_norm="group:8", n_entries=8, codebook_dim=16, utterance_norm=True)  # fmt: skip
    folder = save_ours(config.build(), tmp_path / "run")
    line = refused(capsys, folder, tmp_path / "out", to)
    for said in (
        "conv_paddings 4 1 1 1 1 0 0",
        "conv_norm group:8: theirs is layer or one group a channel, group:32",
        "utterance_norm",
        "target_features projected",
        "similarity_dim none",
        "'w2v2 export' takes it as it is",
    ):
        assert said in line


def test_a_head_that_is_not_there_does_not_stand_in_the_way(tmp_path):
    """What is quantised is no matter for an encoder alone."""
    model = ours(KINDS[0], SHAPES[1])
    model.config = replace(model.config, target_features="projected", similarity_dim=None)
    assert main(["convert", str(save_ours(model, tmp_path / "run")), str(tmp_path / "hf"), "--to", "hf"]) == 0


def test_vocabularies_that_fairseq_cannot_have(models, tmp_path, capsys):
    line = refused(capsys, models / "ours" / "ctc", tmp_path / "out", "fairseq")
    assert "its dictionaries begin with the blank" in line and "got <blank> <unk> | '" in line
    assert "no heads" in refused(capsys, models / "ours" / "encoder", tmp_path / "out", "fairseq")
    replace(OUR_LETTERS, boundary=None).save(tmp_path / "vocab.json")
    folder = shutil.copytree(models / "ours" / "ctc", tmp_path / "run")
    shutil.copy(tmp_path / "vocab.json", folder)
    assert "without a word boundary" in refused(capsys, folder, tmp_path / "out", "hf")


class Syllables(Vocabulary):
    """A vocabulary of another kind."""


def test_vocabularies_of_another_kind(models):
    contents = conversion.read(models / "ours" / "ctc")
    contents.vocabulary = Syllables(labels=OUR_LETTERS.labels)
    for misfits in (huggingface.hf_misfits, fairseq.fairseq_misfits):
        assert "its vocabulary is a Syllables" in misfits(contents)[0]


def test_calls_that_make_no_sense(models, tmp_path, capsys):
    def line(*call):
        return refuse(capsys, "convert", *map(str, call))

    assert "w2v2's already" in line(models / "ours" / "ctc", tmp_path / "out", "--to", "ours")
    assert "Hugging Face's already" in line(models / "hf" / "ctc", tmp_path / "out", "--to", "hf")
    assert "a name of the hub" in line(tmp_path / "nothing", tmp_path / "out", "--to", "ours")
    assert "no weights in" in line(_without_weights(models, tmp_path), tmp_path / "out", "--to", "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    assert "is not an empty folder" in line(models / "hf" / "ctc", tmp_path / "full", "--to", "ours")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert "neither of w2v2 (_type) nor" in line(tmp_path / "other", tmp_path / "out", "--to", "ours")


def _without_weights(models, tmp_path):
    folder = shutil.copytree(models / "hf" / "ctc", tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    return folder


# --- The certificate --------------------------------------------------------------------------------------------------


def swapped(rules):
    """The two norms of a block under each other's names: shapes fit, and it comes back as it went."""
    places = {"ln_1": "ln_2", "ln_2": "ln_1"}
    out = []
    for ours_, theirs_ in rules:
        name = next((name for name in places if name in ours_), None)
        out.append((ours_.replace(name, places[name]) if name else ours_, theirs_))
    return tuple(out)


@pytest.mark.parametrize("to", ["hf", "ours"])
def test_a_wrong_key_map_fails_the_certificate_and_nothing_is_left(models, tmp_path, capsys, monkeypatch, to):
    monkeypatch.setattr(huggingface, "_ENCODER", swapped(huggingface._ENCODER))
    source = models / ("ours" if to == "hf" else "hf") / "ctc"
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", to]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("w2v2: failed: the two models differ by more than 1e-05: last_hidden_state ")
    assert "log_probs" in line and "ctc" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_head", 2), ("norm_first", False), ("logit_temperature", 0.2), ("conv_strides", (4, 2, 2, 2, 2, 2, 3))],
)
def test_a_setting_that_no_shape_gives_away_fails_the_certificate(models, tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(conversion, "_check_round_trip", lambda *_: None)
    write = conversion.HUGGINGFACE.write

    def lying(contents, folder):
        write(replace(contents, config=replace(contents.config, **{field: value})), folder)
        edit(folder / "config.json", w2v2={field: getattr(contents.config, field)})  # ours will not be told

    monkeypatch.setitem(conversion.FORMATS, "hf", replace(conversion.HUGGINGFACE, write=lying))
    monkeypatch.setattr(conversion, "HUGGINGFACE", conversion.FORMATS["hf"])
    assert main(["convert", str(models / "ours" / "pretraining"), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_comes_back_otherwise_than_it_went_fails(models, tmp_path, capsys, monkeypatch):
    put = huggingface.foreign.put

    def rounding(state, names):
        return {name: tensor.bfloat16().float() for name, tensor in put(state, names).items()}

    monkeypatch.setattr(huggingface.foreign, "put", rounding)
    assert main(["convert", str(models / "ours" / "encoder"), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "is not what comes back: weights ['mask_vector'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_its_side_is_refused_and_fairseqs_says_that_nothing_was_compared(
    models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setattr(certificate.importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers" in refused(capsys, models / "hf" / "ctc", tmp_path / "out")
    assert main(["convert", str(models / "fairseq" / "ctc" / "model.pt"), str(tmp_path / "out"), "--to", "ours"]) == 0
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["compared_with"] is None and "not installed" in found["why_not"] and "largest" not in found


def test_a_model_without_mask_vector_gets_zeros_that_are_never_used_and_the_certificate_says_so(models, tmp_path):
    """As facebook/wav2vec2-base-960h is on the Hub. A pretraining model without one is refused."""
    for name in ("ctc", "pretraining"):
        folder = shutil.copytree(models / "hf" / name, tmp_path / name)
        edit_tensors(folder, lambda tensors: tensors.pop("wav2vec2.masked_spec_embed"))
    assert main(["convert", str(tmp_path / "ctc"), str(tmp_path / "ours"), "--to", "ours"]) == 0
    found = json.loads((tmp_path / "ours" / "certificate.json").read_text())
    assert any("no mask vector" in note for note in found["notes"])
    contents = conversion.read(tmp_path / "ours")
    assert contents.config.mask_prob == 0 and not contents.state["mask_vector"].any()
    with pytest.raises(UsageError, match=r"missing wav2vec2\.masked_spec_embed"):
        conversion.read(tmp_path / "pretraining")


@pytest.mark.parametrize("probability", [0.05, 0.075])
def test_a_mask_time_prob_of_spec_augment_or_of_starts_is_no_pretraining_objective(tmp_path, probability):
    """0.05 is transformers' default, 0.075 what XLS-R has."""
    folder = save_theirs(theirs(KINDS[1], SHAPES[0]), tmp_path / "hf")
    edit(folder / "config.json", mask_time_prob=probability)
    contents = conversion.read(folder)
    assert f"mask_time_prob {probability} is not the share masked" in " ".join(contents.notes)
    masks = [contents.config.sample_mask(500, keyed_generator(seed, 500)) for seed in range(50)]
    assert 0.47 < torch.stack(masks).float().mean() < 0.51  # as the paper says, "approximately 49%"
    edit(folder / "config.json", mask_time_prob=0.5)
    assert conversion.read(folder).config.mask_prob == 0.5


def test_the_key_maps_cover_every_tensor_and_no_two_share_a_name():
    for shape in SHAPES:
        for kind in KINDS:
            model = ours(kind, shape)
            state = list(model.state_dict())
            for names in (
                huggingface.hf_names(state, type(model)),
                fairseq.fairseq_names(state, model.config, type(model)),
            ):
                assert list(names) == state and len(set(names.values())) == len(state)
    with pytest.raises(AssertionError):
        renamed(["adapter.weight"], huggingface._ENCODER)
    assert len(LETTERS) == 10
