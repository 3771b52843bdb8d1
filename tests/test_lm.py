"""n-gram models against the formula written out, against KenLM's reader, and, where they are installed, other tools."""

import contextlib
import gzip
import logging
import math
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from arpa import read_arpa
from conftest import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from w2v2.cli.main import main
from w2v2.decoding.kneser_ney import FALLBACK_DISCOUNTS, estimate
from w2v2.decoding.ngram import ORDERS, NGram, arpa_words
from w2v2.errors import UsageError

Sentence = Sequence[str]


def story(sentences: int, seed: int = 0) -> list[list[str]]:
    """Sentences whose words and successions have long tails: enough of each count for discounts of all orders."""
    rng = random.Random(seed)
    likely = [1 / rank for rank in range(1, 301)]
    follows = [rng.choices(range(300), likely, k=6) for _ in range(300)]
    made = []
    for _ in range(sentences):
        said = rng.choices(range(300), likely)
        for _ in range(rng.randint(0, 9)):
            said += [rng.choice(follows[said[-1]])] if rng.random() < 0.6 else rng.choices(range(300), likely)
        made.append([f"W{i}" for i in said])
    return made


def lines(path: Path, sentences: Sequence[Sentence]) -> Path:
    path.write_text("".join(" ".join(sentence) + "\n" for sentence in sentences))
    return path


def formula(sentences: Sequence[Sentence], order: int) -> Callable[[str, Sentence], float]:
    """p(word | history) of modified Kneser-Ney, written from the paper with dictionaries and recursion."""
    padded = [("<s>", *sentence, "</s>") for sentence in sentences]
    raw = Counter(tuple(s[i : i + n]) for s in padded for n in range(1, order + 1) for i in range(len(s) - n + 1))
    before: dict[tuple[str, ...], set[str]] = {}
    for gram in raw:
        before.setdefault(gram[1:], set()).add(gram[0])
    counts: dict[tuple[str, ...], int] = {}
    for gram in raw:
        if gram != ("<s>",):
            counts[gram] = raw[gram] if len(gram) == order or gram[0] == "<s>" else len(before[gram])
    discount = []
    for n in range(1, order + 1):
        t = Counter(count for gram, count in counts.items() if len(gram) == n)
        d: Sequence[float] = FALLBACK_DISCOUNTS
        if t[1] and t[2] and t[3]:
            y = t[1] / (t[1] + 2 * t[2])
            own = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
            d = own if min(own) > 0 else d
        discount.append(d)
    vocabulary = {word for s in padded for word in s} - {"<s>"} | {"<unk>"}
    after: dict[tuple[str, ...], list[int]] = {}
    for gram, count in counts.items():
        after.setdefault(gram[:-1], []).append(count)

    def p(word: str, history: Sentence) -> float:
        history = tuple(history)[-(order - 1) :] if order > 1 else ()
        if history not in after:
            return p(word, history[1:])
        d = discount[len(history)]
        of = lambda count: d[min(count, 3) - 1]  # noqa: E731
        total = sum(after[history])
        left = sum(of(count) for count in after[history]) / total
        count = counts.get((*history, word), 0)
        shorter = p(word, history[1:]) if history else 1 / len(vocabulary)
        return (count - of(count) if count else 0) / total + left * shorter

    return p


def probability(model: NGram, word: str, history: Sentence) -> float:
    """p(word | history) through the public interface."""
    words = [*history, word]
    begun = words[0] == "<s>"
    before = words[1:] if begun else ["<none>"] * model.order + words  # unknown words cut the history off
    place = len(before) - 1
    log_probs = model.log_probs(before[:-1] if word == "</s>" else before)
    return float(10 ** log_probs[place])


def histories(model: NGram) -> list[tuple[str, ...]]:
    """Every history that the model can tell apart."""
    rows = [tuple(model.words[i] for i in row) for columns in model.columns()[:-1] for row in columns]
    return [(), *(row for row in rows if "</s>" not in row)]


sentences_strategy = st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=6), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(sentences_strategy, st.integers(1, 3), st.integers(0, 2))
def test_probabilities_of_every_history_sum_to_one_pruned_or_not(
    sentences: list[list[str]], order: int, prune: int
) -> None:
    order = min(order, max(map(len, sentences)) + 2)
    model = estimate(sentences, order, (0, prune) if order > 1 else ())
    for history in histories(model):
        total = sum(probability(model, word, history) for word in model.words if word != "<s>")
        assert total == pytest.approx(1, abs=1e-9), history


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_equal_the_formula(order: int, caplog: pytest.LogCaptureFixture) -> None:
    sentences = story(400)
    caplog.set_level(logging.INFO)
    model, p = estimate(sentences, order), formula(sentences, order)
    assert not caplog.records  # this text defines all discounts
    rng = random.Random(1)
    for history in rng.sample(histories(model), 100 if order > 1 else 1):
        for word in rng.sample(model.words, 25):
            if word != "<s>":
                assert probability(model, word, history) == pytest.approx(p(word, history), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(sentences_strategy, st.integers(1, 3))
def test_a_text_too_small_for_discounts_follows_the_formula_with_the_fallback(
    sentences: list[list[str]], order: int
) -> None:
    order = min(order, max(map(len, sentences)) + 2)
    model, p = estimate(sentences, order), formula(sentences, order)
    for history in histories(model):
        for word in ("a", "e", "never said", "</s>"):
            known = word if word in model.words else "<unk>"
            assert probability(model, word, history) == pytest.approx(p(known, history), rel=1e-9)


def test_the_fallback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    estimate([["a", "b"], ["a"]], 2)
    assert [record.message.split(":")[0] for record in caplog.records] == ["1-grams", "2-grams"]


def test_pruning_leaves_out_rare_ngrams_and_nothing_else() -> None:
    sentences = story(200)
    raw = Counter(
        tuple(s[i : i + n])
        for w in sentences
        for s in [("<s>", *w, "</s>")]
        for n in (2, 3)
        for i in range(len(s) - n + 1)
    )
    whole, pruned = estimate(sentences, 3), estimate(sentences, 3, (0, 1, 2))
    for n, threshold in ((2, 1), (3, 2)):
        kept = {tuple(pruned.words[i] for i in row) for row in pruned.columns()[n - 1]}
        assert kept == {gram for gram, count in raw.items() if len(gram) == n and count > threshold}
    # What is left out lies at the end of the interpolation: probabilities of what is kept at the top hardly move.
    assert pruned.score(sentences).perplexity > whole.score(sentences).perplexity


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_an_arpa_file_gives_the_same_model_back(tmp_path: Path, name: str) -> None:
    model = estimate(story(200), 3, (0, 0, 1))
    model.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    again = read_arpa(tmp_path / name)
    assert again.words == model.words
    assert arpa_words(tmp_path / name) == list(model.words[3:])
    for mine, read in (
        (model.keys, again.keys),
        (model.log10_probs, again.log10_probs),
        (model.log10_backoffs, again.log10_backoffs),
    ):
        for a, b in zip(mine, read, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_another_order_of_lines_and_no_unknown_word_are_read_too(tmp_path: Path) -> None:
    lines = ["-0.5 B -0.1", "-0.3 </s>", "-99 <s> -0.2", "-0.7 A"]
    path = tmp_path / "lm.arpa"
    path.write_text("\\data\\\nngram 1=4\nngram 2=2\n\n\\1-grams:\n" + "\n".join(lines) + "\n\n")
    with path.open("a") as file:
        file.write("\\2-grams:\n-0.25\tB </s>\n-0.75\t<s> A\n\n\\end\\\n")
    model = read_arpa(path)
    np.testing.assert_allclose(model.log_probs(["A", "B", "C"]), [-0.75, -0.5, -0.1 - 100, -0.3])
    np.testing.assert_allclose(model.log_probs(["B"]), [-0.2 - 0.5, -0.25])
    assert model.score([["A", "C"], []]).unknown == 1


def test_kenlm_reads_the_orders_that_lm_writes_and_no_others(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    dictionary = pytest.importorskip("flashlight.lib.text.dictionary").Dictionary
    readable = []
    for order in range(1, 9):
        estimate(story(20), order).save(tmp_path / "lm.arpa")
        with contextlib.suppress(RuntimeError):
            kenlm.KenLM(str(tmp_path / "lm.arpa"), dictionary(["W1"]))
            readable.append(order)
    assert readable == list(ORDERS)


@pytest.mark.parametrize(("order", "prune"), [(2, ()), (3, ()), (4, (0, 0, 1))])
def test_kenlm_reads_our_files_and_gives_the_same_scores(tmp_path: Path, order: int, prune: tuple[int, ...]) -> None:
    kenlm = pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    dictionary = pytest.importorskip("flashlight.lib.text.dictionary").Dictionary
    sentences = story(300)
    model = estimate(sentences, order, prune)
    model.save(tmp_path / "lm.arpa")
    words = [*sorted({word for sentence in sentences for word in sentence}), "NEVER", "SAID"]
    theirs = kenlm.KenLM(str(tmp_path / "lm.arpa"), dictionary(words))
    rng = random.Random(2)
    for sentence in [*(rng.choices(words, k=rng.randint(0, 9)) for _ in range(200)), *sentences[:50]]:
        state, total = theirs.start(False), 0.0
        for word in sentence:
            state, score = theirs.score(state, words.index(word))
            total += score
        total += theirs.finish(state)[1]
        assert model.log_probs(sentence).sum() == pytest.approx(total, abs=1e-4)


def test_perplexity_is_that_of_words_and_sentence_ends() -> None:
    sentences = story(100)
    model, p = estimate(sentences, 2), formula(sentences, 2)
    held_out = [["W1", "W2"], ["W3", "XYZ"], []]
    surprise = 0.0
    for sentence in held_out:
        known = ["<s>", *(word if word in model.words else "<unk>" for word in sentence), "</s>"]
        surprise -= sum(math.log(p(word, known[:i])) for i, word in enumerate(known) if i)
    score = model.score(held_out)
    assert (score.words, score.unknown) == (7, 1)
    assert score.perplexity == pytest.approx(math.exp(surprise / 7))


@pytest.mark.parametrize(
    ("sentences", "order", "prune", "message"),
    [
        ([], 3, (), "has no words"),
        (
            [["a", "b"]],
            5,
            (),
            "`order` 5 needs a sentence of 3 words or more, the longest has 2; use `order` 4 or less",
        ),
        ([["a", "b"]], 0, (), "`order` must be 1 or more, got 0"),
        ([["a", "b"]], 2, (1,), "0 first and none less"),
        ([["a", "b"]], 3, (0, 2, 1), "0 first and none less"),
        ([["a", "b"]], 2, (0, 0, 0), "up to 2 counts"),
        ([["a", "<unk>"]], 2, (), "has the word <unk>"),
        ([["a", "<UNK>"]], 2, (), "has the word <UNK>"),
        ([["a", "</s>"]], 2, (), "has the word </s>"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    sentences: list[list[str]], order: int, prune: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("+", r"\+")):
        estimate(sentences, order, prune)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", "no whole ARPA file"),
        ("", "no whole ARPA file"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1 a\n", "no whole ARPA file"),
        ("\\data\\\n\n\\1-grams:\n-1\n\\end\\\n", ":4 is no line of 1-grams"),
        ("\\data\\\n\n\\1-grams:\nx a\n\\end\\\n", ":4 is no line of 1-grams"),
        ("\\data\\\n\n\\1-grams:\n-1 a b c\n\\end\\\n", ":4 is no line of 1-grams"),
        ("\\data\\\n\n\\1-grams:\n-1 a x\n\\end\\\n", ":4 is no line of 1-grams"),
        ("\\data\\\n\n\\end\\\n", "no whole ARPA file"),
    ],
)
def test_what_is_no_arpa_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lm.arpa"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        arpa_words(path)


# --- Other tools ------------------------------------------------------------------------------------------------------

Table = dict[tuple[str, ...], tuple[float, float]]


def table(model: NGram) -> Table:
    """log10 probability and back-off weight of each n-gram."""
    backoffs = [*model.log10_backoffs, np.zeros(len(model.keys[-1]))]
    return {
        tuple(model.words[i] for i in row): (float(prob), float(backoff))
        for columns, probs, weights in zip(model.columns(), model.log10_probs, backoffs, strict=True)
        for row, prob, backoff in zip(columns.tolist(), probs, weights, strict=True)
    }


@pytest.mark.parametrize(("order", "prune"), [(2, ()), (3, ()), (4, ()), (3, (0, 0, 1)), (4, (0, 1, 2))])
def test_every_figure_is_that_of_kenlms_lmplz(tmp_path: Path, order: int, prune: tuple[int, ...]) -> None:
    lmplz = shutil.which("lmplz")
    if not lmplz:
        pytest.skip("needs KenLM's lmplz on the PATH")
    sentences = story(400)
    text, out = lines(tmp_path / "text", sentences), tmp_path / "lm.arpa"
    pruned = ["--prune", *map(str, prune)] if prune else []
    command = [lmplz, "-o", str(order), "-S", "5%", "--text", str(text), "--arpa", str(out), *pruned]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = table(estimate(sentences, order, prune)), table(read_arpa(out))
    assert ours.keys() == theirs.keys()
    for gram, (prob, backoff) in theirs.items():  # they write seven digits; p(<s>), which nothing asks for, they call 1
        assert ours[gram][1] == pytest.approx(backoff, abs=1e-6), gram
        assert ours[gram][0] == (-99 if gram == ("<s>",) else pytest.approx(prob, abs=1e-6)), gram


def test_discounts_and_weights_are_those_of_irstlm(tmp_path: Path) -> None:
    """Its ``-lm=msb`` (today ``ikn``) without ``-ps``, the default pruning of single trigrams.

    It differs from the paper, KenLM and us in the unigrams, which it does not discount, with the number of different
    words as the count of ``<unk>``; and it reads the text as one stream, so there are n-grams across sentences, which
    change counts of counts. So those are taken out of its table of counts, and compared is what is left: the weight of
    each history, and the discounted frequency of each bigram and trigram, to the six digits that it writes.
    """
    folder = Path("/usr/lib/irstlm/bin")
    if not folder.exists():
        pytest.skip("needs Debian's irstlm")
    sentences = story(400)
    stream = lines(tmp_path / "text", [["<s>", *sentence, "</s>"] for sentence in sentences])
    subprocess.run(
        [folder / "ngt", f"-i={stream}", "-n=3", f"-o={tmp_path / 'counts'}"], check=True, capture_output=True
    )
    _, size, *rest = (tmp_path / "counts").read_text().splitlines()
    words, grams = rest[: int(size)], rest[int(size) :]
    grams = [line for line in grams if line and "<s> <s>" not in line]
    header = [f"nGrAm 3 {len(grams)} ngram", size]
    (tmp_path / "clean").write_text("\n".join([*header, *words, *grams]) + "\n")
    out = tmp_path / "lm.arpa"
    command = [folder / "tlm", f"-tr={tmp_path / 'clean'}", "-n=3", "-lm=msb", "-ps=no", f"-o={out}"]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = table(estimate(sentences, 3)), table(read_arpa(out))
    assert ours.keys() == theirs.keys()

    def discounted(found: Table, gram: tuple[str, ...]) -> float:
        return float(10 ** found[gram][0] - 10 ** (found[gram[:-1]][1] + found[gram[1:]][0]))

    for gram in theirs:
        if gram[-1] != "</s>":  # nothing follows it, but in their stream <s>
            assert ours[gram][1] == pytest.approx(theirs[gram][1], abs=1e-5), gram
        if len(gram) > 1:
            assert discounted(ours, gram) == pytest.approx(discounted(theirs, gram), abs=5e-6), gram


# --- The verb ---------------------------------------------------------------------------------------------------------


def test_lm_learns_from_files_and_tells_perplexity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = lines(tmp_path / "a.txt", [[w.lower() for w in s] for s in story(100)])
    more = lines(tmp_path / "b.txt", [*story(100, seed=5), []])
    held_out = lines(tmp_path / "c.txt", story(20, seed=9))
    out = tmp_path / "lm.arpa"
    assert main(["lm", str(text), str(more), str(out), "--order", "2", "--held-out", str(held_out)]) == 0
    model, expected = read_arpa(out), estimate([*story(100), *story(100, seed=5)], 2)
    assert model.words == expected.words
    np.testing.assert_allclose(model.log10_probs[1], expected.log10_probs[1])
    assert f"perplexity {expected.score(story(20, seed=9)).perplexity:.2f} of {held_out}" in caplog.text
    assert main(["lm", str(text), str(out), "--keep-case", "--order", "2"]) == 0
    assert "w1" in read_arpa(out).words and "W1" not in read_arpa(out).words


def test_lm_learns_from_the_transcripts_of_a_corpus(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm.arpa"
    assert main(["lm", "--data", str(corpus), str(out)]) == 0
    transcripts = [
        line.split()[1:] for path in sorted((corpus / "train-clean").rglob("*.trans.txt")) for line in path.open()
    ]
    assert read_arpa(out).score(transcripts).unknown == 0
    p = formula(transcripts, 3)
    assert probability(read_arpa(out), "MOON", ["<s>"]) == pytest.approx(p("MOON", ["<s>"]), rel=1e-9)


def test_ids_in_transcripts_of_librispeech_are_no_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = lines(tmp_path / "a.trans.txt", [["7-1-0000", "SUN", "MOON"], ["7-1-0001", "MOON"], ["7-1-0002"]])
    plain = lines(tmp_path / "a.txt", [["SUN", "MOON"], ["MOON"]])
    for name, text in (("ids", texts), ("plain", plain)):
        out = tmp_path / f"{name}.arpa"
        assert main(["lm", str(text), str(out), "--order", "2", "--held-out", str(texts)]) == 0
        assert "5 words and sentence ends, 0 unknown" in caplog.records[-1].getMessage()
    assert (tmp_path / "ids.arpa").read_text() == (tmp_path / "plain.arpa").read_text()


def test_lm_learns_from_the_whole_of_a_folder_without_splits(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm.arpa"
    assert main(["lm", "--data", str(corpus / "test-clean"), str(out), "--order", "2"]) == 0
    said = {word for path in (corpus / "test-clean").rglob("*.trans.txt") for word in path.read_text().split()}
    assert {*read_arpa(out).words} - {"<unk>", "<s>", "</s>"} == {word for word in said if word.isalpha()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["empty.txt", "lm.arpa"], "the text has no words"),
        (["missing.txt", "lm.arpa"], "cannot read missing.txt: No such file"),
        (["folder", "lm.arpa"], "cannot read folder: Is a directory"),
        (["noise.bin", "lm.arpa"], "cannot read noise.bin"),
        (["noise.gz", "lm.arpa"], "cannot read noise.gz"),
        (["good.txt", "lm.arpa", "--order", "1"], "--order must be 2 to 6, which beam search can read, got 1"),
        (["good.txt", "lm.arpa", "--order", "7"], "--order must be 2 to 6, which beam search can read, got 7"),
        (["good.txt", "lm.arpa", "--order", "6"], "use --order 4 or less"),
        (["good.txt", "lm.arpa", "--prune", "1"], "0 first"),
        (["good.txt", "folder"], "cannot write folder"),
        (["good.txt", "nowhere/lm.arpa"], "cannot write nowhere/lm.arpa"),
        (["lm.arpa"], "nothing to learn lm.arpa from"),
        (["lm.arpa", "--data", "corpus", "--split", "test"], "--split must be one of train, valid"),
        (["lm.arpa", "--data", "nowhere"], "no folder nowhere"),
        (["good.txt", "lm.arpa", "--held-out", "missing.txt"], "cannot read missing.txt"),
        (["special.txt", "lm.arpa"], "has the word </S>"),
    ],
)
def test_lm_refuses_in_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_corpus(tmp_path / "corpus", {"train": 1, "dev": 1}, utterances=1)
    lines(tmp_path / "empty.txt", [[], []])
    lines(tmp_path / "good.txt", [["A", "B"], ["B"]])
    lines(tmp_path / "special.txt", [["A", "</s>"]])
    for name in ("noise.bin", "noise.gz"):
        (tmp_path / name).write_bytes(bytes(range(255, 0, -1)))
    assert main(["lm", *argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("w2v2: error: ")
    assert message in said[0]
    assert not list(tmp_path.glob("*lm.arpa*"))


@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz", "b.arpa.gz"])
def test_lm_replaces_a_model_and_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    text, out = lines(tmp_path / "a.txt", [["A", "B"], ["B"]]), tmp_path / name
    own = b"not even gzip\n" if name == "b.arpa.gz" else gzip.compress(b"C D\n") if name == "b.txt.gz" else b"C D\n"
    out.write_bytes(own)
    assert main(["lm", str(text), str(out)]) == 2
    assert f"{out} exists and is no ARPA file to replace" in capsys.readouterr().err
    assert out.read_bytes() == own
    estimate([["C", "D"]], 2).save(out)
    assert main(["lm", str(text), str(out)]) == 0
    assert arpa_words(out) == ["A", "B"]
