"""Self-supervised training of any model that returns :class:`SSLOutput`: the task, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2v2.checkpoint.native import CONFIG, load_pretrained, load_weights
from w2v2.data.batch import Batch
from w2v2.data.corpora import Splits
from w2v2.errors import UsageError
from w2v2.model.masking import Draws
from w2v2.model.pretraining import SSLOutput, Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import SAMPLE_RATE
from w2v2.serial import load_config
from w2v2.training.config import PretrainConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.optim import OptimConfig
from w2v2.training.run import check_device, check_folder, check_splits, fit_task, start_folder, validate_task
from w2v2.training.task import NormalizedTask, Sums, step_seed


def pretrain(
    config: PretrainConfig, splits: Splits, out: Path, *, init_from: Path | None = None, resume: bool = False
) -> Wav2Vec2ForPretraining:
    """Pretrain and leave a run folder.

    Args:
        config: the whole run.
        splits: cuts, with ``train`` and ``valid``.
        out: run folder; new or empty, unless resuming.
        init_from: folder whose weights to start from, all of them, quantizer and heads included.
        resume: go on from the last checkpoint of ``out``.

    Raises:
        UsageError: settings that cannot work, a folder that holds another run, weights that do not fit.
    """
    config.check()
    check_device(config.train)
    check_splits(splits, config.train)
    check_folder(out, resume)
    data = SpeechDataModule(splits, config.data, seed=config.train.seed, normalize=config.model.normalize_audio)
    torch.manual_seed(step_seed(config.train.seed))
    model = config.model.build()
    assert isinstance(model, Wav2Vec2ForPretraining)
    if init_from is not None:
        load_weights(model, init_from)
    start_folder(out, config, splits, resume)
    task = PretrainTask(model, config.optim, config.loss_weights, config.train.seed)
    fit_task(task, data, config, out, resume)
    return model


def evaluate_pretrained(run: Path, splits: Splits, split: str) -> dict[str, float]:
    """Loss, accuracies and perplexities of a finished pretraining run on a split."""
    model = load_pretrained(run)
    config = load_config(run / CONFIG, PretrainConfig)
    task = PretrainTask(model, config.optim, config.loss_weights, config.train.seed)
    data = SpeechDataModule(splits, config.data, normalize=config.model.normalize_audio)
    return validate_task(task, data, split)


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Sum of weight times loss.

    Raises:
        UsageError: a loss without a weight, or a weight without a loss.
    """
    if losses.keys() != weights.keys():
        raise UsageError(f"loss_weights must name the model's losses {sorted(losses)}, got {sorted(weights)}")
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


class PretrainTask(NormalizedTask):
    """Trains a self-supervised model.

    Args:
        model: see :class:`SSLModel`; a module.
        optim: optimiser and schedule.
        loss_weights: weight of each of the model's losses.
        seed: of everything random.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, loss_weights: dict[str, float], seed: int) -> None:
        super().__init__(optim, seed)
        self.model = model
        self.loss_weights = loss_weights
        self.valid_sums = Sums()
        self.baseline_sums = Sums()

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> tuple[Tensor, list[int] | None, Draws] | None:
        """Draw on the host, then send audio and draws along; lengths are only needed on the host.

        None, which the trainer skips, stands for a batch without utterances.
        """
        if self.is_empty(batch):
            return None
        samples = batch.lengths.tolist()
        model: Any = self.model
        if self.trainer.training:
            keys = [(self.seed, number, name) for number, name in zip(batch.passes, batch.ids, strict=True)]
            draws = model.draw(samples, keys, step_key=(self.seed, self.global_step))
        else:
            draws = model.draw(samples, [("valid", name) for name in batch.ids])
        lengths = samples if min(samples) < batch.audio.shape[1] else None
        return batch.audio.to(device, non_blocking=True), lengths, draws.to(device)

    def training_step(self, batch: tuple[Tensor, list[int] | None, Any], batch_idx: int) -> Tensor:
        """Sum of the weighted losses of one micro-batch."""
        audio, lengths, draws = batch
        self.seed_step(batch_idx)
        out: SSLOutput = self.model(audio, draws, lengths, step=self.global_step)
        total = weighted_sum(out.losses, self.loss_weights)
        self.record(out.losses, audio)
        loggable = self._loggable(out, total, audio, lengths)
        self.sums.add(loggable)
        if self.watched is not None:
            self.watched.add(loggable)
        return self.sum_loss(total, out.num_targets)

    def validation_step(self, batch: tuple[Tensor, list[int] | None, Any] | None, batch_idx: int) -> None:
        """The same losses without noise, and once more with every frame masked: what can be told without context."""
        if batch is None:
            return
        audio, lengths, draws = batch
        out: SSLOutput = self.model(audio, draws, lengths, step=self.global_step)
        total = weighted_sum(out.losses, self.loss_weights)
        self.valid_sums.add(self._loggable(out, total, audio, lengths))
        n_frames = int(sum(self.model.frame_lengths(audio, lengths)[0]))  # type: ignore[operator]
        blind: SSLOutput = self.model(audio, draws.all_masked(n_frames), lengths, step=self.global_step)
        self.baseline_sums.add(blind.metrics)

    @staticmethod
    def _loggable(out: SSLOutput, total: Tensor, audio: Tensor, lengths: list[int] | None) -> dict[str, Tensor]:
        return {
            **{f"loss/{name}": value.double() for name, value in out.losses.items()},
            **{f"metric/{name}": value for name, value in out.metrics.items()},
            **NormalizedTask.counted(total, out.num_targets, audio, lengths),
        }

    def figures(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Per-target losses and the model's own figures, from sums; a loss that the model figures itself is that."""
        targets = sums["targets"].item()
        losses = {name[5:]: value.item() / targets for name, value in sums.items() if name.startswith("loss/")}
        metrics = {name[7:]: value for name, value in sums.items() if name.startswith("metric/")}
        model: Any = self.model
        figures = losses | model.summarize(metrics)
        changed = sum(self.loss_weights[name] * (figures[name] - loss) for name, loss in losses.items())
        return {"loss": sums["total"].item() / targets + changed, **figures}

    def train_figures(self) -> dict[str, float]:
        """Figures of all micro-batches since the last call, over all ranks, and ``seconds`` of audio among them."""
        sums = self.sums.take()
        return {**self.figures(sums), **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def on_validation_epoch_end(self) -> None:
        """Log figures of the whole validation set."""
        figures = self.figures(self.valid_sums.take())
        model: Any = self.model
        figures["accuracy_all_masked"] = model.summarize(self.baseline_sums.take())["accuracy"]
        self.log_validation(figures)
