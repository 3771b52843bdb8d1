"""wav2vec 2.0 on PyTorch Lightning: from raw audio to a trusted transcript."""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2v2.data.datamodule import SpeechDataModule
    from w2v2.model.wav2vec2 import SSLOutput, Wav2Vec2, Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForPretraining
    from w2v2.recognizer import Recognizer
    from w2v2.tasks.finetune import FinetuneTask
    from w2v2.tasks.pretrain import PretrainTask

__all__ = [
    "FinetuneTask",
    "PretrainTask",
    "Recognizer",
    "SSLOutput",
    "SpeechDataModule",
    "Wav2Vec2",
    "Wav2Vec2Config",
    "Wav2Vec2ForCTC",
    "Wav2Vec2ForPretraining",
    "load",
]

_HOMES = {
    "FinetuneTask": "w2v2.tasks.finetune",
    "PretrainTask": "w2v2.tasks.pretrain",
    "Recognizer": "w2v2.recognizer",
    "SpeechDataModule": "w2v2.data.datamodule",
}


def __getattr__(name: str) -> Any:
    # Late, so that `w2v2 --help` and the processes that only synthesise or decode audio do not wait for torch.
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "w2v2.model.wav2vec2")), name)
    raise AttributeError(f"module 'w2v2' has no attribute {name!r}")


def load(folder: str | PathLike[str]) -> Recognizer | Wav2Vec2ForPretraining:
    """The model of a run folder, or of a folder of weights, on the CPU, in evaluation mode.

    Returns:
        Of a fine-tuning run a ``Recognizer``, the model with its vocabulary; of a pretraining run the model.

    Raises:
        UsageError: no such folder, one that holds something else, or weights that do not fit.
    """
    from w2v2.checkpoint import VOCABULARY, load_pretrained, refuse_foreign
    from w2v2.recognizer import load_recognizer

    folder = Path(folder)
    refuse_foreign(folder)
    return load_recognizer(folder) if (folder / VOCABULARY).exists() else load_pretrained(folder)
