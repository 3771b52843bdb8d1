"""A small English grammar: sentences for the synthetic corpus.

Its rules stand in grammar.txt, which says how it is written. A sentence is grown from the rule `S`: each `{NAME}` in it
is replaced by a random alternative of rule `NAME`, until none is left.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import numpy as np

WORD = re.compile(r"[A-Za-z][A-Za-z']*")
"""What counts as one word of a text."""


def _with_s(word: str) -> str:
    """Plural of a regular noun, third person of a verb."""
    if re.search(r"(s|x|z|ch|sh|^go)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def _verb_forms(entry: str) -> dict[str, str]:
    base, *irregular = entry.split("/")
    past = base[:-1] + "ied" if re.search(r"[^aeiou]y$", base) else base.removesuffix("e") + "ed"
    ing = (base if base.endswith("ee") else base.removesuffix("e")) + "ing"
    forms = (*irregular, *(past, past, ing)[len(irregular) :])
    return dict(zip(("BASE", "S", "PAST", "PART", "ING"), (base, _with_s(base), *forms), strict=True))


@cache
def rules() -> dict[str, list[str]]:
    """Every rule of the grammar: its name and its alternatives."""
    text = (resources.files(__package__) / "grammar.txt").read_text(encoding="utf-8")
    table: dict[str, list[str]] = {}
    for header, body in re.findall(r"^\[(.*)\]\n([^\[]*)", text, re.MULTILINE):
        kind, *names = header.split()
        for entry in body.strip().splitlines() if kind == "rules" else body.split():
            if kind == "rules":
                name, alternatives = entry.split(" = ")
                table.setdefault(name, []).extend(alternatives.split(" | "))
            elif kind == "verbs":
                for form, word in _verb_forms(entry).items():
                    table.setdefault(f"{names[0]}_{form}", []).append(word)
            else:
                word, _, plural = entry.partition("/")
                table.setdefault(names[0], []).append(word)
                if kind == "nouns" and plural != "-":
                    table.setdefault(names[1], []).append(plural or _with_s(word))
    return table


def sentence(rng: np.random.Generator) -> str:
    """One random sentence in ordinary spelling, with its punctuation."""

    def grow(match: re.Match[str]) -> str:
        alternatives = rules()[match[1]]
        return re.sub(r"\{(\w+)\}", grow, alternatives[int(rng.random() * len(alternatives))])

    text = re.sub(r"\{(\w+)\}", grow, "{S}")
    text = re.sub(r"\ba (?=(?!uni|use|eur|one\b)[aeiou]|hour|honest)", "an ", text)
    text = re.sub(r"\bi\b", "I", text)
    return text[0].upper() + text[1:]


def transcript(text: str) -> str:
    """The words of `text` in upper case, separated by single spaces, without punctuation."""
    return " ".join(WORD.findall(text)).upper()
