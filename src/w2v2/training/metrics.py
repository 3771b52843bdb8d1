"""What happens beside the training step: metrics to the loggers and the terminal, the CSV file, weights at the end."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from w2v2.files import whole
from w2v2.model.flops import peak_flops, utilisation
from w2v2.serial import read_figures
from w2v2.training.task import NormalizedTask

log = logging.getLogger(__name__)


class CSVMetrics(Logger):
    """``metrics.csv``: a row per logged step, columns as they turn up, full precision.

    A resumed run takes up the rows up to its step, so the file reads as if nothing had happened. Lightning's own CSV
    logger deletes an existing file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, float]] = dict(read_figures(path)) if path.exists() else {}
        self.written = False

    @property
    def name(self) -> str:
        """Nothing: the run folder is the name."""
        return ""

    @property
    def version(self) -> str:
        """Nothing, as above."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not here: they are in config.json."""

    @property
    def last(self) -> int:
        """Step of the last row; -1: there is none."""
        return max(self.rows, default=-1)

    def resume_at(self, step: int) -> None:
        """Forget rows after a step."""
        self.rows = {at: row for at, row in self.rows.items() if at <= step}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of a step, and write the file: one more row, where that is all that is new."""
        row = self.rows.setdefault(step or 0, {})
        fits = not row and metrics.keys() <= set(self._columns()) and self.written
        row.update({name: float(value) for name, value in metrics.items()})
        if fits:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                self._writer(file).writerow({"step": step, **row})
        else:
            with whole(self.path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
                writer = self._writer(file)
                writer.writeheader()
                writer.writerows({"step": number, **self.rows[number]} for number in sorted(self.rows))
            self.written = True  # until then the file may have rows that a resumed run has forgotten

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(file, ["step", *self._columns()])


class Progress(pl.Callback):
    """Every so many steps, figures to the loggers and a line with speed and time to go to the log.

    Args:
        every: steps.
        total_steps: at which the run ends.
        flops: of training, per second of audio (``flops.training_flops``); None: not known.
    """

    def __init__(self, every: int, total_steps: int, flops: float | None = None) -> None:
        self.every, self.total_steps, self.flops = every, total_steps, flops
        self.peak: float | None = None
        self.started = self.mark = self.waited = 0.0
        self.first_step = self.last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        self.started = self.mark = time.perf_counter()
        self.first_step = self.last_step = trainer.global_step
        device = trainer.strategy.root_device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep validation out of the training speed."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As above."""
        self.mark += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if an optimiser step has just ended that is due."""
        step, before = trainer.global_step, self.last_step
        if step == before or (step % self.every and step != self.total_steps):
            return
        self.last_step = step
        assert isinstance(pl_module, NormalizedTask)
        figures = pl_module.train_figures()
        now = time.perf_counter()
        waited = float(getattr(trainer.train_dataloader, "waited", 0.0))
        speed = figures.pop("seconds") * (step - before) / (now - self.mark)  # those made here, not all that are summed
        figures |= {
            "learning_rate": pl_module.optim_config.schedule(step),
            "audio_seconds_per_second": speed,
            "wait_share": (waited - self.waited) / (now - self.mark),
        }
        if self.flops is not None and self.peak is not None:
            figures["flops_utilisation"] = utilisation(self.flops, speed, trainer.world_size, self.peak)
        self.mark, self.waited = now, waited
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in figures.items()}, step)
        remaining = (now - self.started) / (step - self.first_step) * (self.total_steps - step)
        accuracy = f"accuracy {figures['accuracy']:.3f}  " if "accuracy" in figures else ""
        accuracy += f"{figures['blank_share']:.0%} blank  " if "blank_share" in figures else ""
        log.info(
            "step %d/%d  loss %.3f  %s%.0f audio-s/s  %.0f %% waiting for data  %s to go",
            step, self.total_steps, figures["loss"], accuracy, speed, 100 * figures["wait_share"],
            timedelta(seconds=round(remaining)),
        )  # fmt: skip


def silence_lightning() -> None:
    """Suppress advice that does not apply: workers are a setting, the loader's length is not known by design."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*train_dataloader yielded None.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*overridden `.*` in `LightningModule`.*",
    ):
        warnings.filterwarnings("ignore", message)
