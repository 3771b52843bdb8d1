"""Features of the encoder: hidden states, codes and pooled vectors, from Python and by ``w2v2 extract``."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import sound, utterances
from safetensors import safe_open
from safetensors.torch import load_file
from test_parity_hf import PRESETS, audio_of, copied

from w2v2 import recipes
from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import CONFIG, save_weights
from w2v2.cli.main import main
from w2v2.data.audio import load_audio
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.inference.extract import extract, read_audio
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary


@pytest.mark.parametrize("preset", PRESETS)
def test_hidden_states_are_hugging_faces_layer_by_layer(preset):
    model, hf, _ = copied(preset)
    model.eval(), hf.eval()
    audio = audio_of(2, 16_000)
    with torch.no_grad():
        mine, frames = model.hidden_states(audio)
        out = hf.wav2vec2(audio, output_hidden_states=True)
    theirs = [*out.hidden_states[:-1], out.last_hidden_state]  # its last hidden state is before ln_f
    assert frames == [49, 49]
    assert len(mine) == len(theirs) == model.config.n_layer + 1
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_hidden_states_end_with_what_encode_returns_and_do_not_depend_on_the_batch(norm_first):
    config = replace(recipes.tiny().model, n_layer=2, n_embd=48, ffn_dim=48, norm_first=norm_first)
    torch.manual_seed(0)
    model = config.build().eval()
    audio = audio_of(2, 16_000)
    with torch.no_grad():
        states, frames = model.hidden_states(audio, [16_000, 9_000])
        encoded, _ = model.encode(audio, [16_000, 9_000])
        alone, _ = model.hidden_states(audio[1:, :9_000])
    assert torch.equal(states[-1], encoded)
    for together, row in zip(states, alone, strict=True):
        torch.testing.assert_close(together[1, : frames[1]], row[0], atol=1e-5, rtol=1e-5)
        assert together[1, frames[1] :].abs().max() == 0


def small(**fields):
    return replace(recipes.tiny().model, n_layer=2, n_embd=48, ffn_dim=48, **fields)


def folder_of(path, model, config):
    path.mkdir()
    save_weights(model, path)
    save_config(config, path / CONFIG)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Run folder of a pretraining model that nobody has trained, with codes that differ."""
    config = recipes.tiny()
    config.model = small(normalize_audio=True)
    torch.manual_seed(0)
    model = config.model.build()
    return folder_of(tmp_path_factory.mktemp("features") / "run", model, config)


# --- Codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_features", ["projected", "encoder"])
def test_codes_are_the_targets_that_training_has_at_masked_frames(target_features):
    torch.manual_seed(0)
    model = small(target_features=target_features, similarity_dim=24).build().eval()
    audio, lengths = audio_of(3, 16_000), [16_000, 9_000, 12_345]
    draws = model.draw(utterances(lengths))
    seen = []
    model.quantizer.register_forward_hook(lambda _, args, out: seen.append(out.codes))
    with torch.no_grad():
        model(audio, draws, lengths)
        codes, frames = model.codes(audio, lengths)
        [alone] = model.codes(audio[1:2, :9_000])[0]
    laid_out = torch.cat([row[:count] for row, count in zip(codes, frames, strict=True)])
    assert torch.equal(laid_out[draws.masked], seen[0])
    assert codes.dtype == torch.int64 and len(laid_out.unique(dim=0)) > 5
    assert torch.equal(codes[1, : frames[1]], alone)
    assert codes[1, frames[1] :].max() == 0


# --- From Python ------------------------------------------------------------------------------------------------------


def test_features_are_of_each_utterance_alone_in_evaluation_mode_with_the_times_of_their_frames():
    torch.manual_seed(0)
    model = small(normalize_audio=True).build().train()
    audio = [3 * audio_of(1, 16_000)[0] + 1, audio_of(1, 9_000)[0]]
    found = extract(model, audio, layers=(0, -1, 1), codes=True)
    for row, features in zip(audio, found, strict=True):
        normal = ((row - row.mean()) / torch.sqrt(row.var(correction=0) + 1e-5))[None]
        with torch.no_grad():
            states, [frames] = model.eval().hidden_states(normal)
        assert list(features) == ["layer_0", "layer_2", "layer_1", "codes", "times"]
        for layer in range(3):
            torch.testing.assert_close(features[f"layer_{layer}"], states[layer][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(features["codes"], model.codes(normal)[0][0])
        assert features["times"].tolist() == [model.config.frame_seconds(t) for t in range(frames)]
    pooled = extract(model, audio, layers=(1,), pool=True)
    for features, mean in zip(found, pooled, strict=True):
        assert list(mean) == ["layer_1"]
        torch.testing.assert_close(mean["layer_1"], features["layer_1"].mean(0), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_extracted_is_refused():
    encoder = Wav2Vec2(small())
    audio = [audio_of(1, 16_000)[0]]
    with pytest.raises(UsageError, match="no layer 3: expected 0 to 2, or -3 to -1"):
        extract(encoder, audio, layers=(0, 3))
    with pytest.raises(UsageError, match="no layer -4"):
        extract(encoder, audio, layers=(-4,))
    with pytest.raises(UsageError, match="no quantizer"):
        extract(encoder, audio, codes=True)
    with pytest.raises(UsageError, match="no mean"):
        extract(small().build(), audio, codes=True, pool=True)
    with pytest.raises(UsageError, match="nothing to extract"):
        extract(encoder, audio, layers=())
    with pytest.raises(ValueError, match="shorter than one frame"):
        extract(encoder, [audio[0][:100]])


def test_the_model_of_any_folder_is_what_its_weights_are(tmp_path):
    config = small()
    torch.manual_seed(0)
    made = {
        "pretraining": config.build(),
        "ctc": Wav2Vec2ForCTC(config, len(Vocabulary.from_texts(["SUN"]).labels)),
        "encoder": Wav2Vec2(config),
    }
    kinds = {"pretraining": Wav2Vec2ForPretraining, "ctc": Wav2Vec2ForCTC, "encoder": Wav2Vec2}
    for name, model in made.items():
        folder = folder_of(tmp_path / name, model, config)
        if name == "ctc":
            with pytest.raises(UsageError, match=r"no .*vocab\.json: expected the labels"):
                read(folder)
            Vocabulary.from_texts(["SUN"]).save(folder / "vocab.json")
        loaded = read(folder).build()
        assert type(loaded) is kinds[name] and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


PYTHON = """
import sys
for name in ("pytorch_lightning", "lightning", "lhotse"):
    sys.modules[name] = None
import w2v2
from w2v2.inference.extract import extract, read_audio
[found] = extract(w2v2.load(sys.argv[1]), [read_audio(sys.argv[2])], layers=(0, -1))
print({name: tuple(value.shape) for name, value in found.items()})
"""


def test_from_python_it_takes_three_lines_and_neither_lightning_nor_lhotse(pretrained, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([sound(1.0, 1, 8_000)] * 2, axis=1), 8_000)
    done = subprocess.run(
        [sys.executable, "-c", PYTHON, str(pretrained), str(tmp_path / "a.wav")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'layer_0': (50, 48), 'layer_2': (50, 48), 'times': (50,)}\n"


# --- Files ------------------------------------------------------------------------------------------------------------


def index_of(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_a_corpus_is_extracted_once_each_and_holds_what_python_gives(pretrained, corpus, tmp_path):
    out = tmp_path / "out"
    argv = ["extract", str(pretrained), "--data", str(corpus), "--split", "train", "--out", str(out), "--workers", "0"]
    assert main([*argv, "--layers", "0", "-1", "--codes", "--batch-seconds", "9"]) == 0
    cuts = {cut.id: cut for cut in read_corpus(corpus)["train"]}
    rows = index_of(out)
    assert sorted(row["id"] for row in rows) == sorted(cuts)
    assert {path.name for path in out.iterdir()} == {"index.jsonl", *(row["file"] for row in rows)}
    model = read(pretrained).build()
    for row in rows[::5]:
        found = load_file(out / row["file"])
        [expected] = extract(model, [torch.from_numpy(load_audio(cuts[row["id"]]))], layers=(0, -1), codes=True)
        assert found.keys() == expected.keys()
        assert torch.equal(found["codes"], expected["codes"]) and torch.equal(found["times"], expected["times"])
        torch.testing.assert_close(found["layer_2"], expected["layer_2"], atol=1e-5, rtol=1e-5)
        assert row["frames"] == len(found["times"])
        assert row["seconds"] == pytest.approx(cuts[row["id"]].duration)
        with safe_open(out / row["file"], "pt") as file:
            assert file.metadata()["id"] == row["id"]


def test_one_bad_file_stops_no_other_and_the_exit_code_says_so(pretrained, tmp_path, caplog):
    audio = tmp_path / "audio"
    for folder in ("a", "b", "empty"):
        (audio / folder).mkdir(parents=True)
    soundfile.write(audio / "a" / "one.wav", sound(1.0, 1), 16_000)
    soundfile.write(audio / "a" / "silence.wav", np.zeros(16_000), 16_000)
    soundfile.write(audio / "a" / "short.wav", sound(0.01, 3), 16_000)
    soundfile.write(audio / "a" / "long.wav", sound(4.0, 4), 16_000)
    (audio / "a" / "text.wav").write_text("not audio")
    (audio / "a" / "cut.wav").write_bytes((audio / "a" / "one.wav").read_bytes()[:20_000])
    soundfile.write(audio / "a" / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(audio / "b" / "one.flac", sound(1.5, 5), 44_100)
    inputs = [audio / "a", audio / "b" / "one.flac", audio / "none.wav", audio / "empty"]
    out = tmp_path / "out"
    argv = ["extract", str(pretrained), *map(str, inputs), "--out", str(out), "--max-seconds", "3", "--format", "numpy"]
    assert main([*argv, "--pool", "mean", "--layers", "1"]) == 1
    rows = index_of(out)
    good = {row["source"]: row for row in rows if "error" not in row}
    bad = {Path(row["source"]).name: row["error"] for row in rows if "error" in row}
    assert [row["file"] for row in good.values()] == ["one.npz", "silence.npz"]
    assert "samples at 16 kHz are less than a frame needs" in bad["short.wav"]
    assert "longer than 3 s" in bad["long.wav"]
    assert "it breaks off" in bad["cut.wav"] and "not finite" in bad["nan.wav"]
    assert bad["text.wav"] and "No such file" in bad["none.wav"]
    assert "no audio in it" in bad["empty"] and "another one goes to one too" in bad["one.flac"]
    assert any("long.wav: longer than 3 s" in record.getMessage() for record in caplog.records)
    found = np.load(out / "silence.npz")
    assert found.files == ["layer_1"] and found["layer_1"].shape == (48,) and np.isfinite(found["layer_1"]).all()
    [expected] = extract(read(pretrained).build(), [read_audio(audio / "a" / "one.wav")], layers=(1,), pool=True)
    np.testing.assert_allclose(np.load(out / "one.npz")["layer_1"], expected["layer_1"], atol=1e-5)


def test_a_broken_recording_of_a_corpus_is_left_out_and_named(pretrained, tmp_path):
    folder = tmp_path / "data" / "test" / "7"
    folder.mkdir(parents=True)
    for i in range(2):
        soundfile.write(folder / f"{i}.flac", sound(2.0, i), 16_000)
    (folder / "1.flac").write_bytes((folder / "1.flac").read_bytes()[:2000])
    name = "x" * 240  # with the id's and the format's parts it is longer than a name can be
    soundfile.write(folder / f"{name}.wav", sound(2.0, 5), 16_000)
    soundfile.write(folder / "2.wav", np.full(32_000, np.nan), 16_000, subtype="FLOAT")
    out = tmp_path / "out"
    argv = ["extract", str(pretrained), "--data", str(tmp_path / "data"), "--out", str(out), "--workers", "0"]
    assert main(argv) == 1
    rows = {row["id"]: row for row in index_of(out)}
    assert rows["test_7_0"]["file"] == "test_7_0.safetensors" and "1.flac" in rows["test_7_1"]["error"]
    assert "not finite" in rows["test_7_2"]["error"] and "cannot write" in rows[f"test_7_{name}"]["error"]
    assert not list(out.glob(".*"))
    assert load_file(out / "test_7_0.safetensors").keys() == {"layer_2", "times"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name either files and folders of audio, or a corpus with --data"),
        (["x.wav", "--data", "y"], "name either files and folders of audio, or a corpus with --data"),
        (["x.wav", "--layers", "9"], "no layer 9: expected 0 to 2"),
        (["x.wav", "--codes", "--pool", "mean"], "codes are names"),
        (["x.wav", "--max-seconds", "0"], "--max-seconds must be more than 0"),
        (["x.wav", "--device", "gpu"], "--device gpu cannot be used"),
        (["--data", "CORPUS", "--split", "dev"], "--split must be one of train, valid, test"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(pretrained, corpus, tmp_path, capsys, options, message):
    words = [str(corpus) if word == "CORPUS" else word for word in options]
    assert main(["extract", str(pretrained), *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_channel_can_be_chosen_and_channels_that_cancel_are_no_silence(pretrained, tmp_path, capsys):
    left = sound(1.0, 1)
    soundfile.write(tmp_path / "opposite.flac", np.stack([left, -left], 1), 16_000)
    soundfile.write(tmp_path / "left.flac", left, 16_000)
    arguments = ["extract", str(pretrained), str(tmp_path / "opposite.flac"), "--out"]
    assert main([*arguments, str(tmp_path / "mix")]) == 1
    assert "its channels cancel each other out" in (tmp_path / "mix" / "index.jsonl").read_text()
    assert main([*arguments, str(tmp_path / "one"), "--channel", "1"]) == 0
    [expected] = extract(read(pretrained).build(), [read_audio(tmp_path / "left.flac")])
    [(name, vectors)] = [item for item in expected.items() if item[0] != "times"]
    torch.testing.assert_close(load_file(tmp_path / "one" / "opposite.safetensors")[name], vectors)
    assert main([*arguments, str(tmp_path / "three"), "--channel", "3"]) == 1
    assert "it has no channel 3, only 2" in (tmp_path / "three" / "index.jsonl").read_text()
