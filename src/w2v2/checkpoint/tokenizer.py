"""The labels of other formats: transformers' ``Wav2Vec2CTCTokenizer``, and fairseq's dictionaries.

The tokenizer's ``pad_token`` is the blank of CTC. It spells like :class:`Vocabulary` but for two things: it puts no
boundary after the last word, and it takes text as it comes, without ``Vocabulary.normalize``.

The first four labels of fairseq's dictionaries are ``<s> <pad> </s> <unk>``, and CTC's blank is the first; here they
are called ``<pad> <s> </s> <unk>``, as in the Hugging Face versions of the same models, so that the blank bears its
usual name there. Ids stay what they are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from w2v2.checkpoint.pickles import plain
from w2v2.checkpoint.weights import choose_language
from w2v2.errors import UsageError, shown
from w2v2.files import read_text, write_text
from w2v2.serial import checked, read_json
from w2v2.text.spelling import case_of
from w2v2.text.vocabulary import PhonemeVocabulary, Vocabulary

TOKENS, SETTINGS, SPECIAL, ADDED = (
    "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def tokenizer_misfits(vocabulary: Vocabulary) -> list[str]:
    """Return every reason why the tokenizer cannot have a vocabulary; empty: it can."""
    faults = []
    if vocabulary.boundary is None:
        faults.append("a vocabulary without a word boundary: their tokenizer puts one for every space")
    if len(set(vocabulary.labels)) < len(vocabulary.labels):
        faults.append("a vocabulary with a label twice: their vocab.json has one id for each")
    if len(vocabulary.silent) > 2:
        faults.append(f"{len(vocabulary.silent)} silent labels: their tokenizer has two, bos_token and eos_token")
    return faults


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Write ``vocab.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``."""
    labels = vocabulary.labels
    silent = [labels[i] for i in vocabulary.silent]
    special = {
        "bos_token": silent[0] if silent else None,
        "eos_token": silent[1] if len(silent) > 1 else None,
        "unk_token": None if vocabulary.unknown is None else labels[vocabulary.unknown],
        "pad_token": labels[vocabulary.blank],
    }
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        **special,
        "word_delimiter_token": None if vocabulary.boundary is None else labels[vocabulary.boundary],
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / TOKENS, {label: i for i, label in enumerate(labels)})
    _write(folder / SETTINGS, settings)
    _write(folder / SPECIAL, {name: token for name, token in special.items() if token is not None})


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


class _Token(TypedDict):
    content: str


class _Settings(TypedDict, total=False):
    tokenizer_class: str | None
    pad_token: str | _Token | None
    unk_token: str | _Token | None
    bos_token: str | _Token | None
    eos_token: str | _Token | None
    word_delimiter_token: str | _Token | None
    phone_delimiter_token: str | None
    target_lang: str | None
    added_tokens_decoder: dict[str, _Token] | None


def read_tokenizer(folder: Path, n_labels: int, language: str | None = None) -> Vocabulary:
    """Return the vocabulary of a folder's tokenizer: phonemes' is a ``PhonemeVocabulary``.

    Args:
        n_labels: outputs of the model; each must have its label.
        language: of a tokenizer of several; None: the one that it is set to.

    Raises:
        UsageError: no tokenizer, no such language, a kind that spells otherwise, or labels that do not fit the outputs.
    """
    path = folder / TOKENS
    if not path.is_file():
        raise UsageError(f"no {path}: a CTC model needs its tokenizer's files, {TOKENS} and {SETTINGS}")
    both = _optional(folder / SPECIAL) | _optional(folder / SETTINGS)
    settings: _Settings = checked(both, _Settings, str(folder / SETTINGS))
    kind, boundary_token = _kind(settings, folder)
    added: dict[str, int] = checked(_optional(folder / ADDED), dict[str, int], str(folder / ADDED))
    tokens = choose_language(read_json(path), language, settings.get("target_lang"), path)
    labels = _labels(tokens, path, settings, added, n_labels)
    ids = {label: i for i, label in enumerate(labels)}

    def place(name: str, default: str | None) -> int | None:
        token: Any = settings.get(name, default)
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else ids.get(token)

    blank = place("pad_token", "<pad>")
    if blank is None:
        raise UsageError(f"{path} has no pad_token, which is the blank of CTC: expected one among its tokens")
    unknown, boundary = place("unk_token", "<unk>"), place("word_delimiter_token", boundary_token)
    unknown = None if unknown == blank else unknown
    silent = [place("bos_token", "<s>"), place("eos_token", "</s>")]
    if kind is PhonemeVocabulary:  # a label is a word, and what ends words of several stands for nothing
        silent, boundary = [*silent, boundary], None
    return kind(
        labels=labels,
        blank=blank,
        unknown=unknown,
        boundary=boundary,
        silent=tuple(i for i in dict.fromkeys(silent) if i is not None and i not in (blank, unknown, boundary)),
    )


def settle_case(vocabulary: Vocabulary) -> tuple[Vocabulary, list[str]]:
    """Return a vocabulary from elsewhere with the case that text gets for it, and notes where that is a choice.

    A stray capital does not make it one of both cases; labels of Turkish and its kin have their rules of i and \u0131.
    """
    notes: list[str] = []
    case, strays = case_of(vocabulary.ids)
    if type(vocabulary) is not Vocabulary:
        return vocabulary, notes
    if strays:
        vocabulary = replace(vocabulary, case=case)
        notes.append(f"its letters are in {case} case but for {strays}: so is all text for it, and these never occur")
    if any(set(letters) <= vocabulary.ids.keys() for letters in ("\u0131i\u011f\u015f", "\u0130I\u011e\u015e")):
        vocabulary = replace(vocabulary, language="tr")
        notes.append("it has dotless \u0131 beside i: text changes case by the rules of Turkish")
    return vocabulary, notes


def _kind(settings: _Settings, folder: Path) -> tuple[type[Vocabulary], str | None]:
    """Return which vocabulary spells as a tokenizer does, and the tokenizer's word delimiter if it names none."""
    name = settings.get("tokenizer_class") or _optional(folder / "config.json").get("tokenizer_class")
    if name in (None, "Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer"):
        return Vocabulary, "|"
    if name == "Wav2Vec2PhonemeCTCTokenizer":
        if (delimiter := settings.get("phone_delimiter_token", " ")) != " ":
            raise UsageError(f"{folder / SETTINGS}: phonemes between {delimiter!r}; expected spaces")
        return PhonemeVocabulary, None
    raise UsageError(
        f"{folder / SETTINGS} has a tokenizer_class that spells otherwise, {name!r}; expected Wav2Vec2CTCTokenizer or "
        "Wav2Vec2PhonemeCTCTokenizer"
    )


def _labels(
    tokens: dict[str, Any], path: Path, settings: _Settings, added: dict[str, int], n_labels: int
) -> tuple[str, ...]:
    by_id: dict[int, str] = {}
    for token, i in checked(tokens, dict[str, int], str(path)).items():
        if not 0 <= i < n_labels or i in by_id:
            raise UsageError(f"{path} has {token!r} at {shown(i)}; expected ids 0 to {n_labels - 1}, each once")
        by_id[i] = token
    decoder = settings.get("added_tokens_decoder") or {}
    extra = {i: token for token, i in added.items()}
    extra |= {int(i): token["content"] for i, token in decoder.items() if i.isdecimal() and len(i) < 10}
    # Tokens added later have no output where the model was not widened for them: transformers never predicts them.
    by_id = {i: token for i, token in extra.items() if i < n_labels} | by_id
    missing = [str(i) for i in range(n_labels) if i not in by_id]
    if missing:
        raise UsageError(
            f"{path} has no token for {len(missing)} of the model's {n_labels} outputs: {' '.join(missing)}; "
            "expected the vocabulary that the model was trained with"
        )
    return tuple(by_id[i] for i in range(n_labels))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# --- fairseq's dictionaries -------------------------------------------------------------------------------------------

DICTIONARY = "dict.ltr.txt"
_SPECIAL, _THEIR_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>"), ("<s>", "<pad>", "</s>", "<unk>")


def dictionary_misfits(vocabulary: Vocabulary) -> list[str]:
    """Return why a dictionary cannot have a vocabulary; empty: it can."""
    if (vocabulary.blank, vocabulary.unknown, sorted(vocabulary.silent)) == (0, 3, [1, 2]):
        return []
    return [
        "the vocabulary: its dictionaries begin with the blank, two labels that are never said (<pad> </s>) and "
        f"the unknown label, got {' '.join(vocabulary.labels[:4])}"
    ]


def write_dictionary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write ``dict.ltr.txt``."""
    write_text(folder / DICTIONARY, "".join(f"{label} 1\n" for label in vocabulary.labels[4:]))


def read_dictionary(task_state: Any, path: Path) -> Vocabulary:
    """Return the vocabulary of a checkpoint, from its task's state or from a ``dict.*.txt`` beside its file.

    Raises:
        UsageError: neither is there, or it is not a dictionary.
    """
    task = plain(task_state, path)
    saved = task.get("target_dictionary") if isinstance(task, dict) else None
    if isinstance(saved, dict) and isinstance(saved.get("symbols"), list):
        symbols = tuple(str(symbol) for symbol in saved["symbols"])
        if symbols[:4] != _THEIR_SPECIAL:
            raise UsageError(f"{path}: its dictionary must begin with {' '.join(_THEIR_SPECIAL)}, got {symbols[:4]}")
        symbols = symbols[4:]
    else:
        files = sorted(path.parent.glob("dict.*.txt"))
        if len(files) != 1:
            raise UsageError(
                f"{path} does not hold its dictionary: expected one dict.*.txt beside it, such as {DICTIONARY}, "
                f"got {', '.join(file.name for file in files) or 'none'}"
            )
        symbols = _read_symbols(files[0])
    labels = (*_SPECIAL, *symbols)
    boundary = labels.index("|") if "|" in labels else None
    return Vocabulary(labels=labels, blank=0, unknown=3, boundary=boundary, silent=(1, 2))


def _read_symbols(path: Path) -> tuple[str, ...]:
    """Return the labels of a file with a label and its count on each line."""
    rows = [line.rstrip().rpartition(" ") for line in read_text(path).splitlines()]
    for symbol, space, count in rows:
        if not symbol or not count.isdigit():
            raise UsageError(f"{path} must have a label and a count on each line, got {symbol + space + count!r}")
    return tuple(symbol for symbol, _, _ in rows)
