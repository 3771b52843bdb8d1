"""What is read is checked: types and ranges of every field, regular files alone, pickles that end, LMs that crash."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import RATE, sound
from fuzz import ARPA, make_models
from test_cli import refuse

from w2v2.checkpoint.pickles import plain, read_pickle
from w2v2.cli.main import main
from w2v2.data.utterance import read_cut
from w2v2.errors import JobError, UsageError
from w2v2.files import open_file, open_text, read_text
from w2v2.serial import checked, parse_json, read_figures

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    soundfile.write(folder / "a.wav", sound(1.0, 0), RATE)
    return folder


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    signal.alarm(600)
    yield
    signal.alarm(0)


def edited(models: Path, tmp_path: Path, path: str, change: Any) -> Path:
    """A copy of a model in which a file of JSON is changed."""
    folder = shutil.copytree(models / Path(path).parent, tmp_path / "model")
    file = folder / Path(path).name
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return folder


OURS = {
    "conv_strides": ([5, 2, 2, 2, 2, 2, -1], "config.json: conv_strides must be 1 to 100000, got (5, 2, 2"),
    "conv_kernel_sizes": ("x", "config.json: conv_kernel_sizes: expected array, got str ('x')"),
    "conv_paddings": ([0] * 6 + [0.5], "config.json: conv_paddings: expected int, got float - at $[6]"),
    "n_layer": (10**12, "config.json: n_layer must be 1 to 1000, got 1000000000000"),
    "n_embd": ([24], "config.json: n_embd: expected int, got array ([24])"),
    "dropout_input": ({"a": 1}, "config.json: dropout_input: expected float, got object ({'a': 1})"),
    "attention_dropout": (1e308, "config.json: attention_dropout must be 0 or more, less than 1, got 1e+308"),
    "conv_bias": (0, "config.json: conv_bias: expected bool, got int (0)"),
    "conv_norm": ("group:x", "config.json: `model.conv_norm` must be 'layer' or 'group:N'"),
    "similarity_dim": (True, "config.json: similarity_dim: expected int | null, got bool (True)"),
    "_type": (["x"], "config.json: expected a saved Wav2Vec2Config or SpectralConfig with its _type"),
}  # fmt: skip


@pytest.mark.parametrize("field", OURS)
def test_a_field_of_ours_is_what_its_type_says(models, tmp_path, capsys, field) -> None:
    value, line = OURS[field]
    folder = edited(models, tmp_path, "ours/ctc/config.json", lambda values: values.__setitem__(field, value))
    assert line in refuse(capsys, "transcribe", str(folder), str(models / "a.wav"), "--out", str(tmp_path / "out"))


THEIRS = {
    "config.json": ("conv_stride", -1, "config.json: conv_stride: expected array, got int (-1)"),
    "tokenizer_config.json": ("pad_token", {"x": 1}, "tokenizer_config.json: object missing required field content"),
    "vocab.json": ("|", "4", "vocab.json: expected int, got str - at $[...]"),
    "preprocessor_config.json": ("do_normalize", "no", "preprocessor_config.json: do_normalize: expected bool"),
}  # fmt: skip


@pytest.mark.parametrize("file", THEIRS)
def test_so_is_one_of_transformers(models, tmp_path, capsys, file) -> None:
    field, value, line = THEIRS[file]
    folder = edited(models, tmp_path, f"hf/ctc/{file}", lambda values: values.__setitem__(field, value))
    assert line in refuse(capsys, "convert", str(folder), str(tmp_path / "out"), "--to", "ours")


def test_a_number_is_no_yes_and_a_long_value_is_cut() -> None:
    assert checked(1, float, "x") == 1.0
    assert checked([1, 2], tuple[int, ...], "x") == (1, 2)
    for value in (True, "1", 1.0, None, 10**400, float("nan")):
        with pytest.raises(UsageError, match="x: expected"):
            checked(value, dict[str, int] if isinstance(value, int) and value > 1 else int, "x")
    with pytest.raises(UsageError) as caught:
        checked("x" * 10**6, int, "x")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b'{"a": "\0"}', b'"\\ud800"', b"9" * 5000, b"", b"\0"]
)
def test_json_of_any_kind_of_wrong_is_one_line(content: bytes) -> None:
    with pytest.raises(UsageError, match="file is not JSON") as caught:
        parse_json(content, "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["step,a\n1,x\n", "a\n1\n", 'step,a\n1,"\n', "step\n" + "1" * 200_000 + "\n", "step,a\nx\0,1\n"]
)
def test_figures_of_any_kind_of_wrong_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(UsageError, match=r"metrics\.csv: expected a column step and numbers") as caught:
        list(read_figures(tmp_path / "metrics.csv"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("torn", ["1", "150", "150,", "150,1.2e-"])
def test_figures_of_a_row_that_was_not_written_to_its_end_are_not_read(torn: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,a\r\n50,1.0\r\n100,2.0\r\n" + torn.encode())
    assert dict(read_figures(tmp_path / "metrics.csv")) == {50: {"a": 1.0}, 100: {"a": 2.0}}


def not_regular(path: Path, kind: str) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero") if kind == "device" else path.mkdir()
    return path


def test_a_line_of_a_manifest_that_is_no_text_is_one_line() -> None:
    with pytest.raises(JobError, match="a manifest holds what is no cut: UnicodeDecodeError"):
        read_cut(b'{"id": "\xff"}')


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = not_regular(tmp_path / "x", kind)
    with pytest.raises(OSError, match="not a regular file" if kind != "folder" else "Is a directory"):
        open_file(path)
    with pytest.raises(UsageError, match=r"cannot read .*/x"):
        read_text(path)
    with pytest.raises(UsageError, match=r"cannot read .*/x"), open_text(path) as lines:
        list(lines)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_every_verb_passes_by_what_is_no_regular_file(models, tmp_path, capsys, caplog, kind) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    soundfile.write(audio / "a.wav", sound(1.5, 0), RATE)
    soundfile.write(audio / "b.wav", sound(1.5, 1), RATE)
    not_regular(audio / "c.wav", kind)
    model = models / "ours" / "ctc"
    assert main(["transcribe", str(model), str(audio), "--out", str(tmp_path / "out")]) == 1
    assert "not a regular file" in caplog.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "b.txt"}
    assert main(["prepare", str(audio), str(tmp_path / "corpus"), "--jobs", "1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "corpus" / "audit.jsonl").read_text().splitlines()]
    assert {row["path"]: row["status"] for row in rows}["c.wav"] == "rejected"
    not_regular(audio / "a.txt", kind)
    capsys.readouterr()
    assert "not a regular file" in refuse(capsys, "prepare", str(audio), str(tmp_path / "again"))
    spoilt = shutil.copytree(model, tmp_path / "model")
    for name in ("vocab.json", "model.safetensors", "config.json"):
        not_regular(spoilt / name, kind)
        refuse(capsys, "transcribe", str(spoilt), str(audio / "b.wav"))


def loop() -> list[Any]:
    own: list[Any] = []
    own.append(own)
    return own


def laughs() -> Any:
    value: Any = ["ha"] * 10
    for _ in range(30):
        value = [value] * 10
    return value


@pytest.mark.parametrize("settings", [loop, laughs, lambda: {"model": {"a": laughs()}}])
def test_settings_that_refer_to_themselves_or_unfold_are_refused(tmp_path: Path, settings) -> None:
    torch.save({"cfg": settings(), "model": {"x": torch.zeros(1)}}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"a\.pt holds settings that refer to themselves or unfold without end"):
        plain(read_pickle(tmp_path / "a.pt")["cfg"], tmp_path / "a.pt")


TENSORS = {
    "a number": ({5: torch.zeros(1)}, "must hold tensors by name"),
    "a list": ([torch.zeros(1)], "must hold tensors by name"),
    "text": ({"x": "y"}, "must hold tensors by name and nothing else"),
    "sparse": ({"x": torch.eye(3).to_sparse()}, "must hold tensors by name and nothing else"),
    "of little": ({"x": torch.zeros(1).expand(10**12)}, "holds fewer numbers than the (1000000000000,) of x"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_weights_are_tensors_by_name_that_are_there(models, tmp_path, capsys, kind) -> None:
    tensors, line = TENSORS[kind]
    folder = shutil.copytree(models / "bin" / "ctc", tmp_path / "model")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert line in refuse(capsys, "convert", str(folder), str(tmp_path / "out"), "--to", "ours")


DAMAGED = {
    "a negative count": ("ngram 1=6", "ngram 1=-6"),  # KenLM's own reader ends with a segmentation fault
    "too many": ("ngram 1=6", "ngram 1=99999999999"),
    "cut off": ("\\2-grams:", ""),
    "no number": ("-0.4\tSUN MOON", "nan\tSUN MOON"),
    "another word": ("-0.4\tSUN MOON", "-0.4\tSUN EARTH"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_lm_is_one_line(models, tmp_path, capsys, kind) -> None:
    pytest.importorskip("flashlight.lib.text")
    (tmp_path / "lm.arpa").write_text(ARPA.replace(*DAMAGED[kind]))
    words = [str(models / "ours" / "ctc"), str(models / "a.wav"), "--lm", str(tmp_path / "lm.arpa")]
    assert "lm.arpa" in refuse(capsys, "transcribe", *words)


def test_damaged_and_hostile_files_of_every_kind(tmp_path: Path) -> None:
    """A part; all of it runs by hand, see CONTRIBUTING.md."""
    words = ["--seed", "0", "--audio", "48", "--files", "45", "--jobs", "1", "--work", str(tmp_path / "fuzz")]
    signal.alarm(0)
    process = subprocess.run([sys.executable, str(FUZZ), *words], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
