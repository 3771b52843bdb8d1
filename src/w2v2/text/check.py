"""What is wrong with transcripts, found before training: every fault counted, the first utterances named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from w2v2.errors import Show, UsageError, quiet
from w2v2.text.spelling import merged
from w2v2.text.vocabulary import SPACE, PieceVocabulary, Vocabulary

_NAMED = 4


_STRANGE = 0.05
"""Share of train's labels that may be unknown; more is another script or case, not a rare character."""


Transcribed = tuple[str, float, str]
"""(utterance id, seconds, transcript)."""


@dataclass
class _Fault:
    count: int = 0
    names: list[str] = field(default_factory=list)
    what: set[str] = field(default_factory=set)

    def add(self, name: str, what: Iterable[str] = ()) -> None:
        self.count += 1
        self.names += [name] if self.count <= _NAMED else []
        self.what |= {*what}

    def __str__(self) -> str:
        return ", ".join(self.names) + (" ..." if self.count > _NAMED else "")

    @property
    def signs(self) -> str:
        return " ".join(sorted(self.what)[:40])


@dataclass
class TranscriptCheck:
    """Faults of a split's transcripts against a vocabulary.

    Args:
        name: of the split.
        vocabulary: of the model.
        fits: whether a transcript's labels fit in the frames of so many seconds.
    """

    name: str
    vocabulary: Vocabulary
    fits: Callable[[float, str], bool]
    total: int = 0
    labels: int = 0
    unknown: int = 0
    empty: _Fault = field(default_factory=_Fault)
    colliding: _Fault = field(default_factory=_Fault)
    strange: _Fault = field(default_factory=_Fault)
    changed: _Fault = field(default_factory=_Fault)
    merged: _Fault = field(default_factory=_Fault)
    infeasible: _Fault = field(default_factory=_Fault)

    def __post_init__(self) -> None:
        labels = {self.vocabulary.labels[i] for i in self.vocabulary.special}
        labels |= {SPACE} if isinstance(self.vocabulary, PieceVocabulary) else set()
        self.reserved = {label for label in labels if label.strip()}

    def add(self, name: str, seconds: float, text: str) -> None:
        """Look at one transcript."""
        vocabulary = self.vocabulary
        self.total += 1
        plain = vocabulary.normalize(text)
        if not plain:
            self.empty.add(name)
            return
        # Signs of one character anywhere; names such as <unk> in whatever case they are written.
        taken = [sign for sign in self.reserved if sign in text or (len(sign) > 1 and sign.lower() in text.lower())]
        if taken:
            self.colliding.add(name, taken)
            return
        strange = vocabulary.strange(text)
        if strange:
            self.strange.add(name, strange)
            if vocabulary.unknown is None:
                return
        if not text.isascii() and (others := merged(text, vocabulary.change_case)):
            self.merged.add(name, [f"{c} (as {vocabulary.change_case(c)})" for c in others])
        ids = vocabulary.encode(text)
        self.labels += len(ids)
        self.unknown += ids.count(vocabulary.unknown) if vocabulary.unknown is not None else 0
        if not strange and vocabulary.decode(ids) != plain:
            example = f"{plain!r} comes back as {vocabulary.decode(ids)!r}"
            self.changed.add(name, () if self.changed.count else [example])
        if not self.fits(seconds, text):
            self.infeasible.add(name)

    def refuse(self, *, learnt: bool) -> None:
        """Refuse what cannot be trained on; unknown labels only where they are ``learnt``, in train.

        Raises:
            UsageError: the first such fault.
        """
        vocabulary, of = self.vocabulary, f"of {self.total} transcripts"
        if self.colliding.count:
            raise UsageError(
                f"{self.name}: {self.colliding.count} {of} contain {self.colliding.signs}, which the vocabulary has "
                f"for itself: {self.colliding}; remove it from the transcripts"
            )
        unknown = self.unknown / max(self.labels, 1)
        if self.strange.count and (vocabulary.unknown is None or (learnt and unknown > _STRANGE)):
            share = "no unknown label stands for them" if vocabulary.unknown is None else f"{unknown:.0%} of all labels"
            raise UsageError(
                f"{self.name}: {self.strange.count} {of} have characters without a label ({self.strange.signs}), "
                f"{share}: {self.strange}; expected {' '.join(list(vocabulary.ids)[:60])}; use another vocabulary, or "
                "transcripts that it spells"
            )
        if self.changed.count:
            raise UsageError(
                f"{self.name}: {self.changed.count} {of} do not come back from their labels ({self.changed.signs}): "
                f"{self.changed}; remove such signs from the transcripts"
            )
        if self.total and self.infeasible.count + self.empty.count == self.total:
            raise UsageError(
                f"{self.name}: none {of} can be learned, {self.infeasible.count} have more labels than their audio "
                f"has frames ({self.infeasible}), {self.empty.count} are empty; do transcripts belong to the audio?"
            )

    def warnings(self) -> list[str]:
        """A line for each fault that training goes on with."""
        lines = {
            "have characters without a label ({signs}), which become unknown": self.strange,
            "have letters that a change of case makes others of ({signs}); `units.language` tr, az or de": self.merged,
            "have more labels than CTC can emit in their frames and are left out": self.infeasible,
            "are empty and left out": self.empty,
        }
        return [
            f"{self.name}: {fault.count} of {self.total} transcripts {text.format(signs=fault.signs)}: {fault}"
            for text, fault in lines.items()
            if fault.count
        ]


def check_transcripts(
    name: str,
    transcribed: Iterable[Transcribed],
    vocabulary: Vocabulary,
    fits: Callable[[float, str], bool],
    size: int,
    show: Show = quiet,
) -> list[str]:
    """Look at all transcripts of a split.

    Args:
        size: how many there are, to say how long it takes.
        show: told how far it is.

    Returns:
        A line for each fault that training goes on with.

    Raises:
        UsageError: a fault that it cannot go on with.
    """
    check = TranscriptCheck(name, vocabulary, fits)
    for at, (utterance, seconds, text) in enumerate(transcribed):
        check.add(utterance, seconds, text)
        if at % 1000 == 0:
            show(f"check transcripts of {name}", at / max(size, 1))
    show(f"check transcripts of {name}", 1.0)
    check.refuse(learnt=name == "train")
    return check.warnings()


def missing_labels(vocabulary: Vocabulary, texts: Iterable[str]) -> list[str]:
    """What occurs in texts that a vocabulary has no label for."""
    return sorted({sign for text in texts for sign in vocabulary.strange(text)})
