"""wav2vec 2.0 on PyTorch Lightning: from raw audio to a trusted transcript."""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2v2.data.datamodule import SpeechDataModule
    from w2v2.model.wav2vec2 import (
        ContrastiveConfig,
        SSLOutput,
        Wav2Vec2,
        Wav2Vec2Config,
        Wav2Vec2ForCTC,
        Wav2Vec2ForPretraining,
    )
    from w2v2.recognizer import Recognizer
    from w2v2.tasks.finetune import FinetuneTask
    from w2v2.tasks.pretrain import PretrainTask

__all__ = [
    "ContrastiveConfig",
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


def load(path: str | PathLike[str]) -> Recognizer | Wav2Vec2:
    """The model of a run folder, a folder of weights, or a checkpoint of another format that ``w2v2 convert`` reads.

    Returns:
        On the CPU, in evaluation mode: of a CTC model a ``Recognizer``, the model with its vocabulary; of a pretraining
        run a ``Wav2Vec2ForPretraining``; of an encoder alone a ``Wav2Vec2``.

    Raises:
        UsageError: nothing there, something else, or weights that do not fit.
    """
    from w2v2.checkpoint import is_foreign, load_model
    from w2v2.model.wav2vec2 import Wav2Vec2ForCTC
    from w2v2.recognizer import Recognizer, load_recognizer

    path = Path(path)
    if is_foreign(path):
        from w2v2.convert.conversion import read

        contents = read(path)
        theirs = contents.build()
        if not isinstance(theirs, Wav2Vec2ForCTC):
            return theirs
        assert contents.vocabulary is not None
        return Recognizer(theirs, contents.vocabulary)
    model = load_model(path)
    return load_recognizer(path) if isinstance(model, Wav2Vec2ForCTC) else model
