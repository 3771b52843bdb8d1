"""Beam search over CTC log-probabilities with flashlight-text: any labels, or words of a lexicon with an n-gram LM."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flashlight.lib.text.decoder import (
    LM,
    CriterionType,
    DecodeResult,
    LexiconDecoder,
    LexiconDecoderOptions,
    LexiconFreeDecoder,
    LexiconFreeDecoderOptions,
    LMState,
    SmearingMode,
    Trie,
    ZeroLM,
)
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary
from torch import Tensor

from w2v2.decode import BeamConfig, Hypothesis, path_hypothesis
from w2v2.errors import JobError, UsageError
from w2v2.lm import arpa_words, open_text
from w2v2.text import Vocabulary

log = logging.getLogger(__name__)

_KENLM_BINARY = b"mmap lm http://kheafield.com/code"
_NEVER = -1e9
"""Log-probability of what a frame of ours does not allow: finite, so that an unfinished hypothesis outlives none."""


@dataclass(frozen=True)
class Entry:
    """A word of a lexicon."""

    word: str
    """As the LM has it."""
    spelling: tuple[int, ...]
    """Labels, the boundary last."""


def make_beam(
    vocabulary: Vocabulary,
    config: BeamConfig,
    *,
    lm: Path | None = None,
    lexicon: Path | None = None,
    hot_words: Sequence[str] = (),
) -> FreeBeam | LexiconBeam:
    """See ``decode.make_decoder``."""
    for path in (lm, lexicon):
        if path is not None and not path.is_file():
            raise UsageError(f"no file {path}: expected {'an LM' if path is lm else 'a lexicon'}; check the path")
    if vocabulary.boundary is None and (lm or lexicon or hot_words):
        raise UsageError(
            "an LM, a lexicon and hot words need labels with a word boundary, which this vocabulary lacks; decode "
            "without them"
        )
    if lm is None and lexicon is None:
        return FreeBeam(vocabulary, config, hot_words)
    known = None if lm is None or _is_binary(lm) else arpa_words(lm)
    if lexicon is not None:
        entries = _as_lm_writes(read_lexicon(lexicon, vocabulary), known, vocabulary)
    elif known is not None:
        entries = spell(known, vocabulary, f"the LM {lm}")
    else:
        raise UsageError(f"{lm} is a KenLM binary, which hides its words: name them with a lexicon, one a line")
    return LexiconBeam(vocabulary, config, entries, lm, hot_words)


class FreeBeam:
    """Any sequence of labels, whatever words it makes."""

    def __init__(self, vocabulary: Vocabulary, config: BeamConfig, hot_words: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.hot_words = [_spelling(word, vocabulary)[:-1] for word in _single_words(hot_words, vocabulary)]
        self._search(config)

    def tuned(self, config: BeamConfig) -> FreeBeam:
        """The same with other weights."""
        other = copy.copy(self)
        other._search(config)
        return other

    def _search(self, config: BeamConfig) -> None:
        self.config = config
        vocabulary = self.vocabulary
        self._lm = HotLabels(self.hot_words, config.hot_word_boost, vocabulary) if self.hot_words else ZeroLM()
        options = LexiconFreeDecoderOptions(
            beam_size=config.beam_size,
            beam_size_token=config.beam_size_token or len(vocabulary.labels),
            beam_threshold=config.beam_threshold,
            lm_weight=1.0,
            sil_score=0.0 if vocabulary.boundary is None else config.silence_score,
            log_add=config.sum_paths,
            criterion_type=CriterionType.CTC,
        )
        silence = vocabulary.blank if vocabulary.boundary is None else vocabulary.boundary
        self._decoder = LexiconFreeDecoder(options, self._lm, silence, vocabulary.blank, [])

    def __call__(self, log_probs: Tensor) -> Hypothesis:
        """Decode (T, labels)."""
        # flashlight begins as if a boundary had just been said; a blank in front makes a boundary at once a label.
        first = _frame(log_probs, self.vocabulary.blank)
        best = _best(self._decoder, torch.cat([first, log_probs]))
        return path_hypothesis(torch.tensor(best.tokens[2:-1]), self.vocabulary, best.score)


class LexiconBeam:
    """Words of a lexicon, weighed by an n-gram LM if there is one. The last one needs no boundary after it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        config: BeamConfig,
        lexicon: Sequence[Entry],
        lm: Path | None = None,
        hot_words: Sequence[str] = (),
    ) -> None:
        self.vocabulary = vocabulary
        hot = _single_words(hot_words, vocabulary)
        known = {vocabulary.normalize(entry.word) for entry in lexicon}
        added = [Entry(word, _spelling(word, vocabulary)) for word in hot if word not in known]
        numbers: dict[str, int] = {}
        self.spellings = [(numbers.setdefault(e.word, len(numbers)), list(e.spelling)) for e in [*lexicon, *added]]
        self.words = [vocabulary.normalize(word) for word in numbers]
        self.hot_words = {i for i, word in enumerate(self.words) if word in set(hot)}
        self.ngram = ZeroLM() if lm is None else _load(lm, list(numbers))
        self._trie: Trie | None = None
        self._search(config)

    def tuned(self, config: BeamConfig) -> LexiconBeam:
        """The same with other weights; what was read from files is shared."""
        other = copy.copy(self)
        other._search(config)
        return other

    def _search(self, config: BeamConfig) -> None:
        self.config = config
        if self.hot_words:
            self._lm = HotWords(self.ngram, config.lm_weight, self.hot_words, config.hot_word_boost)
        else:
            self._lm = self.ngram
        if self._trie is None or self.hot_words:  # what it looks ahead to depends on the weights of hot words alone
            self._trie = self._build_trie()
        options = LexiconDecoderOptions(
            beam_size=config.beam_size,
            beam_size_token=config.beam_size_token or len(self.vocabulary.labels),
            beam_threshold=config.beam_threshold,
            lm_weight=1.0 if self.hot_words else config.lm_weight,
            word_score=config.word_score,
            unk_score=-math.inf,
            sil_score=config.silence_score,
            log_add=config.sum_paths,
            criterion_type=CriterionType.CTC,
        )
        blank, unused = self.vocabulary.blank, len(self.words)
        self._decoder = LexiconDecoder(
            options, self._trie, self._lm, self.vocabulary.boundary, blank, unused, [], False
        )

    def _build_trie(self) -> Trie:
        trie = Trie(len(self.vocabulary.labels), self.vocabulary.boundary)
        start = self._lm.start(False)
        for word, spelling in self.spellings:
            trie.insert(spelling, word, self._lm.score(start, word)[1])
        trie.smear(SmearingMode.MAX)
        return trie

    def __call__(self, log_probs: Tensor) -> Hypothesis:
        """Decode (T, labels)."""
        boundary = self.vocabulary.boundary
        assert boundary is not None
        # A boundary after the end, for nothing: otherwise flashlight drops a last word that has none.
        last = _frame(log_probs, boundary) - self.config.silence_score
        best = _best(self._decoder, torch.cat([log_probs, last]))
        path = best.tokens[1:-2]
        words = [(frame, word) for frame, word in enumerate(best.words[1:-1]) if word >= 0]
        if best.score < _NEVER / 2:  # no hypothesis ends with a word: what was begun is left out
            end = words[-1][0] + 1 if words else 0
            path = path[:end] + [self.vocabulary.blank] * (len(path) - end)
        score = best.score + (0.0 if best.score > _NEVER / 2 else -_NEVER)
        text = " ".join(self.words[word] for _, word in words)
        return path_hypothesis(torch.tensor(path), self.vocabulary, score, text)


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
        self.boundary, self.silent = vocabulary.boundary, vocabulary.silent
        self.whole = {spelling: boost for spelling in spellings}
        self.earned: dict[tuple[int, ...], float] = {}
        for spelling in self.whole:
            for n in range(1, len(spelling) + 1):
                share = boost * n / len(spelling)
                self.earned[spelling[:n]] = max(share, self.earned.get(spelling[:n], share), key=abs)
        self.begun: dict[LMState, tuple[int, ...] | None] = {}

    def start(self, start_with_nothing: bool) -> LMState:
        """State before the first label."""
        state = LMState()
        self.begun = {state: ()}
        return state

    def score(self, state: LMState, label: int) -> tuple[LMState, float]:
        """State after a label, and what the label adds."""
        after = state.child(label)
        begun = self.begun[state]
        if label in self.silent:
            self.begun[after] = begun
            return after, 0.0
        earned = self._earned(begun)
        if label == self.boundary:
            self.begun[after] = ()
            return after, self._whole(begun) - earned
        grown = None if begun is None else (*begun, label)
        self.begun[after] = grown = grown if grown in self.earned else None
        return after, self._earned(grown) - earned

    def finish(self, state: LMState) -> tuple[LMState, float]:
        """State after the last label, and what the end adds."""
        begun = self.begun[state]
        return state, self._whole(begun) - self._earned(begun)

    def _earned(self, begun: tuple[int, ...] | None) -> float:
        return self.earned.get(begun, 0.0) if begun else 0.0

    def _whole(self, begun: tuple[int, ...] | None) -> float:
        return self.whole.get(begun, 0.0) if begun else 0.0


def read_lexicon(path: Path, vocabulary: Vocabulary) -> list[Entry]:
    """Words and their spellings, labels between spaces (``SUN S U N |``); a word alone is spelled by the vocabulary.

    Raises:
        UsageError: labels that the vocabulary lacks, a boundary inside a word, or no word that can be spelled.
    """
    ids = {label: i for i, label in enumerate(vocabulary.labels)}
    boundary = vocabulary.boundary
    assert boundary is not None
    found, alone = [], []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            word, *labels = line.split() or [""]
            if not labels:
                alone += [word] if word else []
                continue
            strange = [label for label in labels if label not in ids]
            spelling = [ids.get(label, boundary) for label in labels]
            spelling = spelling[:-1] if spelling[-1] == boundary else spelling
            if strange or not spelling or boundary in spelling or vocabulary.blank in spelling:
                expected = f"labels of {' '.join(vocabulary.labels)} between spaces, a boundary at the end alone"
                raise UsageError(f"{path}:{number}: {word} is spelled {' '.join(labels)}; expected {expected}")
            found.append(Entry(word, (*spelling, boundary)))
    return found + (spell(alone, vocabulary, f"the lexicon {path}") if alone or not found else [])


def spell(words: Sequence[str], vocabulary: Vocabulary, source: str) -> list[Entry]:
    """Words as the vocabulary spells them; those that it cannot spell are left out, and their number logged.

    Raises:
        UsageError: none can be spelled.
    """
    spellings = [(word, _try_spelling(word, vocabulary)) for word in words]
    found = [Entry(word, spelling) for word, spelling in spellings if spelling]
    lost = [word for word, spelling in spellings if not spelling]
    if not found:
        raise UsageError(
            f"none of the {len(words)} words of {source} can be spelled with the labels {' '.join(vocabulary.labels)}"
            f"{f', such as {lost[0]}' if lost else ''}; expected words of the same script"
        )
    if lost:
        log.info("%d of %d words of %s cannot be spelled, such as %s", len(lost), len(words), source, lost[0])
    recased = [word for word in words if vocabulary.normalize(word) != word]
    if recased:
        as_read = vocabulary.normalize(recased[0])
        log.info("%d of %d words of %s are read as the vocabulary writes them: %s as %s",
                 len(recased), len(words), source, recased[0], as_read)  # fmt: skip
    return found


def _as_lm_writes(lexicon: list[Entry], known: Sequence[str] | None, vocabulary: Vocabulary) -> list[Entry]:
    """Entries under the names that the LM has for their words, whatever the case."""
    if known is None:
        return lexicon
    names = {vocabulary.normalize(word): word for word in known} | {word: word for word in known}
    lost = [e.word for e in lexicon if e.word not in names and vocabulary.normalize(e.word) not in names]
    if len(lost) == len(lexicon):
        raise UsageError(
            f"the LM knows none of the {len(lexicon)} words of the lexicon, such as {lost[0]}; expected an LM of the "
            "same language"
        )
    if lost:
        log.info("%d of %d words of the lexicon are unknown to the LM, such as %s", len(lost), len(lexicon), lost[0])
    return [Entry(names.get(e.word) or names.get(vocabulary.normalize(e.word), e.word), e.spelling) for e in lexicon]


def _try_spelling(word: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Empty where a character has no label."""
    try:
        ids = vocabulary.encode(word)
    except UsageError:
        return ()
    return () if vocabulary.unknown in ids else tuple(ids)


def _spelling(word: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    spelling = _try_spelling(word, vocabulary)
    if not spelling:
        raise UsageError(f"hot word {word!r} cannot be spelled; expected labels {' '.join(vocabulary.labels)}")
    return spelling


def _single_words(words: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Normalised, each once."""
    normal = {vocabulary.normalize(word): word for word in words}
    for word, given in normal.items():
        if len(word.split()) != 1:
            raise UsageError(f"a hot word is one word, got {given!r}; give the words of a phrase one by one")
    return list(normal)


def _is_binary(lm: Path) -> bool:
    with lm.open("rb") as file:
        return file.read(len(_KENLM_BINARY)) == _KENLM_BINARY


def _load(lm: Path, words: list[str]) -> KenLM:
    try:
        model = KenLM(str(lm), Dictionary(words))
    except RuntimeError as error:
        raise UsageError(f"{lm} is not an LM: {str(error).splitlines()[-1]}; expected ARPA or a KenLM binary") from None
    nothing = model.start(True)
    if len(words) > 1 and len({model.score(nothing, word)[1] for word in range(len(words))}) == 1:
        log.info("the LM %s tells no word of the lexicon from another: is it of the same language and case?", lm)
    return model


def _frame(like: Tensor, label: int) -> Tensor:
    """(1, labels) that allows one label, at no cost."""
    frame = torch.full((1, like.shape[1]), _NEVER)
    frame[0, label] = 0.0
    return frame


def _best(decoder: LexiconDecoder | LexiconFreeDecoder, log_probs: Tensor) -> DecodeResult:
    emissions = log_probs.float().contiguous()
    found = decoder.decode(emissions.data_ptr(), *emissions.shape)
    if not found:
        raise JobError("log-probabilities are not numbers: the model has diverged; use an earlier checkpoint")
    return found[0]
