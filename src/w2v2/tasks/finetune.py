"""CTC fine-tuning of the encoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from w2v2.checkpoint import CONFIG, VOCABULARY, load_encoder
from w2v2.config import FinetuneConfig, load_config
from w2v2.data.corpora import Splits
from w2v2.data.datamodule import Batch, SpeechDataModule
from w2v2.decode import Greedy
from w2v2.evaluate import error_rates
from w2v2.model.masking import keyed_generator, sample_layers, sample_span_mask
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2ForCTC
from w2v2.recognizer import Recognizer, load_recognizer
from w2v2.tasks.pretrain import NormalizedTask, Sums, step_seed
from w2v2.text import Vocabulary
from w2v2.train import check_device, check_folder, check_splits, fit_task, start_folder, validate_task


@dataclass
class CTCBatch:
    """A batch on the device, with what was drawn for it on the host."""

    audio: Tensor
    lengths: list[int] | None
    targets: Tensor
    target_lengths: Tensor
    covered: Tensor | None = None
    channels: Tensor | None = None
    keep_layers: tuple[bool, ...] | None = None


class FinetuneTask(NormalizedTask):
    """CTC on characters; the loss is summed over utterances and divided once by their number (``sentence_avg``)."""

    def __init__(self, model: Wav2Vec2ForCTC, vocabulary: Vocabulary, config: FinetuneConfig) -> None:
        super().__init__(config.optim, config.train.seed)
        self.model, self.vocabulary, self.config = model, vocabulary, config
        model.mask_vector.requires_grad_(config.model.mask_prob > 0)
        self.decoder = Greedy(vocabulary)
        self.valid_sums = Sums()
        self.references: list[str] = []
        self.hypotheses: list[str] = []

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> CTCBatch | None:
        """Draw masks on the host in training, then send everything along; None for a batch without utterances."""
        if self.is_empty(batch):
            return None
        assert batch.targets is not None and batch.target_lengths is not None
        samples = batch.lengths.tolist()
        on_device = CTCBatch(
            audio=batch.audio.to(device, non_blocking=True),
            lengths=samples if min(samples) < batch.audio.shape[1] else None,
            targets=batch.targets.to(device, non_blocking=True),
            target_lengths=batch.target_lengths,
        )
        if self.trainer.training:
            self._draw(on_device, batch, samples, device)
        return on_device

    def _draw(self, on_device: CTCBatch, batch: Batch, samples: list[int], device: torch.device) -> None:
        config, model = self.config, self.config.model
        rngs = [keyed_generator(self.seed, number, name) for number, name in zip(batch.passes, batch.ids, strict=True)]
        frames = model.frames(samples)
        if model.mask_prob > 0:
            masks = [model.sample_mask(n, rng) for n, rng in zip(frames, rngs, strict=True)]
            on_device.covered = torch.cat(masks).nonzero().flatten().to(device, non_blocking=True)
        if config.channel_mask_prob > 0:
            span = min(config.channel_mask_length, model.n_embd // 4)
            rows = [sample_span_mask(model.n_embd, config.channel_mask_prob, span, rng, min_spans=0) for rng in rngs]
            on_device.channels = torch.stack(rows).to(device, non_blocking=True)
        step_rng = keyed_generator(self.seed, self.global_step, "layers")
        on_device.keep_layers = sample_layers(model.n_layer, model.layer_drop, step_rng)

    def _loss(self, log_probs: Tensor, frames: list[int], batch: CTCBatch) -> Tensor:
        """CTC summed over utterances, in fp32; utterances whose labels do not fit in their frames cost nothing."""
        return F.ctc_loss(
            log_probs.transpose(0, 1),  # (B, T, labels) -> (T, B, labels)
            batch.targets,
            torch.tensor(frames),
            batch.target_lengths,
            blank=self.vocabulary.blank,
            reduction="sum",
            zero_infinity=True,
        )

    def training_step(self, batch: CTCBatch, batch_idx: int) -> Tensor:
        """Summed CTC loss of one micro-batch."""
        self.seed_step(batch_idx)
        log_probs, frames = self.model(
            batch.audio,
            batch.lengths,
            covered=batch.covered,
            channels=batch.channels,
            keep_layers=batch.keep_layers,
            freeze_encoder=self.global_step < self.config.freeze_encoder_steps,
        )
        loss = self._loss(log_probs, frames, batch)
        self.sums.add(self.counted(loss, len(frames), batch.audio, batch.lengths))
        return self.sum_loss(loss, len(frames))

    def train_figures(self) -> dict[str, float]:
        """Loss per utterance since the last call, and ``seconds`` of audio."""
        sums = self.sums.take()
        loss = (sums["total"] / sums["targets"]).item()
        return {"loss": loss, **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def validation_step(self, batch: CTCBatch | None, batch_idx: int) -> None:
        """Loss and greedy hypotheses."""
        if batch is None:
            return
        log_probs, frames = self.model(batch.audio, batch.lengths)
        loss = self._loss(log_probs, frames, batch)
        self.valid_sums.add(self.counted(loss, len(frames), batch.audio, batch.lengths))
        rows = zip(log_probs.cpu(), frames, strict=True)
        self.hypotheses += [self.decoder(row[:n]).text for row, n in rows]
        self.references += [
            self.vocabulary.decode(row[:n].tolist())
            for row, n in zip(batch.targets.cpu(), batch.target_lengths, strict=True)
        ]

    def on_validation_epoch_end(self) -> None:
        """Log the loss, WER and CER of the whole validation set."""
        sums = self.valid_sums.take()
        if self.trainer.world_size > 1:
            said: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(said, (self.references, self.hypotheses))
            self.references, self.hypotheses = ([text for part in said for text in part[i]] for i in range(2))
        rates = error_rates(self.references, self.hypotheses)
        self.references, self.hypotheses = [], []
        loss = (sums["total"] / sums["targets"]).item()
        self.log_validation({"loss": loss, "wer": rates.wer, "cer": rates.cer})


def finetune(
    config: FinetuneConfig,
    splits: Splits,
    out: Path,
    *,
    init_from: Path | None = None,
    vocabulary: Vocabulary | None = None,
    resume: bool = False,
) -> Recognizer:
    """Fine-tune with CTC and leave a run folder.

    Args:
        config, splits, out, resume: as for ``pretrain``; cuts need transcripts.
        init_from: pretraining run whose encoder to start from; None: from random weights.
        vocabulary: None: the characters of the training transcripts.
    """
    config.check()
    check_device(config.train)
    check_splits(splits, config.train)
    check_folder(out, resume)
    if vocabulary is None:
        vocabulary = Vocabulary.from_texts(cut.supervisions[0].text or "" for cut in splits["train"])
    data = SpeechDataModule(
        splits,
        config.data,
        seed=config.train.seed,
        normalize=config.model.normalize_audio,
        encode=vocabulary.encode,
    )
    torch.manual_seed(step_seed(config.train.seed))
    model = Wav2Vec2ForCTC(config.model, len(vocabulary.labels))
    if init_from is not None:
        load_encoder(model, init_from)
    start_folder(out, config, splits, resume)
    rank_zero_only(vocabulary.save)(out / VOCABULARY)
    fit_task(FinetuneTask(model, vocabulary, config), data, config, out, resume)
    return Recognizer(model, vocabulary)


def evaluate_recognizer(run: Path, splits: Splits, split: str) -> dict[str, float]:
    """Loss, ``wer`` and ``cer`` of a finished fine-tuning run on a split, greedily decoded."""
    recognizer = load_recognizer(run)
    config = load_config(run / CONFIG, FinetuneConfig)
    encode = recognizer.vocabulary.encode
    data = SpeechDataModule(splits, config.data, normalize=config.model.normalize_audio, encode=encode)
    return validate_task(FinetuneTask(recognizer.model, recognizer.vocabulary, config), data, split)


def transcripts(recognizer: Recognizer, batches: Iterable[Batch]) -> dict[str, str]:
    """Greedy hypothesis of each utterance of a loader, by id."""
    hypotheses: dict[str, str] = {}
    device = next(recognizer.model.parameters()).device
    decoder = Greedy(recognizer.vocabulary)
    for batch in batches:
        found = recognizer.batch_emissions(batch.audio.to(device), batch.lengths.tolist())
        hypotheses |= {name: decoder(row).text for name, row in zip(batch.ids, found, strict=True)}
    return hypotheses
