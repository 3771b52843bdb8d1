"""Boosts for hot words, as language models that flashlight asks."""

from __future__ import annotations

from collections.abc import Iterable

from flashlight.lib.text.decoder import LM, LMState

from w2v2.text.vocabulary import Vocabulary


class HotWords(LM):
    """An LM of words times its weight, plus a boost for each hot word."""

    def __init__(self, lm: LM, weight: float, hot_words: set[int], boost: float) -> None:
        super().__init__()
        self.lm, self.weight, self.hot_words, self.boost = lm, weight, hot_words, boost

    def start(self, start_with_nothing: bool) -> LMState:
        """State before the first word."""
        return self.lm.start(start_with_nothing)

    def score(self, state: LMState, word: int) -> tuple[LMState, float]:
        """State after a word, and what the word adds."""
        after, score = self.lm.score(state, word)
        return after, self.weight * score + (self.boost if word in self.hot_words else 0.0)

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """State after the sentence, and what its end adds."""
        after, score = self.lm.finish(state)
        return after, self.weight * score


class HotLabels(LM):
    """A boost for each hot word among labels.

    A word earns its boost label by label, in equal parts, and loses it all if it turns out another one: so the beam
    keeps what may become a hot word, and a whole hypothesis has one boost for each hot word in it, exactly.
    """

    def __init__(self, spellings: Iterable[tuple[int, ...]], boost: float, vocabulary: Vocabulary) -> None:
        super().__init__()
        whole = {spelling: boost for spelling in spellings}
        earned: dict[tuple[int, ...], float] = {(): 0.0}
        for spelling in whole:
            for n in range(1, len(spelling) + 1):
                share = boost * n / len(spelling)
                earned[spelling[:n]] = max(share, earned.get(spelling[:n], share), key=abs)
        numbers = {begun: number for number, begun in enumerate(earned, 1)}
        no = 0  # what is no beginning of a hot word
        self.left = [0.0, *(whole.get(begun, 0.0) - value for begun, value in earned.items())]
        """What the end of a word adds, for each beginning of one."""
        self.steps: list[list[tuple[int, float]]] = []
        """The beginning after each label, and what the label adds."""
        for number, begun in enumerate([None, *earned]):
            has = 0.0 if begun is None else earned[begun]
            row = []
            for label in range(len(vocabulary.labels)):
                grown = None if begun is None else (*begun, label)
                if label in vocabulary.silent:
                    row.append((number, 0.0))
                elif label == vocabulary.boundary:
                    row.append((numbers[()], self.left[number]))
                else:
                    row.append((numbers.get(grown, no), earned.get(grown, 0.0) - has) if grown else (no, -has))
            self.steps.append(row)
        self.begun: dict[LMState, int] = {}

    def start(self, start_with_nothing: bool) -> LMState:
        """State before the first label."""
        state = LMState()
        self.begun = {state: 1}
        return state

    def score(self, state: LMState, label: int) -> tuple[LMState, float]:
        """State after a label, and what the label adds."""
        after = state.child(label)
        self.begun[after], gain = self.steps[self.begun[state]][label]
        return after, gain

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """State after the last label, and what the end adds."""
        return state, self.left[self.begun[state]]
