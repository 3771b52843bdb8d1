"""CTC fine-tuning of the encoder (paper section 4.3)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import VOCABULARY
from w2v2.data.batch import Batch, Fits
from w2v2.data.corpora import Splits
from w2v2.decoding.greedy import Greedy
from w2v2.errors import Show, UsageError, quiet
from w2v2.evaluation.evaluate import error_rates
from w2v2.inference.recognizer import Recognizer
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.lora import add_lora, merge_lora, merged_state
from w2v2.model.losses import ctc_loss
from w2v2.model.masking import Draws
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config
from w2v2.text.check import check_transcripts, missing_labels, transcribed
from w2v2.text.vocabulary import Vocabulary, frames_needed, load_vocabulary
from w2v2.training.config import FinetuneConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.plateau import Plateau
from w2v2.training.run import check_device, check_folder, check_splits, fit_task, start_folder
from w2v2.training.task import NormalizedTask, Sums, step_seed, unequal_lengths

log = logging.getLogger(__name__)


_SAMPLES = 3
"""Validation utterances shown in the log."""


_SHOWN = 100
"""Characters of each there."""


@dataclass
class CTCBatch:
    """A batch on the device, with what was drawn for it on the host."""

    audio: Tensor
    lengths: list[int] | None
    targets: Tensor
    target_lengths: Tensor
    texts: list[str | None]
    """Transcripts as they are."""
    draws: Draws | None = None
    """What is masked or left out; None: nothing, in validation."""


def emission_counts(
    log_probs: Tensor, frames: Sequence[int], targets: Tensor, target_lengths: Tensor, vocabulary: Vocabulary
) -> dict[str, Tensor]:
    """What greedy decoding says of a batch, as sums on its device; boundaries between words are not said.

    Args:
        log_probs: (B, T, labels).
        frames: of each utterance.
        targets, target_lengths: (B, U), padded; (B,) on the host.
        vocabulary: for its blank and boundary.

    Returns:
        ``frames``, those whose best label is ``blank``, labels ``said`` and ``to_say``, ``labels`` with boundaries.
    """
    boundary = -1 if vocabulary.boundary is None else vocabulary.boundary
    best = log_probs.detach().argmax(-1)
    blank = best == vocabulary.blank
    said = (F.pad(best, (1, 0), value=-1)[:, :-1] != best) & ~blank & (best != boundary)
    both = torch.stack([blank, said])
    blanks, labels = torch.cat([both[:, row, :n] for row, n in enumerate(frames)], dim=1).sum(1)
    lengths = target_lengths.tolist()
    to_say = torch.cat([row[:n] for row, n in zip(targets, lengths, strict=True)]) != boundary
    counts = {"frames": sum(frames), "labels": sum(lengths)}
    return {
        "blank": blanks,
        "said": labels,
        "to_say": to_say.sum(),
        **{name: torch.full_like(blanks, count) for name, count in counts.items()},
    }


def _figures(sums: dict[str, Tensor]) -> dict[str, float]:
    """Loss per utterance and per label, share of blank frames, labels said per label of the reference."""
    total = {name: value.item() for name, value in sums.items()}
    return {
        "loss": total["total"] / total["targets"],
        "loss_per_label": total["total"] / max(total["labels"], 1),
        "blank_share": total["blank"] / total["frames"],
        "length_ratio": total["said"] / max(total["to_say"], 1),
    }


class FinetuneTask(NormalizedTask):
    """CTC; the loss is summed over utterances and divided once by their number (``sentence_avg``)."""

    model: Wav2Vec2ForCTC

    def __init__(self, model: Wav2Vec2ForCTC, vocabulary: Vocabulary, config: FinetuneConfig) -> None:
        super().__init__(config.optim, config.train.seed)
        self.model, self.vocabulary, self.config = model, vocabulary, config
        if config.model.mask_prob == 0:
            model.mask_vector.requires_grad_(False)
        self.decoder = Greedy(vocabulary)
        self.plateau = Plateau()
        self.valid_sums = Sums()
        self.references: list[str] = []
        self.hypotheses: list[str] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """With ``layer_decay`` a group for each learning rate."""
        if self.config.layer_decay == 1.0:
            return super().parameter_groups()
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rate_share(name, self.config.model, self.config.layer_decay), []).append(parameter)
        return [{"params": group, "lr_scale": share} for share, group in groups.items()]

    def draw(self, batch: Batch, *, training: bool) -> Draws | None:
        """Masks and layers in training; nothing in validation."""
        if not training:
            return None
        return self.model.draw(
            batch,
            self.step_key(batch),
            channel_mask_prob=self.config.channel_mask_prob,
            channel_mask_length=self.config.channel_mask_length,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> CTCBatch | None:
        """Send everything along; None for a batch without utterances."""
        if self.is_empty(batch):
            return None
        assert batch.targets is not None and batch.target_lengths is not None
        on_device = CTCBatch(
            audio=batch.audio.to(device, non_blocking=True),
            lengths=unequal_lengths(batch),
            targets=batch.targets.to(device, non_blocking=True),
            target_lengths=batch.target_lengths,
            texts=batch.texts,
        )
        draws = self.drawn(batch)
        if draws is not None:
            on_device.draws = draws.to(device)
        return on_device

    def _count(self, log_probs: Tensor, frames: list[int], batch: CTCBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss, and everything that is logged as sums."""
        loss = ctc_loss(log_probs, frames, batch.targets, batch.target_lengths, blank=self.vocabulary.blank)
        counts = emission_counts(log_probs, frames, batch.targets, batch.target_lengths, self.vocabulary)
        return loss, {**counts, **self.counted(loss, len(frames), batch.audio, batch.lengths)}

    def training_step(self, batch: CTCBatch, batch_idx: int) -> Tensor:
        """Summed CTC loss of one micro-batch."""
        self.seed_step(batch_idx)
        log_probs, frames = self.model(
            batch.audio,
            batch.lengths,
            draws=batch.draws,
            freeze_encoder=self.global_step < self.config.freeze_encoder_steps,
        )
        loss, counts = self._count(log_probs, frames, batch)
        self.record({"ctc": loss}, batch.audio)
        self.sums.add(counts)
        return self.sum_loss(loss, len(frames))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave a frozen encoder to itself, beside what every task does."""
        if self.global_step < self.config.freeze_encoder_steps:
            for parameter in self.model.encoder_parameters():
                parameter.grad = None  # weight decay would follow a gradient of zero
        super().on_before_optimizer_step(optimizer)

    def train_figures(self) -> dict[str, float]:
        """Figures since the last call, and ``seconds`` of audio; a plateau is named in the log."""
        sums = self.sums.take()
        figures = _figures(sums)
        steps = self.config.optim.schedule.total_steps
        news = self.plateau.look(self.global_step, figures, steps, self.config.freeze_encoder_steps)
        if news and self.trainer.is_global_zero:
            log.info("%s", news)
        return {**figures, **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def validation_step(self, batch: CTCBatch | None, batch_idx: int) -> None:
        """Loss and greedy hypotheses."""
        if batch is None:
            return
        log_probs, frames = self.model(batch.audio, batch.lengths)
        self.valid_sums.add(self._count(log_probs, frames, batch)[1])
        rows = zip(log_probs.cpu(), frames, strict=True)
        # Compared as evaluation does, in the text's own characters: as labels, what has none would equal a said <unk>.
        self.hypotheses += [self.vocabulary.normalize(self.decoder(row[:n]).text) for row, n in rows]
        self.references += [self.vocabulary.normalize(text or "") for text in batch.texts]

    def on_validation_epoch_end(self) -> None:
        """Log figures of the whole validation set, and some of what is said."""
        figures = _figures(self.valid_sums.take())
        if self.trainer.world_size > 1:
            said: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(said, (self.references, self.hypotheses))
            self.references, self.hypotheses = ([text for part in said for text in part[i]] for i in range(2))
        rates = error_rates(self.references, self.hypotheses)
        self.log_validation({**figures, "wer": rates.wer, "cer": rates.cer})
        if self.trainer.loggers and self.trainer.is_global_zero:
            self._show(self.valid_figures)
        self.references, self.hypotheses = [], []

    def _show(self, figures: dict[str, float]) -> None:
        """Figures and samples, spread over the validation set, to the log; the samples to TensorBoard too."""
        log.info(
            "step %d, validation: loss %.3f  WER %.1f %%  CER %.1f %%  %.0f %% blank  length %.2f of the reference",
            self.global_step, figures["loss"], 100 * figures["wer"], 100 * figures["cer"],
            100 * figures["blank_share"], figures["length_ratio"],
        )  # fmt: skip
        count = min(_SAMPLES, len(self.references))
        places = [i * len(self.references) // count for i in range(count)]
        pairs = [(self.references[i], self.hypotheses[i]) for i in places]
        for reference, hypothesis in pairs:
            log.info("  %s | %s", *(text[:_SHOWN] + "..." * (len(text) > _SHOWN) for text in (reference, hypothesis)))
        text = "\n".join(["| reference | greedy |", "|---|---|", *(f"| {a} | {b} |" for a, b in pairs)])
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("valid/samples", text, self.global_step)

    def score(self) -> tuple[float, ...]:
        """WER, as published; where no word is right yet, CER."""
        figures = self.valid_figures
        return figures["wer"], figures["cer"], figures["loss"]

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The weights, low-rank updates added to them, and the vocabulary: all that transcribing needs."""
        super().save(folder, merged_state(self.model, weights))
        self.vocabulary.save(folder / VOCABULARY)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is known of a plateau too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["plateau"] = dataclasses.asdict(self.plateau)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        super().on_load_checkpoint(checkpoint)
        self.plateau = Plateau(**checkpoint["plateau"])


def rate_share(name: str, config: Wav2Vec2Config, decay: float) -> float:
    """Share of the learning rate of a parameter of the CTC model (BEiT's and fairseq's ``layer_decay``).

    Block i of n, counted from 0, has ``decay ** (n - i)``, all before the blocks ``decay ** (n + 1)``, the output layer
    and a norm after the blocks 1.
    """
    part, _, rest = name.partition(".")
    if part == "lm_head" or (part == "ln_f" and config.norm_first):
        return 1.0
    below = int(rest.partition(".")[0]) if part == "transformer" else -1
    return float(decay ** (config.n_layer - below))


@dataclass
class Start:
    """What a fine-tuning run begins with."""

    model: Wav2Vec2ForCTC
    vocabulary: Vocabulary
    fits: Fits


def check_start(config: FinetuneConfig, init_from: Path | None) -> None:
    """Refuse low-rank updates of weights that are random."""
    if config.lora_rank and init_from is None:
        raise UsageError(
            f"`lora_rank` {config.lora_rank} keeps the weights of `init_from` RUN; name one, or leave it at 0"
        )


def begin(
    config: FinetuneConfig,
    splits: Splits,
    *,
    init_from: Path | None = None,
    vocabulary: Vocabulary | None = None,
    show: Show = quiet,
) -> Start:
    """Settle the vocabulary, look at all transcripts, and build the model; nothing is written.

    Raises:
        UsageError: transcripts or weights that cannot be used.
    """
    pretrained = None if init_from is None else read(init_from)
    vocabulary, takes_head = _settle_vocabulary(config, splits, pretrained, vocabulary)
    fits = label_fit(config.model, vocabulary)
    for name in ("train", "valid"):
        said = transcribed(splits[name], config.data.min_seconds)
        for line in check_transcripts(name, said, vocabulary, fits, len(splits[name]), show):
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
        return (text for _, _, text in transcribed(splits["train"], config.data.min_seconds))

    own = given or config.units.vocabulary(texts())
    if pretrained is None or pretrained.vocabulary is None:
        return own, False
    theirs = pretrained.vocabulary
    if given is not None:
        why = "" if theirs == given else "it has another vocabulary than the one given"
    elif type(theirs) is type(own):
        missing = missing_labels(theirs, texts())
        why = f"it has no label for {' '.join(missing)}" if missing else ""
    else:
        why = f"its labels are a {type(theirs).__name__}, these a {type(own).__name__}"
    say = rank_zero_only(log.info)
    if why:
        say("the output layer starts afresh, not from %s: %s", pretrained.source, why)
        return own, False
    say("vocabulary and output layer are those of %s, %d labels", pretrained.source, len(theirs.labels))
    return theirs, True


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
    init_from: Path | None = None,
    vocabulary: Vocabulary | None = None,
    resume: bool = False,
    show: Show = quiet,
) -> Recognizer:
    """Fine-tune with CTC and leave a run folder.

    Args:
        config, splits, out, resume: as for ``pretrain``; cuts need transcripts.
        init_from: run whose encoder to start from, and of a fine-tuned one the output layer, where its labels cover
            the transcripts; None: from random weights.
        vocabulary: None: that of the run to start from, or what ``config.units`` makes of the training transcripts.
        show: told how far it is with looking at the transcripts.
    """
    config.check()
    check_device(config.train)
    check_splits(splits, config.train)
    check_folder(out, resume)
    check_start(config, init_from)
    if resume:
        init_from, vocabulary = None, load_vocabulary(out / VOCABULARY)
    start = begin(config, splits, init_from=init_from, vocabulary=vocabulary, show=show)
    data = SpeechDataModule(
        splits,
        config.data,
        seed=config.train.seed,
        normalize=config.model.normalize_audio,
        encode=start.vocabulary.encode,
        fits=start.fits,
    )
    start_folder(out, config, splits, resume)
    rank_zero_only(start.vocabulary.save)(out / VOCABULARY)
    fit_task(FinetuneTask(start.model, start.vocabulary, config), data, config, out, resume)
    merge_lora(start.model)
    return Recognizer(start.model, start.vocabulary)


def transcripts(recognizer: Recognizer, batches: Iterable[Batch]) -> dict[str, str]:
    """Greedy hypothesis of each utterance of a loader, by id."""
    hypotheses: dict[str, str] = {}
    device = next(recognizer.model.parameters()).device
    decoder = Greedy(recognizer.vocabulary)
    for batch in batches:
        found = recognizer.batch_emissions(batch.audio.to(device), batch.lengths.tolist())
        hypotheses |= {name: decoder(row).text for name, row in zip(batch.ids, found, strict=True)}
    return hypotheses
