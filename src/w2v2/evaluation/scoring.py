"""Errors along alignments, added up: by word and character, by speaker and length, and which are the most frequent."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jiwer

from w2v2.evaluation.significance import LEVEL, Units, ratio_interval

LENGTHS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
"""Seconds at which the groups of the per-length table end."""


FREQUENT = 20
"""Errors of each kind in the list of the most frequent ones."""


COUNTS = ("word_errors", "words", "character_errors", "characters")
"""What an utterance counts: errors, and words or characters of the reference."""


_MOST_KINDS = 20_000


@dataclass
class Edits:
    """What turns references into hypotheses, counted along jiwer's alignments."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """Of all three kinds."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference(self) -> int:
        """Words, or characters, of the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors by reference word; where there are none, as jiwer has it, the errors."""
        return self.errors / max(1, self.reference)

    def add(self, output: jiwer.WordOutput | jiwer.CharacterOutput) -> None:
        """Add those of an alignment."""
        self.hits += output.hits
        self.substitutions += output.substitutions
        self.deletions += output.deletions
        self.insertions += output.insertions


@dataclass
class Group:
    """Utterances of a speaker, or of a length, or all of them."""

    utterances: int = 0
    seconds: float = 0.0
    words: Edits = field(default_factory=Edits)
    characters: Edits = field(default_factory=Edits)

    def add(self, seconds: float, words: jiwer.WordOutput, characters: jiwer.CharacterOutput) -> None:
        """Add an utterance."""
        self.utterances += 1
        self.seconds += seconds
        self.words.add(words)
        self.characters.add(characters)

    def figures(self) -> dict[str, Any]:
        """As in the tables by speaker and by length."""
        return {
            "utterances": self.utterances,
            "seconds": round(self.seconds, 3),
            "words": self.words.reference,
            "word_errors": self.words.errors,
            "wer": self.words.rate,
            "cer": self.characters.rate,
        }


class _Common(Counter[tuple[str, ...]]):
    """Counts that keep to the most common kinds where there are very many: the rarest are forgotten now and then."""

    def see(self, kinds: Iterable[tuple[str, ...]]) -> None:
        self.update(kinds)
        if len(self) > _MOST_KINDS:
            kept = self.most_common(_MOST_KINDS // 2)
            self.clear()
            self.update(dict(kept))


class Tally:
    """Adds utterances up: counts by speaker, by length, of frequent errors. Of the utterances nothing else is kept."""

    def __init__(self) -> None:
        self.all = Group()
        self.speakers: dict[str, Group] = {}
        self.lengths = [Group() for _ in (*LENGTHS, None)]
        self.units = Units(4)
        self.kinds = {name: _Common() for name in ("substitutions", "deletions", "insertions")}
        self.wrong = self.empty_references = self.too_short = self.without_transcript = 0
        self.unreadable: dict[str, str] = {}
        self.strange, self.with_strange = _Common(), 0
        self.compute_seconds = 0.0

    def add(self, reference: str, hypothesis: str, *, speaker: str | None = None, seconds: float = 0.0) -> list[int]:
        """Add an utterance; both texts in the same spelling.

        Returns:
            Word errors, reference words, character errors, reference characters.
        """
        words, characters = jiwer.process_words(reference, hypothesis), jiwer.process_characters(reference, hypothesis)
        own, length = Group(), self.lengths[bisect.bisect_left(LENGTHS, seconds)]
        for group in (own, length, self.speakers.setdefault(speaker or "", Group()), self.all):
            group.add(seconds, words, characters)
        self._see(words)
        self.wrong += own.words.errors > 0
        self.empty_references += own.words.reference == 0
        counts = [own.words.errors, own.words.reference, own.characters.errors, own.characters.reference]
        self.units.add(speaker, *counts)
        return counts

    def see_strange(self, characters: Iterable[str]) -> None:
        """Count what an utterance's reference has that the model has no label for (``Vocabulary.strange``)."""
        kinds = [(character,) for character in characters]
        self.strange.see(kinds)
        self.with_strange += bool(kinds)

    def _see(self, words: jiwer.WordOutput) -> None:
        [reference], [heard] = words.references, words.hypotheses
        for part in words.alignments[0]:
            old = reference[part.ref_start_idx : part.ref_end_idx]
            new = heard[part.hyp_start_idx : part.hyp_end_idx]
            if part.type == "equal":
                continue
            kind, wrong = {
                "substitute": ("substitutions", zip(old, new, strict=False)),
                "delete": ("deletions", zip(old, strict=True)),
                "insert": ("insertions", zip(new, strict=True)),
            }[part.type]
            self.kinds[kind].see(wrong)

    def summary(self) -> dict[str, Any]:
        """The figures, as in ``evaluation.json``; ``docs/evaluation.md`` says what each is."""
        kind, counts = self.units.choose()
        edges = (0.0, *LENGTHS, None)
        return {
            "wer": self.all.words.rate,
            "cer": self.all.characters.rate,
            "words": _rate(self.all.words, ratio_interval(counts[:, 0], counts[:, 1])),
            "characters": _rate(self.all.characters, ratio_interval(counts[:, 2], counts[:, 3])),
            "intervals": {"level": LEVEL, "over": kind, "units": len(counts), "method": "bootstrap-t"},
            "utterances": self.all.utterances,
            "seconds": round(self.all.seconds, 3),
            "sentence_error_rate": self.wrong / max(1, self.all.utterances),
            "empty_references": self.empty_references,
            "too_short": self.too_short,
            "without_transcript": self.without_transcript,
            "unreadable": self.unreadable,
            "without_label": {
                "utterances": self.with_strange,
                "characters": {row["words"][0]: row["count"] for row in _frequent(self.strange)},
            },
            "real_time_factor": self.compute_seconds / max(self.all.seconds, 1e-9),
            "by_speaker": [
                {"speaker": name or None, **self.speakers[name].figures()} for name in sorted(self.speakers)
            ],
            "by_length": [
                {"from": start, "to": end, **group.figures()}
                for start, end, group in zip(edges, edges[1:], self.lengths, strict=False)
                if group.utterances
            ],
            "frequent": {name: _frequent(counts) for name, counts in self.kinds.items()},
        }


def _rate(edits: Edits, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "rate": edits.rate,
        "interval": None if interval is None else [max(0.0, end) for end in interval],
        "reference": edits.reference,
        "errors": edits.errors,
        "substitutions": edits.substitutions,
        "deletions": edits.deletions,
        "insertions": edits.insertions,
    }


def _frequent(counts: _Common) -> list[dict[str, Any]]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]
    return [{"words": list(kind), "count": count} for kind, count in ranked]
