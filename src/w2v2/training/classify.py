"""Fine-tuning a classifier: of whole utterances (speakers, languages, emotions, keywords), or of frames (phones)."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import VOCABULARY
from w2v2.data.batch import Encode
from w2v2.data.corpora import Splits
from w2v2.data.utterance import ID
from w2v2.errors import UsageError
from w2v2.evaluation.phones import check_times, frames_to_last, nothing_labelled, phone_classes, read_labels
from w2v2.inference.recognizer import Classifier, FrameClassifier
from w2v2.model.classifier import Wav2Vec2ForClassification
from w2v2.model.frame_classifier import Wav2Vec2ForFrames
from w2v2.model.head import Wav2Vec2WithHead
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
from w2v2.training.units import Classes, FrameClasses


class ClassifyTask(HeadTask):
    """Cross-entropy, summed over utterances and divided once by their number."""

    def __init__(self, model: Wav2Vec2WithHead, classes: ClassNames, config: FinetuneConfig) -> None:
        super().__init__(model, config)
        self.classes = classes
        self.valid_sums = Sums()

    def rows(self, log_probs: Tensor, frames: list[int], batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, classes), and the class (N,) of each, -1: none; N does not depend on the classes."""
        return log_probs, batch.targets[:, 0]

    def _count(
        self, log_probs: Tensor, frames: list[int], batch: LabelledBatch
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Summed loss, of how many rows, and everything that is logged as sums."""
        log_probs, classes = self.rows(log_probs, frames, batch)
        loss = F.nll_loss(log_probs, classes, ignore_index=-1, reduction="sum")
        counts = self.counted(loss, len(classes), batch.audio, batch.lengths)
        counts |= {"correct": (log_probs.argmax(-1) == classes).sum().double(), "scored": (classes >= 0).sum().double()}
        return loss, len(classes), counts

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Summed loss of one micro-batch."""
        self.seed_step(batch_idx)
        frozen = self.encoder_is_frozen
        with self.casts_kept():
            log_probs, frames = self.model(batch.audio, batch.lengths, draws=batch.draws, freeze_encoder=frozen)
        loss, rows, counts = self._count(log_probs, frames, batch)
        self.record({"classes": loss}, batch.audio)
        self.sums.add(counts)
        return self.sum_loss(loss, rows)

    def train_figures(self) -> dict[str, float]:
        """Loss per utterance or frame and accuracy since the last call, and ``seconds`` of audio a step."""
        sums = self.sums.take()
        return {**_figures(sums), **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def validation_step(self, batch: LabelledBatch | None, batch_idx: int) -> None:
        """Add up a batch."""
        if batch is not None:
            log_probs, frames = self.model(batch.audio, batch.lengths)
            self.valid_sums.add(self._count(log_probs, frames, batch)[2])

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


class ClassifyFramesTask(ClassifyTask):
    """Cross-entropy, summed over frames and divided once by the number of those up to each utterance's last label."""

    def rows(self, log_probs: Tensor, frames: list[int], batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Those frames end to end, and their classes."""
        lengths = [min(pair) for pair in zip(frames, batch.target_lengths.tolist(), strict=True)]
        kept = [torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]) for x in (log_probs, batch.targets)]
        return kept[0], kept[1]


def _figures(sums: dict[str, Tensor]) -> dict[str, float]:
    count = max(sums["scored"].item(), 1)
    return {"loss": sums["total"].item() / count, "accuracy": sums["correct"].item() / count}


def classify(
    config: FinetuneConfig,
    splits: Splits,
    out: Path,
    *,
    init_from: str | PathLike[str] | None = None,
    language: str | None = None,
    resume: bool = False,
) -> Classifier | FrameClassifier:
    """Fine-tune a classifier and leave a run folder.

    Args:
        config: whose ``units`` are :class:`Classes` or :class:`FrameClasses`.
        splits, out, resume: as for ``pretrain``; each utterance has a class, or labels of its frames.
        init_from: run whose encoder to start from, and of a classifier of the same classes its head; None: random
            weights.
        language: as of ``read``.

    Raises:
        UsageError: as of every run; fewer than two classes, or some to validate on that are not there to train on;
            labels of frames that are missing, or of other audio.
    """
    check_run(config, splits, out, resume)
    check_start(config, init_from)
    targets = (_Frames if isinstance(config.units, FrameClasses) else _Utterances)(config, splits)
    classes = load_classes(out / VOCABULARY) if resume else targets.classes()
    torch.manual_seed(step_seed(config.train.seed))
    model = targets.model(len(classes.labels))
    if init_from is not None and not resume:
        pretrained = read(init_from, language)
        (pretrained.fill if pretrained.classes == classes else pretrained.fill_encoder)(model)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    data = SpeechDataModule(
        targets.splits,
        config.data,
        seed=config.train.seed,
        normalize=config.model.normalize,
        encode=targets.encoder(classes),
        fits=targets.fits,
    )
    start_folder(out, config, splits, resume)
    rank_zero_only(classes.save)(out / VOCABULARY)
    fit_task(targets.task(model, classes, config), data, config, out, resume)
    merge_lora(model)
    return FrameClassifier(model, classes) if isinstance(model, Wav2Vec2ForFrames) else Classifier(model, classes)


class _Utterances:
    """Classes of whole utterances, which stand in the place of their transcripts."""

    task: type[ClassifyTask] = ClassifyTask

    def __init__(self, config: FinetuneConfig, splits: Splits) -> None:
        assert isinstance(config.units, Classes)
        self.config, self.units = config, config.units
        self.splits = {name: splits[name].labelled(self.units.label) for name in ("train", "valid")}

    def classes(self) -> ClassNames:
        label, least = self.units.label, self.config.data.min_seconds
        names = {name: {text.strip() for _, _, text in s.transcripts(least)} - {""} for name, s in self.splits.items()}
        if not names["train"]:
            raise UsageError(f"no utterance has a {label}: expected one in each, for `units.label` {label}")
        if unheard := sorted(names["valid"] - names["train"]):
            raise UsageError(
                f"{len(unheard)} classes of {label} to validate on are not there to train on, such as {unheard[0]!r}: "
                "expected utterances of each class in both splits; prepare the corpus with `splits`"
            )
        return ClassNames.from_texts(names["train"], label)

    def encoder(self, classes: ClassNames) -> Encode:
        return classes.encode

    def fits(self, seconds: float, text: str) -> bool:
        """Every utterance is long enough for its class."""
        return True

    def model(self, n_classes: int) -> Wav2Vec2ForClassification | Wav2Vec2ForFrames:
        return Wav2Vec2ForClassification(self.config.model, n_classes, attention=self.units.attention)


class _Frames:
    """Classes of frames, found by the utterance's id, which stands in the place of its transcript."""

    task: type[ClassifyTask] = ClassifyFramesTask

    def __init__(self, config: FinetuneConfig, splits: Splits) -> None:
        assert isinstance(config.units, FrameClasses)
        self.config = config
        self.labels = read_labels(Path(config.units.labels or config.data.sources[0]))
        self.splits = {name: splits[name].labelled(ID) for name in ("train", "valid")}

    def classes(self) -> ClassNames:
        phones = []
        for name, split in self.splits.items():
            seconds = {u.id: u.seconds for u in split.utterances() if self.labels.get(u.id)}
            if not seconds:
                raise nothing_labelled(name)
            check_times(self.labels, seconds)
            phones.append([self.labels[utterance] for utterance in seconds])
        return ClassNames(labels=tuple(phone_classes(*phones)), label="frame")

    def encoder(self, classes: ClassNames) -> Encode:
        return lambda utterance: frames_to_last(self.labels[utterance], self.config.model, classes.ids)

    def fits(self, seconds: float, text: str) -> bool:
        """Whether the utterance has labels at all."""
        return bool(self.labels.get(text))

    def model(self, n_classes: int) -> Wav2Vec2ForClassification | Wav2Vec2ForFrames:
        return Wav2Vec2ForFrames(self.config.model, n_classes)
