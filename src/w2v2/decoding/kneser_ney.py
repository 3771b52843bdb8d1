"""Modified Kneser-Ney estimation of n-gram language models, in numpy, of text that fits memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from w2v2.decoding.ngram import (
    NO_PROBABILITY,
    ORDERS,
    SPECIAL,
    START,
    UNKNOWN,
    Floats,
    Ints,
    NGram,
    Score,
    encode,
    is_arpa,
    ngram_starts,
)
from w2v2.errors import UsageError
from w2v2.files import open_text
from w2v2.text.spelling import UPPER, casing, normalize_text

log = logging.getLogger(__name__)


FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Where the counts define none; those of KenLM's ``lmplz --discount_fallback``."""


def learn(
    out: Path,
    texts: Sequence[Path] = (),
    corpora: Sequence[str] = (),
    *,
    split: str | None = None,
    keep_case: bool = False,
    language: str = "",
    order: int = 3,
    prune: Sequence[int] = (),
    held_out: Path | None = None,
) -> tuple[NGram, Score]:
    """Write a language model of files of text and of transcripts as ARPA; see ``read_sentences`` and ``estimate``.

    Returns:
        The model, and its score on the text that is held out, without any on what it was learnt from.

    Raises:
        UsageError: nothing to learn from, a file that is not to be replaced, an order that beam search cannot read.
    """
    if not texts and not corpora:
        raise UsageError(f"nothing to learn {out} from: name files of text before it, or a corpus with `data`")
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"cannot write {out}: expected the name of a file in a folder that exists")
    if out.exists() and not is_arpa(out):
        raise UsageError(f"{out} exists and is no ARPA file to replace; name the file to write last, or remove it")
    if order not in ORDERS:
        raise UsageError(f"`order` must be {min(ORDERS)} to {max(ORDERS)}, which beam search can read, got {order}")
    tested, spoken = ([held_out], ()) if held_out else (texts, corpora)
    learnt, scored = (
        read_sentences(*of, split=split, keep_case=keep_case, language=language)
        for of in ((texts, corpora), (tested, spoken))
    )
    model = estimate(learnt, order, prune)
    score = model.score(scored)
    model.save(out)
    return model, score


def read_sentences(
    texts: Iterable[Path],
    corpora: Iterable[str] = (),
    *,
    split: str | None = None,
    keep_case: bool = False,
    language: str = "",
) -> Iterator[list[str]]:
    """Words of each line and transcript that has any, in upper case unless it is kept.

    Args:
        texts: a sentence a line, in LibriSpeech's ``*.trans.txt`` after its id; gzipped if the name ends in .gz.
        corpora: whose transcripts of a split to read; None: of ``train``, or of the only one that there is.
        language: whose rules of case hold, as for ``casing``.
    """
    upper = casing(UPPER, language)

    def words(text: str) -> list[str]:
        return (text if keep_case else normalize_text(text, upper)).split()

    for path in texts:
        with open_text(path) as file:
            with_ids = path.name.removesuffix(".gz").endswith(".trans.txt")
            yield from filter(None, (words("".join(line.split(maxsplit=1)[1:]) if with_ids else line) for line in file))
    for corpus in corpora:
        from w2v2.data.corpora import choose_split, read_corpus  # late: text alone needs no lhotse

        splits = read_corpus(corpus, training=False)
        name = split or (next(iter(splits)) if len(splits) == 1 else "train")
        cuts = choose_split(splits, name, corpus)
        yield from filter(None, (words(u.text or "") for u in cuts.utterances()))


@dataclass
class _Level:
    """The n-grams of one order in a text."""

    keys: Ints
    prefix: Ints
    """Number of the first n - 1 words among the (n-1)-grams."""
    suffix: Ints
    """The same of the last n - 1 words."""
    counts: Ints
    starts: NDArray[np.bool_]
    """Whether the first word is ``<s>``."""


def estimate(sentences: Iterable[Sequence[str]], order: int, prune: Sequence[int] = ()) -> NGram:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3; as KenLM's lmplz does it).

    p(w | h) = max(c(hw) - D(c(hw)), 0) / sum of c(h.) + γ(h) p(w | h without its first word). Below order N, and except
    after ``<s>``, c is the number of different words before the n-gram. D has a value each for counts of 1, 2 and more;
    where the counts of counts do not define them, ``FALLBACK_DISCOUNTS`` hold for that order, and the log says so. The
    unigrams are interpolated with 1/(V - 1), which ``<unk>`` gets too; ``<s>`` is never predicted.

    Args:
        sentences: words of each, without ``<s>``, ``</s>`` and ``<unk>``.
        prune: n-grams that occur so many times or less are left out, for n = 1, 2, ...; the last number holds for all
            longer ones. The first is 0, and none is less than the one before.

    Raises:
        UsageError: no words, one of those three, an order that no sentence is long enough for, or wrong thresholds.
    """
    if order < 1:
        raise UsageError(f"`order` must be 1 or more, got {order}")
    thresholds = _thresholds(prune, order)
    numbers = {word: number for number, word in enumerate(SPECIAL)}
    tokens, sentence = encode(sentences, numbers, grow=True)
    _refuse_special(numbers, tokens, sentence)
    if len(numbers) == len(SPECIAL):
        raise UsageError("the text has no words: expected a sentence a line")
    longest = int(np.bincount(sentence).max())
    if longest < order:
        raise UsageError(
            f"`order` {order} needs a sentence of {order - 2} words or more, the longest has {longest - 2}; "
            f"use `order` {longest} or less"
        )
    levels = _count(tokens, sentence, len(numbers), order)
    return _smooth(tuple(numbers), levels, thresholds)


def _refuse_special(numbers: dict[str, int], tokens: Ints, sentence: Ints) -> None:
    """KenLM reads ``<UNK>`` as ``<unk>``; so none of the three may be in a text in any case."""
    sentences = int(sentence[-1]) + 1 if len(sentence) else 0
    own = np.bincount(tokens, minlength=len(SPECIAL))[: len(SPECIAL)] - [0, sentences, sentences]
    strange = [word for word, count in zip(SPECIAL, own, strict=True) if count]
    strange += [word for word in numbers if word.lower() in SPECIAL and word not in SPECIAL]
    if strange:
        raise UsageError(f"the text has the word {strange[0]}, which language models use themselves; remove it")


def _thresholds(prune: Sequence[int], order: int) -> list[int]:
    given = list(prune) or [0]
    if given[0] != 0 or given != sorted(given) or len(given) > order:
        raise UsageError(
            f"`prune` takes up to {order} counts, for n-grams of 1 word, 2 words, ..., 0 first and none less than the "
            f"one before, such as 0 0 1; got {' '.join(map(str, given))}"
        )
    return given + given[-1:] * (order - len(given))


def _count(tokens: Ints, sentence: Ints, n_words: int, order: int) -> list[_Level]:
    words = np.arange(n_words)
    nothing = np.zeros(n_words, dtype=np.int64)
    first = SPECIAL.index(START)
    levels = [_Level(words, nothing, nothing, np.bincount(tokens, minlength=n_words), words == first)]
    numbers = tokens
    for n in range(2, order + 1):
        starts = ngram_starts(sentence, n)
        keys, which, counts = np.unique(
            numbers[starts] * n_words + tokens[starts + n - 1], return_inverse=True, return_counts=True
        )
        suffix = np.empty(len(keys), dtype=np.int64)
        suffix[which] = numbers[starts + 1]
        prefix = keys // n_words
        levels.append(_Level(keys, prefix, suffix, counts, levels[-1].starts[prefix]))
        numbers = np.full(len(tokens), -1)
        numbers[starts] = which
    return levels


def _smooth(words: tuple[str, ...], levels: list[_Level], thresholds: list[int]) -> NGram:
    probs: list[Floats] = []
    backoffs: list[Floats] = []
    kept: list[NDArray[np.bool_]] = []
    below = np.full(1, 1.0 / (len(words) - 1))  # what the unigrams are interpolated with
    for n, level in enumerate(levels, 1):
        counts = _adjusted(level, levels[n] if n < len(levels) else None)
        if n == 1:
            counts[[SPECIAL.index(UNKNOWN), SPECIAL.index(START)]] = 0
        discount = np.array((0.0, *discounts(counts, n)))[np.minimum(counts, 3)]
        keep = (level.counts > thresholds[n - 1]) | (n == 1)
        histories = len(below) if n > 1 else 1
        total = np.bincount(level.prefix, counts, histories)
        freed = np.bincount(level.prefix, np.where(keep, discount, counts), histories)
        gamma = np.divide(freed, total, out=np.ones(histories), where=total > 0)
        below = (counts - discount) / total[level.prefix] + gamma[level.prefix] * below[level.suffix]
        probs.append(below)
        backoffs.append(gamma)
        kept.append(keep)
    probs[0][SPECIAL.index(START)] = 10.0**NO_PROBABILITY
    return _assemble(words, levels, probs, backoffs[1:], kept)


def _adjusted(level: _Level, above: _Level | None) -> Ints:
    """Counts of the highest order; below, numbers of different words before an n-gram, where words can be before it."""
    if above is None:
        return level.counts.copy()
    return np.where(level.starts, level.counts, np.bincount(above.suffix, minlength=len(level.keys)))


def discounts(counts: Ints, n: int) -> tuple[float, float, float]:
    """What is taken from counts of 1, 2, and 3 or more (Chen and Goodman 1999, equation 26)."""
    t1, t2, t3, t4 = (int(t) for t in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    discounts: tuple[float, float, float] | None = None
    if t1 and t2 and t3:
        y = t1 / (t1 + 2 * t2)
        discounts = 1 - 2 * y * t2 / t1, 2 - 3 * y * t3 / t2, 3 - 4 * y * t4 / t3
    if discounts is None or min(discounts) <= 0:
        log.info(
            "%d-grams: %d, %d, %d, %d of them count 1, 2, 3, 4, which defines no discounts; taking %s",
            n, t1, t2, t3, t4, ", ".join(map(str, FALLBACK_DISCOUNTS)),
        )  # fmt: skip
        return FALLBACK_DISCOUNTS
    return discounts


def _assemble(
    words: tuple[str, ...],
    levels: list[_Level],
    probs: list[Floats],
    backoffs: list[Floats],
    kept: list[NDArray[np.bool_]],
) -> NGram:
    keys = [levels[0].keys]
    for n in range(1, len(levels)):
        renumbered = np.cumsum(kept[n - 1]) - 1
        level, keep = levels[n], kept[n]
        keys.append(renumbered[level.prefix[keep]] * len(words) + level.keys[keep] % len(words))
    return NGram(
        words=words,
        keys=tuple(keys),
        log10_probs=tuple(np.log10(p[keep]) for p, keep in zip(probs, kept, strict=True)),
        log10_backoffs=tuple(np.log10(b[keep]) for b, keep in zip(backoffs, kept[:-1], strict=True)),
    )
