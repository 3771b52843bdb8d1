"""The files of transformers' ``Wav2Vec2CTCTokenizer``, and a vocabulary.

Its ``pad_token`` is the blank of CTC. It spells like :class:`Vocabulary` but for two things: it puts no boundary after
the last word, and it takes text as it comes, without ``Vocabulary.normalize``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from w2v2.checkpoint.contents import read_json
from w2v2.errors import UsageError
from w2v2.text.vocabulary import Vocabulary

TOKENS, SETTINGS, SPECIAL, ADDED = (
    "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def tokenizer_misfits(vocabulary: Vocabulary) -> list[str]:
    """Why the tokenizer cannot have a vocabulary; empty: it can."""
    found = []
    if vocabulary.boundary is None:
        found.append("a vocabulary without a word boundary: their tokenizer puts one for every space")
    if len(set(vocabulary.labels)) < len(vocabulary.labels):
        found.append("a vocabulary with a label twice: their vocab.json has one id for each")
    if len(vocabulary.silent) > 2:
        found.append(f"{len(vocabulary.silent)} silent labels: their tokenizer has two, bos_token and eos_token")
    return found


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
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path, n_labels: int) -> Vocabulary:
    """The vocabulary of a folder's tokenizer.

    Args:
        n_labels: outputs of the model; each must have its label.

    Raises:
        UsageError: no tokenizer, one of several languages, or labels that do not fit the outputs.
    """
    path = folder / TOKENS
    if not path.is_file():
        raise UsageError(f"no {path}: a CTC model needs its tokenizer's files, {TOKENS} and {SETTINGS}")
    settings = _optional(folder / SPECIAL) | _optional(folder / SETTINGS)
    labels = _labels(path, settings, _optional(folder / ADDED), n_labels)
    ids = {label: i for i, label in enumerate(labels)}

    def place(name: str, default: str) -> int | None:
        token = settings.get(name, default)
        return ids.get(token["content"] if isinstance(token, dict) else token)

    blank = place("pad_token", "<pad>")
    if blank is None:
        raise UsageError(f"{path} has no pad_token, which is the blank of CTC: expected one among its tokens")
    unknown, boundary = place("unk_token", "<unk>"), place("word_delimiter_token", "|")
    unknown = None if unknown == blank else unknown
    silent = [place("bos_token", "<s>"), place("eos_token", "</s>")]
    return Vocabulary(
        labels=labels,
        blank=blank,
        unknown=unknown,
        boundary=boundary,
        silent=tuple(i for i in dict.fromkeys(silent) if i is not None and i not in (blank, unknown, boundary)),
    )


def _labels(path: Path, settings: dict[str, Any], added: dict[str, Any], n_labels: int) -> tuple[str, ...]:
    tokens = read_json(path)
    if any(isinstance(value, dict) for value in tokens.values()):
        raise UsageError(
            f"{path} is of several languages ({', '.join(tokens)}), with an adapter each; not to be had here"
        )
    by_id: dict[int, str] = {}
    for token, i in tokens.items():
        if not isinstance(i, int) or not 0 <= i < n_labels or i in by_id:
            raise UsageError(f"{path} has {token!r} at {i!r}; expected ids 0 to {n_labels - 1}, each once")
        by_id[i] = token
    decoder = settings.get("added_tokens_decoder") or {}
    extra = {i: token for token, i in added.items()}
    extra |= {int(i): token["content"] for i, token in decoder.items() if str(i).isdigit()}
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
