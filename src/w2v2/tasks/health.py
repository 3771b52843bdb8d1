"""Watches a run for collapse and for numbers that are not finite, says what is wrong and what cures it, and stops it.

:class:`Judge` knows the signatures and needs nothing but figures, so recorded runs can be judged too;
:class:`Sentinel` hands it the figures of a run; :class:`Tracer` finds where a number stopped being finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from w2v2.data.datamodule import Batch
from w2v2.errors import JobError
from w2v2.tasks.checkpoints import Checkpoints, checkpoint_files, step_of
from w2v2.tasks.pretrain import NormalizedTask, PretrainTask, Sums, norm_figures
from w2v2.tasks.sharding import gathered

log = logging.getLogger(__name__)

LOOK_EVERY = 20
"""Optimiser steps between looks at a run's figures, whatever ``log_every`` is."""
_SHORTEST_LOOK = 5
"""Steps without which a look says more of its batches than of the run."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Signature:
    """One way in which contrastive training with a quantizer dies.

    Thresholds were set on recorded runs (``tests/curves``) with a factor of about two between healthy and dead; they
    are per codebook or relative to chance, so that they hold for other numbers of groups, entries and distractors.
    """

    name: str
    """What is seen."""
    cure: str
    """What usually helps."""
    steps: int
    """Optimiser steps for which it must last."""
    seen: Callable[[Figures, int], bool]
    """Of the figures of an interval, and the number of codebooks."""


def _at_chance(figures: Figures) -> bool:
    """Whether nothing is told from anything: accuracy near 1 / (K + 1), the loss near ln(K + 1)."""
    share = figures["contrastive_of_chance"]
    return share > 0.99 and figures["accuracy"] < 4 * math.exp(-figures["contrastive"] / share)


SIGNATURES = (
    Signature(
        "uniform logits: the contrastive loss is ln(K+1) and does not move, accuracy is chance, the gradient is gone",
        "lower --optim.schedule.peak or lengthen the warm-up, hear more audio per step (--train.accumulate), and check "
        "that the audio is not constant or silent",
        80,
        # Published runs stay at chance for thousands of updates, with a gradient norm of 0.2 to 5.
        lambda f, groups: _at_chance(f) and f["grad_norm"] < 0.08,
    ),
    Signature(
        "few codes: targets use a handful of entries, and many distractors are identical to the target",
        "raise --loss-weights.diversity, hear more audio per step (--train.accumulate, --data.batch-seconds), lower "
        "--optim.schedule.peak",
        100,
        lambda f, groups: f["identical_distractors"] > (0.15 if f["code_perplexity"] < 4.5 * groups else 0.5),
    ),
    Signature(
        "chosen codes no longer follow the probabilities: code_perplexity is far below prob_perplexity",
        "lower --optim.schedule.peak or lengthen the warm-up, and check that the audio is not constant or silent; "
        "without content the diversity loss is met by probabilities that are all equal",
        60,
        lambda f, groups: f["code_perplexity"] < 0.5 * f["prob_perplexity"] and f["contrastive_of_chance"] > 0.95,
    ),
    Signature(
        "perplexity has fallen to a few entries of each codebook, and much of the accuracy is there with every frame "
        "masked: which of them comes next is guessed from no context",
        "raise --loss-weights.diversity, hear more audio per step (--train.accumulate, --data.batch-seconds), lower "
        "--optim.schedule.peak",
        200,
        # Healthy runs pass through so few in 20 steps; one that stayed there read two thirds from context all the same.
        lambda f, groups: f["code_perplexity"] < 8 * groups and f["accuracy"] > 0.1 and f["blind_share"] > 0.4,
    ),
    Signature(
        "perplexity has fallen to almost nothing: about one entry of each codebook is left",
        "raise --loss-weights.diversity, lower --optim.schedule.peak, hear more audio per step (--train.accumulate)",
        60,
        lambda f, groups: f["prob_perplexity"] < 2 * groups,
    ),
    Signature(
        "the gradient norm is gone: nothing is learned any more",
        "lower --optim.schedule.peak, lengthen the warm-up, or start again from weights that are not dead",
        60,
        lambda f, groups: f["grad_norm"] < 0.02,
    ),
)  # fmt: skip


_NEEDED = {
    "contrastive", "contrastive_of_chance", "accuracy", "identical_distractors", "code_perplexity", "prob_perplexity",
    "grad_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Alarm:
    """A signature that has lasted long enough to be sure of."""

    name: str
    cure: str
    since: int
    """Last step at which the run did not show it."""
    step: int

    def __str__(self) -> str:
        return (
            f"collapsed since step {self.since}, seen at step {self.step}: {self.name}; "
            f"what usually cures it: {self.cure}"
        )


class Judge:
    """Takes a run's figures in order of steps and says when a signature has lasted too long.

    Figures without perplexities, such as those of fine-tuning, are of another kind of training and never alarm.
    Intervals in which something was not finite say nothing of the rest and are passed over, but for the loss itself.
    Of a validation it keeps which share of the accuracy was there with every frame masked (``blind_share``) until the
    next one.
    """

    def __init__(self, first_step: int = 0) -> None:
        self.step = first_step
        self.since: dict[str, int] = {}
        """Signatures that the last interval showed, with the step at which each began."""
        self.blind_share = 0.0

    def validated(self, figures: Figures) -> None:
        """Take the figures of a validation."""
        if "accuracy_all_masked" in figures:
            self.blind_share = figures["accuracy_all_masked"] / max(figures["accuracy"], 1e-9)

    @property
    def trusted(self) -> int:
        """Last step at which no signature that now shows was there."""
        return min([self.step, *self.since.values()])

    def look(self, step: int, figures: Figures) -> Alarm | None:
        """Take the figures of the interval that ends with a step; an alarm if one is due."""
        before, self.step = self.step, step
        if not math.isfinite(figures["loss"]):
            # Of a step that was left out, the budget of these takes care.
            if not figures.get("steps_left_out"):
                return Alarm("the loss is not finite", "lower --optim.schedule.peak, train in bf16-mixed", before, step)
            return None
        if not figures.keys() >= _NEEDED:
            return None
        groups = sum(name.startswith("code_perplexity_") for name in figures)
        figures = figures | {"blind_share": self.blind_share}
        for signature in SIGNATURES:
            if not signature.seen(figures, groups):
                self.since.pop(signature.name, None)
                continue
            since = self.since.setdefault(signature.name, before)
            if step - since >= signature.steps:
                return Alarm(signature.name, signature.cure, since, step)
        return None


class Reading:
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


@dataclass
class KeptStep:
    """The micro-batches of a step, on the host, from which it can be run again."""

    number: int
    """Steps done before it."""
    batches: list[tuple[int, Batch]] = dataclasses.field(default_factory=list)
    """With the number that its seed depends on."""
    flag: Reading | None = None


class Sentinel(pl.Callback):
    """Stops a run that has collapsed or whose numbers are not finite, and keeps the last checkpoint before that.

    Figures are summed apart from those that are logged, copied without waiting every ``LOOK_EVERY`` steps and judged a
    step later. Whether a step was left out is read when the next one's backward pass has been launched: then the
    weights are still those that the step had, and the device has work.

    Args:
        checkpoints: told what may be thrown away and what may become ``best``; must come later among the callbacks.
        max_steps_left_out: steps without a finite gradient before the run is stopped.
        judge: whether to look for collapse.

    Raises:
        JobError: in training.
    """

    def __init__(self, checkpoints: Checkpoints, max_steps_left_out: int, *, judge: bool = True) -> None:
        self.checkpoints, self.max_steps_left_out, self.judging = checkpoints, max_steps_left_out, judge
        self.left_out = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step that the run has reached."""
        assert isinstance(pl_module, NormalizedTask)
        self.looked = self.last_step = trainer.global_step
        self.judge = Judge(trainer.global_step)
        self.figures: tuple[int, Reading] | None = None
        self.kept, self.current = KeptStep(trainer.global_step), KeptStep(trainer.global_step)
        self.judging = self.judging and isinstance(pl_module, PretrainTask)
        pl_module.watched = Sums() if self.judging else None
        pl_module.watched_norms = Sums() if self.judging else None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep what a step is made of until it is known to be finite."""
        assert isinstance(pl_module, NormalizedTask) and pl_module.host_batch is not None
        self.current.batches.append((batch_idx, pl_module.host_batch))

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
        assert isinstance(pl_module, NormalizedTask) and pl_module.step_finite is not None
        self.last_step = step
        self.current.flag = Reading({"finite": pl_module.step_finite})
        self.kept, self.current = self.current, KeptStep(step)
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
            self.judge.validated(pl_module.valid_figures)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the last steps too."""
        if trainer.global_step - self.looked >= _SHORTEST_LOOK:
            self._send(pl_module, trainer.global_step)
        self._read(trainer, pl_module)

    def _send(self, task: Any, step: int) -> None:
        self.looked = step
        if self.judging:
            norms = {f"norms/{name}": value for name, value in task.watched_norms.values.items()}
            task.watched_norms.values = {}
            self.figures = step, Reading({**task.watched.take(), **norms})

    def _read(self, trainer: pl.Trainer, task: Any) -> None:
        if (flag := self.kept.flag) is not None:
            self.kept.flag = None
            if not flag.get()["finite"]:
                self._trace(trainer, task)
        if self.figures is None:
            return
        (step, reading), self.figures = self.figures, None
        values = reading.get()
        norms = {name[6:]: values.pop(name).item() for name in list(values) if name.startswith("norms/")}
        figures = task.figures(values) | norm_figures(norms)
        alarm = self.judge.look(step, figures)
        self.checkpoints.trusted = self.judge.trusted
        self.checkpoints.suspected = bool(self.judge.since)
        if alarm is not None:
            raise JobError(
                f"{alarm} (to go on all the same: --train.sentinel False); {self._retreat(trainer, alarm.since)}"
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

    def _trace(self, trainer: pl.Trainer, task: NormalizedTask) -> None:
        """Say where a step that was left out stopped being finite; stop the run when there are too many of them.

        With a loss scale (16-mixed) steps are left out as a matter of course, until the scale fits.
        """
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        self.left_out += 1
        fault = Tracer(trainer, task, self.kept).fault()
        step = self.kept.number + 1
        log.warning("step %d left out, its gradient is not finite: %s", step, fault)
        if self.left_out > self.max_steps_left_out:
            raise JobError(
                f"{self.left_out} steps left out, more than --train.max-steps-left-out {self.max_steps_left_out}; "
                f"the last, step {step}: {fault}; repair these utterances, or go on from an earlier checkpoint"
            )


class Tracer:
    """Runs a step again, under the seeds it had, to find the first thing that is not finite. Leaves no trace itself."""

    def __init__(self, trainer: pl.Trainer, task: NormalizedTask, kept: KeptStep) -> None:
        self.trainer, self.task, self.kept = trainer, task, kept

    def fault(self) -> str:
        """One line that names a module and utterances."""
        silent = [name for _, batch in self.kept.batches for name in _bad_rows(batch)]
        places: list[str] = []
        for number, batch in self.kept.batches:
            if not batch.ids or (place := self._place(batch, number)) is None:
                continue
            places.append(place)
            if not silent:
                alone = [
                    name for row, name in enumerate(batch.ids) if self._place(_row(batch, row), number) is not None
                ]
                # All of them: the weights are at fault, or it takes the batch as a whole.
                silent += alone or batch.ids
            break
        ids = ", ".join(silent[:8]) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
        if not places:
            ours = ", ".join(name for _, batch in self.kept.batches for name in batch.ids[:8])
            return f"it was finite when run again on this process; utterances {ids or ours}"
        audio = " (their audio is not finite)" if any(_bad_rows(batch) for _, batch in self.kept.batches) else ""
        return f"{places[0]}; utterances {ids}{audio}"

    def _place(self, batch: Batch, number: int) -> str | None:
        """First module whose output is not finite, else first one in the backward pass whose gradient is not."""
        task, order, found = self.task, list[nn.Module](), list[str]()
        names = {module: name for name, module in task.model.named_modules() if name}

        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            order.append(module)
            if not found and not all(value.isfinite().all() for value in _tensors(output)):
                faulty = [name for name, p in module.named_parameters() if not p.isfinite().all()]
                weights = f", whose {', '.join(faulty[:4])} is not finite itself" if faulty else ""
                found.append(f"first output that is not finite: {names[module]}{weights}")

        handles = [module.register_forward_hook(watch) for module in names]
        compiled = {module: module._compiled_call_impl for module in names}
        for module in names:
            module._compiled_call_impl = None  # a compiled block does not call the hooks of its parts
        try:
            with _replay(task, self.kept.number), gathered(task.model):
                moved: Any = task.transfer_batch_to_device(batch, task.device, 0)
                with self.trainer.precision_plugin.train_step_context():
                    loss: Any = task.training_step(moved, number)
                if found:
                    return found[0]
                if not loss.isfinite():
                    return "the loss is not finite, every module's output is"
                return self._bad_gradient(loss, order)
        finally:
            for handle in handles:
                handle.remove()
            for module, call in compiled.items():
                module._compiled_call_impl = call

    def _bad_gradient(self, loss: Tensor, order: list[nn.Module]) -> str | None:
        learning = {name: p for name, p in self.task.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
        bad = [
            name for name, grad in zip(learning, grads, strict=True) if grad is not None and not grad.isfinite().all()
        ]
        if not bad:
            return None
        turns = {module: turn for turn, module in enumerate(order)}
        owner = {name: self.task.model.get_submodule(name.rpartition(".")[0]) for name in bad}
        first = max(bad, key=lambda name: turns.get(owner[name], -1))
        return f"outputs are finite; first gradient that is not: {first}"


@contextlib.contextmanager
def _replay(task: NormalizedTask, step: int) -> Iterator[None]:
    """The task at an earlier step; its sums and torch's generators are put back afterwards."""
    saved = task.sums, task.watched, task.step_targets, task.host_batch
    task.sums, task.watched, task.replayed_step = Sums(), None, step
    try:
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            yield
    finally:
        task.sums, task.watched, task.step_targets, task.host_batch = saved
        task.replayed_step = None


def _bad_rows(batch: Batch) -> list[str]:
    """Utterances whose audio is not finite."""
    return [name for name, row in zip(batch.ids, batch.audio, strict=True) if not row.isfinite().all()]


def _row(batch: Batch, row: int) -> Batch:
    """One utterance of a batch, as a batch."""
    samples = int(batch.lengths[row])
    return Batch(
        audio=batch.audio[row : row + 1, :samples],
        lengths=batch.lengths[row : row + 1],
        ids=batch.ids[row : row + 1],
        passes=batch.passes[row : row + 1],
        targets=None if batch.targets is None else batch.targets[row : row + 1],
        target_lengths=None if batch.target_lengths is None else batch.target_lengths[row : row + 1],
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in what a module returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, (list, tuple)):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors(part)
