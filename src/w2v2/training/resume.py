"""Checkpoints: written whole or not at all, the newest good one found again, one more when a signal ends the run."""

from __future__ import annotations

import logging
import os
import re
import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from w2v2.errors import JobError, StoppedError, Whole, first_line
from w2v2.files import whole, write_json
from w2v2.serial import checked, read_checked, save_config
from w2v2.training.config import RunConfig
from w2v2.training.sharding import whole_weights
from w2v2.training.task import NormalizedTask

log = logging.getLogger(__name__)


_NAME, _NUMBER = "step={:08d}.ckpt", "step=[0-9]{8,18}"
_ASKS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]  # not all systems
WARM_START = "warm_start"
"""Folder in a run folder: the run that the warm start is."""


class _Best(TypedDict):
    score: list[float]


class _Count(TypedDict):
    ready: Whole


class _Progress(TypedDict):
    current: _Count


_Loop = TypedDict("_Loop", {"epoch_loop.batch_progress": _Progress})


class _Loops(TypedDict):
    fit_loop: _Loop


class _Saved(TypedDict):
    global_step: Whole
    loops: _Loops


class AtomicIO(CheckpointIO):
    """A checkpoint is a file under its final name only when all of it is on disk; reading one runs no code.

    Lightning's own writing holds a second copy of everything in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside, then rename. On a full disk nothing is left but what was there before."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (RuntimeError, OSError) as error:  # torch's writer does not say that the disk is full
            reason = str(error).splitlines()[0]
            raise OSError(
                f"cannot write {path}: {reason}; earlier checkpoints are whole, go on with `resume`"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values, on the host."""
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return saved

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file."""
        Path(path).unlink(missing_ok=True)


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints of a run folder, newest first."""
    files = (folder / "checkpoints").glob("step=*.ckpt")
    return sorted((path for path in files if re.fullmatch(_NUMBER, path.stem) and path.is_file()), reverse=True)


def can_resume(out: Path) -> bool:
    """Whether a run folder holds a checkpoint, be it of the warm start."""
    return bool(checkpoint_files(out) or checkpoint_files(out / WARM_START))


def step_of(path: Path) -> int:
    """Optimiser steps of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step="))


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, by its checksums too, and what is in it; others are named in the log.

    Raises:
        JobError: none can be read.
    """
    for path in checkpoint_files(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
                if (name := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {name}")
            saved = AtomicIO().load_checkpoint(path)
            if checked(saved, _Saved, path.name)["global_step"] != step_of(path):
                raise ValueError(f"it is of step {saved['global_step']}")
            return path, saved
        except Exception as error:  # a damaged file can fail in any way that its bytes please
            log.warning("%s is damaged (%s); the one before is used", path, first_line(error))
    raise JobError(
        f"no checkpoint in {folder / 'checkpoints'} can be read; start again with `init_from` {folder / 'best'}"
    )


class Checkpoints(pl.Callback):
    """Writes a checkpoint every so many steps, at the end, and when a signal asks to stop; keeps the last ones.

    The weights with the best validation (``NormalizedTask.score``) are kept beside as a folder of their own, ``best``.

    SIGTERM or SIGUSR1, which schedulers send before they take the machine, and Ctrl-C end the run after the current
    step, with its state saved; a second one ends it at once.

    Raises:
        StoppedError: in training, after a signal, when everything is saved.
    """

    def __init__(self, out: Path, config: RunConfig, max_steps: int) -> None:
        self.out, self.config, self.max_steps = out, config, max_steps
        self.step = 0
        self.signal = 0
        self.trusted: int | None = None
        """Last step at which the run was known to be healthy; the newest checkpoint up to there is never removed."""
        self.suspected = False
        """Whether the weights may have collapsed and must not become the best."""
        self.best: tuple[float, ...] = (float("inf"),)
        if (out / "best" / "best.json").exists():
            self.best = tuple(read_checked(out / "best" / "best.json", _Best)["score"])
        self.handlers: dict[int, Any] = {}
        self.started = False
        """Whether an optimiser step has been done."""
        self.before_validation: dict[str, Any] = {}
        """What a checkpoint holds at the step whose validation is under way."""
        self.validated = -1  # last step after which there was a validation

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals, once what the optimiser has taken up is of the parameters' shapes."""
        for optimizer in trainer.optimizers:
            _check_state(optimizer)
        self.step = trainer.global_step
        self._listen()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals, in a validation after the last step too."""
        self._listen()

    def _listen(self) -> None:
        for number in _ASKS:
            self.handlers.setdefault(number, signal.signal(number, self._ask_to_stop))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen no more."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt  # which nobody on the way takes for a mere error
        self.signal = number
        log.warning("%s: saving after this step; once more to end at once", signal.Signals(number).name)

    def interruption(self) -> BaseException:
        """What ended the run at once, where Lightning has made an exit code of it."""
        if not self.signal:
            return KeyboardInterrupt()
        name = signal.Signals(self.signal).name
        return StoppedError(self.signal, f"{name} again: ended at once; go on from the last checkpoint with `resume`")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if an optimiser step has just ended that is due."""
        step = trainer.global_step
        if step == self.step:
            return
        self.step, self.started = step, True
        number = self._agreed(trainer, step)
        if number or step == self.max_steps or step % self.config.train.checkpoint_every == 0:
            self._save(trainer)
        if number:
            raise StoppedError(number, f"{signal.Signals(number).name} at step {step}: saved; go on with `resume`")
        if step % self.config.train.val_every == 0 and not self.config.train.shard:  # references, not copies
            self.before_validation = trainer._checkpoint_connector.dump_checkpoint()

    def _agreed(self, trainer: pl.Trainer, count: int) -> int:
        """The signal that any process got; all learn of it at the same step or batch, whose number ``count`` is."""
        if trainer.world_size == 1:
            return self.signal
        if count % 10 and trainer.strategy.root_device.type == "cuda":
            return 0  # asking the others means waiting for the device
        number = torch.tensor(self.signal, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave a validation, which may take long, with the state of the step before it saved."""
        if self.config.train.shard or not (number := self._agreed(trainer, batch_idx)):
            return
        path = self.out / "checkpoints" / _NAME.format(self.step)
        if trainer.is_global_zero and self.before_validation and not path.exists():
            trainer.strategy.checkpoint_io.save_checkpoint(self.before_validation, path)
        name = signal.Signals(number).name
        raise StoppedError(number, f"{name} in the validation of step {self.step}: saved; go on with `resume`")

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.out / "checkpoints" / _NAME.format(self.step))
        if trainer.is_global_zero:
            files = checkpoint_files(self.out)
            good = [path for path in files if self.trusted is None or step_of(path) <= self.trusted]
            for path in files[self.config.train.keep_checkpoints :]:
                if path not in good[:1]:
                    path.unlink(missing_ok=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if they are the best so far."""
        assert isinstance(pl_module, NormalizedTask)
        self.before_validation = {}
        self.validated = trainer.global_step
        score = pl_module.score()
        # The first process decides: the others may not see its disk, and gathering the weights takes all of them.
        if not trainer.strategy.broadcast(score < self.best and not self.suspected):
            return
        self.best = score
        weights = whole_weights(pl_module.model)
        if trainer.is_global_zero:
            folder = self.out / "best"
            folder.mkdir(exist_ok=True)
            pl_module.save(folder, weights)
            save_config(self.config, folder / "config.json")
            best = {"step": trainer.global_step, "loss": pl_module.valid_figures["loss"], "score": score}
            write_json(folder / "best.json", best)


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that its kernels, which do not look, would read or write beyond its end."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
                raise ValueError(f"the optimizer's {name} is {shapes}")
