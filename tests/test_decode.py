"""Beam search against all paths enumerated, and the tuning of its weights."""

import codecs
import gzip
import itertools
import logging
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arpa import read_arpa
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_greedy import SMALL, VOCABULARY, peaked

from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import make_decoder
from w2v2.decoding.greedy import Greedy, Hypothesis
from w2v2.decoding.kneser_ney import estimate, read_sentences
from w2v2.decoding.ngram import NGram
from w2v2.errors import JobError, UsageError
from w2v2.evaluation.tuning import EmissionCache, Trial, tune
from w2v2.inference.recognizer import weights_key
from w2v2.inference.words import word_times
from w2v2.text.vocabulary import Vocabulary

pytest.importorskip("flashlight.lib.text")
from w2v2.decoding.hot_words import Phrases

WIDE = BeamConfig(beam_size=5000, beam_threshold=1e4)


# --- Beam search against all paths ------------------------------------------------------------------------------------


def paths(log_probs: torch.Tensor, vocabulary: Vocabulary) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Every path, the labels that it spells, and its log-probability."""
    rows = log_probs.double().tolist()
    for path in itertools.product(range(len(vocabulary.labels)), repeat=len(rows)):
        ids = tuple(label for label, _ in itertools.groupby(path) if label != vocabulary.blank)
        yield path, ids, sum(row[label] for row, label in zip(rows, path, strict=True))


def spelled_words(ids: Sequence[int], vocabulary: Vocabulary) -> tuple[str, ...]:
    text = "".join(" " if i == vocabulary.boundary else vocabulary.labels[i] for i in ids)
    return tuple(text.split())


def gather(scores: Iterator[tuple[tuple, float]], config: BeamConfig) -> dict[tuple, float]:
    """Best or summed score of all paths with the same outcome."""
    found: dict[tuple, list[float]] = {}
    for outcome, score in scores:
        found.setdefault(outcome, []).append(score)
    one = (lambda s: math.log(math.fsum(math.exp(x - max(s)) for x in s)) + max(s)) if config.sum_paths else max
    return {outcome: one(s) for outcome, s in found.items()}


def times(phrases: Sequence[str], words: Sequence[str]) -> int:
    """How often some phrases are in a text."""
    ends = [words[:n] for n in range(1, len(words) + 1)]
    return sum(tuple(end[-len(phrase.split()) :]) == tuple(phrase.split()) for phrase in phrases for end in ends)


def free_scores(
    log_probs: torch.Tensor, vocabulary: Vocabulary, config: BeamConfig, hot: Sequence[str] = ()
) -> dict[tuple[int, ...], float]:
    def every() -> Iterator[tuple[tuple[int, ...], float]]:
        for path, ids, score in paths(log_probs, vocabulary):
            words = spelled_words(ids, vocabulary)
            score += config.silence_score * (0 if vocabulary.boundary is None else path.count(vocabulary.boundary))
            score += config.blank_score * path.count(vocabulary.blank)
            yield ids, score + config.hot_word_boost * times(hot, words)

    return gather(every(), config)


def lexicon_scores(
    log_probs: torch.Tensor,
    vocabulary: Vocabulary,
    config: BeamConfig,
    lexicon: Sequence[str],
    lm: NGram | None = None,
    hot: Sequence[str] = (),
) -> dict[tuple[str, ...], float]:
    def every() -> Iterator[tuple[tuple[str, ...], float]]:
        for path, ids, score in paths(log_probs, vocabulary):
            words = spelled_words(ids, vocabulary)
            if all(word in lexicon for word in words):
                score += config.silence_score * path.count(vocabulary.boundary) + config.word_score * len(words)
                score += config.blank_score * path.count(vocabulary.blank)
                score += config.lm_weight * lm.log_probs(words).sum() if lm else 0.0
                yield words, score + config.hot_word_boost * times(hot, words)

    return gather(every(), config)


def random_log_probs(seed: int, frames: int, labels: int = 4) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(frames, labels, generator=rng)).log_softmax(-1)


def check_best(found: Hypothesis, outcome: tuple, scores: dict[tuple, float]) -> None:
    """The best outcome with its score; or one as good, where there are several."""
    assert found.score == pytest.approx(max(scores.values()), abs=1e-4)
    assert scores[outcome] == pytest.approx(found.score, abs=1e-4)


def check_frames(found: Hypothesis, log_probs: torch.Tensor, vocabulary: Vocabulary) -> float:
    """Frames are in order and within the utterance; the log-probability of the path that they stand for."""
    path = [vocabulary.blank] * len(log_probs)
    before = -1
    for label, start, end in zip(found.ids, found.starts, found.ends, strict=True):
        assert before < start <= end < len(log_probs)
        path[start : end + 1] = [label] * (end - start + 1)
        before = end
    return sum(float(row[label]) for row, label in zip(log_probs.double(), path, strict=True))


seeds, lengths = st.integers(0, 2**31), st.integers(0, 5)
weights = st.floats(-3, 3).map(lambda x: round(x, 3))


@settings(max_examples=40, deadline=None)
@given(seeds, lengths, st.booleans(), st.sampled_from([0.0, -1.5, 0.7]), st.sampled_from([0.0, -1.2, 0.5]))
def test_lexicon_free_beam_finds_the_best_of_all_paths(
    seed: int, frames: int, sum_paths: bool, silence_score: float, blank_score: float
) -> None:
    log_probs = random_log_probs(seed, frames)
    config = replace(WIDE, sum_paths=sum_paths, silence_score=silence_score, blank_score=blank_score)
    found = make_decoder(SMALL, beam=config)(log_probs)
    check_best(found, found.ids, free_scores(log_probs, SMALL, config))
    assert found.text == SMALL.decode(found.ids)
    acoustic = check_frames(found, log_probs, SMALL)
    if not sum_paths and not silence_score and not blank_score:
        greedy = Greedy(SMALL)(log_probs)
        assert (found.ids, found.starts, found.ends) == (greedy.ids, greedy.starts, greedy.ends)
        assert found.score == pytest.approx(greedy.score, abs=1e-4)
        assert found.score == pytest.approx(acoustic, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(seeds, lengths, st.booleans())
def test_labels_without_a_word_boundary_are_decoded_too(seed: int, frames: int, sum_paths: bool) -> None:
    pieces = Vocabulary(labels=("<blank>", "▁A", "▁B", "C"), blank=0, unknown=None, boundary=None)
    config = replace(WIDE, sum_paths=sum_paths, silence_score=-2.0, blank_score=-0.8)
    log_probs = random_log_probs(seed, frames)
    found = make_decoder(pieces, beam=config)(log_probs)
    check_best(found, found.ids, free_scores(log_probs, pieces, config))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of words A, B, AB and BA."""
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    estimate([text.split() for text in ("A B", "A AB A", "BA", "B B AB", "AB", "A B A")], 3).save(path)
    return path


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LM's words, but for BA, and one that it does not know."""
    path = tmp_path_factory.mktemp("lexicon") / "words"
    path.write_text("A A |\nB B\nAB\nBB B B |\n")
    return path


@settings(max_examples=30, deadline=None)
@given(seeds, lengths, st.booleans(), st.floats(0, 4), weights, st.sampled_from([(0.0, 0.0), (-1.5, 0.4), (0.7, -2.0)]))
def test_scores_with_an_lm_equal_the_formula_on_all_paths(
    lm: Path, seed: int, frames: int, sum_paths: bool, lm_weight: float, word_score: float, others: tuple[float, float]
) -> None:
    log_probs, (silence_score, blank_score) = random_log_probs(seed, frames), others
    config = replace(WIDE, sum_paths=sum_paths, lm_weight=lm_weight, word_score=word_score)
    config = replace(config, silence_score=silence_score, blank_score=blank_score)
    found = make_decoder(SMALL, lm=lm, beam=config)(log_probs)
    model = read_arpa(lm)
    scores = lexicon_scores(log_probs, SMALL, config, ("A", "B", "AB", "BA"), model)
    words = tuple(found.text.split())
    check_best(found, words, scores)
    assert spelled_words(found.ids, SMALL) == words
    acoustic = check_frames(found, log_probs, SMALL)
    if not sum_paths and not silence_score:
        terms = lm_weight * model.log_probs(words).sum() + word_score * len(words)
        assert found.score == pytest.approx(acoustic + terms, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(seeds, lengths, st.booleans(), st.booleans(), weights)
def test_a_lexicon_decides_which_words_there_are(
    lm: Path, lexicon: Path, seed: int, frames: int, sum_paths: bool, with_lm: bool, word_score: float
) -> None:
    log_probs = random_log_probs(seed, frames)
    config = replace(WIDE, sum_paths=sum_paths, word_score=word_score)
    found = make_decoder(SMALL, lexicon=lexicon, lm=lm if with_lm else None, beam=config)(log_probs)
    model = read_arpa(lm) if with_lm else None  # BB is <unk> to it
    scores = lexicon_scores(log_probs, SMALL, config, ("A", "B", "AB", "BB"), model)
    check_best(found, tuple(found.text.split()), scores)


@pytest.mark.parametrize("kind", ["free", "lexicon", "lm"])
@settings(max_examples=40, deadline=None)
@given(seeds, lengths, st.booleans(), weights, st.sampled_from([0.0, 1.5]))
def test_hot_words_add_exactly_their_boost(
    lm: Path, lexicon: Path, kind: str, seed: int, frames: int, sum_paths: bool, boost: float, lm_weight: float
) -> None:
    log_probs = random_log_probs(seed, frames)
    hot = ("BA", "A", "A BA", "B A", "A A A")  # BA is not in the lexicon: it joins
    config = replace(WIDE, sum_paths=sum_paths, hot_word_boost=boost, lm_weight=lm_weight)
    if kind == "free":
        found = make_decoder(SMALL, hot_words=[phrase.lower() for phrase in hot], beam=config)(log_probs)
        check_best(found, found.ids, free_scores(log_probs, SMALL, config, hot))
        return
    given_lexicon, given_lm = (lexicon, None) if kind == "lexicon" else (None, lm)
    found = make_decoder(SMALL, lexicon=given_lexicon, lm=given_lm, hot_words=hot, beam=config)(log_probs)
    words = ("A", "B", "AB", "BA") if kind == "lm" else ("A", "B", "AB", "BB", "BA")
    model = read_arpa(lm) if kind == "lm" else None
    check_best(found, tuple(found.text.split()), lexicon_scores(log_probs, SMALL, config, words, model, hot))


@pytest.mark.parametrize("with_lm", [False, True])
def test_a_hot_word_wins_when_its_boost_passes_what_it_lacks_and_not_before(lm: Path, with_lm: bool) -> None:
    log_probs, changed = random_log_probs(7, 5), 0
    given_lm = lm if with_lm else None
    plain = replace(WIDE, hot_word_boost=0.0)
    if with_lm:
        scores: dict = lexicon_scores(log_probs, SMALL, plain, ("A", "B", "AB", "BA"), read_arpa(lm))
        words = {outcome: outcome for outcome in scores}
    else:
        scores = free_scores(log_probs, SMALL, plain)
        words = {outcome: spelled_words(outcome, SMALL) for outcome in scores}
    best = max(scores, key=scores.__getitem__)
    for hot in ("A", "B", "AB", "BA"):
        lack = min(
            (scores[best] - score) / (words[outcome].count(hot) - words[best].count(hot))
            for outcome, score in scores.items()
            if words[outcome].count(hot) > words[best].count(hot)
        )
        for boost, wins in ((lack - 1e-3, False), (lack + 1e-3, True)):
            config = replace(WIDE, hot_word_boost=boost)
            text = make_decoder(SMALL, lm=given_lm, hot_words=[hot], beam=config)(log_probs).text
            assert (text.split().count(hot) > words[best].count(hot)) is wins, (hot, boost)
            changed += wins
    assert changed == 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("AB ", min_size=1, max_size=6), min_size=1, max_size=4), st.text("AB ", max_size=14), weights)
def test_a_text_has_one_boost_for_each_time_that_a_phrase_is_in_it(
    given_phrases: list[str], text: str, boost: float
) -> None:
    phrases = {" ".join(phrase.split()) for phrase in given_phrases} - {""}
    words = text.split()
    for tokens, boundary in ((words, None), (text, " ")):
        numbers = {token: i for i, token in enumerate(sorted({*"AB ", *words, *" ".join(phrases).split()}))}
        split = [(*phrase, boundary) if boundary else phrase.split() for phrase in phrases]
        follow = Phrases(
            [tuple(numbers[token] for token in phrase) for phrase in split],
            boost,
            None if boundary is None else numbers[boundary],
        )
        begun, total = (), 0.0
        for token in tokens:
            begun, gain = follow.step(begun, numbers[token])
            total += gain
        assert total + follow.end(begun) == pytest.approx(boost * times(sorted(phrases), words), abs=1e-9)


@pytest.mark.parametrize("with_lm", [False, True])
def test_threads_share_a_decoder(lm: Path, with_lm: bool) -> None:
    decode = make_decoder(SMALL, lm=lm if with_lm else None, hot_words=["A", "AB A"], beam=WIDE)
    rows = [random_log_probs(seed, 12) for seed in range(40)]
    one = [decode(row) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(decode, rows)) == one


def test_a_narrow_beam_keeps_what_may_become_a_hot_word() -> None:
    """With a beam of two, a boost that came only at the end of the word would come too late."""
    wanted, heard = [3, 4, 4, 0, 3, 2], [4, 3, 3, 0, 4, 2]
    log_probs = torch.full((6, 5), -20.0)
    log_probs[range(6), wanted], log_probs[range(6), heard] = -1.0, -0.1
    config = BeamConfig(beam_size=2, hot_word_boost=12.0)
    assert make_decoder(VOCABULARY, beam=config)(log_probs).text == "BAB"
    assert make_decoder(VOCABULARY, hot_words=["ABA"], beam=config)(log_probs).text == "ABA"


# --- What is made of files and words ----------------------------------------------------------------------------------


def test_greedy_unless_something_is_asked_for() -> None:
    assert isinstance(make_decoder(SMALL), Greedy)
    assert not isinstance(make_decoder(SMALL, beam=BeamConfig()), Greedy)


def kinds(lm: Path, lexicon: Path) -> list[dict]:
    beam = {"beam": BeamConfig()}
    return [{}, beam, {"hot_words": ["AB"]}, {"lexicon": lexicon}, {"lm": lm}, {"lm": lm, "hot_words": ["AB"]}]


def test_nothing_and_silence_are_an_empty_text(lm: Path, lexicon: Path) -> None:
    silence = torch.tensor([[-9.0, -9.0, -9.0, -0.001]]).repeat(50, 1)
    for kind in kinds(lm, lexicon):
        for log_probs in (torch.zeros(0, 4), silence):
            found = make_decoder(SMALL, **kind)(log_probs)
            assert (found.text, found.ids, found.starts, found.ends) == ("", (), (), ())
            assert math.isfinite(found.score)


def test_a_last_word_needs_no_boundary_and_a_decoder_can_be_used_again(lm: Path, lexicon: Path) -> None:
    log_probs = torch.full((5, 4), -7.0)
    log_probs[range(5), [0, 1, 0, 2, 2]] = -0.01  # A | A B B
    for kind in kinds(lm, lexicon):
        decode = make_decoder(SMALL, **kind)
        for _ in range(2):
            found = decode(log_probs)
            assert (found.text, found.starts, found.ends) == ("A AB", (0, 1, 2, 3), (0, 1, 2, 4))
            times = word_times(found, SMALL, float)
            assert [(w.text, w.end) for w in times] == [("A", 0.5), ("AB", 4.5)]  # frames of a second each
            assert [(c.text, c.end) for c in times[1].characters] == [("A", 2.5), ("B", 4.5)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_is_no_word_of_an_lm_a_lexicon_or_a_text(
    tmp_path: Path, lm: Path, lexicon: Path, suffix: str
) -> None:
    marked = [tmp_path / f"{path.name}{suffix}" for path in (lm, lexicon)]
    for path, source in zip(marked, (lm, lexicon), strict=True):
        with (gzip.open if suffix else open)(path, "wb") as file:
            file.write(codecs.BOM_UTF8 + source.read_bytes())
    assert list(read_sentences([marked[1]])) == [line.split() for line in lexicon.read_text().splitlines()]
    log_probs = random_log_probs(0, 6)
    expected = make_decoder(SMALL, lm=lm, lexicon=lexicon)(log_probs)
    assert make_decoder(SMALL, lm=marked[0], lexicon=marked[1])(log_probs) == expected


def test_a_word_cut_short_by_the_beam_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("ABBA\nB\n")
    decode = make_decoder(SMALL, lexicon=tmp_path / "words", beam=BeamConfig(beam_size=1))
    log_probs = torch.full((5, 4), -7.0)
    log_probs[range(5), [2, 1, 0, 2, 3]] = -0.01  # B | A B _
    found = decode(log_probs)
    assert (found.text, found.ids, found.starts) == ("B", (2, 1), (0, 1))
    assert -60 < found.score < 0


def test_words_may_be_spelled_otherwise_than_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("One A B |\nTwo B B |\nTwo B A\n")
    log_probs = torch.full((7, 4), -7.0)
    log_probs[range(7), [0, 2, 1, 2, 0, 0, 1]] = -0.01
    found = make_decoder(SMALL, lexicon=tmp_path / "words")(log_probs)
    assert found.text == "ONE TWO"
    assert [(w.text, w.end) for w in word_times(found, SMALL, float)] == [("ONE", 1.5), ("TWO", 5.5)]


def test_an_lm_in_another_case_is_read_as_the_vocabulary_writes(
    tmp_path: Path, lm: Path, lexicon: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lower = tmp_path / "lower.arpa"
    model = read_arpa(lm)
    replace(model, words=tuple(word.lower() for word in model.words)).save(lower)
    for words in (None, lexicon):
        for seed in range(10):
            log_probs = random_log_probs(seed, 6)
            a, b = (make_decoder(SMALL, lm=path, lexicon=words)(log_probs) for path in (lm, lower))
            assert a == b
    assert f"4 of 4 words of the LM {lower} are read as the vocabulary writes them: a as A" in caplog.messages
    assert "1 of 4 words of the lexicon are unknown to the LM, such as BB" in caplog.messages


def test_words_that_cannot_be_spelled_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    estimate([["A", "ÉA", "C"], ["B"]], 2).save(tmp_path / "lm.arpa")
    make_decoder(SMALL, lm=tmp_path / "lm.arpa")
    assert f"2 of 4 words of the LM {tmp_path / 'lm.arpa'} cannot be spelled, such as ÉA" in caplog.messages


def test_more_words_of_one_spelling_than_can_be_kept_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    estimate([["W1", "W6"], ["W8", "B"]], 2).save(tmp_path / "lm.arpa")
    lines = [f"W{i} A |\n" for i in range(1, 9)]
    (tmp_path / "words").write_text("".join([*lines[:1] * 7, *lines, "B B |\n", "W8 A B |\n"]))
    with caplog.at_level(logging.INFO, "w2v2"):
        decode = make_decoder(SMALL, lexicon=tmp_path / "words", lm=tmp_path / "lm.arpa", hot_words=["B"])
    [said] = [message for message in caplog.messages if "spelled the same" in message]
    assert said.startswith("2 entries of the lexicon left out") and said.endswith(": W7 W8")
    assert "4 of 8 words of the lexicon are unknown to the LM, such as W2" in caplog.messages
    assert [word for word, _ in decode.spellings] == list(range(8))
    assert "Trie" not in "".join(capfd.readouterr())


def test_the_unknown_label_spells_nothing(tmp_path: Path) -> None:
    estimate([["A", "C"]], 2).save(tmp_path / "lm.arpa")
    decode = make_decoder(VOCABULARY, lm=tmp_path / "lm.arpa", beam=BeamConfig(lm_weight=0.0))
    assert decode(peaked([1, 1, 2, 3, 2], 20.0)).text == "A"


def files(tmp_path: Path) -> None:
    estimate([["D", "E"]], 2).save(tmp_path / "strange.arpa")
    estimate([["A", "B"]], 2).save(tmp_path / "good.arpa")
    estimate([["A", "B"]], 1).save(tmp_path / "one.arpa")
    (tmp_path / "noise.arpa").write_bytes(bytes(range(255, 0, -1)))
    (tmp_path / "text.arpa").write_text("hello\n")
    (tmp_path / "model.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad").write_text("A A |\nAX A X |\n")
    (tmp_path / "inside").write_text("AB A | B |\n")
    (tmp_path / "nothing").write_text("AB |\n")
    (tmp_path / "others").write_text("AB\nBA\n")
    (tmp_path / "sign").write_text("A A |\n<unk> A B |\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm": "none.arpa"}, "no file .*none.arpa: expected an LM"),
        ({"lexicon": "none"}, "no file .*none: expected a lexicon"),
        ({"lm": "."}, "no file .*: expected an LM"),
        ({"lm": "strange.arpa"}, "none of the 2 words of the LM .* can be spelled .* such as D"),
        ({"lm": "noise.arpa"}, "cannot read .*noise.arpa"),
        ({"lm": "text.arpa"}, "no whole ARPA file"),
        ({"lm": "one.arpa"}, "assumes at least a bigram model"),
        ({"lm": "model.bin"}, "KenLM binary, which hides its words"),
        ({"lm": "model.bin", "lexicon": "others"}, "model.bin is not an LM"),
        (
            {"lm": "good.arpa", "lexicon": "others"},
            "knows none of the 2 words of the lexicon, such as AB",
        ),
        ({"lexicon": "empty"}, "none of the 0 words"),
        ({"lexicon": "bad"}, ":2: AX is spelled A X"),
        ({"lexicon": "inside"}, ":1: AB is spelled A . B"),
        ({"lexicon": "nothing"}, ":1: AB is spelled"),
        ({"lm": "good.arpa", "lexicon": "sign"}, ":2: <unk> is a sign of language models and no word"),
        ({"hot_words": ["AC"]}, "hot word 'AC' cannot be spelled"),
        ({"hot_words": ["A AC"]}, "hot word 'A AC' cannot be spelled|hot word 'AC' cannot be spelled"),
        ({"hot_words": [""]}, "a hot word is a word or some words"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, options: dict, message: str) -> None:
    files(tmp_path)
    given = {name: value if name == "hot_words" else tmp_path / value for name, value in options.items()}
    with pytest.raises(UsageError, match=message) as refusal:
        make_decoder(SMALL, **given)
    assert "\n" not in str(refusal.value)


def test_words_need_a_boundary_and_weights_need_sense(lm: Path) -> None:
    pieces = Vocabulary(labels=("<blank>", "▁A"), unknown=None, boundary=None)
    for options in ({"lm": lm}, {"hot_words": ["A"]}):
        with pytest.raises(UsageError, match="need labels with a word boundary"):
            make_decoder(pieces, **options)
    for field, value in (
        ("beam_size", 0),
        ("beam_size_token", 0),
        ("beam_threshold", -1.0),
        ("lm_weight", math.nan),
        ("word_score", -math.inf),
    ):
        with pytest.raises(UsageError, match=field):
            BeamConfig(**{field: value})


def test_a_diverged_model_is_a_clear_line(lm: Path) -> None:
    for options in ({"beam": BeamConfig()}, {"lm": lm}):
        with pytest.raises(JobError, match="not numbers"):
            make_decoder(SMALL, **options)(torch.full((3, 4), math.nan))


def test_a_kenlm_binary_decodes_as_its_arpa_file_does(tmp_path: Path, lm: Path, lexicon: Path) -> None:
    tool = shutil.which("build_binary")
    if not tool:
        pytest.skip("needs KenLM's build_binary on the PATH")
    subprocess.run([tool, str(lm), str(tmp_path / "lm.bin")], check=True, capture_output=True)
    for seed in range(10):
        log_probs = random_log_probs(seed, 6)
        a, b = (make_decoder(SMALL, lm=path, lexicon=lexicon)(log_probs) for path in (lm, tmp_path / "lm.bin"))
        assert a == b
    (tmp_path / "lower").write_text("a A |\nb B |\n")
    with pytest.raises(
        UsageError, match="none of the 2 words of the lexicon, such as a; expected one of the same language and case"
    ):
        make_decoder(SMALL, lm=tmp_path / "lm.bin", lexicon=tmp_path / "lower")


# --- Tuning -----------------------------------------------------------------------------------------------------------


def noisy(text: str, seed: int) -> torch.Tensor:
    """Three frames a label, blurred so that greedy decoding errs."""
    ids = [i for label in SMALL.encode(text) for i in (label, label, SMALL.blank)]
    logits = 2.2 * torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(seed))
    logits[range(len(ids)), ids] += 3.0
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def dev() -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    texts = {f"u{i}": text for i, text in enumerate(("A B A", "A AB A", "BA", "B B AB", "AB", "A B") * 5)}
    return [(name, noisy(text, int(name[1:]))) for name, text in texts.items()], texts


def test_tuning_finds_weights_that_err_less_and_says_which(lm: Path, dev: tuple) -> None:
    emissions, references = dev
    decoder = make_decoder(SMALL, lm=lm, beam=BeamConfig(beam_size=20))
    start = BeamConfig(beam_size=20, lm_weight=0.0, word_score=-5.0)
    found = tune(decoder.tuned, emissions, references, start=start, trials=25, seed=3)
    assert len(found.trials) == 25
    assert found.trials[0].beam == start
    beams = [t.beam for t in found.trials]
    assert all(0 <= b.lm_weight <= 5 and -5 <= b.word_score <= 5 and -4 <= b.blank_score <= 0 for b in beams)
    for weight in ("lm_weight", "word_score", "blank_score"):
        assert len({getattr(beam, weight) for beam in beams}) == 25
    best = min(found.trials, key=lambda t: (t.wer, t.cer))
    assert found.best == best.beam
    assert best.wer < found.trials[0].wer
    # the weights are really those of the trial: decode again, and count with a plain edit distance
    wrong = sum(edits(references[n].split(), decoder.tuned(found.best)(e).text.split()) for n, e in emissions)
    assert best.wer == pytest.approx(wrong / sum(len(text.split()) for text in references.values()))
    # later rounds look closer to the best
    spread = [abs(beam.lm_weight - best.beam.lm_weight) for beam in beams]
    assert max(spread[-4:]) < max(spread[1:13])
    again = tune(decoder.tuned, emissions, references, start=start, trials=25, seed=3)
    assert again.trials == found.trials
    assert found.table()[1].split()[0] == f"{best.beam.lm_weight:.3f}"


def edits(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i, *row[1:]], row
        for j, y in enumerate(b, 1):
            row[j] = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
    return row[-1]


@pytest.mark.parametrize("trials", [1, 2, 9, 10, 30])
def test_tuning_spends_its_budget_of_trials_and_no_more(trials: int) -> None:
    found = tune(lambda config: Greedy(SMALL), [("u", noisy("A", 0))], {"u": "A"}, trials=trials)
    assert len(found.trials) == trials
    assert isinstance(found.trials[0], Trial) and found.best == BeamConfig()  # all alike: nothing is changed


def test_tuning_needs_transcripts() -> None:
    make: Callable = lambda config: Greedy(SMALL)  # noqa: E731
    for references, trials, message in (
        ({}, 1, "no word"),
        ({"u": ""}, 1, "no word"),
        ({"u": "A"}, 0, "1"),
    ):
        with pytest.raises(UsageError, match=message):
            tune(make, [("u", noisy("A", 0))], references, trials=trials)


def test_tuning_passes_over_utterances_without_a_transcript() -> None:
    cached = [("u", noisy("A", 0)), ("silent", noisy("B", 0))]
    found = tune(lambda config: Greedy(SMALL), cached, {"u": "A"}, trials=1)
    assert found == tune(lambda config: Greedy(SMALL), cached[:1], {"u": "A"}, trials=1)


def test_a_cache_goes_on_after_an_interruption_and_refuses_another_model(
    tmp_path: Path, dev: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2v2.evaluation.tuning._FILE_MB", 0.0005)  # several files
    emissions = [*dev[0], ("nothing", torch.zeros(0, 4))]
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.zeros(3)}, model / "model.safetensors")
    folder = tmp_path / "cache"
    key = weights_key(model)

    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield from emissions[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EmissionCache(folder, key, 4).fill(interrupted())
    cache = EmissionCache(folder, key, 4)
    assert len(cache) == 7 and "u6" in cache and "u7" not in cache
    cache.fill((name, value) for name, value in emissions if name not in cache)
    read = EmissionCache(folder, key, 4)
    assert len(list(folder.glob("*.safetensors"))) > 3
    for found in (dict(cache), dict(read)):
        assert found.keys() == dict(emissions).keys()
        assert all(torch.equal(found[name], value) for name, value in emissions)
    save_file({"w": torch.ones(3)}, model / "model.safetensors")
    with pytest.raises(UsageError, match="of another model"):
        EmissionCache(folder, weights_key(model), 4)
    with pytest.raises(UsageError, match="is not empty and no cache"):
        EmissionCache(model, key, 4)
    with pytest.raises(UsageError, match=r"no .*config\.json"):
        weights_key(folder)
