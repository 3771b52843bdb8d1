"""Probes while a run goes on: what a linear classifier tells of phones from each layer, into the run's metrics."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from w2v2.data.corpora import Splits
from w2v2.training.config import ProbeConfig
from w2v2.training.metrics import Progress
from w2v2.training.task import NormalizedTask

log = logging.getLogger(__name__)

MOST_OF_THE_TIME = 0.03
"""Share of a run's time beyond which probes are said to be too many."""


def probed_splits(config: ProbeConfig, splits: Splits) -> Splits:
    """What is probed of ``train`` and ``valid``.

    Raises:
        UsageError: labels that cannot be used.
    """
    from w2v2.evaluation.features import thin_out  # late: pretraining runs without evaluation/
    from w2v2.evaluation.phones import check_times, phone_classes, read_labels

    phones = read_labels(Path(config.labels))
    cuts = [[cut for cut in splits[name] if cut.id in phones] for name in ("train", "valid")]
    probed = {name: thin_out(part, config.minutes, name) for name, part in zip(("train", "valid"), cuts, strict=True)}
    check_times(phones, {cut.id: cut.duration for part in cuts for cut in part})
    phone_classes(*([phones[cut.id] for cut in part] for part in cuts))
    return probed


class Probing(pl.Callback):
    """Every so many steps, ``probe/FEATURES/phones_one``, phones told from one frame, to the loggers.

    Features are ``layer_0`` (convolutions), ``layer_1`` and so on, and, computed once, ``log-mel`` and ``MFCC``; of a
    model with codes ``probe/codes/purity`` and ``.../information`` come with them.

    Args:
        config: when, and with which labels.
        splits: ``train`` and ``valid``.
        seed: of the classifiers.
        progress: whose clock stands still meanwhile.
    """

    def __init__(self, config: ProbeConfig, splits: Splits, seed: int, progress: Progress) -> None:
        self.config, self.seed, self.progress = config, seed, progress
        self.splits = probed_splits(config, splits)
        self.untrained: dict[str, float] = {}
        self.seconds, self.last_step = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step that the run has reached."""
        self.started, self.last_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe, if an optimiser step has just ended that is due; the other processes wait at their next step."""
        step = trainer.global_step
        if step == self.last_step or step % self.config.every:
            return
        self.last_step, start = step, time.perf_counter()
        if trainer.is_global_zero:
            assert isinstance(pl_module, NormalizedTask)
            figures = self._figures(pl_module.model)
            for logger in trainer.loggers:
                logger.log_metrics({f"probe/{name}": value for name, value in figures.items()}, step)
            self._tell(step, figures, start)
        self.progress.mark += time.perf_counter() - start

    def _figures(self, model: Any) -> dict[str, float]:
        from w2v2.evaluation.probe import probe

        results = probe(
            model, self.splits, "valid", Path(self.config.labels), minutes=math.inf, seed=self.seed,
            beside=() if self.untrained else ("spectra",), quick=True,
        )  # fmt: skip
        figures = {f"codes/{key}": value for key, value in (results["codes"] or {}).items()}
        for row in results["rows"]:
            layer = row["layer"]
            name, figures_of = (row["features"], self.untrained) if layer is None else (f"layer_{layer}", figures)
            figures_of[f"{name}/phones_one"] = row["phones_one"]
        return figures | self.untrained

    def _tell(self, step: int, figures: dict[str, float], start: float) -> None:
        now = time.perf_counter()
        self.seconds += now - start
        one = {name.partition("/")[0]: value for name, value in figures.items() if name.endswith("/phones_one")}
        best = max((name for name in one if name.startswith("layer_")), key=one.__getitem__)
        log.info(
            "step %d, probe: %.1f %% of the phones told from one frame of %s, %.1f %% from log-mel (%.1f s)",
            step, 100 * one[best], best.replace("_", " "), 100 * one["log-mel"], now - start,
        )  # fmt: skip
        share = self.seconds / (now - self.started)
        if share > MOST_OF_THE_TIME:
            log.info("probes take %.0f %% of the time; raise `probe.every`, or lower `probe.minutes`", 100 * share)
