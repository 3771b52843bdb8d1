"""n-gram language models of words: queries and ARPA files. Estimated in ``kneser_ney.py``. Needs numpy alone.

An n-gram's key is the number of its first n - 1 words among the (n-1)-grams, times the size of the vocabulary, plus the
number of its last word. Tables are sorted by it, so a number is found by bisection, for a whole text at once.
Legend: V words, n order of an n-gram, N order of the model.
"""

from __future__ import annotations

import gzip
import io
import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from w2v2.errors import UsageError
from w2v2.files import open_text, whole

UNKNOWN, START, END = SPECIAL = ("<unk>", "<s>", "</s>")
NO_PROBABILITY = -99.0
"""log10 of zero, as SRILM writes it: of ``<s>``, which is never predicted."""
ORDERS = range(2, 7)
"""N that KenLM's reader in flashlight takes."""
_BEGIN, _FINISH = "\\data\\", "\\end\\"
_SENTENCES_AT_ONCE = 50_000

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    log10_prob: float
    """Of all words and sentence ends, unknown words as ``<unk>``."""
    words: int
    """Predicted: words, and an end for each sentence."""
    unknown: int
    """Words that the model does not know."""

    @property
    def perplexity(self) -> float:
        """Of a word or sentence end."""
        return math.inf if not self.words else float(10.0 ** (-self.log10_prob / self.words))


@dataclass(frozen=True)
class NGram:
    """A back-off model: what an ARPA file holds."""

    words: tuple[str, ...]
    """``<unk>``, ``<s>``, ``</s>``, and the rest."""
    keys: tuple[Ints, ...]
    """Of the n-grams of each order, sorted."""
    log10_probs: tuple[Floats, ...]
    log10_backoffs: tuple[Floats, ...]
    """Of each order but the last: the weight of the shorter history where a longer n-gram is missing."""

    @property
    def order(self) -> int:
        """N."""
        return len(self.keys)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Number of each word."""
        return {word: number for number, word in enumerate(self.words)}

    def log_probs(self, words: Sequence[str]) -> Floats:
        """(words + 1,) log10 p of each word after all before it, and of the sentence end."""
        return self._log10(*encode([words], self.numbers))

    def score(self, sentences: Iterable[Sequence[str]]) -> Score:
        """Of a text of any size."""
        total, predicted, unknown = 0.0, 0, 0
        rest = iter(sentences)
        while part := list(itertools.islice(rest, _SENTENCES_AT_ONCE)):
            tokens, sentence = encode(part, self.numbers)
            total += float(self._log10(tokens, sentence).sum())
            predicted += len(tokens) - len(part)
            unknown += int((tokens == 0).sum())
        return Score(total, predicted, unknown)

    def _log10(self, tokens: Ints, sentence: Ints) -> Floats:
        """log10 p of each token that is not ``<s>``, given those before it in its sentence."""
        numbers_of = [tokens]  # numbers_of[n - 1][i]: number of the n-gram that starts at i; -1: there is none
        for n in range(2, self.order + 1):
            numbers = np.full(len(tokens), -1)
            starts = ngram_starts(sentence, n)
            numbers[starts] = self._find(n, numbers_of[-1][starts], tokens[starts + n - 1])
            numbers_of.append(numbers)
        at = np.flatnonzero(tokens != SPECIAL.index(START))
        total, open_ = np.zeros(len(at)), np.ones(len(at), dtype=bool)
        for n in range(self.order, 0, -1):
            start = np.maximum(at - n + 1, 0)
            inside = open_ & (at - n + 1 >= 0) & (sentence[start] == sentence[at])
            hit = inside & (numbers_of[n - 1][start] >= 0)
            total[hit] += self.log10_probs[n - 1][numbers_of[n - 1][start[hit]]]
            if n > 1:
                shorter = inside & ~hit & (numbers_of[n - 2][start] >= 0)
                total[shorter] += self.log10_backoffs[n - 2][numbers_of[n - 2][start[shorter]]]
            open_ &= ~hit
        return total

    def _find(self, n: int, prefixes: Ints, last: Ints) -> Ints:
        keys, wanted = self.keys[n - 1], prefixes * len(self.words) + last
        at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        known = (prefixes >= 0) & (keys[at] == wanted) if len(keys) else np.zeros(len(wanted), dtype=bool)
        return np.where(known, at, -1)

    def columns(self) -> list[Ints]:
        """(n-grams, n) words of the n-grams of each order."""
        ngrams: list[Ints] = [self.keys[0][:, None]]
        for keys in self.keys[1:]:
            prefix, last = np.divmod(keys, len(self.words))
            ngrams.append(np.column_stack([ngrams[-1][prefix], last]))
        return ngrams

    def save(self, path: Path) -> None:
        """Write as ARPA, gzipped where the name ends in .gz; whole or not at all."""
        kind: Any = gzip if path.suffix == ".gz" else io
        with whole(path) as partial, kind.open(partial, "wt", encoding="utf-8") as file:
            self._write(file)

    def _write(self, file: TextIO) -> None:
        file.write(f"{_BEGIN}\n" + "".join(f"ngram {n}={len(keys)}\n" for n, keys in enumerate(self.keys, 1)))
        for n, columns in enumerate(self.columns(), 1):
            file.write(f"\n\\{n}-grams:\n")
            backoffs = self.log10_backoffs[n - 1] if n < self.order else np.zeros(len(columns))
            for prob, row, backoff in zip(self.log10_probs[n - 1], columns.tolist(), backoffs, strict=True):
                text = " ".join([self.words[number] for number in row])
                file.write(f"{prob:.12g}\t{text}\t{backoff:.12g}\n" if backoff else f"{prob:.12g}\t{text}\n")
        file.write(f"\n{_FINISH}\n")


def encode(sentences: Iterable[Sequence[str]], numbers: dict[str, int], *, grow: bool = False) -> tuple[Ints, Ints]:
    """Numbers of the words of sentences in a row, in ``<s>`` and ``</s>``, and the sentence of each."""
    tokens, lengths = array("q"), array("q")
    start, end = numbers[START], numbers[END]
    for words in sentences:
        if grow:
            tokens.extend([start, *(numbers.setdefault(word, len(numbers)) for word in words), end])
        else:
            tokens.extend([start, *(numbers.get(word, 0) for word in words), end])
        lengths.append(len(words) + 2)
    return np.array(tokens, dtype=np.int64), np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))


def ngram_starts(sentence: Ints, n: int) -> Ints:
    """Where n-grams start that lie within one sentence."""
    last = max(len(sentence) - n + 1, 0)
    return np.flatnonzero(sentence[:last] == sentence[n - 1 :])


# --- Files ------------------------------------------------------------------------------------------------------------


def is_arpa(path: Path) -> bool:
    """Whether an existing file, gzipped if it ends in .gz, begins as an ARPA file does."""
    try:
        with open_text(path) as lines:
            return next(filter(None, map(str.strip, lines)), None) == _BEGIN
    except UsageError:
        return False


def arpa_words(path: Path) -> list[str]:
    """The words of an ARPA file, without ``<s>``, ``</s>`` and ``<unk>``.

    Raises:
        UsageError: something else.
    """
    words: list[str] = []
    title = ""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if text.startswith("\\"):
                if title == "\\1-grams:":
                    return [word for word in words if word not in SPECIAL]
                title = text
            elif text and not title:
                break
            elif text and title == "\\1-grams:":
                fields = text.split()
                if not 2 <= len(fields) <= 3 or not all(map(_is_number, fields[::2])):
                    raise UsageError(
                        f"{path}:{number} is no line of 1-grams: {text[:80]!r}; expected a log10 probability, a word "
                        "and perhaps a log10 back-off weight"
                    )
                words.append(fields[1])
    raise UsageError(f"{path} is no whole ARPA file; expected {_BEGIN} at its start and {_FINISH} at its end")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
