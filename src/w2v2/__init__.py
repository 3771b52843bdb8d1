"""wav2vec 2.0 on PyTorch Lightning: from raw audio to a trusted transcript."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2v2 import recipes as recipes
    from w2v2.checkpoint.formats import convert as convert
    from w2v2.data.batch import Batch as Batch
    from w2v2.data.config import DataConfig as DataConfig
    from w2v2.data.corpora import read_corpus as read_corpus
    from w2v2.errors import UsageError as UsageError
    from w2v2.evaluation.evaluate import evaluate as evaluate
    from w2v2.inference.align import align as align
    from w2v2.inference.extract import extract as extract
    from w2v2.inference.recognizer import Recognizer as Recognizer
    from w2v2.inference.recognizer import load as load
    from w2v2.inference.transcribe import transcribe as transcribe
    from w2v2.inference.transcripts import Transcript as Transcript
    from w2v2.model.ctc import Wav2Vec2ForCTC as Wav2Vec2ForCTC
    from w2v2.model.masking import Draws as Draws
    from w2v2.model.masking import utterance_generators as utterance_generators
    from w2v2.model.objective import SSLOutput as SSLOutput
    from w2v2.model.pretraining import ContrastiveConfig as ContrastiveConfig
    from w2v2.model.pretraining import Wav2Vec2ForPretraining as Wav2Vec2ForPretraining
    from w2v2.model.quantizer import QuantizerOutput as QuantizerOutput
    from w2v2.model.wav2vec2 import Wav2Vec2 as Wav2Vec2
    from w2v2.model.wav2vec2 import Wav2Vec2Config as Wav2Vec2Config
    from w2v2.text.vocabulary import Vocabulary as Vocabulary
    from w2v2.training.config import FinetuneConfig as FinetuneConfig
    from w2v2.training.config import PretrainConfig as PretrainConfig
    from w2v2.training.config import TrainConfig as TrainConfig
    from w2v2.training.ctc_task import FinetuneTask as FinetuneTask
    from w2v2.training.data import SpeechDataModule as SpeechDataModule
    from w2v2.training.finetune import finetune as finetune
    from w2v2.training.optim import OptimConfig as OptimConfig
    from w2v2.training.pretrain import PretrainTask as PretrainTask
    from w2v2.training.pretrain import pretrain as pretrain

_HOMES = {
    "checkpoint.formats": "convert",
    "data.batch": "Batch",
    "data.config": "DataConfig",
    "data.corpora": "read_corpus",
    "errors": "UsageError",
    "evaluation.evaluate": "evaluate",
    "inference.align": "align",
    "inference.extract": "extract",
    "inference.recognizer": "Recognizer load",
    "inference.transcribe": "transcribe",
    "inference.transcripts": "Transcript",
    "model.ctc": "Wav2Vec2ForCTC",
    "model.masking": "Draws utterance_generators",
    "model.objective": "SSLOutput",
    "model.pretraining": "ContrastiveConfig Wav2Vec2ForPretraining",
    "model.quantizer": "QuantizerOutput",
    "model.wav2vec2": "Wav2Vec2 Wav2Vec2Config",
    "text.vocabulary": "Vocabulary",
    "training.config": "FinetuneConfig PretrainConfig TrainConfig",
    "training.data": "SpeechDataModule",
    "training.ctc_task": "FinetuneTask",
    "training.finetune": "finetune",
    "training.optim": "OptimConfig",
    "training.pretrain": "PretrainTask pretrain",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = ["recipes", *_HOME]


def __getattr__(name: str) -> Any:
    # Late, so that `w2v2 --help` and the processes that only synthesise or decode audio do not wait for torch.
    if name in _HOME:
        return getattr(import_module(f"w2v2.{_HOME[name]}"), name)
    if name == "recipes":
        return import_module("w2v2.recipes")
    raise AttributeError(f"module 'w2v2' has no attribute {name!r}")
