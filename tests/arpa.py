"""A reader of ARPA files, of the tests' own: words in dictionaries, no bisection."""

import gzip
import re
from pathlib import Path

import numpy as np

from w2v2.decoding.ngram import SPECIAL, NGram


def read_arpa(path: Path) -> NGram:
    """The model in a file of any tool; without ``<unk>`` unknown words get 1e-100, as in KenLM."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    grams: list[dict[tuple[str, ...], tuple[float, float]]] = []
    for n, section in enumerate(re.split(r"\\\d+-grams:\n", text.split("\\end\\")[0])[1:], 1):
        rows = [line.split() for line in section.splitlines() if line.strip()]
        grams.append({tuple(row[1 : n + 1]): (float(row[0]), float((*row[n + 1 :], 0)[0])) for row in rows})
    numbers = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *(word for (word,) in grams[0])]))}
    grams[0] = {(word,): grams[0].get((word,), (-100.0, 0.0)) for word in numbers}
    places: dict[tuple[str, ...], int] = {(): 0}
    keys, probs, backoffs = [], [], []
    for table in grams:
        rank = {gram: places[gram[:-1]] * len(numbers) + numbers[gram[-1]] for gram in table}
        order = sorted(table, key=rank.__getitem__)
        places = {gram: place for place, gram in enumerate(order)}
        keys.append(np.array([rank[gram] for gram in order], dtype=np.int64))
        probs.append(np.array([table[gram][0] for gram in order]))
        backoffs.append(np.array([table[gram][1] for gram in order]))
    return NGram(tuple(numbers), tuple(keys), tuple(probs), tuple(backoffs[:-1]))
