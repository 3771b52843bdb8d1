"""Beam search over CTC log-probabilities with flashlight-text: any labels, or words of a lexicon with an n-gram LM."""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from flashlight.lib.text.decoder import (
    CriterionType,
    DecodeResult,
    LexiconDecoder,
    LexiconDecoderOptions,
    LexiconFreeDecoder,
    LexiconFreeDecoderOptions,
    SmearingMode,
    Trie,
    ZeroLM,
)
from torch import Tensor

from w2v2.decoding.config import BeamConfig
from w2v2.decoding.greedy import Hypothesis, path_hypothesis
from w2v2.decoding.hot_words import HotLabels, HotWords
from w2v2.decoding.kenlm import is_binary, load_lm
from w2v2.decoding.lexicon import Entry, as_lm_writes, phrases_of, read_lexicon, spell, spelling_of
from w2v2.decoding.ngram import arpa_words
from w2v2.errors import JobError, UsageError
from w2v2.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)


_NEVER = -1e9
"""Log-probability of what a frame of ours does not allow: finite, so that an unfinished hypothesis outlives none."""


_HOMOPHONES = 6
"""Words of one spelling in flashlight's trie (``kTrieMaxLabel``)."""


_HOT_LABELS = 10
"""Labels tried at each frame with hot words but no lexicon: each is a call of Python, 3 million for 30 s with all."""


def make_beam(
    vocabulary: Vocabulary,
    config: BeamConfig,
    *,
    lm: Path | None = None,
    lexicon: Path | None = None,
    hot_words: Sequence[str] = (),
) -> FreeBeam | LexiconBeam:
    """See ``decoder.make_decoder``."""
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
    known = None if lm is None or is_binary(lm) else arpa_words(lm)
    if lexicon is not None:
        entries = read_lexicon(lexicon, vocabulary)
        entries = entries if known is None else as_lm_writes(entries, known, vocabulary)
    elif known is not None:
        entries = spell(known, vocabulary, f"the LM {lm}")
    else:
        raise UsageError(f"{lm} is a KenLM binary, which hides its words: name them with a lexicon, one a line")
    return LexiconBeam(vocabulary, config, entries, lm, hot_words)


class _Beam:
    """What both searches share: other weights for the same words, one utterance at a time in flashlight's decoder."""

    _decoder: LexiconDecoder | LexiconFreeDecoder
    vocabulary: Vocabulary

    def tuned(self, config: BeamConfig) -> Self:
        """The same with other weights; what was read from files is shared."""
        other = copy.copy(self)
        other._set_up(config)
        return other

    def _set_up(self, config: BeamConfig) -> None:
        self.config = config
        self._lock = threading.Lock()  # flashlight's decoder holds one utterance
        self._search(config)

    def _search(self, config: BeamConfig) -> None:
        raise NotImplementedError

    def _weighed(self, log_probs: Tensor) -> Tensor:
        weights = torch.zeros(log_probs.shape[1])
        weights[self.vocabulary.blank] = self.config.blank_score
        return log_probs + weights

    def _best(self, log_probs: Tensor) -> DecodeResult:
        emissions = log_probs.float().contiguous()
        with self._lock:
            results = self._decoder.decode(emissions.data_ptr(), *emissions.shape)
        if not results:
            raise JobError("log-probabilities are not numbers: the model has diverged; use an earlier checkpoint")
        return results[0]


class FreeBeam(_Beam):
    """Any sequence of labels, whatever words it makes. With hot words, of the ten likeliest labels of each frame.

    flashlight keeps every hypothesis of an utterance: 0.2 GB for 20 s with a beam of 50. Give it no long recordings.
    """

    def __init__(self, vocabulary: Vocabulary, config: BeamConfig, hot_words: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.hot_words = [spelling_of(phrase, vocabulary) for phrase in phrases_of(hot_words, vocabulary)]
        self._set_up(config)

    def _search(self, config: BeamConfig) -> None:
        vocabulary = self.vocabulary
        self._lm = HotLabels(self.hot_words, config.hot_word_boost, vocabulary) if self.hot_words else ZeroLM()
        options = LexiconFreeDecoderOptions(
            beam_size=config.beam_size,
            beam_size_token=config.beam_size_token or (_HOT_LABELS if self.hot_words else len(vocabulary.labels)),
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
        best = self._best(torch.cat([first, self._weighed(log_probs)]))
        return path_hypothesis(torch.tensor(best.tokens[2:-1]), self.vocabulary, best.score)


class LexiconBeam(_Beam):
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
        phrases = [phrase.split() for phrase in phrases_of(hot_words, vocabulary)]
        hot = list(dict.fromkeys(word for phrase in phrases for word in phrase))
        known = {vocabulary.normalize(entry.word) for entry in lexicon}
        added = [Entry(word, spelling_of(word, vocabulary)) for word in hot if word not in known]
        entries = _without_surplus([*lexicon, *added])
        numbers: dict[str, int] = {}
        self.spellings = [(numbers.setdefault(e.word, len(numbers)), list(e.spelling)) for e in entries]
        asked = len(numbers.keys() - {entry.word for entry in added})
        self.words = [vocabulary.normalize(word) for word in numbers]
        first = {word: i for i, word in reversed([*enumerate(self.words)])}
        self.same = [first[word] for word in self.words]
        """The first word that is spelled as each one."""
        self.hot_words = [tuple(first[word] for word in phrase) for phrase in phrases]
        self.ngram = ZeroLM() if lm is None else load_lm(lm, list(numbers), asked)
        self._trie: Trie | None = None
        self._set_up(config)

    def _search(self, config: BeamConfig) -> None:
        if self.hot_words:
            self._lm = HotWords(self.ngram, config.lm_weight, self.same, self.hot_words, config.hot_word_boost)
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
        best = self._best(torch.cat([self._weighed(log_probs), last]))
        path = best.tokens[1:-2]
        words = [(frame, word) for frame, word in enumerate(best.words[1:-1]) if word >= 0]
        if best.score < _NEVER / 2:  # no hypothesis ends with a word: what was begun is left out
            end = words[-1][0] + 1 if words else 0
            path = path[:end] + [self.vocabulary.blank] * (len(path) - end)
        score = best.score + (0.0 if best.score > _NEVER / 2 else -_NEVER)
        text = " ".join(self.words[word] for _, word in words)
        return path_hypothesis(torch.tensor(path), self.vocabulary, score, text)


def _without_surplus(entries: Sequence[Entry]) -> list[Entry]:
    """Entries, each once, without those that flashlight's trie would drop; they are named in the log."""
    kept: list[Entry] = []
    lost: list[Entry] = []
    words = Counter[tuple[int, ...]]()
    for entry in dict.fromkeys(entries):
        words[entry.spelling] += 1
        (kept if words[entry.spelling] <= _HOMOPHONES else lost).append(entry)
    if lost:
        log.warning(
            "%d entries of the lexicon left out: %d before are spelled the same, and flashlight takes no more: %s",
            len(lost), _HOMOPHONES, " ".join(entry.word for entry in lost),
        )  # fmt: skip
    return kept


def _frame(like: Tensor, label: int) -> Tensor:
    """(1, labels) that allows one label, at no cost."""
    frame = torch.full((1, like.shape[1]), _NEVER)
    frame[0, label] = 0.0
    return frame
