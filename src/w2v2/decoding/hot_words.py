"""Boosts for hot words and phrases, as language models that flashlight asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flashlight.lib.text.decoder import LM, LMState

from w2v2.text.vocabulary import Vocabulary

Begun = tuple[int, ...] | None
"""The longest end of a text, from the beginning of a word on, that begins a phrase; None: inside a word, none does."""


class Phrases:
    """Follows phrases in a text, token by token, as Aho and Corasick do.

    A phrase earns its boost in equal parts and loses it all if it turns out another one: so the beam keeps what may
    become a phrase, and a whole text has one boost for each time that a phrase is in it, exactly.

    Args:
        phrases: tokens of each, the boundary last, if there is one.
        boundary: token that ends each word; None: every token is a word.
    """

    def __init__(self, phrases: Iterable[tuple[int, ...]], boost: float, boundary: int | None) -> None:
        self.boost, self.boundary, self.whole = boost, boundary, frozenset(phrases)
        self.earned: dict[Begun, float] = {None: 0.0, (): 0.0}
        for phrase in self.whole:
            last = len(phrase) - (boundary is not None)  # the boundary itself earns nothing: a text may end without it
            for n in range(1, len(phrase)):
                share = boost * n / last
                self.earned[phrase[:n]] = max(share, self.earned.get(phrase[:n], share), key=abs)
        self._steps: dict[tuple[Begun, int], tuple[Begun, float]] = {}

    def step(self, begun: Begun, token: int) -> tuple[Begun, float]:
        """What is begun after a token, and what the token adds."""
        if (step := self._steps.get((begun, token))) is None:
            step = self._steps[begun, token] = self._step(begun, token)
        return step

    def _step(self, begun: Begun, token: int) -> tuple[Begun, float]:
        ends = token == self.boundary
        if begun is None:
            return (() if ends else None), 0.0
        if ends and (not begun or begun[-1] == token):
            return begun, 0.0  # one boundary more
        grown = (*begun, token)
        words = [i + 1 for i, each in enumerate(grown) if self.boundary is None or each == self.boundary]
        tails = [grown[i:] for i in [0, *words]]
        after = next((tail for tail in tails if tail in self.earned), None)
        added = self.boost * sum(tail in self.whole for tail in tails)
        return after, added + self.earned[after] - self.earned[begun]

    def end(self, begun: Begun) -> float:
        """What the end of the text adds."""
        added = 0.0
        if self.boundary is not None:
            begun, added = self.step(begun, self.boundary)
        return added - self.earned[begun]


class HotWords(LM):
    """An LM of words times its weight, plus a boost for each hot word or phrase.

    Args:
        lm: of words.
        words: what each word of the LM is in the phrases; several may be spelled the same.
        phrases: words of each.
    """

    def __init__(
        self, lm: LM, weight: float, words: Sequence[int], phrases: Iterable[tuple[int, ...]], boost: float
    ) -> None:
        super().__init__()
        self.lm, self.weight, self.words, self.phrases = lm, weight, words, Phrases(phrases, boost, None)
        self._states: dict[tuple[LMState, Begun], LMState] = {}
        self._meaning: dict[LMState, tuple[LMState, Begun]] = {}

    def start(self, start_with_nothing: bool) -> LMState:
        """State before the first word."""
        self._states, self._meaning = {}, {}
        return self._state(self.lm.start(start_with_nothing), ())

    def _state(self, state: LMState, begun: Begun) -> LMState:
        """One for each of the LM's states and what is begun: flashlight joins hypotheses of the same state."""
        if (own := self._states.get((state, begun))) is None:
            own = self._states[state, begun] = LMState()
            self._meaning[own] = state, begun
        return own

    def score(self, state: LMState, word: int) -> tuple[LMState, float]:
        """State after a word, and what the word adds."""
        before, begun = self._meaning[state]
        after, score = self.lm.score(before, word)
        begun, boost = self.phrases.step(begun, self.words[word])
        return self._state(after, begun), self.weight * score + boost

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """State after the sentence, and what its end adds."""
        before, begun = self._meaning[state]
        after, score = self.lm.finish(before)
        return self._state(after, ()), self.weight * score + self.phrases.end(begun)


class HotLabels(LM):
    """A boost for each hot word or phrase among labels.

    Args:
        phrases: labels of each, the boundary last.
    """

    def __init__(self, phrases: Iterable[tuple[int, ...]], boost: float, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.phrases, self.silent = Phrases(phrases, boost, vocabulary.boundary), frozenset(vocabulary.silent)
        self._begun: dict[LMState, Begun] = {}

    def start(self, start_with_nothing: bool) -> LMState:
        """State before the first label."""
        state = LMState()
        self._begun = {state: ()}
        return state

    def score(self, state: LMState, label: int) -> tuple[LMState, float]:
        """State after a label, and what the label adds."""
        after, begun = state.child(label), self._begun[state]
        self._begun[after], gain = (begun, 0.0) if label in self.silent else self.phrases.step(begun, label)
        return after, gain

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """State after the last label, and what the end adds."""
        return state, self.phrases.end(self._begun[state])
