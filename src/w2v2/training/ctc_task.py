"""The CTC task: loss, greedy error rates in validation, and what is said of a run that says nothing yet."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from w2v2.checkpoint.native import VOCABULARY
from w2v2.decoding.greedy import Greedy
from w2v2.evaluation.evaluate import error_rates
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.losses import ctc_loss
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.text.vocabulary import Vocabulary
from w2v2.training.config import FinetuneConfig
from w2v2.training.head_task import HeadTask, LabelledBatch
from w2v2.training.task import Sums

log = logging.getLogger(__name__)

_SAMPLES = 3
"""Validation utterances shown in the log."""
_SHOWN = 100
"""Characters of each there."""


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
        ``frames``, those whose best label is ``blank``, labels ``emitted`` and ``to_say``, ``labels`` with boundaries.
    """
    boundary = -1 if vocabulary.boundary is None else vocabulary.boundary
    best = log_probs.detach().argmax(-1)
    blank = best == vocabulary.blank
    emitted = (F.pad(best, (1, 0), value=-1)[:, :-1] != best) & ~blank & (best != boundary)
    both = torch.stack([blank, emitted])
    blanks, labels = torch.cat([both[:, row, :n] for row, n in enumerate(frames)], dim=1).sum(1)
    lengths = target_lengths.tolist()
    to_say = torch.cat([row[:n] for row, n in zip(targets, lengths, strict=True)]) != boundary
    counts = {"frames": sum(frames), "labels": sum(lengths)}
    return {
        "blank": blanks,
        "emitted": labels,
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
        "length_ratio": total["emitted"] / max(total["to_say"], 1),
    }


@dataclass
class Plateau:
    """Names the plateau of blanks, on which every CTC run stays for a while before its first letters.

    A model is on it while 70 % of the frames or more are blank, a tenth of the reference's labels or fewer are said
    (to leave it a fifth), and the loss does not fall by 5 % an interval. It is named after 50 steps, and once it is
    over. Word boundaries, the first that is learned, are not counted as said.
    """

    step: int = 0
    """Last look."""
    loss: float = float("inf")
    """Per label, at that."""
    since: int | None = None
    """Step at which the plateau began."""
    named: bool = False

    def look(self, step: int, figures: dict[str, float], total_steps: int, frozen_steps: int = 0) -> str | None:
        """Take the figures of the interval that ends with a step; a line, if a plateau is to be named.

        ``total_steps`` and ``frozen_steps`` are the run's and those of its beginning in which the encoder is frozen.
        """
        before, flat = self.step, figures["loss_per_label"] > 0.95 * self.loss
        self.step, self.loss = step, figures["loss_per_label"]
        blank, ratio = figures["blank_share"], figures["length_ratio"]
        seen = f"{blank:.0%} of the frames are blank, {ratio:.2f} labels are said for each of the reference"
        if blank < 0.7 or ratio > (0.2 if self.named else 0.1):
            since, named = self.since or 0, self.named
            self.since, self.named = None, False
            return f"step {step}: out of the plateau of blanks after {step - since} steps, {seen}" if named else None
        if self.since is None and flat:
            self.since = before
        if self.since is None or self.named or step - self.since < 50:
            return None
        self.named = True
        rest = f"the encoder is frozen until step {frozen_steps}" if step < frozen_steps else "that is no fault yet"
        return (
            f"steps {self.since} to {step}: {seen}, the loss stays at {self.loss:.2f} nats per label: the plateau of "
            f"blanks, which every CTC run goes through before its first letters; {rest}. If it lasts for more than a "
            f"third of the run, until step {self.since + total_steps // 3}, raise `optim.schedule.peak`, mask less, or "
            "see with `preflight` whether the set-up can learn"
        )


class FinetuneTask(HeadTask):
    """CTC; the loss is summed over utterances and divided once by their number (``sentence_avg``)."""

    model: Wav2Vec2ForCTC

    def __init__(self, model: Wav2Vec2ForCTC, vocabulary: Vocabulary, config: FinetuneConfig) -> None:
        super().__init__(model, config)
        self.vocabulary = vocabulary
        self.decoder = Greedy(vocabulary)
        self.plateau = Plateau()
        self.valid_sums = Sums()
        self.references: list[str] = []
        self.hypotheses: list[str] = []

    def _count(self, log_probs: Tensor, frames: list[int], batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss, and everything that is logged as sums."""
        loss = ctc_loss(log_probs, frames, batch.targets, batch.target_lengths, blank=self.vocabulary.blank)
        counts = emission_counts(log_probs, frames, batch.targets, batch.target_lengths, self.vocabulary)
        return loss, {**counts, **self.counted(loss, len(frames), batch.audio, batch.lengths)}

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Summed CTC loss of one micro-batch."""
        self.seed_step(batch_idx)
        frozen = self.encoder_is_frozen
        with self.casts_kept():
            log_probs, frames = self.model(batch.audio, batch.lengths, draws=batch.draws, freeze_encoder=frozen)
        loss, counts = self._count(log_probs, frames, batch)
        self.record({"ctc": loss}, batch.audio)
        self.sums.add(counts)
        return self.sum_loss(loss, len(frames))

    def train_figures(self) -> dict[str, float]:
        """Figures since the last call, and ``seconds`` of audio a step; a plateau is named in the log."""
        sums = self.sums.take()
        figures = _figures(sums)
        steps = self.config.optim.schedule.total_steps
        news = self.plateau.look(self.global_step, figures, steps, self.config.freeze_encoder_steps)
        if news and self.trainer.is_global_zero:
            log.info("%s", news)
        return {**figures, **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def validation_step(self, batch: LabelledBatch | None, batch_idx: int) -> None:
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
            ranks: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(ranks, (self.references, self.hypotheses))
            self.references, self.hypotheses = ([text for rank in ranks for text in rank[i]] for i in range(2))
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
        """CER: WER is near 1 until words are right, and lower for a model that says nothing yet."""
        figures = self.valid_figures
        return figures["cer"], figures["wer"], figures["loss"]

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The weights, and the vocabulary: all that transcribing needs."""
        super().save(folder, weights)
        self.vocabulary.save(folder / VOCABULARY)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is known of a plateau too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["plateau"] = dataclasses.asdict(self.plateau)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        super().on_load_checkpoint(checkpoint)
        self.plateau = Plateau(*checkpoint["plateau"].values())
