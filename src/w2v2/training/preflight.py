"""Whether a fine-tuning set-up can learn at all: it must learn a few short utterances by heart."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from w2v2.data.batch import Batch, SpeechDataset
from w2v2.data.corpora import Row, Split, Splits
from w2v2.data.utterance import Utterance
from w2v2.decoding.greedy import Greedy
from w2v2.errors import Show, UsageError, quiet
from w2v2.evaluation.evaluate import error_rates
from w2v2.model.losses import ctc_loss
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.training.config import FinetuneConfig
from w2v2.training.ctc_task import FinetuneTask
from w2v2.training.finetune import Start, begin, check_start
from w2v2.training.run import check_run

UTTERANCES, STEPS, WARM_UP, LOOK_EVERY = 8, 400, 20, 10


LOOKED_AT, AT_LEAST = 2_000, 1.0
"""Utterances of the corpus that the short ones are taken from; seconds that each should have."""


DONE, LEARNS = 0.1, 0.5
"""Character error rate at which it ends; and by how much it must be below that of saying the same of all of them."""


@dataclass(frozen=True)
class Preflight:
    """What came of it."""

    utterances: int
    seconds: float
    steps: int
    peak: float
    losses: tuple[float, float]
    """Per utterance, before and after."""
    cers: tuple[float, float]
    """Before and after."""
    deaf_cer: float
    """Of the transcript that is nearest to all of them, said of each: what can be had without listening."""

    @property
    def learns(self) -> bool:
        """Whether far more is right at the end than without listening."""
        return self.cers[1] <= max(DONE, LEARNS * self.deaf_cer)

    def __str__(self) -> str:
        verdict = (
            "this set-up can learn"
            if self.learns
            else "it does not learn them; listen whether the transcripts belong to the audio, and check "
            "`optim.schedule.peak` and the run it starts from"
        )
        return (
            f"preflight: {self.utterances} utterances ({self.seconds:.1f} s) {self.steps} times at a rate of up to "
            f"{self.peak:g}: loss {self.losses[0]:.4g} -> {self.losses[1]:.4g} per utterance, "
            f"CER {self.cers[0]:.0%} -> {self.cers[1]:.0%}, without listening {self.deaf_cer:.0%}: {verdict}"
        )


def preflight(
    config: FinetuneConfig,
    splits: Splits,
    *,
    init_from: str | PathLike[str] | None = None,
    language: str | None = None,
    show: Show = quiet,
) -> Preflight:
    """Learn eight short utterances by heart, with everything as in the run but for masks, dropout and LayerDrop.

    The learning rate rises to the schedule's peak in 20 steps and stays there, 400 in all at most; a frozen encoder
    learns from the start. In fp32. Nothing is written.

    Raises:
        UsageError: as ``finetune``; audio that cannot be read.
    """
    check_run(config, splits)
    check_start(config, init_from)
    start = begin(config, splits, init_from=init_from, language=language, show=show)
    batch = short_batch(config, splits["train"], start)
    cuda = config.train.accelerator != "cpu" and torch.cuda.is_available()
    return overfit(config, start, batch, torch.device("cuda" if cuda else "cpu"), show)


def short_batch(config: FinetuneConfig, split: Split, start: Start) -> Batch:
    """The shortest usable utterances, of a second or more where there are enough, no two with the same transcript."""
    by_text: dict[str, Any] = {}
    for cut in itertools.islice(split, LOOKED_AT):
        text = Utterance.of(cut).text or ""
        if text.strip() and cut.duration >= config.data.min_seconds and start.fits(cut.duration, text):
            by_text.setdefault(text, cut)
    cuts = heapq.nsmallest(UTTERANCES, by_text.values(), key=lambda cut: (cut.duration < AT_LEAST, cut.duration))
    if not cuts:
        raise UsageError(f"none of the first {LOOKED_AT} utterances of train can be learned; check the transcripts")
    dataset = SpeechDataset(normalize=config.model.normalize, encode=start.vocabulary.encode)
    batch = dataset[(0, 0), [Row(cut.duration, cut.id, cut) for cut in cuts]]
    if batch.bad:
        raise UsageError(f"cannot read {'; '.join(batch.bad.values())}; repair or remove them")
    return batch


def overfit(config: FinetuneConfig, start: Start, batch: Batch, device: torch.device, show: Show = quiet) -> Preflight:
    """Train on one batch until it is known by heart, or for ``STEPS`` steps."""
    assert batch.targets is not None and batch.target_lengths is not None
    task = FinetuneTask(start.model.to(device), start.vocabulary, config)
    optimizer = config.optim.build(task.parameter_groups())
    model, vocabulary = start.model.eval(), start.vocabulary  # without dropout
    peak = max(config.optim.schedule(step) for step in range(1, config.optim.schedule.total_steps + 1))
    audio, targets, lengths = batch.audio.to(device), batch.targets.to(device), batch.lengths.tolist()
    decoder = Greedy(vocabulary)
    label_ids = [row[:n].tolist() for row, n in zip(batch.targets, batch.target_lengths, strict=True)]
    references = [vocabulary.decode(row) for row in label_ids]
    losses, cers = [], []
    for step in range(STEPS + 1):
        log_probs, frames = model(audio, lengths)
        loss = ctc_loss(log_probs, frames, targets, batch.target_lengths, blank=vocabulary.blank) / len(frames)
        if step % LOOK_EVERY == 0:
            losses.append(loss.item())
            rows = zip(log_probs.detach().cpu(), frames, strict=True)
            cers.append(error_rates(references, [decoder(row[:n]).text for row, n in rows]).cer)
            show("preflight", step / STEPS)
        if step == STEPS or cers[-1] <= DONE or not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / WARM_UP) * group.get("lr_scale", 1.0)
        optimizer.step()
    return Preflight(
        utterances=len(batch.ids),
        seconds=sum(lengths) / SAMPLE_RATE,
        steps=step,
        peak=peak,
        losses=(losses[0], losses[-1]),
        cers=(cers[0], cers[-1]),
        deaf_cer=min(error_rates(references, [text] * len(references)).cer for text in references),
    )
