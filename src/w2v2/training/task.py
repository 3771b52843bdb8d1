"""What every training task shares: one normalisation of gradients, sums as metrics, keyed seeds."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from w2v2.checkpoint.native import save_state
from w2v2.data.batch import Batch
from w2v2.errors import JobError
from w2v2.model.masking import Draws
from w2v2.model.precision import Casts, casts_kept
from w2v2.training.optim import OptimConfig
from w2v2.training.sharding import shard, whole


@dataclass
class MicroBatch:
    """What there is to say of a micro-batch if its step is not finite; tensors stay on the device."""

    ids: list[str]
    losses: dict[str, Tensor]
    """Sum of each loss, ()."""
    audio_finite: Tensor
    """(B,) of each utterance, bool."""


@dataclass
class Step:
    """An optimiser step, as this process saw it."""

    number: int
    """From 1."""
    finite: Tensor
    """() whether the gradient's norm over all processes was; else the step was left out."""
    micro_batches: list[MicroBatch]
    """Of this process."""


def step_seed(*key: int) -> int:
    """A seed for torch's generators that depends on the key alone, such as (seed, step, rank, micro-batch)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def unequal_lengths(batch: Batch) -> list[int] | None:
    """Valid samples of each utterance, for a model; None where none is padded."""
    lengths: list[int] = batch.lengths.tolist()
    return lengths if min(lengths) < batch.audio.shape[1] else None


class Sums:
    """Named sums that stay on the device until somebody reads them."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add to each name."""
        for name, value in values.items():
            before = self.values.get(name)  # on the host, if it comes from a checkpoint
            self.values[name] = value.detach().clone() if before is None else before.to(value.device) + value.detach()

    def take(self) -> dict[str, Tensor]:
        """The sums over all ranks; starts again from nothing."""
        taken, self.values = self.values, {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name in sorted(taken):
                torch.distributed.all_reduce(taken[name])
        return taken


def norm_figures(norms: dict[str, float]) -> dict[str, float]:
    """Mean gradient norm of the steps that had a finite one, if any did, and the number of the others."""
    figures = {"grad_norm": norms["norm"] / norms["finite"]} if norms["finite"] else {}
    return {**figures, "steps_left_out": norms["steps"] - norms["finite"]}


def _from_all_ranks(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each rank has, on the host; every one must call this."""
    own = {name: value.cpu() for name, value in values.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return gathered


def _turn_page(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint of the end of a pass one of the beginning of the next.

    Lightning would go on counting batches where the old pass ended, so seeds and positions would be other ones.
    """
    loop = checkpoint["loops"]["fit_loop"]
    checkpoint["epoch"] += 1
    for progress in loop["epoch_progress"].values():
        progress.update(dict.fromkeys(progress, progress["ready"]))
    batches = loop["epoch_loop.batch_progress"]
    batches["total"] = dict.fromkeys(batches["total"], batches["total"]["ready"])
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    for counts in loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        counts["current"] = dict.fromkeys(counts["current"], 0)


class NormalizedTask(pl.LightningModule):
    """One normalisation for every task: gradients are of the summed loss, divided once by the step's number of targets.

    Micro-batches add up, DDP averages over ranks, and just before clipping everything is multiplied by the number of
    ranks over the number of targets of all ranks and micro-batches. So one big batch, accumulation and any number of
    ranks give the same gradient.
    """

    model: nn.Module

    def __init__(self, optim: OptimConfig, seed: int) -> None:
        super().__init__()
        self.optim_config, self.seed = optim, seed
        self.step_targets = 0
        self.casts: Casts = {}
        self.sums = Sums()
        self.valid_figures: dict[str, float] = {}
        self.seconds_heard = 0.0
        self.norm_sums = Sums()
        # For those who watch the run (health.py): sums apart from the logged ones, and what a step was made of.
        self.watched: Sums | None = None
        self.watched_norms: Sums | None = None
        self.last_step: Step | None = None
        self.micro_batches: list[MicroBatch] = []
        self.batch_ids: list[str] = []

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Remember which utterances are on their way to the device."""
        self.batch_ids = batch.ids
        return batch

    def draw(self, batch: Batch, *, training: bool) -> Draws | None:
        """What the model draws for a batch, on the host; the loader's workers call it too.

        Depends on the seed, the epoch and place of the batch in it, and its utterances.
        """
        raise NotImplementedError

    def drawn(self, batch: Batch) -> Draws | None:
        """What was drawn in the worker, or is now, for a loader that knows no task."""
        return batch.draws if batch.draws is not None else self.draw(batch, training=self.trainer.training)

    def step_key(self, batch: Batch) -> tuple[int, int, int]:
        """Seed, epoch, and the optimiser step of the epoch that a training batch is for."""
        epoch, number = batch.place
        return self.seed, epoch, number // self.trainer.accumulate_grad_batches

    def record(self, losses: dict[str, Tensor], audio: Tensor) -> None:
        """Keep what names a micro-batch, until its step is known to be finite.

        Args:
            losses: sums over the micro-batch.
            audio: (B, S) on the device.
        """
        losses = {name: loss.detach() for name, loss in losses.items()}
        self.micro_batches.append(MicroBatch(self.batch_ids, losses, audio.isfinite().all(1)))

    def train_figures(self) -> dict[str, float]:
        """Figures of everything since the last call, over all ranks, and ``seconds`` of audio a step."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Share the model out over the processes, if the strategy has them laid out for it."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over every parameter that learns."""
        return self.optim_config.build(self.parameter_groups())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Every parameter that learns; a group's ``lr_scale`` is its share of the schedule's learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write what is to be used later, of the last or the best step: the model's weights, given whole."""
        save_state(weights, folder)

    def score(self) -> tuple[float, ...]:
        """By which the last validation is better than another: the lower."""
        return (self.valid_figures.get("loss", float("nan")),)

    def seed_step(self, batch_idx: int) -> None:
        """Make dropout and Gumbel noise depend on (seed, step, rank, micro-batch) alone."""
        torch.manual_seed(step_seed(self.seed, self.global_step, self.global_rank, batch_idx))

    def casts_kept(self) -> contextlib.AbstractContextManager[None]:
        """Inside, weights are cast once for all micro-batches of a step; sharded ones, which come and go, each time."""
        return casts_kept(None if isinstance(self.model, FSDPModule) else self.casts)

    def sum_loss(self, total: Tensor, num_targets: int) -> Tensor:
        """A summed loss as ``training_step`` has to return it: Lightning divides by the number of micro-batches."""
        self.step_targets += num_targets
        return total * self.trainer.accumulate_grad_batches

    @staticmethod
    def counted(total: Tensor, num_targets: int, audio: Tensor, lengths: list[int] | None) -> dict[str, Tensor]:
        """What every task sums up for its figures: the loss, its targets, and the samples heard, padding left out."""
        samples = audio.numel() if lengths is None else sum(lengths)
        ones = torch.ones((), device=total.device, dtype=torch.float64)
        return {"total": total.double(), "targets": num_targets * ones, "samples": samples * ones}

    def is_empty(self, batch: Batch) -> bool:
        """Whether none of a batch could be read: there is nothing to learn from it, and alone one may go on.

        Raises:
            JobError: other processes, or other micro-batches of the step, count on this one's gradient.
        """
        if batch.ids:
            return False
        if self.trainer.world_size > 1 or (self.trainer.training and self.trainer.accumulate_grad_batches > 1):
            raise JobError(f"no utterance of a whole batch can be read: {'; '.join(batch.bad.values())}; repair them")
        return True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise the gradient and set the learning rate."""
        scale: float | Tensor = 1 / self.step_targets if self.step_targets else float("nan")
        if self.trainer.world_size > 1:
            targets = torch.full((), float(self.step_targets), device=self.device)  # a kernel, not a copy
            torch.distributed.all_reduce(targets)
            scale = self.trainer.world_size / targets
        self.step_targets = 0
        self.casts.clear()
        torch._foreach_mul_([p.grad for p in self.parameters() if p.grad is not None], scale)
        for group in optimizer.param_groups:
            group["lr"] = self.optim_config.schedule(self.global_step + 1) * group.get("lr_scale", 1.0)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm; a step whose gradient is not finite is left out by the optimiser itself, on the device.

        So nothing here waits for the device: whether a step was left out is read with the other figures.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        finite = norm.isfinite()
        optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None  # type: ignore[attr-defined]
        ones = torch.ones_like(norm)
        norms = {"norm": torch.where(finite, norm, 0.0), "finite": finite * ones, "steps": ones}
        self.norm_sums.add(norms)
        self.last_step = Step(self.global_step + 1, finite, self.micro_batches)
        self.micro_batches = []
        if self.watched_norms is not None:
            self.watched_norms.add(norms)

    def step_figures(self, seconds: float) -> dict[str, float]:
        """What every task logs beside its own figures: gradient norm, steps left out, hours heard."""
        self.seconds_heard += seconds
        norms = {name: value.item() for name, value in self.norm_sums.values.items()}
        self.norm_sums.values = {}
        figures = {"hours_heard": self.seconds_heard / 3600, "seconds": seconds / norms.get("steps", 1.0)}
        if norms:
            figures |= {"grad_norm": 0.0, **norm_figures(norms)}
        return figures

    def log_validation(self, figures: dict[str, float]) -> None:
        """Give figures of a validation to the loggers and to callbacks, and keep them as ``valid_figures``."""
        self.valid_figures = figures
        self.log_dict({f"valid/{name}": value for name, value in figures.items()}, logger=False, sync_dist=True)
        for logger in self.trainer.loggers:
            logger.log_metrics({f"valid/{name}": value for name, value in figures.items()}, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of the unfinished logging interval; after the last batch of a pass, begin the next one."""
        if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            _turn_page(checkpoint)
        checkpoint["sums"] = _from_all_ranks(self.sums.values)
        checkpoint["norms"] = self.norm_sums.values
        checkpoint["seconds_heard"] = self.seconds_heard

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        self.sums.values = checkpoint["sums"][self.global_rank]
        self.norm_sums.values = checkpoint["norms"]
        self.seconds_heard = checkpoint["seconds_heard"]
