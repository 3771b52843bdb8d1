"""A whole CTC fine-tuning run (paper section 4.3): vocabulary, start, and run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import VOCABULARY
from w2v2.data.batch import Fits
from w2v2.data.corpora import Splits
from w2v2.errors import Show, UsageError, quiet
from w2v2.inference.recognizer import Recognizer
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.lora import add_lora, merge_lora
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config
from w2v2.text.check import check_transcripts, missing_labels
from w2v2.text.spelling import frames_needed
from w2v2.text.vocabulary import Vocabulary, load_vocabulary
from w2v2.training.config import FinetuneConfig
from w2v2.training.ctc_task import FinetuneTask
from w2v2.training.data import SpeechDataModule
from w2v2.training.folder import start_folder
from w2v2.training.run import check_run, fit_task
from w2v2.training.task import step_seed
from w2v2.training.units import Classes, FrameClasses

log = logging.getLogger(__name__)


@dataclass
class Start:
    """What a fine-tuning run begins with."""

    model: Wav2Vec2ForCTC
    vocabulary: Vocabulary
    fits: Fits


def check_start(config: FinetuneConfig, init_from: str | PathLike[str] | None) -> None:
    """Refuse low-rank updates of weights that are random."""
    if config.lora_rank and init_from is None:
        raise UsageError(
            f"`lora_rank` {config.lora_rank} keeps the weights of `init_from` RUN; name one, or leave it at 0"
        )


def begin(
    config: FinetuneConfig,
    splits: Splits,
    *,
    init_from: str | PathLike[str] | None = None,
    language: str | None = None,
    vocabulary: Vocabulary | None = None,
    show: Show = quiet,
) -> Start:
    """Settle the vocabulary, look at all transcripts, and build the model; nothing is written.

    Raises:
        UsageError: transcripts or weights that cannot be used.
    """
    if isinstance(config.units, Classes | FrameClasses):
        raise UsageError("`units` are classes, and CTC has none: call `classify` (training/classify.py)")
    pretrained = None if init_from is None else read(init_from, language)
    vocabulary, takes_head = _settle_vocabulary(config, splits, pretrained, vocabulary)
    fits = label_fit(config.model, vocabulary)
    for name in ("train", "valid"):
        texts = splits[name].transcripts(config.data.min_seconds)
        for line in check_transcripts(name, texts, vocabulary, fits, len(splits[name]), show):
            rank_zero_only(log.warning)("%s", line)
    torch.manual_seed(step_seed(config.train.seed))
    model = Wav2Vec2ForCTC(config.model, len(vocabulary.labels))
    if pretrained is not None:
        (pretrained.fill if takes_head else pretrained.fill_encoder)(model)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    return Start(model, vocabulary, fits)


def _settle_vocabulary(
    config: FinetuneConfig, splits: Splits, pretrained: Checkpoint | None, given: Vocabulary | None
) -> tuple[Vocabulary, bool]:
    """The vocabulary, and whether it comes with the output layer of the run to start from.

    It does where that run has labels of the same kind for all there is in the transcripts.
    """

    def texts() -> Iterable[str]:
        return (text for _, _, text in splits["train"].transcripts(config.data.min_seconds))

    assert not isinstance(config.units, Classes | FrameClasses)
    fresh = given or config.units.vocabulary(texts())
    if pretrained is None or pretrained.vocabulary is None:
        return fresh, False
    present = pretrained.vocabulary
    if given is not None:
        why = "" if present == given else "it has another vocabulary than the one given"
    elif type(present) is type(fresh):
        missing = missing_labels(present, texts())
        why = f"it has no label for {' '.join(missing)}" if missing else ""
    else:
        why = f"its labels are a {type(present).__name__}, these a {type(fresh).__name__}"
    inform = rank_zero_only(log.info)
    if why:
        inform("the output layer starts afresh, not from %s: %s", pretrained.source, why)
        return fresh, False
    inform("vocabulary and output layer are those of %s, %d labels", pretrained.source, len(present.labels))
    return present, True


def label_fit(model: Wav2Vec2Config, vocabulary: Vocabulary) -> Fits:
    """Whether CTC can emit a transcript in the frames of so many seconds."""

    def fits(seconds: float, text: str) -> bool:
        return frames_needed(vocabulary.encode(text)) <= model.frames([round(seconds * SAMPLE_RATE)])[0]

    return fits


def finetune(
    config: FinetuneConfig,
    splits: Splits,
    out: Path,
    *,
    init_from: str | PathLike[str] | None = None,
    language: str | None = None,
    vocabulary: Vocabulary | None = None,
    resume: bool = False,
    show: Show = quiet,
) -> Recognizer:
    """Fine-tune with CTC and leave a run folder.

    Args:
        config, splits, out, resume: as for ``pretrain``; cuts need transcripts.
        init_from: run whose encoder to start from, and of a fine-tuned one the output layer, where its labels cover
            the transcripts; None: from random weights.
        language: as of ``read``.
        vocabulary: None: that of the run to start from, or what ``config.units`` makes of the training transcripts.
        show: told how far it is with looking at the transcripts.
    """
    check_run(config, splits, out, resume)
    check_start(config, init_from)
    if resume:
        init_from, vocabulary = None, load_vocabulary(out / VOCABULARY)
    start = begin(config, splits, init_from=init_from, language=language, vocabulary=vocabulary, show=show)
    data = SpeechDataModule(
        splits,
        config.data,
        seed=config.train.seed,
        normalize=config.model.normalize,
        encode=start.vocabulary.encode,
        fits=start.fits,
    )
    start_folder(out, config, splits, resume)
    rank_zero_only(start.vocabulary.save)(out / VOCABULARY)
    fit_task(FinetuneTask(start.model, start.vocabulary, config), data, config, out, resume)
    merge_lora(start.model)
    return Recognizer(start.model, start.vocabulary)
