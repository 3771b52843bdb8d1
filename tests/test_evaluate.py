"""Error rates and how far they can be trusted: against jiwer, an own edit distance, enumeration and simulation."""

import gc
import itertools
import json
import random
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from conftest import WORDS as VOICES
from conftest import sound, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import fastcopy

from w2v2 import recipes
from w2v2.checkpoint.native import CONFIG, VOCABULARY, save_weights
from w2v2.cli.main import main
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Split, read_corpus
from w2v2.data.loader import whole_utterances
from w2v2.decoding.greedy import Greedy
from w2v2.evaluation.evaluate import error_rates, evaluate, paired_test
from w2v2.evaluation.scoring import Tally
from w2v2.evaluation.significance import MAX_GROUPS, Units, _standard_error, paired_difference, ratio_interval
from w2v2.evaluation.tuning import EmissionCache
from w2v2.inference.recognizer import Recognizer, weights_key
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.serial import load_config, save_config
from w2v2.text.vocabulary import Vocabulary
from w2v2.training.config import FinetuneConfig

WORDS = st.lists(st.sampled_from(["A", "BE", "SEE", "TO", "TOO"]), max_size=8).map(" ".join)


def distance(one, other):
    """Edits between two sequences, by the textbook's table."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def tally_of(pairs, **about):
    tally = Tally()
    for reference, hypothesis in pairs:
        tally.add(reference, hypothesis, **about)
    return tally


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_counts_are_jiwers_and_an_own_edit_distances(pairs):
    found = tally_of(pairs).summary()
    references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
    words, characters = jiwer.process_words(references, hypotheses), jiwer.process_characters(references, hypotheses)
    for name, theirs, rate in (("words", words, words.wer), ("characters", characters, characters.cer)):
        ours = found[name]
        assert ours["rate"] == pytest.approx(rate)
        for kind in ("substitutions", "deletions", "insertions"):
            assert ours[kind] == getattr(theirs, kind)
    assert found["words"]["errors"] == sum(distance(a.split(), b.split()) for a, b in pairs)
    assert found["characters"]["errors"] == sum(distance(a, b) for a, b in pairs)
    assert found["words"]["reference"] == sum(len(a.split()) for a, _ in pairs)
    assert found["sentence_error_rate"] == sum(a.split() != b.split() for a, b in pairs) / len(pairs)
    rates = error_rates(references, hypotheses)
    assert (rates.wer, rates.cer) == pytest.approx((found["wer"], found["cer"]))


def test_rates_are_of_the_corpus_and_an_empty_reference_adds_insertions():
    found = tally_of([("A B C D E F", "A B C D E F"), ("A", "B"), ("", "A B")]).summary()
    assert found["wer"] == pytest.approx(3 / 7)  # neither 1/3 of utterances' means nor infinite
    assert found["words"]["insertions"] == 2 and found["empty_references"] == 1


def test_the_most_frequent_errors_are_those_of_the_alignments():
    found = tally_of([("THE CAT SAT", "A CAT"), ("THE DOG", "A DOG TOO"), ("THE", "TEA")]).summary()["frequent"]
    assert found["substitutions"] == [{"words": ["THE", "A"], "count": 2}, {"words": ["THE", "TEA"], "count": 1}]
    assert found["deletions"] == [{"words": ["SAT"], "count": 1}]
    assert found["insertions"] == [{"words": ["TOO"], "count": 1}]


def test_the_tables_by_speaker_and_length_add_up_to_the_whole():
    tally, rng = Tally(), random.Random(0)
    for i in range(60):
        words = rng.choices(["A", "BE", "SEE"], k=rng.randint(0, 5))
        heard = [word for word in words if rng.random() < 0.8]
        tally.add(" ".join(words), " ".join(heard), speaker=f"s{i % 7}" if i % 9 else None, seconds=rng.uniform(0, 40))
    found = tally.summary()
    for table in (found["by_speaker"], found["by_length"]):
        assert sum(row["utterances"] for row in table) == found["utterances"] == 60
        assert sum(row["words"] for row in table) == found["words"]["reference"]
        assert sum(row["word_errors"] for row in table) == found["words"]["errors"]
        assert sum(row["seconds"] for row in table) == pytest.approx(found["seconds"], abs=0.1)
    assert [row["speaker"] for row in found["by_speaker"]] == [None, *(f"s{i}" for i in range(7))]
    assert [row["from"] for row in found["by_length"]] == sorted(row["from"] for row in found["by_length"])


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_utterances():
    def kept(count):
        tally, rng = Tally(), random.Random(1)
        tracemalloc.start()
        for i in range(count):
            words = [f"W{rng.randrange(9)}" for _ in range(12)]
            heard = [word if rng.random() < 0.7 else f"W{rng.randrange(9)}" for word in words]
            tally.add(" ".join(words), " ".join(heard), speaker=f"s{i % 5}", seconds=i % 30)
            if i == 99:
                gc.collect()
                start = tracemalloc.get_traced_memory()[0]
        gc.collect()  # what is kept counts, not what has not been swept yet
        grown = tracemalloc.get_traced_memory()[0] - start
        tracemalloc.stop()
        return grown

    kept(200)  # whatever is made once
    few, many = kept(200), kept(2000)
    assert many < few + 50_000  # 1,800 rows would be 900 kB


def test_kinds_of_errors_are_bounded_and_the_frequent_ones_stay():
    tally = Tally()
    for i in range(30_000):
        tally._see(jiwer.process_words(f"W{i} THE", "X A"))
    kinds = tally.kinds["substitutions"]
    assert len(kinds) <= 20_000
    assert kinds["THE", "A"] == 30_000


def test_more_utterances_than_groups_share_them_and_lose_nothing():
    units = Units(2)
    for i in range(MAX_GROUPS + 500):
        units.add("one", i, 1)
    kind, counts = units.choose()
    assert kind == "utterances" and counts.shape == (MAX_GROUPS, 2)
    assert counts.sum(0).tolist() == [sum(range(MAX_GROUPS + 500)), MAX_GROUPS + 500]
    assert counts[3].tolist() == [3 + MAX_GROUPS + 3, 2]


# --- Intervals and tests ----------------------------------------------------------------------------------------------


def test_the_standard_error_is_the_delete_one_jackknifes_of_the_drawn_units():
    rng = np.random.default_rng(0)
    errors, words = rng.integers(0, 30, 9), rng.integers(50, 200, 9)
    weights = rng.multinomial(9, np.full(9, 1 / 9), 5)
    for row, found in zip(weights, _standard_error(weights, errors, words), strict=True):
        e, w = np.repeat(errors, row), np.repeat(words, row)
        left_out = [np.delete(e, i).sum() / np.delete(w, i).sum() for i in range(9)]
        assert found == pytest.approx(np.sqrt(8 / 9 * sum((x - e.sum() / w.sum()) ** 2 for x in left_out)))


def speakers(rng, count, rate=0.15):
    """Words of some speakers and errors at a rate of their own: a beta distribution's, of mean ``rate``."""
    words = rng.integers(300, 1200, count)
    return rng.binomial(words, rng.beta(2, 2 / rate - 2, count)), words


@pytest.mark.parametrize("count", [8, 12, 24])
def test_intervals_over_speakers_hold_the_truth_in_95_of_100_cases(count):
    rng, trials = np.random.default_rng(count), 600
    inside = 0
    for seed in range(trials):
        low, high = ratio_interval(*speakers(rng, count), seed)
        inside += low <= 0.15 <= high
    assert inside / trials == pytest.approx(0.95, abs=0.02)


def test_intervals_over_utterances_of_few_speakers_would_not():
    rng, trials, inside = np.random.default_rng(3), 100, 0
    for seed in range(trials):
        rates = np.repeat(rng.beta(2, 2 / 0.15 - 2, 8), 10)
        low, high = ratio_interval(rng.binomial(50, rates), np.full(80, 50), seed)
        inside += low <= 0.15 <= high
    assert inside / trials < 0.85


def test_intervals_are_the_same_again_and_absent_or_without_width_where_there_is_nothing_to_draw():
    errors, words = speakers(np.random.default_rng(0), 10)
    low, high = ratio_interval(errors, words)
    assert (low, high) == ratio_interval(errors, words)
    assert low < errors.sum() / words.sum() < high
    assert ratio_interval(errors[:4], words[:4]) is None
    assert ratio_interval(np.zeros(6, int), np.zeros(6, int)) is None
    assert ratio_interval(words // 100, words // 100 * 10) == (0.1, 0.1)
    assert ratio_interval(np.eye(1, 6, dtype=int)[0], np.full(6, 9)) is None  # most resamples have no error at all


@pytest.mark.parametrize(("count", "over"), [(1, "utterances"), (4, "utterances"), (5, "speakers")])
def test_too_few_speakers_fall_back_to_utterances_and_the_result_says_so(count, over):
    tally = Tally()
    for i in range(20):
        tally.add("A B C D " * (1 + i % 7), "A B C " * (1 + i % 7 - i % 2), speaker=f"s{i % count}")
    found = tally.summary()
    assert found["intervals"]["over"] == over
    assert found["intervals"]["units"] == (count if over == "speakers" else 20)
    low, high = found["words"]["interval"]
    assert 0 <= low <= found["wer"] <= high


def test_p_is_the_share_of_all_swaps_that_differ_as_much():
    ours, other = np.array([5, 9, 2, 7, 4, 6, 8]), np.array([8, 9, 6, 9, 5, 5, 12])
    changes = ours - other
    sums = [
        abs(sum(s * c for s, c in zip(signs, changes, strict=True))) for signs in itertools.product((1, -1), repeat=7)
    ]
    exact = np.mean([total >= abs(changes.sum()) for total in sums])
    found = paired_difference(ours, other, np.full(7, 50))
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(changes.sum() / 350)


def test_p_is_uniform_for_equally_good_systems_however_different_the_speakers():
    rng, values = np.random.default_rng(5), []
    for seed in range(400):
        words = rng.integers(300, 1200, 20)
        rates = rng.beta(2, 2 / 0.15 - 2, 20)
        own = [np.clip(rates * rng.lognormal(0, 0.2, 20), 0, 1) for _ in range(2)]  # each is better at some speakers
        values.append(paired_difference(*(rng.binomial(words, rate) for rate in own), words, seed).p)
    for level in (0.05, 0.2, 0.5, 0.8):  # three standard errors
        assert np.mean(np.array(values) <= level) == pytest.approx(level, abs=3 * (level * (1 - level) / 400) ** 0.5)


def test_a_planted_difference_is_found_and_its_interval_holds_it():
    rng, found = np.random.default_rng(6), []
    for seed in range(40):
        words = rng.integers(300, 1200, 20)
        rates = rng.beta(2, 2 / 0.15 - 2, 20)
        ours, other = (rng.binomial(words, rate) for rate in (0.9 * rates, rates))
        found.append(paired_difference(ours, other, words, seed))
    assert np.mean([one.p < 0.05 for one in found]) > 0.9
    assert np.mean([one.interval[0] <= -0.015 <= one.interval[1] for one in found]) > 0.85
    same = paired_difference(ours, ours, words)
    assert (same.difference, same.p, same.interval) == (0.0, 1.0, (0.0, 0.0))


# --- Recognisers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """Run folder of a recogniser that nobody has trained."""
    folder = tmp_path_factory.mktemp("ctc")
    config = recipes.tiny_ctc()
    config.model = replace(config.model, n_layer=1, n_embd=48, ffn_dim=48, normalize_audio=True)
    vocabulary = Vocabulary.from_texts(["SUN MOON STAR SKY RAIN WIND"])
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config.model, len(vocabulary.labels))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)  # so that it says something
    save_weights(model, folder)
    save_config(config, folder / CONFIG)
    vocabulary.save(folder / VOCABULARY)
    return folder


@pytest.fixture
def awkward(tmp_path):
    """Everything that training leaves out: too short, without words, without a transcript, unreadable, infeasible."""
    root = write_corpus(tmp_path / "awkward", {"test-clean": 2}, utterances=4)
    folder = root / "test-clean" / "101" / "1"
    lines = (folder / "101-1.trans.txt").read_text().splitlines()
    for i, seconds in enumerate((0.01, 0.3, 1.0, 1.0), 4):
        soundfile.write(folder / f"101-1-{i:04d}.flac", sound(seconds, i), 16_000)
    lines += ["101-1-0004 SUN münd1", f"101-1-0005 {'STAR ' * 30}", "101-1-0006 ", ""]  # the last one has no line
    (folder / "101-1.trans.txt").write_text("\n".join(lines))
    bad = root / "test-clean" / "102" / "1" / "102-1-0003.flac"
    bad.write_bytes(bad.read_bytes()[:2000])
    return root


def rows_of(folder):
    return [json.loads(line) for line in (folder / "hypotheses.jsonl").read_text().splitlines()]


def test_every_utterance_is_scored_exactly_once_whatever_training_would_think_of_it(ctc, awkward, capsys):
    argv = ["evaluate", str(ctc), "--data", str(awkward), "--workers", "0", "--max-bad", "20%", "--json"]
    assert main([*argv, "--batch-seconds", "4", "--out", str(awkward / "out")]) == 0
    found, rows = json.loads(capsys.readouterr().out), rows_of(awkward / "out")
    ids = [f"101-1-{i:04d}" for i in range(7)] + [f"102-1-{i:04d}" for i in range(3)]
    assert sorted(row["id"] for row in rows) == ids
    assert (found["utterances"], found["too_short"], found["empty_references"]) == (10, 1, 1)
    assert found["without_transcript"] == 1
    assert found["without_label"] == {"utterances": 1, "characters": {"1": 1, "Ü": 1}}
    assert list(found["unreadable"]) == ["102-1-0003"] and "102-1-0003.flac" in found["unreadable"]["102-1-0003"]
    by_id = {row["id"]: row for row in rows}
    assert (by_id["101-1-0004"]["hypothesis"], by_id["101-1-0004"]["word_errors"]) == ("", 2)
    assert by_id["101-1-0005"]["words"] == 30
    silent = by_id["101-1-0006"]
    assert silent["words"] == 0 and silent["word_errors"] == len(silent["hypothesis"].split())
    assert {row["speaker"] for row in rows} == {"101", "102"}
    references, hypotheses = ([row[side] for row in rows] for side in ("reference", "hypothesis"))
    assert any(hypotheses)
    assert (found["wer"], found["cer"]) == pytest.approx(
        (jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses))
    )
    assert found["real_time_factor"] > 0
    assert json.loads((awkward / "out" / "evaluation.json").read_text()) == found


def test_batches_change_nothing_and_a_table_is_printed(ctc, awkward, capsys):
    argv = ["evaluate", str(ctc), "--data", str(awkward), "--workers", "0", "--max-bad", "20%"]
    results = []
    for seconds in ("1", "60"):
        assert main([*argv, "--batch-seconds", seconds, "--out", str(awkward / seconds)]) == 0
        results.append({row["id"]: row for row in rows_of(awkward / seconds)})
    assert results[0] == results[1]
    said = capsys.readouterr().out
    for line in (
        "1 utterances too short for a frame: all words deleted",
        "1 utterances without a transcript: not scored",
        "1 utterances with what the model has no label for, always wrong: 1 Ü",
        "not read and not scored: ",
        "intervals over utterances, for want of speakers",
        "most frequent deletions",
    ):
        assert line in said


@pytest.mark.parametrize("options", [[], ["--beam-size", "4"]])
def test_an_utterance_that_the_model_cannot_bear_is_named_and_the_others_are_scored(ctc, tmp_path, capsys, options):
    root = write_corpus(tmp_path, {"test-clean": 1}, utterances=3)
    folder = root / "test-clean" / "101" / "1"
    soundfile.write(folder / "101-1-0003.wav", 1e38 * sound(1.0, 1), 16_000, subtype="FLOAT")
    with (folder / "101-1.trans.txt").open("a") as file:
        file.write("101-1-0003 SUN\n")
    argv = ["evaluate", str(ctc), "--data", str(root), "--workers", "0", "--json", "--out", str(tmp_path / "out")]
    assert main([*argv, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["utterances"] == len(rows_of(tmp_path / "out")) == 3
    assert list(found["unreadable"]) == ["101-1-0003"] and "not finite" in found["unreadable"]["101-1-0003"]


def test_a_score_on_the_very_folder_that_was_trained_on_comes_with_a_remark(ctc, tmp_path, caplog):
    root, run = write_corpus(tmp_path / "flat", {"": 2}, utterances=2), tmp_path / "run"
    shutil.copytree(ctc, run)
    config = load_config(run / CONFIG, FinetuneConfig)
    for source, remarks in ((str(root), 1), ("another", 0)):
        caplog.clear()
        config.data.sources = (source,)
        save_config(config, run / CONFIG)
        assert main(["evaluate", str(run), "--data", str(root), "--workers", "0"]) == 0
        assert sum("what the model was trained on" in line.getMessage() for line in caplog.records) == remarks


def test_unreadable_recordings_beyond_the_budget_are_an_error_and_leave_the_earlier_results(ctc, awkward, capsys):
    out = awkward / "out"
    out.mkdir()
    (out / "hypotheses.jsonl").write_text("earlier\n")
    assert main(["evaluate", str(ctc), "--data", str(awkward), "--workers", "0", "--out", str(out)]) == 1
    assert "1 utterances cannot be read" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["hypotheses.jsonl"]


def test_what_is_marked_as_impossible_for_ctc_or_too_short_to_train_on_is_there_too(ctc, corpus):
    cuts = [fastcopy(cut, custom={"ctc_infeasible": True}) for cut in read_corpus(corpus)["train"]]
    loader = whole_utterances("train", Split.of(cuts), DataConfig(min_seconds=30.0, num_workers=0, batch_seconds=7.0))
    batches = list(loader)
    assert sorted(name for batch in batches for name in batch.ids) == sorted(cut.id for cut in cuts)
    assert len(batches) > 4
    for batch in batches:
        by_id = {cut.id: cut for cut in cuts}
        assert batch.texts == [by_id[name].supervisions[0].text for name in batch.ids]
        assert batch.speakers == [by_id[name].supervisions[0].speaker for name in batch.ids]
        assert batch.lengths.tolist() == [by_id[name].num_samples for name in batch.ids]


def test_a_system_is_tested_against_another_on_the_same_utterances(ctc, corpus, tmp_path, capsys):
    argv = ["evaluate", str(ctc), "--data", str(corpus), "--split", "train", "--workers", "0", "--json"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    rows = rows_of(tmp_path / "one")
    better = tmp_path / "better.jsonl"
    better.write_text(
        "".join(
            json.dumps(row | {"word_errors": 0, "character_errors": row["character_errors"]}) + "\n"
            for row in rows[::-1]
        )
    )
    capsys.readouterr()
    assert main([*argv, "--out", str(tmp_path / "two"), "--against", str(better)]) == 0
    found = json.loads(capsys.readouterr().out)
    against = found["against"]
    assert (against["other"], against["over"], against["units"]) == (str(better), "utterances", len(rows))
    assert against["wer"]["difference"] == pytest.approx(found["wer"])
    assert against["wer"]["p"] < 0.001 and against["wer"]["interval"][0] > 0
    assert against["cer"] == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    # its own folder, whose results it then replaces
    assert main([*argv[:-1], "--out", str(tmp_path / "two"), "--against", str(tmp_path / "two")]) == 0
    assert "p = 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["none", "other", "reference", "damaged", "no_text", "no_number"])
def test_results_that_cannot_be_compared_are_refused_and_our_own_kept(ctc, corpus, tmp_path, capsys, fault):
    argv = ["evaluate", str(ctc), "--data", str(corpus), "--workers", "0"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    path, lines = (
        tmp_path / "one" / "hypotheses.jsonl",
        (tmp_path / "one" / "hypotheses.jsonl").read_text().splitlines(),
    )
    row = json.loads(lines[0])
    said = {"none": "no ", "other": "1 of ours are not there, 1 of its own", "reference": "1 have another reference"}
    said |= {
        "damaged": "line 1 is not JSON",
        "no_text": "codec can't decode",
        "no_number": "line 1: word_errors: expected int",
    }
    lines[0] = {
        "none": "",
        "other": json.dumps(row | {"id": "another"}),
        "reference": json.dumps(row | {"reference": "SOMETHING ELSE"}),
        "damaged": lines[0][:20],
        "no_text": "\xff",
        "no_number": json.dumps(row | {"word_errors": "few"}),
    }[fault]
    path.unlink() if fault == "none" else path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    assert main([*argv, "--out", str(tmp_path / "two"), "--against", str(tmp_path / "one")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert said[fault] in line
    if fault == "none":  # that is noticed at once
        assert not (tmp_path / "two").exists()
        return
    assert f"the results without the test are in {tmp_path / 'two'}" in line
    found = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert found["against"] is None and found["utterances"] == len(rows_of(tmp_path / "two")) == len(lines)
    # its own folder, whose results it then replaces
    assert main([*argv, "--out", str(tmp_path / "one"), "--against", str(tmp_path / "one")]) == 2
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


def test_a_split_without_transcripts_is_refused(ctc, tmp_path, capsys):
    write_corpus(tmp_path / "data", {"test": 1}, utterances=2)
    next((tmp_path / "data").rglob("*.trans.txt")).unlink()
    assert main(["evaluate", str(ctc), "--data", str(tmp_path / "data"), "--workers", "0"]) == 2
    assert "of 2 utterances 2 have no transcript" in capsys.readouterr().err


def test_options_of_recognisers_are_refused_for_a_pretraining_run_and_missing_runs_and_devices_named(
    ctc, corpus, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    save_config(recipes.tiny(), run / CONFIG)
    save_weights(recipes.tiny().model.build(), run)
    argv = ["--data", str(corpus), "--split", "test"]
    assert main(["evaluate", str(run), *argv, "--lm", "x", "--against", "y", "--beam-size", "3"]) == 2
    assert "has no CTC head, so --lm, --against, --beam-size cannot be used" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "none"), *argv, "--against", "x"]) == 2
    assert "expected a finished run folder" in capsys.readouterr().err
    assert main(["evaluate", str(ctc), *argv, "--device", "gpu"]) == 2
    assert "--device gpu cannot be used" in capsys.readouterr().err
    for option, value, message in (
        ("--batch-seconds", "0", " --batch-seconds must be more than 0"),
        ("--workers", "-1", " --workers must be 0 or more"),
        ("--max-bad", "many", " --max-bad must be a share"),
    ):
        assert main(["evaluate", str(ctc), *argv, option, value]) == 2
        assert message in capsys.readouterr().err


def test_evaluation_needs_no_files_of_its_own(corpus):
    vocabulary = Vocabulary.from_texts(["SUN MOON STAR SKY RAIN WIND"])
    config = replace(recipes.tiny().model, n_layer=1, n_embd=48, ffn_dim=48)
    recognizer = Recognizer(Wav2Vec2ForCTC(config, len(vocabulary.labels)), vocabulary)
    split = read_corpus(corpus)["valid"]
    loader = whole_utterances("valid", split, DataConfig(num_workers=0))
    with open("/dev/null", "w") as nowhere:
        tally = evaluate(recognizer, Greedy(vocabulary), loader, nowhere)
    assert tally.all.utterances == len(split)
    assert tally.all.seconds == pytest.approx(split.seconds, abs=0.01)


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory):
    """A copy of the corpus, prepared, whose audio a test may take away; and an LM of its training transcripts."""
    root = tmp_path_factory.mktemp("prepared")
    shutil.copytree(corpus, root / "audio")
    assert main(["prepare", str(root / "audio"), str(root / "corpus"), "--jobs", "1"]) == 0
    assert main(["lm", "--data", str(corpus), str(root / "words.arpa"), "--order", "2"]) == 0
    return root


def test_with_an_lm_only_its_words_are_heard_and_its_weights_are_tuned_on_kept_log_probabilities(
    ctc, manifest, tmp_path, capsys
):
    pytest.importorskip("flashlight.lib.text")
    argv = ["evaluate", str(ctc), "--data", str(manifest / "corpus"), "--workers", "0", "--json"]
    assert main([*argv, "--out", str(tmp_path / "greedy")]) == 0
    greedy = json.loads(capsys.readouterr().out)
    assert greedy["decoder"] == {}
    call = [*argv, "--lm", str(manifest / "words.arpa"), "--tune", "valid", "--trials", "3", "--beam-size", "20"]
    assert main([*call, "--out", str(tmp_path / "lm"), "--against", str(tmp_path / "greedy")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {word for row in rows_of(tmp_path / "lm") for word in row["hypothesis"].split()} <= set(VOICES)
    about = found["decoder"]
    assert (about["beam_size"], about["tuned_on"], about["lexicon"]) == (20, "valid", None)
    assert about["lm"] == str(manifest / "words.arpa")
    assert found["against"]["wer"]["difference"] == pytest.approx(found["wer"] - greedy["wer"])

    for path in (manifest / "audio" / "dev-clean").rglob("*.flac"):
        path.unlink()  # what was computed of it is kept
    assert main([*call, "--out", str(tmp_path / "again")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["decoder"] == about and again["wer"] == found["wer"]
    names = ("lm_weight", "word_score", "blank_score", "beam_size")
    weights = [word for name in names for word in (f"--{name.replace('_', '-')}", str(about[name]))]
    assert main([*argv, "--lm", str(manifest / "words.arpa"), *weights, "--out", str(tmp_path / "given")]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["decoder"] == about | {"tuned_on": None} and given["wer"] == found["wer"]


def test_tuning_notices_other_audio_of_the_same_length_and_a_transcript_that_is_gone(ctc, corpus, tmp_path, capsys):
    pytest.importorskip("flashlight.lib.text")
    run, data = shutil.copytree(ctc, tmp_path / "run"), shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "lexicon.txt").write_text("\n".join(VOICES))
    argv = ["evaluate", str(run), "--data", str(data), "--workers", "0", "--lexicon", str(tmp_path / "lexicon.txt")]

    def tuned():
        assert main([*argv, "--tune", "valid", "--trials", "1", "--beam-size", "5"]) == 0
        caches = list((run / "emissions").iterdir())
        labels = len(json.loads((run / "vocab.json").read_text())["labels"])
        return {cache.name: EmissionCache(cache, weights_key(run), labels) for cache in caches}

    before = tuned()
    said = next((data / "dev-clean").rglob("*.trans.txt"))
    said.write_text("".join(said.read_text().splitlines(keepends=True)[1:]))
    assert tuned().keys() == before.keys()
    path = max((data / "dev-clean").rglob("*.flac"))  # not the one without a transcript
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, soundfile.info(path).frames)
    soundfile.write(path, noise, 16_000)
    [new] = tuned().keys() - before.keys()
    old, new = dict(before.popitem()[1]), dict(tuned()[new])
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert changed == {path.stem} and len(old) == len(new) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "valid"], "--tune looks for weights of an LM and of words"),
        (["--tune", "dev"], "--tune must be one of train, valid, test"),
        (["--lm", "words.arpa", "--tune", "test"], "--tune test is what is scored"),
        (["--data", "audio", "--lm", "words.arpa", "--tune", "test-clean"], "--tune test-clean is what is scored, 4"),
        (["--trials", "3"], "--trials is of --tune; add that, or leave --trials out"),
        (["--lm", "none.arpa"], "no file none.arpa"),
        (["--beam-size", "0"], "--beam-size of a beam search must be 1 to 1,000,000, got 0"),
        (
            ["--beam-size-token", "5000000000"],
            "--beam-size-token of a beam search must be 1 to 1,000,000, got 5000000000",
        ),
        (["--beam-width", "3"], "Unrecognized options: --beam-width"),
        (["--hot-words", "ÄÖ"], "cannot be spelled"),
    ],
)
def test_mistakes_about_decoders_are_one_line(ctc, manifest, tmp_path, capsys, monkeypatch, options, message):
    pytest.importorskip("flashlight.lib.text")
    monkeypatch.chdir(manifest)
    out = tmp_path / "out"
    assert main(["evaluate", str(ctc), "--data", "corpus", "--workers", "0", "--out", str(out), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not out.exists()


def documented(section):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    table = page.split(f"### {section}\n")[1].split("\n#")[0]
    return {
        name for line in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", line)
    }


def leaves(value, prefix=""):
    """Dotted names of all keys but of maps by utterance id."""
    if isinstance(value, list):
        value = value[0] if value and isinstance(value[0], dict) else None
    if not isinstance(value, dict) or prefix in ("unreadable.", "decoder.", "without_label.characters."):
        return {prefix.removesuffix(".")}
    return {name for key, inner in value.items() for name in leaves(inner, f"{prefix}{key}.")}


def test_documented_keys_are_the_keys_written(ctc, awkward):
    argv = ["evaluate", str(ctc), "--data", str(awkward), "--workers", "0", "--max-bad", "20%", "--out"]
    assert main([*argv, str(awkward / "one")]) == 0
    assert main([*argv, str(awkward / "two"), "--against", str(awkward / "one")]) == 0
    assert leaves(json.loads((awkward / "two" / "evaluation.json").read_text())) == documented("evaluation.json")
    assert set(rows_of(awkward / "two")[0]) == documented("hypotheses.jsonl")


def test_paired_test_reads_folders(ctc, corpus, tmp_path):
    assert main(["evaluate", str(ctc), "--data", str(corpus), "--workers", "0", "--out", str(tmp_path / "a")]) == 0
    assert paired_test(tmp_path / "a", tmp_path / "a" / "hypotheses.jsonl")["wer"]["p"] == 1.0
