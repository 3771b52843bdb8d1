"""Long recordings cut by alignment: planted pauses, texts that nobody says and speech that no text has."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import sound
from test_transcribe import recognizer

import w2v2.inference.cut
from w2v2.checkpoint.native import VOCABULARY, save_weights
from w2v2.cli.main import main
from w2v2.data.corpora import read_corpus
from w2v2.inference.cut import cut_words
from w2v2.inference.words import Word
from w2v2.preparation.config import AuditConfig, PrepareConfig
from w2v2.preparation.run import prepare
from w2v2.serial import save_config


def words(*spans: tuple[str, float, float, float]) -> list[Word]:
    """Of (text, start, end, score)."""
    return [
        Word(text, start, end, score, tuple(Word(c, start, end, score) for c in text))
        for text, start, end, score in spans
    ]


def spoken(count: int, at: float, score: float, gap: float = 0.1) -> list[tuple[str, float, float, float]]:
    return [(f"w{i}", at + i * (0.4 + gap), at + i * (0.4 + gap) + 0.4, score) for i in range(count)]


def test_utterances_end_at_pauses_hold_every_word_once_and_none_is_too_long() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        gaps = rng.choice([0.02, 0.1, 0.6, 3.0], 80, p=[0.5, 0.35, 0.1, 0.05])
        lengths = rng.uniform(0.1, 0.9, 80)
        starts = np.cumsum(gaps + np.concatenate([[0.0], lengths[:-1]]))
        known = words(*((f"w{i}", starts[i], starts[i] + lengths[i], -0.2) for i in range(80)))
        cuts = cut_words(known, float(known[-1].end) + 1.0, 10.0, 0.1)
        assert " ".join(cut.text for cut in cuts).split() == [word.text for word in known]
        assert all(cut.end - cut.start <= 10.0 for cut in cuts)
        assert all(before.end <= after.start + 1e-9 for before, after in itertools.pairwise(cuts))
        first = 0
        for cut in cuts:
            said = known[first : first + len(cut.text.split())]
            assert cut.start <= said[0].start and said[-1].end <= cut.end
            assert all(b.start - a.end <= 2.0 for a, b in itertools.pairwise(said))
            first += len(said)
        assert {round(cut.confidence, 6) for cut in cuts} == {round(float(np.exp(-0.2)), 6)}


def test_words_that_nobody_says_are_utterances_of_their_own() -> None:
    known = words(*spoken(30, 0.0, -0.2), *spoken(20, 15.0, -6.0, 0.0), *spoken(30, 23.0, -0.2))
    known[10] = words(("w10", known[10].start, known[10].end, -5.0))[0]  # a name that the model does not know
    cuts = cut_words(known, 40.0, 60.0, 0.1)
    assert [abs(len(cut.text.split()) - count) <= 2 for cut, count in zip(cuts, (30, 20, 30), strict=True)] == [
        True
    ] * 3
    assert [cut.confidence >= 0.1 for cut in cuts] == [True, False, True]


def test_a_word_that_covers_what_no_text_has_is_not_taken_for_it() -> None:
    known = words(*spoken(10, 0.0, -0.2), ("long", 5.0, 12.0, -0.3), *spoken(10, 12.0, -0.2))
    cuts = cut_words(known, 20.0, 60.0, 0.1)
    assert [(len(cut.text.split()), cut.confidence > 0) for cut in cuts] == [(10, True), (1, False), (10, True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: its alignments are of no use, but they are alignments."""
    folder, hearing = tmp_path_factory.mktemp("model"), recognizer(n_layer=1, n_head=4)
    save_config(hearing.model.config, folder / "config.json")
    save_weights(hearing.model, folder)
    hearing.vocabulary.save(folder / VOCABULARY)
    return folder


def test_prepare_cuts_long_transcribed_recordings_and_counts_what_does_not_match(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "Abba, cafe 3 bad dad. " * 10
    for name, seconds in (("s1-long", 40.0), ("s2-short", 4.0), ("s3-none", 40.0)):
        folder = tmp_path / "in" / name[:2]
        folder.mkdir(parents=True)
        soundfile.write(folder / f"{name}.wav", sound(seconds, 1), 16_000)
        if name != "s3-none":
            (folder / f"{name}.txt").write_text(text if name == "s1-long" else "ABBA")
    command = ["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--cut-by", str(model), "--jobs", "1"]
    command += ["--max-seconds", "12", "--valid-share", "0"]
    assert main([*command, "--min-confidence", "0"]) == 0
    table = [json.loads(line) for line in (tmp_path / "out-cut.jsonl").open()]
    long = [row for row in table if "s1-long" in row["path"]]
    assert " ".join(row["text"] for row in long).split() == text.split()
    assert all(0 <= row["start"] < row["end"] <= 40 and 0 <= row["confidence"] <= 1 for row in long) and len(long) >= 4
    [short] = [row for row in table if "s2-short" in row["path"]]
    assert (short["start"], short["text"], short["speaker"], short["confidence"]) == (None, "ABBA", "s2", None)
    train = read_corpus(str(tmp_path / "out"), training=False)["train"]
    texts = {row.id: row.utterance().text for piece in train.pieces for row in piece.rows()}
    rejected = json.loads((tmp_path / "out" / "corpus.json").read_text())["audit"]["rejected"]  # of random times
    assert sum(text is not None for text in texts.values()) == len(long) + 1 - rejected and rejected <= 2
    assert sum("s3-none" in name for name in texts) >= 4  # at pauses, as nobody knows what is said
    caplog.clear()
    command[2] = str(tmp_path / "sure")
    assert main([*command, "--min-confidence", "0.99"]) == 0
    assert (
        f"passed over: {len(long)} rows of less confidence than 0.99" in caplog.text
        or "rows of less conf" in caplog.text
    )
    corpus = json.loads((tmp_path / "sure" / "corpus.json").read_text())
    assert corpus["splits"]["train"]["transcribed"] == 1


def test_what_has_been_aligned_is_not_aligned_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        soundfile.write(tmp_path / "in" / f"{name}.wav", sound(20.0, ord(name)), 16_000)
        (tmp_path / "in" / f"{name}.txt").write_text("ABBA CAFE " * 9)
    command = ["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--cut-by", str(model), "--min-confidence", "0"]
    command += ["--max-seconds", "8", "--jobs", "1"]
    assert main(command) == 0
    before = (tmp_path / "out-cut.jsonl").read_text()
    _, first, second = (tmp_path / "out-cut.aligned.jsonl").read_text().split("\n")
    (tmp_path / "out-cut.aligned.jsonl").write_bytes(
        f"\n{first}\n{second[:30]}Ä".encode()[:-1]
    )  # killed while it wrote the second
    aligned: list[str] = []
    real = w2v2.inference.cut.align
    monkeypatch.setattr(w2v2.inference.cut, "align", lambda *a, **k: aligned.append(a[1].name) or real(*a, **k))
    assert main(command) == 0
    assert [Path(name).name for name in aligned] == ["b.wav"]
    assert (tmp_path / "out-cut.jsonl").read_text() == before


def test_what_is_cut_keeps_its_folder_its_list_of_splits_and_what_was_passed_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, seconds in enumerate((20.0, 2.0, 2.0)):
        Path("in", f"s{i}").mkdir(parents=True)
        soundfile.write(f"in/s{i}/u{i}.wav", sound(seconds, i), 16_000)
        Path("in", f"s{i}", f"u{i}.txt").write_text("ABBA CAFE " * (9 if seconds > 9 else 1))
    Path("in/notes.pdf").write_text("")
    Path("in/splits.tsv").write_text("utt\trole\ns0_u0\ttrain\ns1_u1\tvalid\ns2_u2\ttest\n")
    command = ["prepare", "in", "work/out", "--cut-by", str(model), "--min-confidence", "0", "--max-seconds", "8"]
    with caplog.at_level("INFO"):
        assert main([*command, "--jobs", "1"]) == 0
    assert any("out-cut.jsonl: " in line and "1 .pdf" in line for line in caplog.messages)
    made = json.loads(Path("work/out/corpus.json").read_text())["splits"]
    assert made["train"]["transcribed"] >= 2 and made["valid"]["transcribed"] == made["test"]["transcribed"] == 1


def ids_of(corpus: Path) -> dict[str, list[str]]:
    splits = read_corpus(str(corpus)).items()
    return {name: [row.id for piece in split.pieces for row in piece.rows()] for name, split in splits}


def test_one_recording_is_trained_and_validated_on_its_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.flac", sound(60.0, 1), 16_000)
    for shards in ("", "flac"):
        out = tmp_path / f"out{shards}"
        config = PrepareConfig(audit=AuditConfig(max_seconds=8.0), valid_share=0.2, shards=shards)
        corpus = prepare(tmp_path / "in", out, config)
        assert "one recording only: the last 2 of its" in caplog.text
        ids = ids_of(out)
        assert len(ids["valid"]) == 2 and sorted(ids["train"] + ids["valid"]) == [
            f"a-{i:04d}" for i in range(len(ids["train"]) + 2)
        ]
        assert sum(split["hours"] for split in corpus["splits"].values()) * 3600 == pytest.approx(60.0)


def test_what_a_model_hears_is_a_table_of_which_prepare_takes_what_is_sure(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Self-training in two commands: transcribe > TABLE, prepare TABLE --min-confidence."""
    (tmp_path / "in").mkdir()
    for name in "abcdef":
        soundfile.write(tmp_path / "in" / f"{name}.wav", sound(3.0, ord(name)), 16_000)
    assert main(["transcribe", str(model), str(tmp_path / "in"), "--format", "jsonl", "--timestamps", "none"]) == 0
    (tmp_path / "heard.jsonl").write_text(out := capsys.readouterr().out)
    heard = {row["path"]: row for row in map(json.loads, out.splitlines())}
    assert len(heard) == 6 and all(0 < row["confidence"] < 1 for row in heard.values())
    least = sorted(row["confidence"] for row in heard.values())[2]
    command = ["prepare", str(tmp_path / "heard.jsonl"), str(tmp_path / "out"), "--valid-share", "0", "--jobs", "1"]
    assert main([*command, "--min-confidence", str(least)]) == 0
    train = read_corpus(str(tmp_path / "out"), training=False)["train"]
    taken = {cut.recording.sources[0].source: cut.supervisions[0].text for cut in train}
    assert taken == {path: row["text"] for path, row in heard.items() if row["confidence"] >= least}
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["audit"]["passed_over"] == {
        f"rows of less confidence than {least:g}": 2
    }
