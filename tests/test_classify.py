"""Classifiers of whole utterances: against transformers, and whether they learn what tells voices apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import run
from conftest import write_corpus

import w2v2
from w2v2.checkpoint.formats import read
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.text.classes import ClassNames

SMALL = {"n_layer": 2, "n_embd": 48, "n_head": 4, "ffn_dim": 64, "pos_conv_kernel": 16, "pos_conv_groups": 4}
TINY = [word for name, value in SMALL.items() for word in (f"--model.{name.replace('_', '-')}", str(value))]
TINY += ["--model.conv-channels", *["32"] * 7]


def tone(path: Path, hertz: float, seconds: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16_000)) / 16_000
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time) + 0.01 * rng.standard_normal(len(time)), 16_000)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Utterances of three pitches, in a table whose transcript is the pitch's name; prepared."""
    root = tmp_path_factory.mktemp("tones")
    rows = []
    for split, count in (("train", 8), ("valid", 3), ("test", 4)):
        for name, hertz in (("low", 200.0), ("middle", 700.0), ("high", 2500.0)):
            for i in range(count):
                path = f"{split}/{name}-{split}-{i}.wav"
                tone(root / path, hertz * (1 + 0.02 * i), 0.6 + 0.1 * (i % 4), len(rows))
                rows.append({"path": path, "pitch": name, "speaker": f"s{i % 3}", "split": split})
    (root / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["prepare", "table.jsonl", "corpus", "--columns", "text=pitch"]
    assert run(words, root).returncode == 0
    return root


@pytest.fixture(scope="module")
def trained(tones: Path) -> Path:
    words = ["finetune", "classify_utterances", "--label", "text", "--data", "corpus", "--out", "run", *TINY]
    words += ["--freeze-encoder-steps", "2", "--optim.schedule.peak", "3e-3", "--optim.schedule.total-steps", "120"]
    words += [
        "--train.val-every",
        "20",
        "--train.log-every",
        "10",
        "--data.batch-seconds",
        "6",
        "--data.num-workers",
        "0",
    ]
    done = run([*words, "--model.conv-gradient-scale", "1"], tones)
    assert done.returncode == 0, done.stderr
    return tones / "run"


@pytest.mark.parametrize("attention", [False, True])
def test_a_class_does_not_depend_on_what_else_is_in_the_batch(attention: bool) -> None:
    model = Wav2Vec2ForClassification(Wav2Vec2Config(**SMALL), 3, attention=attention).eval()
    torch.nn.init.normal_(model.classifier.layer_weights)
    lengths = [9_000, 16_000, 12_345]
    rows = [torch.randn(n) for n in lengths]
    with torch.no_grad():
        together, _ = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)
        alone = torch.cat([model(row[None])[0] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_it_computes_what_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, use_weighted_layer_sum=True,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(theirs.layer_weights)
    theirs.wav2vec2.save_pretrained(tmp_path)
    encoder = read(tmp_path)
    ours = Wav2Vec2ForClassification(encoder.config, 3).eval()
    encoder.fill_encoder(ours)
    names = {
        "projector.weight": "projector.weight",
        "projector.bias": "projector.bias",
        "layer_weights": "layer_weights",
    }
    names |= {"output.weight": "classifier.weight", "output.bias": "classifier.bias"}
    ours.classifier.load_state_dict({name: theirs.state_dict()[other] for name, other in names.items()})
    audio = torch.randn(2, 12_000)
    with torch.no_grad():
        torch.testing.assert_close(ours(audio)[0], theirs(audio).logits.log_softmax(-1), atol=1e-5, rtol=1e-4)


def test_it_learns_what_is_plain_to_hear_and_says_how_sure_it_is(trained: Path, tones: Path) -> None:
    done = run(["evaluate", "run", "--data", "corpus", "--json", "--workers", "0"], tones)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["utterances"] == 12 and results["label"] == "text"
    assert results["accuracy"] > 0.8  # a third by chance
    low, high = results["interval"] or (0, 1)
    assert low <= results["accuracy"] <= high
    assert {row["class"]: row["utterances"] for row in results["classes"]} == {"high": 4, "low": 4, "middle": 4}
    wrong = sum(row["count"] for row in results["confusions"])
    assert results["accuracy"] == pytest.approx(1 - wrong / 12)
    assert sum(results["layers"]) == pytest.approx(1) and len(results["layers"]) == 3
    rows = [json.loads(line) for line in (trained / "evaluation/test/predictions.jsonl").read_text().splitlines()]
    assert sum(row["reference"] == row["prediction"] for row in rows) == round(results["accuracy"] * 12)
    table = run(["evaluate", "run", "--data", "corpus", "--workers", "0"], tones).stdout
    assert f"accuracy {results['accuracy']:.2%}" in table and "share of each layer" in table


def test_in_python_it_gives_probabilities(trained: Path, tones: Path) -> None:
    classifier = w2v2.load(trained)
    audio, rate = soundfile.read(tones / "test/high-test-0.wav", dtype="float32")
    shares = classifier(audio, rate)
    assert set(shares) == {"low", "middle", "high"} and sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    with pytest.raises(UsageError, match="shorter than one frame"):
        classifier(audio[:100], rate)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "classify_utterances", "--data", "{voices}"], "classes of speaker to validate on are not there"),
        (["finetune", "classify_utterances", "--data", "corpus", "--label", "mood"], "no utterance has a mood"),
        (["finetune", "tiny_ctc", "--data", "corpus", "--label", "text"], "--label is of recipes that classify"),
        (["finetune", "classify_utterances", "--data", "corpus", "--minutes", "1"], "are of transcripts"),
        (["convert", "run", "x", "--to", "hf"], "classifier"),
        (["export", "run", "x", "--to", "onnx"], "classifier"),
        (["transcribe", "run", "corpus"], "no CTC head"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line(
    trained: Path, tones: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    write_corpus(tmp_path / "voices", {"train-clean-100": 2, "dev-clean": 1})
    done = run([word.format(voices=tmp_path / "voices") for word in words], tones)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_labels_of_a_manifest_are_read_alike_from_its_lines_and_from_cuts(tones: Path) -> None:
    split = read_corpus(tones / "corpus")["test"].labelled("speaker")
    assert split.transcribed == 12
    from_lines = [row.utterance().text for piece in split.pieces for row in piece.rows()]
    assert from_lines == [u.text for u in split.utterances()] == [u.speaker for u in split.utterances()]
    assert split.content != read_corpus(tones / "corpus")["test"].content


def test_names_come_back_and_one_class_is_none(tmp_path: Path) -> None:
    names = ClassNames.from_texts([" b ", "a", "b", ""], "text")
    assert names.labels == ("a", "b") and [names.decode(names.encode(name)) for name in names.labels] == ["a", "b"]
    for labels in ((), ("a",), ("a", "a")):
        with pytest.raises(UsageError, match="two different classes"):
            ClassNames(labels=labels)
