"""transformers' feature extractor and tokenizer against what is done here: the same audio heard, text spelled."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.extractor import PREPROCESSOR, PROCESSOR
from w2v2.errors import JobError
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config
from w2v2.text.vocabulary import PhonemeVocabulary, Vocabulary

_TOLERANCE = 1e-4
"""Of the audio's unit variance: the two add other, small numbers to it before they divide."""


def compare_processor(
    transformers: Any, folder: Path, checkpoint: Checkpoint, audio: Tensor, language: str | None = None
) -> dict[str, Any]:
    """Compare what both hear of some audio, and how both spell the labels and read a path of them.

    Args:
        transformers: the package.
        folder: theirs.
        checkpoint: ours.
        audio: (S,) noise of unit variance.
        language: to set their tokenizer to.

    Returns:
        The certificate's ``processor``: ``audio`` and ``text``, each with what was compared, or why it was not.

    Raises:
        JobError: they differ.
    """
    vocabulary = checkpoint.vocabulary
    return {
        "audio": _compare_audio(transformers, folder, audio + 0.1, checkpoint.config),
        "text": "no labels" if vocabulary is None else _compare_text(transformers, folder, vocabulary, language),
    }


def _compare_audio(transformers: Any, folder: Path, audio: Tensor, config: Wav2Vec2Config) -> dict[str, Any] | str:
    if not any((folder / name).is_file() for name in (PREPROCESSOR, PROCESSOR)):
        return "not compared: no feature extractor"
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
    theirs = torch.as_tensor(extractor(audio.numpy(), sampling_rate=SAMPLE_RATE).input_values[0])
    difference = (config.normalized(audio) - theirs).abs().max().item()
    if not difference <= _TOLERANCE:
        raise JobError(
            f"transformers' feature extractor gives other audio, by {difference:.2g}, where normalize_audio is "
            f"{config.normalize_audio}; nothing is left of the conversion"
        )
    return {"normalized": config.normalize_audio, "difference": difference}


def _compare_text(
    transformers: Any, folder: Path, vocabulary: Vocabulary, language: str | None
) -> dict[str, Any] | str:
    phonemes = isinstance(vocabulary, PhonemeVocabulary)
    name = "Wav2Vec2PhonemeCTCTokenizer" if phonemes else "Wav2Vec2CTCTokenizer"
    try:
        options: dict[str, Any] = {"do_phonemize": False} if phonemes else {}
        options |= {} if language is None else {"target_lang": language}
        tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)
    except ImportError as error:
        return f"not compared: {str(error).strip().splitlines()[0]}"
    text, path = _all_labels(vocabulary, 1 if phonemes else 5)
    labels = [i for i, _ in itertools.groupby(path) if i != vocabulary.blank]
    boundary = 0 if vocabulary.boundary is None else 1  # theirs has none after the last word
    read = unicodedata.normalize("NFC", tokenizer.decode(path, clean_up_tokenization_spaces=False))
    pairs = {
        "spell": (vocabulary.encode(text)[: -boundary or None], tokenizer(text).input_ids),
        "read": (vocabulary.decode(labels), " ".join(read.split())),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise JobError(
                f"transformers' tokenizer does not {what} as the vocabulary here: {theirs!r}, here {ours!r}; nothing "
                "is left of the conversion"
            )
    return {"labels": len({*labels}), "same": True}


def _all_labels(vocabulary: Vocabulary, length: int) -> tuple[str, list[int]]:
    """A text of words of so many labels, with all that are one character there, and a path that says it."""
    alone = [i for form, i in vocabulary.ids.items() if length == 1 or form == vocabulary.labels[i] == form[:1]]
    words = [alone[start : start + length] for start in range(0, len(alone), length)]
    text = vocabulary.normalize(" ".join("".join(vocabulary.labels[i] for i in word) for word in words))
    between = [] if vocabulary.boundary is None else [vocabulary.boundary]
    path = [i for word in words for i in [*(i for label in word for i in (label, label, vocabulary.blank)), *between]]
    return text, path
