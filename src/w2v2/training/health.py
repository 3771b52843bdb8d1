"""Stops a run that has collapsed, and names the utterances of a step that is not finite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from w2v2.errors import JobError
from w2v2.training.collapse import CollapseDetector
from w2v2.training.resume import Checkpoints, checkpoint_files, step_of
from w2v2.training.sharding import whole
from w2v2.training.task import MicroBatch, NormalizedTask, Step, Sums, norm_figures

log = logging.getLogger(__name__)


LOOK_EVERY = 20
"""Optimiser steps between looks at a run's figures, whatever ``log_every`` is."""


_SHORTEST_LOOK = 5
"""Steps without which a look says more of its batches than of the run."""


class AsyncCopy:
    """Tensors on their way to the host, so that nobody waits for the device until they are needed."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
        cuda = any(value.is_cuda for value in values.values())
        self.copied = torch.cuda.Event() if cuda else None
        if self.copied is not None:
            self.copied.record()

    def get(self) -> dict[str, Tensor]:
        """The values, once they are here."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values


class Sentinel(pl.Callback):
    """Stops a run that has collapsed or whose numbers are not finite, and keeps the last checkpoint before that.

    Figures are summed apart from those that are logged, copied without waiting every ``LOOK_EVERY`` steps and judged a
    step later. Whether a step was left out is read when the next one's backward pass has been launched: then the
    device has work.

    Args:
        checkpoints: told what may be thrown away and what may become ``best``; must come later among the callbacks.
        max_steps_left_out: steps without a finite gradient before the run is stopped.
        detect_collapse: whether to look for it.

    Raises:
        JobError: in training.
    """

    def __init__(self, checkpoints: Checkpoints, max_steps_left_out: int, *, detect_collapse: bool = True) -> None:
        self.checkpoints, self.max_steps_left_out = checkpoints, max_steps_left_out
        self.detect_collapse, self.left_out = detect_collapse, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step that the run has reached."""
        assert isinstance(pl_module, NormalizedTask)
        self.looked = self.last_step = trainer.global_step
        self.detector = CollapseDetector(trainer.global_step)
        self.figures: tuple[int, AsyncCopy] | None = None
        self.unread: tuple[Step, AsyncCopy] | None = None
        pl_module.watched = Sums() if self.detect_collapse else None
        pl_module.watched_norms = Sums() if self.detect_collapse else None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """This step's gradient has been launched: read what the last one left."""
        self._read(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send a step's flag on its way, and the figures, if a look is due."""
        step = trainer.global_step
        if step == self.last_step:
            return
        assert isinstance(pl_module, NormalizedTask) and pl_module.last_step is not None
        self.last_step = step
        self.unread = pl_module.last_step, AsyncCopy({"finite": pl_module.last_step.finite})
        if step - self.looked >= LOOK_EVERY:
            self._send(pl_module, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights that may have collapsed must not become the best: judge what there is."""
        if trainer.state.fn != "fit":
            return
        if trainer.global_step - self.looked >= _SHORTEST_LOOK:
            self._send(pl_module, trainer.global_step)
        self._read(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the model tells without context belongs to the picture."""
        if trainer.state.fn == "fit":
            assert isinstance(pl_module, NormalizedTask)
            self.detector.validated(pl_module.valid_figures)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the last steps too."""
        if trainer.global_step - self.looked >= _SHORTEST_LOOK:
            self._send(pl_module, trainer.global_step)
        self._read(trainer, pl_module)

    def _send(self, task: Any, step: int) -> None:
        self.looked = step
        if self.detect_collapse:
            norms = {f"norms/{name}": value for name, value in task.watched_norms.values.items()}
            task.watched_norms.values = {}
            self.figures = step, AsyncCopy({**task.watched.take(), **norms})

    def _read(self, trainer: pl.Trainer, task: Any) -> None:
        if self.unread is not None:
            (step, flag), self.unread = self.unread, None
            if not flag.get()["finite"]:
                self._count_left_out(trainer, task, step)
        if self.figures is None:
            return
        (number, copy), self.figures = self.figures, None
        values = copy.get()
        norms = {name[6:]: values.pop(name).item() for name in list(values) if name.startswith("norms/")}
        figures = task.figures(values) | norm_figures(norms)
        alarm = self.detector.look(number, figures)
        self.checkpoints.trusted = self.detector.trusted
        self.checkpoints.suspected = bool(self.detector.since)
        if alarm is not None:
            raise JobError(
                f"{alarm} (to go on all the same: `train.sentinel` False); {self._retreat(trainer, alarm.since)}"
            )

    def _retreat(self, trainer: pl.Trainer, since: int) -> str:
        """Remove checkpoints later than a step, and say which is left."""
        files = checkpoint_files(self.checkpoints.out)
        if trainer.is_global_zero:
            for path in files:
                if step_of(path) > since:
                    path.unlink(missing_ok=True)
        good = [path for path in files if step_of(path) <= since]
        return f"the last good checkpoint is {good[0]}" if good else "no checkpoint is older than that"

    def _count_left_out(self, trainer: pl.Trainer, task: NormalizedTask, step: Step) -> None:
        """Name the losses and utterances of a step that was left out; stop the run when there are too many of them.

        With a loss scale (16-mixed) steps are left out as a matter of course, until the scale fits.
        """
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        self.left_out += 1
        fault = describe(step.micro_batches, task.model)
        log.warning("step %d left out, its gradient is not finite: %s", step.number, fault)
        if self.left_out > self.max_steps_left_out:
            raise JobError(
                f"{self.left_out} steps left out, more than `train.max_steps_left_out` {self.max_steps_left_out}; "
                f"the last, step {step.number}: {fault}; repair these utterances, or go on from an earlier checkpoint"
            )


def describe(micro_batches: Sequence[MicroBatch], model: nn.Module) -> str:
    """Say in a line what is not finite of a step: weights, losses by name, utterances. It waits for the device.

    The utterances are those whose audio is not finite; without such, those of the micro-batches with a loss that is
    not; without such, all of this process.

    Args:
        micro_batches: of this process.
        model: of a sharded one, every process must call this.
    """
    weights = [name for name, p in model.named_parameters() if not whole(p.detach()).isfinite().all()]
    suspects = [part for part in micro_batches if not all(loss.isfinite() for loss in part.losses.values())]
    where = "" if suspects else "every loss here is finite, a gradient is not; "
    suspects = suspects or list(micro_batches)
    totals = {name: sum(part.losses[name].item() for part in suspects) for name in suspects[0].losses}
    faulty = [
        name
        for part in suspects
        for name, finite in zip(part.ids, part.audio_finite.tolist(), strict=True)
        if not finite
    ]
    return (
        (f"weights that are not finite: {', '.join(weights)}; " if weights else "")
        + f"{where}losses {', '.join(f'{name} {total:.6g}' for name, total in totals.items())}; utterances "
        + ", ".join(faulty or [name for part in suspects for name in part.ids])
        + (" (their audio is not finite)" if faulty else "")
    )
