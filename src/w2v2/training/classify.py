"""Fine-tuning a classifier of whole utterances: speakers, languages, emotions, keywords."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import VOCABULARY
from w2v2.data.corpora import Splits
from w2v2.errors import UsageError
from w2v2.inference.recognizer import Classifier
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.lora import add_lora, merge_lora
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.text.classes import ClassNames, load_classes
from w2v2.training.config import FinetuneConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.finetune import check_start
from w2v2.training.folder import start_folder
from w2v2.training.head_task import HeadTask, LabelledBatch
from w2v2.training.run import check_run, fit_task
from w2v2.training.task import Sums, step_seed
from w2v2.training.units import Classes


class ClassifyTask(HeadTask):
    """Cross-entropy, summed over utterances and divided once by their number."""

    model: Wav2Vec2ForClassification

    def __init__(self, model: Wav2Vec2ForClassification, classes: ClassNames, config: FinetuneConfig) -> None:
        super().__init__(model, config)
        self.classes = classes
        self.valid_sums = Sums()

    def _count(self, log_probs: Tensor, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss, and everything that is logged as sums."""
        classes = batch.targets[:, 0]
        loss = F.nll_loss(log_probs, classes, reduction="sum")
        counts = self.counted(loss, len(classes), batch.audio, batch.lengths)
        return loss, {"correct": (log_probs.argmax(-1) == classes).sum().double(), **counts}

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Summed loss of one micro-batch."""
        self.seed_step(batch_idx)
        frozen = self.encoder_is_frozen
        with self.casts_kept():
            log_probs, _ = self.model(batch.audio, batch.lengths, draws=batch.draws, freeze_encoder=frozen)
        loss, counts = self._count(log_probs, batch)
        self.record({"classes": loss}, batch.audio)
        self.sums.add(counts)
        return self.sum_loss(loss, len(log_probs))

    def train_figures(self) -> dict[str, float]:
        """Loss per utterance and accuracy since the last call, and ``seconds`` of audio."""
        sums = self.sums.take()
        return {**_figures(sums), **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def validation_step(self, batch: LabelledBatch | None, batch_idx: int) -> None:
        """Add up a batch."""
        if batch is not None:
            self.valid_sums.add(self._count(self.model(batch.audio, batch.lengths)[0], batch)[1])

    def on_validation_epoch_end(self) -> None:
        """Log figures of the whole validation set."""
        self.log_validation(_figures(self.valid_sums.take()))

    def score(self) -> tuple[float, ...]:
        """Share of wrong classes; of the same, the loss."""
        return 1 - self.valid_figures["accuracy"], self.valid_figures["loss"]

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The weights, and the classes' names."""
        super().save(folder, weights)
        self.classes.save(folder / VOCABULARY)


def _figures(sums: dict[str, Tensor]) -> dict[str, float]:
    count = sums["targets"].item()
    return {"loss": sums["total"].item() / count, "accuracy": sums["correct"].item() / count}


def classify(
    config: FinetuneConfig,
    splits: Splits,
    out: Path,
    *,
    init_from: str | PathLike[str] | None = None,
    resume: bool = False,
) -> Classifier:
    """Fine-tune a classifier and leave a run folder.

    Args:
        config: whose ``units`` are :class:`Classes`.
        splits, out, resume: as for ``pretrain``; each utterance has a class.
        init_from: run whose encoder to start from, and of a classifier of the same classes its head; None: random
            weights.

    Raises:
        UsageError: as of every run; fewer than two classes, or some to validate on that are not there to train on.
    """
    check_run(config, splits, out, resume)
    check_start(config, init_from)
    assert isinstance(config.units, Classes)
    splits = {name: splits[name].labelled(config.units.label) for name in ("train", "valid")}
    classes = load_classes(out / VOCABULARY) if resume else _classes(splits, config)
    torch.manual_seed(step_seed(config.train.seed))
    model = Wav2Vec2ForClassification(config.model, len(classes.labels), attention=config.units.attention)
    if init_from is not None and not resume:
        pretrained = read(init_from)
        (pretrained.fill if pretrained.classes == classes else pretrained.fill_encoder)(model)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    normalize = config.model.normalize
    seed = config.train.seed
    data = SpeechDataModule(splits, config.data, seed=seed, normalize=normalize, encode=classes.encode, fits=_any)
    start_folder(out, config, splits, resume)
    rank_zero_only(classes.save)(out / VOCABULARY)
    fit_task(ClassifyTask(model, classes, config), data, config, out, resume)
    merge_lora(model)
    return Classifier(model, classes)


def _any(seconds: float, text: str) -> bool:
    """Every utterance is long enough for its class."""
    return True


def _classes(splits: Splits, config: FinetuneConfig) -> ClassNames:
    label, least = config.units.label, config.data.min_seconds  # type: ignore[union-attr]
    names = {split: {text.strip() for _, _, text in splits[split].transcripts(least)} - {""} for split in splits}
    if not names["train"]:
        raise UsageError(f"no utterance has a {label}: expected one in each, for `units.label` {label}")
    if unheard := sorted(names["valid"] - names["train"]):
        raise UsageError(
            f"{len(unheard)} classes of {label} to validate on are not there to train on, such as {unheard[0]!r}: "
            "expected utterances of each class in both splits; prepare the corpus with `splits`"
        )
    return ClassNames.from_texts(names["train"], label)
