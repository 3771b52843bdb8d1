"""The probe on planted labels, on tones whose phone is their pitch, and on labels that cannot be used."""

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_train import nano

from w2v2.checkpoint.native import CONFIG, save_weights
from w2v2.cli.main import main
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError, quiet
from w2v2.evaluation.abx import abx_errors
from w2v2.evaluation.features import Frames
from w2v2.evaluation.phones import Phone, read_labels
from w2v2.evaluation.probe import _rows, probe, share_correct, train_linear
from w2v2.inference.recognizer import load
from w2v2.model.wav2vec2 import Wav2Vec2
from w2v2.report import write_run_report
from w2v2.serial import save_config
from w2v2.training.config import ProbeConfig
from w2v2.training.pretrain import pretrain

PITCHES = {"a": 300.0, "e": 900.0, "i": 2500.0, "o": 5000.0}


def test_features_that_hold_the_label_give_one_and_noise_gives_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    classes = torch.randint(4, (4000,), generator=rng)
    around = torch.arange(4000)[:, None]
    planted = torch.nn.functional.one_hot(classes, 4).half()
    noise = torch.randn(4000, 16, generator=rng).half()
    for x, low, high in ((planted, 1.0, 1.0), (noise, 0.2, 0.3)):
        classify = train_linear(x, around[:2000], classes[:2000], 4, 0)
        assert low <= share_correct(classify, x, around[2000:], classes[2000:]) <= high
    # What only the frame before tells is told by five frames of context, and by one no better than by chance.
    late, five = planted.roll(1, 0), (torch.arange(4000)[:, None] + torch.arange(-2, 3)).clamp(0, 3999)
    scores = []
    for context in (around, five):
        classify = train_linear(late, context[:2000], classes[:2000], 4, 0, epochs=40)
        scores.append(share_correct(classify, late, context[2000:], classes[2000:]))
    assert scores[0] < 0.35 and scores[1] > 0.99


@pytest.mark.parametrize(("utterances", "low", "high"), [(1, None, None), (2, 1.0, 1.0), (4, 1.0, 1.0)])
def test_voices_are_told_on_utterances_beside_those_they_were_learned_from(
    utterances: int, low: float | None, high: float | None
) -> None:
    voices, frames = 12, 50
    speakers = torch.arange(voices).repeat_interleave(utterances * frames)
    ends = torch.arange(1, voices * utterances + 1) * frames
    bounds = [(int(end) - frames, int(end)) for end in ends]
    noise = 0.01 * torch.randn(len(speakers), voices, generator=torch.Generator().manual_seed(0))
    planted = {"log-mel": torch.nn.functional.one_hot(speakers, voices) + noise}
    told = Frames(bounds, torch.zeros_like(speakers), speakers, planted)
    (row,) = _rows(told, told, 1, voices, seed=0, abx=False, quick=False, show=quiet)
    assert row["speakers"] is None if low is None else low <= row["speakers"] <= high
    (row,) = _rows(told, told, 1, 1, seed=0, abx=False, quick=False, show=quiet)
    assert row["speakers"] is None  # nobody knows who speaks


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three voices to train on and one to test on, four utterances each of tones of 200 ms, with CTM files."""
    root, rng = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for voice, split in enumerate(["train-a", "train-a", "train-a", "test-a", "dev-a"], 1):
        folder = root / split / str(voice) / "1"
        folder.mkdir(parents=True)
        lines, texts = [], []
        for i in range(4):
            name, t, parts = f"{voice}-1-{i:04d}", np.arange(3200) / 16_000, []
            for k, phone in enumerate(rng.choice(list(PITCHES), 15)):
                parts.append(np.sin(2 * np.pi * PITCHES[phone] * t) * 0.3)
                lines.append(f"{name} 1 {0.2 * k:.2f} 0.2 {phone}\n")
            audio = np.concatenate(parts) + 0.01 * rng.standard_normal(48_000)
            soundfile.write(folder / f"{name}.flac", audio, 16_000)
            texts.append(f"{name} TONES\n")
        (folder / f"{voice}-1.phones.ctm").write_text("".join(lines))
        (folder / f"{voice}-1.trans.txt").write_text("".join(texts))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("probe"), nano()
    torch.manual_seed(0)
    save_config(config, folder / CONFIG)
    save_weights(config.model.build(), folder)
    return folder


def test_phones_that_are_pitches_are_told_and_what_is_written_is_documented(
    tones: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["evaluate", str(run), "--data", str(tones), "--probe", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((out / "probe.json").read_text()) == found
    assert found.keys() == {"schema", "split", "classes", "frames", "speakers", "rows", "codes"}
    assert sorted(found["classes"]) == list("aeio") and found["speakers"] == {"train": 3, "scored": 1}
    rows = {(row["features"], row["layer"]): row for row in found["rows"]}
    assert set(rows) == {("log-mel", None), ("MFCC", None), *((n, i) for n in ("model", "random") for i in range(3))}
    assert rows["log-mel", None]["phones_one"] > 0.9 and rows["log-mel", None]["speakers"] < 0.6
    assert 0 < found["codes"]["information"] <= found["codes"]["purity"] * 2
    assert main(["evaluate", str(run), "--data", str(tones), "--probe", "--labels", str(tones), "--layers", "2"]) == 0
    table = capsys.readouterr().out
    assert "log-mel" in table and "model, layer 2" in table and "layer 1" not in table


def test_one_that_cannot_be_read_is_left_out_of_a_probe_by_name(
    tones: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tones, tmp_path / "tones")
    broken, short = (tmp_path / "tones" / "train-a" / "1" / "1" / f"1-1-000{i}.flac" for i in (0, 1))
    broken.write_bytes(broken.read_bytes()[:20_000])
    (broken.parent / "1-1.phones.ctm").write_text(
        "".join(x for x in (broken.parent / "1-1.phones.ctm").open() if not x.startswith("1-1-0001"))
        + "1-1-0001 1 0 0.005 a\n"
    )
    soundfile.write(short, np.zeros(100), 16_000)
    options = ["--data", str(tmp_path / "tones"), "--probe", "--json", "--device", "cpu"]
    assert main(["evaluate", str(run), *options]) == 0
    rows = {(row["features"], row["layer"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["log-mel", None]["phones_one"] > 0.8
    told = [line for line in caplog.messages if line.startswith("not probed: ")]
    assert len(told) == 2 and "1-1-0000" in told[0] and "1-1-0001 is shorter than a frame" in told[1]


def test_a_text_grid_says_the_same_as_a_ctm(tmp_path: Path) -> None:
    (tmp_path / "x.TextGrid").write_text(
        'File type = "ooTextFile"\nObject class = "TextGrid"\nxmin = 0\nxmax = 1\ntiers? <exists>\nsize = 2\nitem []:\n'
        'item [1]:\nclass = "IntervalTier"\nname = "words"\nxmin = 0\nxmax = 1\nintervals: size = 1\nintervals [1]:\n'
        'xmin = 0\nxmax = 1\ntext = "HI"\nitem [2]:\nclass = "IntervalTier"\nname = "phones"\nxmin = 0\nxmax = 1\n'
        'intervals: size = 3\nintervals [1]:\nxmin = 0\nxmax = 0.25\ntext = "HH"\nintervals [2]:\nxmin = 0.25\n'
        'xmax = 0.75\ntext = "AY1"\nintervals [3]:\nxmin = 0.75\nxmax = 1\ntext = "sil"\n'
    )
    grid = read_labels(tmp_path)
    assert grid == {"x": [Phone("HH", 0.0, 0.25), Phone("AY", 0.25, 0.75)]}
    (tmp_path / "x.TextGrid").rename(tmp_path / "x.txt")
    (tmp_path / "a.ctm").write_text(
        "x 1 0.25 0.5 AY1_E\n;; comment\nx 1 0 0.25 HH_B\nx 1 0.75 0.2 h#\nx 1 0.95 0.05 SIL_S\n"
    )
    assert read_labels(tmp_path) == grid


def test_labels_that_cannot_be_used_are_one_line_and_exit_code_2(
    tones: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(lines: str, *more: str) -> str:
        labels = tmp_path / "labels"
        labels.mkdir(exist_ok=True)
        (labels / "a.ctm").write_text(lines)
        assert main(["evaluate", str(run), "--data", str(tones), "--probe", "--labels", str(labels), *more]) == 2
        out, err = capsys.readouterr()
        message = err.strip().splitlines()[-1]
        assert not out and "Traceback" not in err
        return message

    good = "1-1-0000 1 0 1 a\n4-1-0000 1 0 1 a\n"
    assert "phone 'a' of 4-1-0000, 2 to 4 s, leaves its audio of 3 s" in refused(good + "4-1-0000 1 2 2 a\n")
    assert "phone 'a' of 4-1-0000, nan to nan s, leaves its audio of 3 s" in refused(good + "4-1-0000 1 nan nan a\n")
    assert "phones in no class: q" in refused(good + "4-1-0000 1 1 1 q\n")
    assert "--layers must be 0 to 2, the blocks of this model, got 7" in refused(good, "--layers", "7")
    assert "no utterance of split 'test' has phones with times" in refused("1-1-0000 1 0 1 a\n")
    assert "a.ctm, line 1: expected utterance, channel" in refused("nonsense\n")
    assert main(["evaluate", str(run), "--data", str(tones), "--probe", "--labels", str(tmp_path / "none")]) == 2
    assert "no labels in" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--data", str(tones), "--layers", "1"]) == 2
    assert "--layers is of --probe" in capsys.readouterr().err
    message = refused(good, "--against", "x", "--beam-size", "3")
    assert "--probe decodes nothing, so --against, --beam-size cannot be used; leave it out" in message


def test_a_run_probes_its_layers_and_is_the_same_run_as_one_that_does_not(
    tones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits, runs = read_corpus(tones), {}
    for every in (0, 2):
        config = nano(max_steps=4)
        config.train.log_every = 2
        config.probe = ProbeConfig(every=every, labels=str(tones), minutes=0.4)
        with caplog.at_level("INFO", logger="w2v2"):
            pretrain(config, splits, tmp_path / str(every))
        with (tmp_path / str(every) / "metrics.csv").open(newline="") as file:
            runs[every] = [dict(row) for row in csv.DictReader(file)]
    assert "step 4, probe: " in caplog.text and "from log-mel" in caplog.text
    plain = [{k: v for k, v in row.items() if "second" not in k and "share" not in k} for row in runs[0]]
    for row, before in zip(runs[2], plain, strict=True):
        assert before.items() <= row.items()
        for name in ("layer_0", "layer_2", "log-mel", "MFCC"):
            assert 0.1 < float(row[f"probe/{name}/phones_one"]) <= 1
    assert float(runs[2][0]["probe/log-mel/phones_one"]) > 0.8
    page = write_run_report(tmp_path / "2").read_text()
    assert "Phones told from one frame" in page and "layer 2" in page and "Purity of the codes" in page


def test_probes_of_a_run_that_cannot_be_are_refused_before_it(tones: Path, tmp_path: Path) -> None:
    config = nano(max_steps=4)
    config.probe = ProbeConfig(every=2)
    with pytest.raises(UsageError, match=r"`probe.every` needs `probe.labels`, a folder of phones"):
        pretrain(config, read_corpus(tones), tmp_path / "run")
    config.probe.labels = str(tmp_path)
    with pytest.raises(UsageError, match="no labels in"):
        pretrain(config, read_corpus(tones), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_abx_of_tones_is_near_zero_of_noise_near_a_half_and_says_what_it_needs(tones: Path, run: Path) -> None:
    labels, splits = Path(tones), read_corpus(tones, training=False)
    model = load(run)
    assert isinstance(model, Wav2Vec2)
    if find_spec("fastabx") is None:
        with pytest.raises(UsageError, match=r"`abx` needs fastabx, on Python 3\.12 or later"):
            probe(model, splits, "train", labels, abx=True)
        return
    with pytest.raises(UsageError, match="`abx` compares voices: expected two or more"):
        probe(model, splits, "test", labels, abx=True)
    rows = probe(model, splits, "train", labels, layers=[0], abx=True)["rows"]
    spectrum = next(row for row in rows if row["features"] == "log-mel")
    assert spectrum["abx_within"] < 0.05 and spectrum["abx_across"] < 0.1
    rng = torch.Generator().manual_seed(0)
    phones = torch.randint(4, (600,), generator=rng).repeat_interleave(5)
    noise = torch.randn(3000, 8, generator=rng)
    frames = Frames([(0, 1500), (1500, 3000)], phones, torch.arange(3000) // 1500, {"noise": noise})
    assert all(0.45 < error < 0.55 for error in abx_errors(frames, "noise", 0))
    many = Frames([(i, i + 250) for i in range(0, 3000, 250)], phones, torch.arange(3000) // 250, {"noise": noise})
    assert len({abx_errors(many, "noise", 0) for _ in range(4)}) == 1 and abx_errors(many, "noise", 1)[1] > 0.4
