"""n-gram language models of words: queries and ARPA files. Estimated in ``kneser_ney.py``. Needs numpy alone.

An n-gram's key is the number of its first n - 1 words among the (n-1)-grams, times the size of the vocabulary, plus the
number of its last word. Tables are sorted by it, so a number is found by bisection, for a whole text at once.
Legend: V words, n order of an n-gram, N order of the model.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from w2v2.errors import UsageError

UNKNOWN, START, END = SPECIAL = ("<unk>", "<s>", "</s>")


NO_PROBABILITY = -99.0
"""log10 of zero, as SRILM writes it: of ``<s>``, which is never predicted."""


_KENLM_UNKNOWN = -100.0
"""log10 that KenLM gives unknown words where the file has no ``<unk>``."""


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

    def log_prob(self, words: Sequence[str]) -> float:
        """log10 p of a whole sentence, its end included; unknown words count as ``<unk>``, as in KenLM."""
        return float(self.log_probs(words).sum())

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
        found = [tokens]  # found[n - 1][i]: number of the n-gram that starts at i; -1: there is none
        for n in range(2, self.order + 1):
            numbers = np.full(len(tokens), -1)
            starts = ngram_starts(sentence, n)
            numbers[starts] = self._find(n, found[-1][starts], tokens[starts + n - 1])
            found.append(numbers)
        at = np.flatnonzero(tokens != SPECIAL.index(START))
        total, open_ = np.zeros(len(at)), np.ones(len(at), dtype=bool)
        for n in range(self.order, 0, -1):
            start = np.maximum(at - n + 1, 0)
            inside = open_ & (at - n + 1 >= 0) & (sentence[start] == sentence[at])
            hit = inside & (found[n - 1][start] >= 0)
            total[hit] += self.log10_probs[n - 1][found[n - 1][start[hit]]]
            if n > 1:
                shorter = inside & ~hit & (found[n - 2][start] >= 0)
                total[shorter] += self.log10_backoffs[n - 2][found[n - 2][start[shorter]]]
            open_ &= ~hit
        return total

    def _find(self, n: int, prefixes: Ints, last: Ints) -> Ints:
        keys, wanted = self.keys[n - 1], prefixes * len(self.words) + last
        at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        known = (prefixes >= 0) & (keys[at] == wanted) if len(keys) else np.zeros(len(wanted), dtype=bool)
        return np.where(known, at, -1)

    def columns(self) -> list[Ints]:
        """(n-grams, n) words of the n-grams of each order."""
        made: list[Ints] = [self.keys[0][:, None]]
        for keys in self.keys[1:]:
            prefix, last = np.divmod(keys, len(self.words))
            made.append(np.column_stack([made[-1][prefix], last]))
        return made

    def save(self, path: Path) -> None:
        """Write as ARPA, gzipped where the name ends in .gz; whole or not at all."""
        partial = path.with_name(f".{path.name}.partial{path.suffix}")
        try:
            with _open(partial, "wt") as file:
                self._write(file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

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


def _open(path: Path, mode: str) -> TextIO:
    kind: Any = gzip if path.suffix == ".gz" else io
    return cast(TextIO, kind.open(path, mode, encoding="utf-8"))


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file to read, gzipped or not.

    Raises:
        UsageError: no such file, a folder, or no text in it.
    """
    try:
        with _open(path, "rt") as file:
            yield file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot read {path}: {what}; expected a file of UTF-8 text, gzipped if it ends in .gz"
        ) from error


def is_arpa(path: Path) -> bool:
    """Whether an existing file, gzipped if it ends in .gz, begins as an ARPA file does."""
    try:
        with open_text(path) as file:
            return next(filter(None, map(str.strip, file)), None) == _BEGIN
    except UsageError:
        return False


def arpa_words(path: Path) -> list[str]:
    """The words of an ARPA file, without ``<s>``, ``</s>`` and ``<unk>``.

    Raises:
        UsageError: something else.
    """
    unigrams = itertools.takewhile(lambda entry: entry[0] == 1, _entries(path))
    return [words[0] for _, _, words, _ in unigrams if words[0] not in SPECIAL]


def read_arpa(path: Path) -> NGram:
    """Read an ARPA file of any tool; without ``<unk>`` unknown words get 1e-100, as in KenLM.

    Raises:
        UsageError: something else.
    """
    numbers = {word: number for number, word in enumerate(SPECIAL)}
    rows: list[array[int]] = []
    values: list[tuple[array[float], array[float]]] = []
    for n, prob, words, backoff in _entries(path):
        if n == 1:
            numbers.setdefault(words[0], len(numbers))
        if n > len(rows):
            rows.append(array("q"))
            values.append((array("d"), array("d")))
        rows[n - 1].extend([numbers.get(word, -1) for word in words])
        values[n - 1][0].append(prob)
        values[n - 1][1].append(backoff)
    if not rows:
        raise UsageError(f"{path} has no n-grams; expected an ARPA file")
    columns = [np.array(row, dtype=np.int64).reshape(-1, n) for n, row in enumerate(rows, 1)]
    probs, backoffs = ([np.array(v[i]) for v in values] for i in (0, 1))
    return _sorted_model(path, tuple(numbers), columns, probs, backoffs)


def _sorted_model(
    path: Path, words: tuple[str, ...], columns: list[Ints], probs: list[Floats], backoffs: list[Floats]
) -> NGram:
    n_words = len(words)
    unigrams = [np.full(n_words, _KENLM_UNKNOWN), np.zeros(n_words)]
    for table, values in zip(unigrams, (probs[0], backoffs[0]), strict=True):
        table[columns[0][:, 0]] = values
    keys = [np.arange(n_words)]
    made = NGram(words, (keys[0],), (unigrams[0],), ())
    all_probs, all_backoffs = [unigrams[0]], [unigrams[1]]
    for n in range(2, len(columns) + 1):
        rows = columns[n - 1]
        prefix = rows[:, 0]
        for length in range(2, n):
            prefix = made._find(length, prefix, rows[:, length - 1])
        if (prefix < 0).any() or (rows < 0).any():
            bad = rows[(prefix < 0) | (rows < 0).any(1)][0]
            text = " ".join(words[number] if number >= 0 else "?" for number in bad)
            raise UsageError(f"{path} has the {n}-gram {text!r} without its words or history; write the file again")
        order = np.argsort(prefix * n_words + rows[:, -1], kind="stable")
        keys.append((prefix * n_words + rows[:, -1])[order])
        all_probs.append(probs[n - 1][order])
        all_backoffs.append(backoffs[n - 1][order])
        made = NGram(words, tuple(keys), tuple(all_probs), tuple(all_backoffs[:-1]))
    return made


def _entries(path: Path) -> Iterator[tuple[int, float, list[str], float]]:
    """(n, log10 probability, words, log10 back-off weight) of each line of an ARPA file."""
    n, begun = 0, False
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if text.startswith("\\"):
                title = re.fullmatch(r"\\(\d+)-grams:", text)
                n, begun = int(title[1]) if title else 0, begun or text == _BEGIN
                if text == _FINISH:
                    return
            elif text and not begun:
                break
            elif text and n:
                fields = text.split()
                try:
                    backoff = float(fields[n + 1]) if len(fields) == n + 2 else 0.0
                    entry = n, float(fields[0]), fields[1 : n + 1], backoff
                except (ValueError, IndexError):
                    fields = []
                if not n + 1 <= len(fields) <= n + 2:
                    raise UsageError(
                        f"{path}:{number} is no line of {n}-grams: {text[:80]!r}; expected a log10 probability, {n} "
                        "words and perhaps a log10 back-off weight"
                    )
                yield entry
    raise UsageError(f"{path} is no whole ARPA file; expected {_BEGIN} at its start and {_FINISH} at its end")
