"""Which words a beam search may find, and how the labels spell them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from w2v2.decoding.ngram import SPECIAL
from w2v2.errors import UsageError
from w2v2.files import open_text
from w2v2.text.spelling import composed_ids
from w2v2.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A word of a lexicon."""

    word: str
    """As the LM has it."""
    spelling: tuple[int, ...]
    """Labels, the boundary last."""


def read_lexicon(path: Path, vocabulary: Vocabulary) -> list[Entry]:
    """Words and their spellings, labels between spaces (``SUN S U N |``); a word alone is spelled by the vocabulary.

    Raises:
        UsageError: labels that the vocabulary lacks, a boundary inside a word, a spelling of a sign such as ``<unk>``,
            or no word that can be spelled.
    """
    ids = composed_ids(dict(enumerate(vocabulary.labels)))
    boundary = vocabulary.boundary
    assert boundary is not None
    entries, alone = [], []
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            word, *labels = line.split() or [""]
            labels = [normalize("NFC", label) for label in labels]
            if not labels:
                alone += [word] if word and word not in SPECIAL else []
                continue
            if word in SPECIAL:
                raise UsageError(f"{path}:{number}: {word} is a sign of language models and no word; remove the line")
            strange = [label for label in labels if label not in ids]
            spelling = [ids.get(label, boundary) for label in labels]
            spelling = spelling[:-1] if spelling[-1] == boundary else spelling
            if strange or not spelling or boundary in spelling or vocabulary.blank in spelling:
                expected = f"labels of {' '.join(vocabulary.labels)} between spaces, a boundary at the end alone"
                raise UsageError(f"{path}:{number}: {word} is spelled {' '.join(labels)}; expected {expected}")
            entries.append(Entry(word, (*spelling, boundary)))
    return entries + (spell(alone, vocabulary, f"the lexicon {path}") if alone or not entries else [])


def spell(words: Sequence[str], vocabulary: Vocabulary, source: str) -> list[Entry]:
    """Words as the vocabulary spells them; those that it cannot spell are left out, and their number logged.

    Raises:
        UsageError: none can be spelled.
    """
    spellings = [(word, _try_spelling(word, vocabulary)) for word in words]
    entries = [Entry(word, spelling) for word, spelling in spellings if spelling]
    lost = [word for word, spelling in spellings if not spelling]
    if not entries:
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
    return entries


def as_lm_writes(lexicon: list[Entry], known: Sequence[str], vocabulary: Vocabulary) -> list[Entry]:
    """Entries under the names that an LM, which knows these words, has for them, whatever the case."""
    names = {vocabulary.normalize(word): word for word in known} | {word: word for word in known}
    return [Entry(names.get(e.word) or names.get(vocabulary.normalize(e.word), e.word), e.spelling) for e in lexicon]


def _try_spelling(word: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Empty where a character has no label."""
    try:
        ids = vocabulary.encode(word)
    except UsageError:
        return ()
    return () if vocabulary.unknown in ids else tuple(ids)


def spelling_of(word: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Labels of a hot word or phrase, the boundary last.

    Raises:
        UsageError: a character without a label.
    """
    spelling = _try_spelling(word, vocabulary)
    if not spelling:
        raise UsageError(f"hot word {word!r} cannot be spelled; expected labels {' '.join(vocabulary.labels)}")
    return spelling


def phrases_of(hot_words: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Hot words and phrases, normalised, each once.

    Raises:
        UsageError: there is no word in one.
    """
    phrases = list(dict.fromkeys(vocabulary.normalize(phrase) for phrase in hot_words))
    if "" in phrases:
        raise UsageError("a hot word is a word or some words, got ''; leave it out")
    return phrases
