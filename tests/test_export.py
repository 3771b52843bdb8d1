"""Exports against the models they were made from, in the programs that users run them with."""

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import sound
from torch import Tensor, nn

import w2v2
from w2v2.checkpoint.card import write_card
from w2v2.checkpoint.native import save_weights
from w2v2.cli.main import main
from w2v2.errors import JobError, UsageError
from w2v2.export import compare
from w2v2.export.int8 import fuse_attention, quantize_convolutions
from w2v2.files import whole_folder
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.serial import load_config, save_config
from w2v2.text.vocabulary import PhonemeVocabulary, PieceVocabulary, Vocabulary

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

NANO = [
    "--train.max-steps", "2", "--train.log-every", "1", "--train.val-every", "2", "--train.checkpoint-every", "2",
    "--data.num-workers", "0",
]  # fmt: skip
SHAPE = [
    "--model.n-layer", "2", "--model.n-embd", "48", "--model.ffn-dim", "48", "--model.normalize-audio", "True",
    "--model.pos-conv-groups", "4", "--model.pos-conv-kernel", "16", "--data.batch-seconds", "5",
    "--data.max-seconds", "3", "--warm-start.updates", "1",
]  # fmt: skip
LENGTHS = (9_999, 16_000, 20_480, 33_333, 100_001)  # none of those that the export itself is checked at


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretraining run, and a CTC run from it."""
    root = tmp_path_factory.mktemp("runs")
    pre, ctc = root / "pre", root / "ctc"
    assert main(["pretrain", "tiny", "--data", str(corpus), "--out", str(pre), *NANO, *SHAPE]) == 0
    tune = ["finetune", "tiny_ctc", "--data", str(corpus), "--init-from", str(pre), "--out", str(ctc)]
    assert main([*tune, *NANO]) == 0
    return {"pre": pre, "ctc": ctc}


@pytest.fixture(scope="module")
def exports(
    runs: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for kind, to in (("pre", "onnx"), ("ctc", "onnx"), ("ctc", "torch")):
        made[kind, to] = root / f"{kind}-{to}"
        options = ["--int8", "--data", str(corpus)] if (kind, to) == ("ctc", "onnx") else []
        command = ["export", str(runs[kind]), str(made[kind, to]), "--to", to, "--license", "cc-by-4.0", *options]
        assert main(command) == 0
    return made


def speech(batch: int, samples: int) -> Tensor:
    return torch.from_numpy(np.stack([sound(samples / 16_000, seed=i)[:samples] for i in range(batch)]))


def original(run: Path, audio: Tensor) -> Tensor:
    """What the run's model says, utterance by utterance, by the functions that everything else uses."""
    loaded = w2v2.load(run)
    if isinstance(loaded, w2v2.Recognizer):
        return torch.stack([loaded.emissions([row])[0] for row in audio])
    rows = [(row - row.mean()) / torch.sqrt(row.var(correction=0) + 1e-5) for row in audio]
    with torch.no_grad():
        return torch.cat([loaded.encode(row[None])[0] for row in rows])


def graph(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda audio: module(audio).detach()
    session = onnxruntime.InferenceSession(path)
    return lambda audio: torch.from_numpy(session.run(None, {"audio": audio.numpy()})[0])


@pytest.mark.parametrize(
    ("kind", "to", "name"),
    [("pre", "onnx", "model.onnx"), ("ctc", "onnx", "model.onnx"), ("ctc", "torch", "model.pt2")],
)
def test_a_graph_gives_the_model_s_numbers_at_any_length_and_batch(
    exports: dict[tuple[str, str], Path], runs: dict[str, Path], kind: str, to: str, name: str
) -> None:
    run = graph(exports[kind, to] / name)
    for samples in LENGTHS:
        for batch in (1, 2, 5):
            audio = 10 ** -torch.arange(batch)[:, None] * speech(batch, samples)  # loud and quiet ones
            expected = original(runs[kind], audio)
            torch.testing.assert_close(run(audio), expected, atol=1e-4, rtol=1e-5)
            assert expected.std() > 0.1


def test_what_is_beside_a_graph_says_what_it_is(exports: dict[tuple[str, str], Path], runs: dict[str, Path]) -> None:
    folder = exports["ctc", "onnx"]
    check = json.loads((folder / "export.json").read_text())
    assert len({case["samples"] for case in check["checks"]}) == 5
    assert {case["batch"] for case in check["checks"]} == {1, 3}
    assert 0 <= check["largest_difference"] <= check["limit"] == 1e-4
    assert {"torch", "onnx", "onnxruntime"} <= check["packages"].keys()
    assert w2v2.load(runs["ctc"]).model.config == load_config(folder / "config.json", ContrastiveConfig)
    assert (folder / "vocab.json").read_text() == (runs["ctc"] / "vocab.json").read_text()
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    audio = speech(1, 16_000)
    torch.testing.assert_close(  # the graph normalises: nothing may happen before it
        extractor(audio[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values, audio, atol=0, rtol=0
    )


def test_int8_is_smaller_and_near_and_its_error_rates_are_stated(
    exports: dict[tuple[str, str], Path], runs: dict[str, Path], corpus: Path
) -> None:
    folder = exports["ctc", "onnx"]
    check = json.loads((folder / "export.json").read_text())
    whole, small = ((folder / name).stat().st_size for name in ("model.onnx", "model.int8.onnx"))
    assert check["bytes"] == {"model.onnx": whole, "model.int8.onnx": small}
    # What is saved is three of the four bytes of each weight of a linear layer, and of a convolution but the first.
    model = w2v2.load(runs["ctc"]).model
    layers = {m for m in model.modules() if isinstance(m, nn.Linear)}
    saved = 3 * sum(w.numel() for w in [*(m.weight for m in layers), *model.feature_encoder.conv_weights()[1:]])
    assert 0.6 * saved < whole - small < saved
    assert str(Path(w2v2.__file__).parent).encode() not in (folder / "model.onnx").read_bytes()
    assert str(Path(w2v2.__file__).parent).encode() not in (exports["ctc", "torch"] / "model.pt2").read_bytes()
    audio = speech(1, 48_000)
    a, b = graph(folder / "model.onnx")(audio), graph(folder / "model.int8.onnx")(audio)
    assert 0 < (a - b).norm() / a.norm() < 0.05
    assert 0 < check["int8"]["relative_difference"] < 0.05 and check["int8"]["same_label"] > 0.5
    small, rows = w2v2.load(str(folder / "model.int8.onnx")), list(speech(2, 48_000))
    for row, beside in zip(rows, small.emissions(rows), strict=True):  # what else is in a batch does not matter
        assert torch.equal(small.emissions([row])[0], beside)
    stated, recognizer = check["error_rates"], w2v2.load(runs["ctc"])
    assert stated["unreadable"] == {}
    lines = [line for path in sorted(corpus.glob("test-clean/**/*.txt")) for line in path.read_text().splitlines()]
    texts = dict(line.split(" ", 1) for line in lines)
    heard = {path.stem: recognizer(*soundfile.read(path)) for path in sorted(corpus.glob("test-clean/**/*.flac"))}
    assert texts.keys() == heard.keys() and stated["utterances"] == len(texts) == 4
    pairs = list(texts.values()), [recognizer.vocabulary.normalize(heard[name]) for name in texts]
    assert stated["model.onnx"] == {"wer": jiwer.wer(*pairs), "cer": jiwer.cer(*pairs)}
    assert stated["model.int8.onnx"].keys() == {"wer", "cer"}


def test_attention_by_one_kernel_gives_the_same(exports: dict[tuple[str, str], Path], runs: dict[str, Path]) -> None:
    path, audio = exports["ctc", "onnx"] / "model.onnx", speech(2, 48_000)
    model = onnx.load(path)
    fuse_attention(model, w2v2.load(runs["ctc"]).model.config.n_head)
    kinds = {node.op_type for node in model.graph.node}
    assert "MultiHeadAttention" in kinds and "Softmax" not in kinds
    [fused] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"audio": audio.numpy()})
    torch.testing.assert_close(torch.from_numpy(fused), graph(path)(audio), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "padding", "bias"), [(3, 2, 0, False), (2, 2, 1, True), (5, 1, 2, True)])
def test_a_convolution_in_8_bits_is_near(kernel: int, stride: int, padding: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (torch.randn(shape, generator=generator) for shape in ((2, 4, 33), (6, 4, kernel), (6,)))
    names, tensor, helper = ["x", "weight", "bias"][: 2 + bias], onnx.numpy_helper.from_array, onnx.helper
    values = [tensor(t.numpy(), name) for t, name in ((weight, "weight"), (shift, "bias"))][: 1 + bias]
    node = helper.make_node("Conv", names, ["y"], strides=[stride], pads=[padding, padding])
    shapes = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 3) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", shapes[:1], shapes[1:], values)
    quantize_convolutions(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    [y] = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    expected = F.conv1d(x, weight, shift if bias else None, stride, padding)
    # Each product is off by half a step of either factor at most: of 255 over the inputs' range, of 63 over a weight's.
    steps = x.clamp(min=0).max() - x.clamp(max=0).min(), weight.abs().amax((1, 2))[:, None]
    bound = F.conv1d(x.abs(), torch.ones_like(weight), None, stride, padding) * steps[1] / 63 / 2
    bound += weight.abs().sum((1, 2))[:, None] * steps[0] / 255 / 2 + 4 * kernel * steps[0] / 255 * steps[1] / 63 / 4
    error = (torch.from_numpy(y) - expected).abs()
    assert y.dtype == np.float32 and error.max() > 0 and (error <= bound).all()


# --- Refused ----------------------------------------------------------------------------------------------------------


class TwoFaced(nn.Module):
    """Positions that are others in a graph than in Python."""

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        return 0.01 * x.roll(1, -1) if torch.compiler.is_exporting() else torch.zeros_like(x)


@dataclass(kw_only=True)
class TwoFacedConfig(ContrastiveConfig):
    def build_positional_embedding(self) -> nn.Module:
        return TwoFaced()


class Dynamic(nn.Module):
    """Positions that depend on what is said: no graph."""

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        return x if x.sum() > 0 else -x


@dataclass(kw_only=True)
class DynamicConfig(ContrastiveConfig):
    def build_positional_embedding(self) -> nn.Module:
        return Dynamic()


def weights(folder: Path, kind: type[ContrastiveConfig], vocabulary: Vocabulary | None = None) -> Path:
    """A folder of weights of a very small model."""
    config = kind(
        n_layer=1, n_head=2, n_embd=32, ffn_dim=32, conv_channels=(16,) * 7, conv_norm="group:4", n_entries=8,
        codebook_dim=4, pos_conv_kernel=8, pos_conv_groups=2,
    )  # fmt: skip
    folder.mkdir()
    torch.manual_seed(0)
    save_weights(Wav2Vec2ForCTC(config, len(vocabulary.labels)) if vocabulary else config.build(), folder)
    save_config(config, folder / "config.json")
    if vocabulary:
        vocabulary.save(folder / "vocab.json")
    return folder


@pytest.mark.parametrize("to", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("kind", "message"), [(TwoFacedConfig, "differs from the model by"), (DynamicConfig, "cannot be exported")]
)
def test_a_graph_that_is_not_the_model_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, kind: type[ContrastiveConfig], message: str
) -> None:
    run = weights(tmp_path / "run", kind)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", to]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_comparison_finds_nan_other_shapes_and_one_wrong_value() -> None:
    def off(audio: Tensor) -> Tensor:
        wrong = audio.clone()
        wrong[-1, -1] += 2e-4
        return wrong

    lengths = (100, 200, 300, 400, 500)
    assert len(compare(torch.sin, torch.sin, lengths)) == 10
    for fault in (off, lambda audio: audio[:, :-1], lambda audio: audio * torch.nan):
        with pytest.raises(JobError):
            compare(lambda audio: audio, fault, lengths)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("nowhere", ["--to", "onnx"], "no nowhere/config.json"),
        ("corpus", ["--to", "onnx"], "config.json: expected a finished run folder"),
        ("theirs", ["--to", "onnx"], "theirs"),
        ("file", ["--to", "torch"], "wav2vec_small.pt"),
        ("pre", ["--to", "onnx", "--data", "CORPUS"], "need a CTC model"),
        ("pre", ["--to", "torch", "--int8"], "--int8 and --data are for --to onnx, got --to torch"),
        ("ctc", ["--to", "onnx", "--data", "CORPUS", "--split", "none"], "--split must be one of train, valid, test"),
        ("ctc", ["--to", "torch", "--split", "none"], "--split is of --data; add that, or leave --split out"),
        ("ctc", ["--to", "onnx", "--data", "SILENT"], "no utterance of test has words to compare with"),
        ("ctc", ["--to", "torch", "--push-to-hub", "a/b/c"], "must be OWNER/NAME, got 'a/b/c'"),
        ("ctc", ["--to", "torch", "--push-to-hub", "a/b"], "needs a token of the hub"),
    ],
)
def test_a_wrong_folder_or_option_is_one_line_and_leaves_nothing(
    runs: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    options: list[str],
    message: str,
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    theirs, file, silent = tmp_path / "theirs", tmp_path / "wav2vec_small.pt", tmp_path / "silent"
    for split in ("train", "test"):
        (silent / split).mkdir(parents=True)
        soundfile.write(silent / split / "a.wav", sound(1.0, 0), 16_000)
    transformers.Wav2Vec2Config().save_pretrained(theirs)
    file.write_bytes(b"PK")
    places = {**runs, "nowhere": Path("nowhere"), "corpus": corpus, "theirs": theirs, "file": file}
    folders = {"CORPUS": str(corpus), "SILENT": str(silent)}
    options = [folders.get(option, option) for option in options]
    assert main(["export", str(places[what]), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["silent", "theirs", "wav2vec_small.pt"]


def test_a_full_folder_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="is not an empty folder"), whole_folder(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# --- Cards and the hub ------------------------------------------------------------------------------------------------

WITHOUT_US = "import sys; sys.modules['w2v2'] = None\n"  # importing it raises ImportError


@pytest.mark.parametrize("kind", ["pre", "ctc"])
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_card_has_its_facts_and_its_code_runs(
    exports: dict[tuple[str, str], Path],
    runs: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    kind: str,
    to: str,
) -> None:
    if (kind, to) not in exports:
        pytest.skip("the other kind's covers it")
    folder = tmp_path / "export"
    shutil.copytree(exports[kind, to], folder)
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc-by-4.0" and front["datasets"] == [corpus.name]
    assert front["pipeline_tag"] == ("feature-extraction" if kind == "pre" else "automatic-speech-recognition")
    assert str(corpus.parent) not in text and str(runs[kind].parent) not in text  # nothing about this machine
    check = json.loads((folder / "export.json").read_text())
    environment = json.loads((runs[kind] / "environment.json").read_text())
    train = environment["data"]["train"]
    assert f"on {train['hours']:.2f} hours of `{corpus.name}`, {train['speakers']} speakers" in text
    assert front["library_name"] == "w2v2" and to.split("-")[0] in "".join(front["tags"])
    assert "None were measured" in text and f"{check['largest_difference']:.1e}" in text

    audio = sound(2.0, seed=3)
    soundfile.write(folder / "speech.wav", audio, 16_000, subtype="FLOAT")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    command = [sys.executable, "-c", WITHOUT_US + code[0]]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    if kind == "ctc":
        assert said.strip() == w2v2.load(runs["ctc"])(audio, 16_000) != ""
    else:
        assert re.search(r"\(?\[?100, 48", said)


VOCABULARIES = {
    "labels": lambda: Vocabulary(labels=("<blank>", "<unk>", "S", "O"), boundary=None),
    "phonemes": lambda: PhonemeVocabulary(labels=("<blank>", "<unk>", "a", "t", "ŋ")),
    "pieces": lambda: PieceVocabulary.from_texts(["THE SUN AND THE MOON", "RAIN IN THE SKY"], size=30),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_code_of_a_card_spells_any_vocabulary(kind: str, tmp_path: Path) -> None:
    run = weights(tmp_path / "run", ContrastiveConfig, VOCABULARIES[kind]())
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--to", "torch"]) == 0
    audio = sound(2.0, seed=3)
    soundfile.write(out / "speech.wav", audio, 16_000, subtype="FLOAT")
    text = (out / "README.md").read_text()
    assert "No licence was given" in text and "license" not in yaml.safe_load(text.split("---\n")[1])
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    command = [sys.executable, "-c", WITHOUT_US + code]
    printed = subprocess.run(command, cwd=out, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == w2v2.load(run)(audio, 16_000) != ""


def test_the_card_has_what_was_evaluated(
    exports: dict[tuple[str, str], Path], runs: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", tmp_path / "export"
    shutil.copytree(runs["ctc"], run)
    shutil.copytree(exports["ctc", "torch"], folder)
    assert main(["evaluate", str(run), "--data", str(corpus), "--split", "valid"]) == 0
    path = run / "evaluation" / "valid" / "evaluation.json"
    found = json.loads(path.read_text())
    found["words"]["interval"] = [0.125, 0.5]  # of more speakers than these
    path.write_text(json.dumps(found))
    write_card(run, folder, name="a")
    text = (folder / "README.md").read_text()
    assert str(corpus) not in text and "None were measured" not in text
    rates = f"{100 * found['wer']:.2f} (12.50 to 50.00) | {100 * found['cer']:.2f} |"
    assert f"| `{corpus.name}` | valid | greedy | {found['utterances']} | {rates}" in text


def test_without_the_hub_s_client_there_is_no_card_and_a_licence_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = weights(tmp_path / "run", ContrastiveConfig)
    monkeypatch.setattr("w2v2.cli.convert.find_spec", lambda name: None)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "torch", "--license", "mit"]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "torch"]) == 0
    assert "without a model card" in caplog.text and not (tmp_path / "out" / "README.md").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's interface as an upload needs; keeps what it was given."""

    address: str
    files: dict[str, bytes]
    made: list[dict[str, object]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.made.append({**json.loads(body), "authorization": self.headers["Authorization"]})
            answer: dict[str, object] = {"url": f"{self.address}/me/nano", "name": "me/nano"}
        elif self.path.startswith("/api/models/me/nano/preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path.startswith("/api/models/me/nano/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/me/nano/commit/{'0' * 40}"}
        else:
            answer = {"warnings": [], "errors": []}  # of the card's front matter
        self._say(answer)

    def do_GET(self) -> None:
        self._say({"id": "me/nano", "sha": "0" * 40, "siblings": []})

    def _say(self, answer: dict[str, object]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        pass


def test_push_uploads_the_folder_to_a_private_repository(tmp_path: Path) -> None:
    run = weights(tmp_path / "run", ContrastiveConfig)
    Hub.files, Hub.made = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.address = f"http://127.0.0.1:{server.server_port}"
    own = {
        "HF_ENDPOINT": Hub.address,
        "HF_TOKEN": "hf_none",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "w2v2.cli.main", "export", str(run), str(tmp_path / "out"), "--to", "torch"]
    command += ["--push-to-hub", "me/nano"]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    made = Hub.made[0]
    assert len(Hub.made) == 1 and made["authorization"] == "Bearer hf_none"
    assert made.get("visibility", "private" if made.get("private") else "public") == "private"
    assert Hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    gone = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)  # nobody listens
    assert gone.returncode == 1
    assert "is written, but not pushed to me/nano" in gone.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "model.pt2").exists()


# --- Graphs in the place of runs --------------------------------------------------------------------------------------


def test_a_graph_gives_what_the_run_gives_it_was_made_of(runs, exports, corpus, tmp_path, capsys):
    folder = exports["ctc", "onnx"]
    audio = [torch.from_numpy(sound(seconds, seed=3)) for seconds in (1.0, 2.3, 0.01, 1.0)]
    expected = w2v2.load(runs["ctc"]).emissions(audio)
    for name, bound in ((folder, 1e-4), (folder / "model.int8.onnx", 0.5)):
        found = w2v2.load(str(name)).emissions(audio)
        assert [len(row) for row in found] == [len(row) for row in expected]
        assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True) if len(a)) <= bound
    texts = []
    for name in (runs["ctc"], folder):
        scores = tmp_path / f"scores-{len(texts)}"
        assert main(["transcribe", str(name), str(corpus / "test-clean"), "--batch-size", "3"]) == 0
        out = capsys.readouterr().out
        command = ["evaluate", str(name), "--data", str(corpus), "--split", "test", "--out", str(scores)]
        assert main([*command, "--workers", "0"]) == 0
        capsys.readouterr()
        texts.append((out, (scores / "hypotheses.jsonl").read_text()))
    assert texts[0] == texts[1]
    with pytest.raises(UsageError, match="gives labels and no features"):
        w2v2.extract(w2v2.load(folder).model, audio[:1])
    encoder, ours = w2v2.load(exports["pre", "onnx"]), w2v2.extract(w2v2.load(runs["pre"]), audio[:2])
    for a, b in zip(w2v2.extract(encoder, audio[:2]), ours, strict=True):
        assert a.keys() == b.keys() and torch.equal(a["times"], b["times"])
        assert all((a[key] - b[key]).abs().max() <= 1e-4 * b[key].abs().max() for key in a)
    with pytest.raises(UsageError, match="its last layer alone"):
        w2v2.extract(encoder, audio[:1], layers=(0,))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def strange_graph(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["b", "t"]) for name in ("input_values", "logits")]
    node = onnx.helper.make_node("Identity", ["input_values"], ["logits"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:]), ir_version=10)
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda folder: change(folder / "preprocessor_config.json", sampling_rate=8_000), "wants audio at 8000 Hz"),
        (lambda folder: (folder / "vocab.json").unlink(), "graph/vocab.json: No such file or directory"),
        (lambda folder: (folder / "config.json").unlink(), "expected what 'w2v2 export' wrote beside model.onnx"),
        (lambda folder: Vocabulary.from_texts(["ABC"]).save(folder / "vocab.json"), "by the vocab.json beside it"),
        (lambda folder: change(folder / "config.json", conv_strides=[5] + [2] * 5 + [1]), "by the config.json beside"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"onnx"), "is damaged or no ONNX model"),
        (strange_graph, "takes input_values and gives logits; expected an export of 'w2v2 export'"),
    ],
)
def test_graphs_beside_files_of_another_model_are_refused(exports, tmp_path, spoil, line):
    folder = shutil.copytree(exports["ctc", "onnx"], tmp_path / "graph")
    (folder / "model.int8.onnx").unlink()
    spoil(folder)
    with pytest.raises(UsageError, match=re.escape(line)):
        w2v2.load(folder)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["transcribe", "GRAPH", "a.wav", "--device", "cuda"], "--device cuda cannot be used by an ONNX model"),
        (["transcribe", "GRAPH", "a.wav", "--language", "deu"], "leave --language out"),
        (["convert", "GRAPH", "out", "--to", "hf"], "is an exported graph, which has no weights to take"),
        (["finetune", "tiny_ctc", "--data", "x", "--init-from", "GRAPH"], "has no weights to take"),
        (["evaluate", "GRAPH", "--data", "CORPUS", "--probe"], "without layers to probe"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(exports, corpus, capsys, words, line):
    names = {"GRAPH": str(exports["ctc", "onnx"]), "CORPUS": str(corpus)}
    assert main([names.get(word, word) for word in words]) == 2
    assert line in capsys.readouterr().err
