"""Self-supervised training of any model that returns :class:`SSLOutput`: the task, and a whole run."""

from __future__ import annotations

import logging
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.native import CONFIG, WEIGHTS, read_native
from w2v2.data.batch import Batch
from w2v2.data.corpora import Splits
from w2v2.data.loader import stop_workers
from w2v2.errors import UsageError
from w2v2.model.masking import Draws
from w2v2.model.objective import SSLModel, SSLOutput
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2
from w2v2.serial import load_config
from w2v2.training.config import PretrainConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.folder import start_folder
from w2v2.training.optim import OptimConfig
from w2v2.training.resume import WARM_START, can_resume, checkpoint_files
from w2v2.training.run import check_run, fit_task, validate_task
from w2v2.training.task import NormalizedTask, Sums, step_seed, unequal_lengths

log = logging.getLogger(__name__)

_BASIS_FRAMES = 16_000
"""Of which the basis of the auxiliary loss is taken: 320 s."""

SSLBatch = tuple[Tensor, list[int] | None, Draws]
"""Audio (B, S) and draws on the device; valid samples of each utterance, None when all are S."""


def pretrain(
    config: PretrainConfig,
    splits: Splits,
    out: Path,
    *,
    init_from: str | PathLike[str] | None = None,
    language: str | None = None,
    resume: bool = False,
) -> Wav2Vec2:
    """Pretrain and leave a run folder.

    Args:
        config: the whole run; its model's ``build`` makes an :class:`SSLModel`.
        splits: cuts, with ``train`` and ``valid``.
        out: run folder; new or empty, unless resuming.
        init_from: folder whose weights to start from: all of them, where its model is of the same type, else those of
            the encoder. See ``PretrainConfig.adopt_architecture``.
        language: as of ``read``.
        resume: go on from the last checkpoint of ``out``.

    Raises:
        UsageError: settings that cannot work, a folder that holds another run, weights that do not fit.
    """
    check_run(config, splits, out, resume)
    _check_stack(config, init_from, resume)
    data = SpeechDataModule(
        splits,
        config.data,
        seed=config.train.seed,
        normalize=config.model.normalize,
    )
    start = None
    if init_from is not None:
        from w2v2.checkpoint.formats import read  # late: other formats have labels, which pretraining runs without

        start = read(init_from, language)
    torch.manual_seed(step_seed(config.train.seed))
    model = config.model.build()
    objective = as_objective(model)
    if start is not None:
        _start_from(start, model)
    start_folder(out, config, splits, resume)
    if config.warm_start.updates and not (resume and checkpoint_files(out)):
        _take_stack(_warm_start(config, splits, out / WARM_START, resume), model)
    if isinstance(model, Wav2Vec2ForPretraining) and not (resume and checkpoint_files(out)):
        _fit_neighbourhood(model, data)
    task = PretrainTask(objective, config.optim, config.loss_weights, config.train.seed)
    fit_task(task, data, config, out, resume)
    return model


def _check_stack(config: PretrainConfig, init_from: str | PathLike[str] | None, resume: bool) -> None:
    """Refuse to warm up what is trained, and to freeze what is not."""
    if init_from is not None and config.warm_start.updates and not resume:
        raise UsageError(
            f"`warm_start.updates` {config.warm_start.updates} would undo the convolutions of `init_from`; set it to 0"
        )
    if not (config.model.conv_gradient_scale or config.warm_start.updates or init_from or resume):
        raise UsageError(
            "`model.conv_gradient_scale` 0 freezes convolutions that are random; set it to 0.1, as published, or give "
            "`warm_start.updates`, such as 600, or `init_from`"
        )


def _warm_start(config: PretrainConfig, splits: Splits, out: Path, resume: bool) -> Wav2Vec2:
    """What the stage before the run makes; a finished one is read."""
    if resume and (out / WEIGHTS).exists():
        return read_native(out).build()
    rank_zero_only(log.info)("warm start: %d updates on the spectrum", config.warm_start.updates)
    return pretrain(config.warm_start_run(), splits, out, resume=resume and can_resume(out))


def _take_stack(warm: Wav2Vec2, model: Wav2Vec2) -> None:
    """Copy the convolutions and the norm after them."""
    model.feature_encoder.load_state_dict(warm.feature_encoder.state_dict())
    model.feature_projection.norm.load_state_dict(warm.feature_projection.norm.state_dict())


@torch.no_grad()
def _fit_neighbourhood(model: Wav2Vec2ForPretraining, data: SpeechDataModule) -> None:
    """Take the basis of the auxiliary loss from the first training batches, unless the model came with one."""
    if model.neighbourhood is None or model.neighbourhood.basis.any():
        return
    stacks: list[Tensor] = []
    for batch in data.train_dataloader():
        if batch.ids:
            normalised, _ = model.feature_projection(model.feature_encoder(batch.audio))
            stacks.append(model.neighbourhood.stack(normalised))
        if sum(map(len, stacks)) >= _BASIS_FRAMES:
            break
    stop_workers()
    model.neighbourhood.fit(torch.cat(stacks)[:_BASIS_FRAMES])


def _start_from(start: Checkpoint, model: Wav2Vec2) -> None:
    if type(start.config) is type(model.config):
        # The auxiliary loss is the recipe's: without it its tensors are left, and where it is new it starts afresh.
        fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("neighbourhood.")}
        given = {n: t for n, t in start.state.items() if n in fresh or not n.startswith("neighbourhood.")}
        replace(start, state=fresh | given).fill(model)
        return
    start.fill_encoder(model)
    rank_zero_only(log.warning)(
        "%s holds a model of %s: its encoder is taken, what %s has beside starts afresh",
        start.source, type(start.config).__name__, type(model.config).__name__,
    )  # fmt: skip


def as_objective(model: Wav2Vec2) -> SSLModel[Any]:
    """A model, if it can be pretrained.

    Raises:
        UsageError: it lacks a method of :class:`SSLModel`.
    """
    missing = [name for name in ("draw", "summarize", "baseline") if not callable(getattr(model, name, None))]
    if missing:
        raise UsageError(
            f"`model` must build an objective (SSLModel); {type(model.config).__name__} builds a "
            f"{type(model).__name__}, which has no {', '.join(missing)}"
        )
    return cast(SSLModel[Any], model)


def evaluate_pretrained(run: Path, splits: Splits, split: str) -> dict[str, float]:
    """Losses and figures of a finished pretraining run on a split."""
    model = read_native(run).build()
    config = load_config(run / CONFIG, PretrainConfig)
    task = PretrainTask(as_objective(model), config.optim, config.loss_weights, config.train.seed)
    data = SpeechDataModule(splits, config.data, normalize=config.model.normalize)
    return validate_task(task, data, split)


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Sum of weight times loss.

    Raises:
        UsageError: a loss without a weight, or a weight, other than 0, without a loss.
    """
    unknown = sorted(name for name, weight in weights.items() if weight and name not in losses)
    missing = sorted(losses.keys() - weights.keys())
    if unknown or missing:
        faults = [f"leave out {name}" for name in unknown] + [f"add {name}" for name in missing]
        raise UsageError(
            f"`loss_weights` must name the model's losses, {', '.join(losses)}, got {', '.join(weights)}: "
            f"{', '.join(faults)}"
        )
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()


class PretrainTask(NormalizedTask):
    """Trains a self-supervised model.

    Args:
        model: what is trained, a module.
        optim: optimiser and schedule.
        loss_weights: weight of each of the model's losses.
        seed: of everything random.
    """

    def __init__(self, model: SSLModel[Any], optim: OptimConfig, loss_weights: dict[str, float], seed: int) -> None:
        super().__init__(optim, seed)
        assert isinstance(model, nn.Module)
        self.model: nn.Module = model
        self.loss_weights = loss_weights
        self.valid_sums = Sums()

    @property
    def objective(self) -> SSLModel[Any]:
        """The model, as what the task knows of it."""
        return cast(SSLModel[Any], self.model)

    def draw(self, batch: Batch, *, training: bool) -> Draws:
        """What the objective asks for."""
        draws: Draws = self.objective.draw(batch, self.step_key(batch) if training else None)
        return draws

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> SSLBatch | None:
        """Send audio and draws along; lengths are only needed on the host.

        None, which the trainer skips, stands for a batch without utterances.
        """
        if self.is_empty(batch):
            return None
        draws = self.drawn(batch)
        assert draws is not None
        return batch.audio.to(device, non_blocking=True), unequal_lengths(batch), draws.to(device)

    def _losses(self, batch: SSLBatch) -> tuple[Tensor, SSLOutput, dict[str, Tensor]]:
        """Summed weighted losses, what the model returns, and everything that is logged as sums."""
        audio, lengths, draws = batch
        out = self.objective(audio, draws, lengths, step=self.global_step)
        total = weighted_sum(out.losses, self.loss_weights)
        sums = {
            **{f"loss/{name}": value.double() for name, value in out.losses.items()},
            **{f"metric/{name}": value for name, value in out.metrics.items()},
            **self.counted(total, out.num_targets, audio, lengths),
        }
        return total, out, sums

    def training_step(self, batch: SSLBatch, batch_idx: int) -> Tensor:
        """Sum of the weighted losses of one micro-batch."""
        self.seed_step(batch_idx)
        with self.casts_kept():
            total, out, sums = self._losses(batch)
        self.record(out.losses, batch[0])
        self.sums.add(sums)
        if self.watched is not None:
            self.watched.add(sums)
        return self.sum_loss(total, out.num_targets)

    def validation_step(self, batch: SSLBatch | None, batch_idx: int) -> None:
        """The same losses without noise, and the metrics of the baseline, if there is one."""
        if batch is None:
            return
        self.valid_sums.add(self._losses(batch)[2])
        audio, lengths, draws = batch
        baseline = self.objective.baseline(draws)
        if baseline is not None:
            out = self.objective(audio, baseline, lengths, step=self.global_step)
            self.valid_sums.add({f"metric/baseline/{name}": value for name, value in out.metrics.items()})

    def figures(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Per-target losses and the model's own figures, from sums; a loss that the model figures itself is that."""
        targets = sums["targets"].item()
        losses = {name[5:]: value.item() / targets for name, value in sums.items() if name.startswith("loss/")}
        metrics = {name[7:]: value for name, value in sums.items() if name.startswith("metric/")}
        figures = losses | self.objective.summarize(metrics)
        changed = sum(self.loss_weights[name] * (figures[name] - loss) for name, loss in losses.items())
        return {"loss": sums["total"].item() / targets + changed, **figures}

    def train_figures(self) -> dict[str, float]:
        """Figures of all micro-batches since the last call, over all ranks, and ``seconds`` of audio a step."""
        sums = self.sums.take()
        return {**self.figures(sums), **self.step_figures(sums["samples"].item() / SAMPLE_RATE)}

    def on_validation_epoch_end(self) -> None:
        """Log figures of the whole validation set."""
        self.log_validation(self.figures(self.valid_sums.take()))
