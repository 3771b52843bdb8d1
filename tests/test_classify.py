"""Classifiers of whole utterances and of frames: against transformers, and whether they learn what is heard."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import run
from conftest import write_corpus

import w2v2
from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.formats import read
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.frame_classifier import Wav2Vec2ForFrames
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


def of_transformers(name: str, folder: Path) -> tuple[Any, Checkpoint]:
    """A classifier of theirs with random weights, and its encoder as read here."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, use_weighted_layer_sum=True,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = getattr(transformers, name)(config).eval()
    torch.nn.init.normal_(theirs.layer_weights)
    theirs.wav2vec2.save_pretrained(folder)
    return theirs, read(folder)


def test_it_computes_what_transformers_does(tmp_path: Path) -> None:
    theirs, encoder = of_transformers("Wav2Vec2ForSequenceClassification", tmp_path)
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
    assert 0 <= low <= results["accuracy"] <= high <= 1
    assert {row["class"]: row["utterances"] for row in results["classes"]} == {"high": 4, "low": 4, "middle": 4}
    wrong = sum(row["count"] for row in results["confusions"])
    assert results["accuracy"] == pytest.approx(1 - wrong / 12)
    assert "What the classifier listens to" in (trained / "report.html").read_text()
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
        (
            ["finetune", "tiny_ctc", "--data", "corpus", "--label", "text"],
            "--label is of recipes such as",
        ),
        (["finetune", "classify_utterances", "--data", "corpus", "--minutes", "1"], "are of transcripts"),
        (["convert", "run", "x", "--to", "hf"], "classifier"),
        (["export", "run", "x", "--to", "onnx"], "classifier"),
        (["transcribe", "run", "corpus"], "no CTC head"),
        (["evaluate", "run", "--data", "{voices}", "--split", "valid"], "no text in valid that the model knows"),
        (["evaluate", "run", "--data", "corpus", "--lm", "x"], "decodes nothing, so --lm cannot be used; leave it out"),
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


# --- Frames


@pytest.fixture(scope="module")
def melodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Utterances of tones one after the other, with their times as CTM, of five voices each."""
    root = tmp_path_factory.mktemp("melodies")
    rng = np.random.default_rng(0)
    for subset, count in (("train-clean-100", 10), ("dev-clean", 5), ("test-clean", 6)):
        for number in range(count):
            name = f"{len(subset)}{number}-1-0000"
            folder = root / "audio" / subset / name.split("-")[0] / "1"
            folder.mkdir(parents=True)
            names = rng.permutation(["low", "middle", "high", "SIL"])
            hertz = {"low": 200.0, "middle": 700.0, "high": 2500.0, "SIL": 0.0}
            ends = np.cumsum(rng.uniform(0.2, 0.4, 4))
            time = np.arange(round(ends[-1] * 16_000)) / 16_000
            tones = [0.3 * np.sin(2 * np.pi * hertz[tone] * time) for tone in names]
            audio = np.choose(np.searchsorted(ends, time, side="right").clip(max=3), tones)
            soundfile.write(folder / f"{name}.flac", audio + 0.01 * rng.standard_normal(len(time)), 16_000)
            rows = zip(names, [0.0, *ends[:-1]], ends, strict=True)
            lines = [f"{name} 1 {start:.4f} {end - start:.4f} {tone}\n" for tone, start, end in rows]
            (root / "times").mkdir(exist_ok=True)
            (root / f"times/{name}.ctm").write_text("".join(lines))
    assert run(["prepare", "audio", "corpus"], root).returncode == 0
    return root


@pytest.fixture(scope="module")
def framed(melodies: Path) -> Path:
    words = ["finetune", "classify_frames", "--units.labels", "times", "--data", "corpus", "--out", "run", *TINY]
    words += ["--freeze-encoder-steps", "2", "--optim.schedule.peak", "3e-3", "--optim.schedule.total-steps", "60"]
    words += ["--train.val-every", "20", "--train.log-every", "10", "--data.batch-seconds", "6"]
    done = run([*words, "--data.num-workers", "0", "--model.conv-gradient-scale", "1"], melodies)
    assert done.returncode == 0, done.stderr
    return melodies / "run"


def test_frames_are_classified_as_transformers_does(tmp_path: Path) -> None:
    theirs, encoder = of_transformers("Wav2Vec2ForAudioFrameClassification", tmp_path)
    ours = Wav2Vec2ForFrames(encoder.config, 3).eval()
    encoder.fill_encoder(ours)
    names = {"layer_weights": "layer_weights", "output.weight": "classifier.weight", "output.bias": "classifier.bias"}
    ours.classifier.load_state_dict({name: theirs.state_dict()[other] for name, other in names.items()})
    rows = [torch.randn(n) for n in (9_000, 12_000)]
    with torch.no_grad():
        together, frames = ours(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [9_000, 12_000])
        for row, log_probs, count in zip(rows, together, frames, strict=True):
            expected = theirs(row[None]).logits[0].log_softmax(-1)
            torch.testing.assert_close(log_probs[:count], expected, atol=1e-5, rtol=1e-4)


def test_frames_are_learned_scored_where_they_have_a_label_and_found_in_time(framed: Path, melodies: Path) -> None:
    words = ["evaluate", "run", "--data", "corpus", "--labels", "times", "--workers", "0"]
    done = run([*words, "--json"], melodies)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["label"] == "frame" and results["over"] == "speakers" and len(results["layers"]) == 3
    assert results["accuracy"] > 0.8  # a third by chance
    low, high = results["interval"] or (0, 1)  # none where all is right
    assert 0 <= low <= results["accuracy"] <= high <= 1
    labelled = 0.0
    for path in (melodies / "times").glob("10*.ctm"):  # the test voices
        rows = [line.split() for line in path.read_text().splitlines()]
        labelled += sum(float(length) for *_, length, tone in rows if tone != "SIL")
    assert results["frames"] == sum(row["frames"] for row in results["classes"]) == pytest.approx(50 * labelled, abs=18)
    rows = [json.loads(line) for line in (framed / "evaluation/test/predictions.jsonl").read_text().splitlines()]
    assert sum(row["right"] for row in rows) == pytest.approx(results["accuracy"] * results["frames"])
    page = (framed / "report.html").read_text()
    assert "What the classifier listens to" in page
    assert all(f"<td>{share:.1%}</td>" in page for share in results["layers"])
    shutil.copytree(melodies / "times", melodies / "renamed")
    renamed = 0
    for path in (melodies / "renamed").glob("10*.ctm"):
        text = path.read_text()
        tone = next(label for label in text.split()[4::5] if label != "SIL")
        renamed += text.count(f" {tone}\n")
        path.write_text(text.replace(f" {tone}\n", " NEW\n"))
    others = json.loads(run([*words, "--json", "--labels", "renamed"], melodies).stdout)
    assert others["left_out"] == {"phones that the model does not know": renamed} and renamed
    table = run(words, melodies).stdout
    assert f"accuracy {results['accuracy']:.2%}" in table and f"{results['frames']:,} frames" in table
    (path,) = (melodies / "audio").rglob("100-1-0000.flac")
    audio, rate = soundfile.read(path, dtype="float32")
    assert run(["extract", "run", "audio", "--out", "features"], melodies).returncode == 0
    found = w2v2.load(framed)(audio, rate)
    assert found[0][1] == 0 and all(a[2] == pytest.approx(b[1]) for a, b in itertools.pairwise(found))
    assert found[-1][2] == pytest.approx(len(audio) / rate, abs=0.03)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "classify_frames", "--data", "corpus"], "no labels in corpus"),
        (["finetune", "classify_frames", "--data", "corpus", "--label", "text"], "has none"),
        (["finetune", "classify_frames", "--data", "corpus", "--data.augment.speed", ".1"], "move the times"),
        (
            ["finetune", "classify_frames", "--data", "corpus", "--units.labels", "other"],
            "no utterance of split",
        ),
        (["finetune", "classify_frames", "--data", "corpus", "--units.labels", "late"], "leaves its audio"),
        (["evaluate", "run", "--data", "corpus"], "no labels in corpus"),
        (["evaluate", "run", "--data", "corpus", "--labels", "other"], "no frame in test that the model knows"),
        (["evaluate", "run", "--data", "corpus", "--labels", "late"], "leaves its audio"),
        (["export", "run", "x", "--to", "onnx"], "classifier"),
    ],
)
def test_what_is_wrong_with_labels_of_frames_is_said_in_a_line(
    framed: Path, melodies: Path, words: list[str], message: str
) -> None:
    for folder, name, start in (("other", "x-1-0000", 0), ("late", None, 30)):
        (melodies / folder).mkdir(exist_ok=True)
        names = [name] if name else [path.stem for path in (melodies / "times").iterdir()]
        (melodies / folder / "x.ctm").write_text("".join(f"{each} 1 {start} 0.1 low\n" for each in names))
    done = run(words, melodies)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_classifier_is_not_converted_and_the_line_sends_nowhere_else(trained: Path, tmp_path: Path) -> None:
    done = run(["convert", str(trained), str(tmp_path / "out"), "--to", "hf"], tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith(
        "is a classifier, which is not converted; use it by w2v2.load"
    )
