"""A configuration to a finished run folder: seeds, Trainer, loggers, checkpoints, and a record of what ran on what."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_only
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils.checkpoint import checkpoint

from w2v2.data.corpora import Splits
from w2v2.data.loader import dead_workers_named, stop_workers
from w2v2.errors import JobError, UsageError, first_line, public
from w2v2.model.feature_encoder import FeatureEncoder
from w2v2.model.flops import training_flops
from w2v2.serial import to_dict
from w2v2.training.config import PretrainConfig, RunConfig, TrainConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.folder import METRICS, TENSORBOARD, check_folder
from w2v2.training.health import Sentinel
from w2v2.training.metrics import CSVMetrics, Progress, silence_lightning
from w2v2.training.probing import Probing, probed_splits
from w2v2.training.resume import AtomicIO, Checkpoints, checkpoint_files, newest_good
from w2v2.training.sharding import transformer_blocks, whole_weights
from w2v2.training.task import NormalizedTask

log = logging.getLogger(__name__)


def validate_task(task: NormalizedTask, data: SpeechDataModule, split: str) -> dict[str, float]:
    """Figures of a task on a split, in one process."""
    with warnings.catch_warnings():
        silence_lightning()
        trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, devices=1)
        trainer.validate(task, data.eval_dataloader(split), verbose=False)
    return task.valid_figures


def fit_task(task: NormalizedTask, data: SpeechDataModule, config: RunConfig, out: Path, resume: bool) -> None:
    """Run a task to its last step, with everything a run folder holds; weights are saved at the end.

    A run that is to be resumed and has no checkpoint yet begins.

    Raises:
        StoppedError: a signal asked for the end, and everything is saved.
    """
    train, optim, max_steps = config.train, config.optim, config.max_steps
    metrics = CSVMetrics(out / METRICS)
    last = _take_up(out, data, metrics, max_steps) if resume and checkpoint_files(out) else None
    if last is None:
        metrics.resume_at(-1)
    checkpoints = Checkpoints(out, config, max_steps)
    pretraining = isinstance(config, PretrainConfig)
    sentinel = Sentinel(checkpoints, train.max_steps_left_out, detect_collapse=train.sentinel and pretraining)
    tune(task.model, train)
    if _on_gpu(train) and "mixed" in _precision(train):
        torch.set_float32_matmul_precision("high")  # TF32 for what of bf16 or fp16 training stays fp32
    board = TensorBoardLogger(out, name="", version=TENSORBOARD, purge_step=metrics.last + 1)
    flops = training_flops(config.model, config.data.max_seconds) if pretraining else None
    progress = Progress(train.log_every, max_steps, flops)
    probing: list[pl.Callback] = []
    if isinstance(config, PretrainConfig) and config.probe.every:
        probing = [Probing(config.probe, data.splits, train.seed, progress)]
    with warnings.catch_warnings():
        silence_lightning()
        trainer = pl.Trainer(
            accelerator=train.accelerator,
            devices=train.devices,
            num_nodes=train.num_nodes,
            strategy=_strategy(task.model, train),
            default_root_dir=out,
            precision=_precision(train),  # type: ignore[arg-type]
            max_epochs=-1,
            max_steps=max_steps,
            accumulate_grad_batches=train.accumulate,
            gradient_clip_val=optim.clip_norm,
            gradient_clip_algorithm="norm",
            val_check_interval=train.val_every * train.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            plugins=[AtomicIO(), *_slurm()],
            enable_checkpointing=False,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=[metrics, board, *_wandb(config, out)],
            callbacks=[sentinel, progress, *probing, checkpoints],
        )
        with _threads(config.threads), _failures_named(checkpoints, last):
            trainer.fit(task, data, ckpt_path=last, weights_only=True)
            if trainer.global_step != checkpoints.validated:
                trainer.validate(task, data, verbose=False)
    weights = whole_weights(task.model)
    if trainer.is_global_zero:
        task.save(out, weights)


def _take_up(out: Path, data: SpeechDataModule, metrics: CSVMetrics, max_steps: int) -> Path:
    """The checkpoint to go on from, with data and metrics set to go on there, too."""
    path, saved = newest_good(out)
    step = saved["global_step"]
    data.skip = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    metrics.resume_at(step)
    if step == max_steps:
        rank_zero_only(log.info)("%s has done its %d steps: nothing is left to do", out, step)
    return path


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _failures_named(checkpoints: Checkpoints, last: Path | None) -> Iterator[None]:
    """What ends training from without, as one line; workers end with it.

    Raises:
        JobError: no memory, a data worker that was killed, or a checkpoint that no step can follow on.
        KeyboardInterrupt, StoppedError: of which Lightning has made an exit code.
    """
    try:
        with dead_workers_named():
            yield
    except (RuntimeError, MemoryError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise error if last is None or checkpoints.started else _unusable(last, error) from error
        raise JobError(
            f"out of memory ({first_line(error)}); lower `data.batch_seconds` and raise `train.accumulate` as much, or "
            "choose `train.activation_checkpointing` True; go on with `resume`"
        ) from error
    except SystemExit as stop:
        raise checkpoints.interruption() from stop
    finally:
        stop_workers()


def _unusable(last: Path, error: Exception) -> Exception:
    if isinstance(error, (UsageError, JobError)):
        return error
    reason = f"{type(error).__name__} {first_line(error)}"
    return JobError(f"cannot go on from {last}: {reason}; remove it, and the one before is used")


def _strategy(model: torch.nn.Module, train: TrainConfig) -> Strategy | str:
    """One device, DDP, or FSDP2 over all processes; a checkpoint is one whole file in each case."""
    if train.devices * train.num_nodes == 1:
        return "auto"
    if not train.shard:  # gradients lie where they are sent from: no copy, and half their memory
        hook = bf16_compress_hook if train.bf16_gradients else None
        return DDPStrategy(gradient_as_bucket_view=True, ddp_comm_hook=hook)
    transformer_blocks(model, "`train.shard`")
    return ModelParallelStrategy(train.devices * train.num_nodes, 1, save_distributed_checkpoint=False)


def _slurm() -> list[SLURMEnvironment]:
    """SLURM's processes without Lightning's own requeueing, which would save and resume beside ours."""
    alone = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if alone else []


def is_first_process() -> bool:
    """Whether this process is the one that writes, of however many there are."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _wandb(config: RunConfig, out: Path) -> list[Logger]:
    if not config.train.wandb:
        return []
    try:
        logger = WandbLogger(project=config.train.wandb, name=out.name, save_dir=out)
    except ModuleNotFoundError as error:
        raise UsageError("`train.wandb` needs Weights & Biases: pip install wandb") from error
    logger.log_hyperparams(json.loads(public(json.dumps(to_dict(config)))))
    return [logger]


def tune(model: torch.nn.Module, train: TrainConfig) -> None:
    """Trade memory for time, or compile, block by block; choose the kernels of attention.

    cuDNN's, which torch prefers on Hopper, plans anew for each pair of lengths, and of these there are hundreds.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if train.activation_checkpointing:
        for block in transformer_blocks(model, "`train.activation_checkpointing`"):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for module in model.modules():
            if isinstance(module, FeatureEncoder):
                module.recompute = True
    if train.compile:
        for block in transformer_blocks(model, "`train.compile`"):
            block.compile(dynamic=True)


def check_run(config: RunConfig, splits: Splits, out: Path | None = None, resume: bool = False) -> None:
    """Refuse a run that cannot work, before anything is written; ``out`` None: one that writes nothing."""
    config.check()
    check_device(config.train)
    _check_splits(splits, config.train)
    schedule, steps = config.optim.schedule, config.max_steps
    if schedule(steps) > schedule(steps - 1):
        rank_zero_only(log.warning)("the warm-up of `optim.schedule` is longer than the run, which has %d steps", steps)
    if isinstance(config, PretrainConfig) and config.probe.every:
        probed_splits(config.probe, splits)
    if out is not None:
        check_world(config.train)
        check_folder(out, resume, config.max_steps)


def check_world(train: TrainConfig) -> None:
    """Refuse other processes than a launcher has started, which would be runs of their own or wait for each other."""
    world, launcher, nodes = train.devices * train.num_nodes, "", 1
    if TorchElasticEnvironment.detect():
        launcher, world, nodes = "torchrun", int(os.environ["WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    elif SLURMEnvironment.detect():
        launcher, world, nodes = "SLURM", int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    elif train.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        launcher, world = "w2v2 without torchrun or SLURM", train.devices
    if launcher and (world, nodes) != (train.devices * train.num_nodes, train.num_nodes):
        raise UsageError(
            f"{launcher} started {world} processes on {nodes} machines, `train.devices` is {train.devices} and "
            f"`train.num_nodes` {train.num_nodes}; give `train.devices` {world // nodes}, `train.num_nodes` {nodes}"
        )


def check_device(train: TrainConfig) -> None:
    """Refuse a device or precision that is not there."""
    gpus = torch.cuda.device_count()
    there = ["auto", "cpu"] + ["gpu", "cuda"] * (gpus > 0) + ["mps"] * torch.backends.mps.is_available()
    if train.accelerator not in there:
        raise UsageError(f"`train.accelerator` must be one of {', '.join(there)} here, got {train.accelerator!r}")
    if _on_gpu(train) and train.devices > gpus:
        raise UsageError(f"`train.devices` {train.devices} needs as many GPUs, {gpus} are visible; use fewer")
    known = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true")
    if train.precision not in known:
        raise UsageError(f"`train.precision` must be one of {', '.join(known)}, got {train.precision!r}")
    check_precision(train.precision, torch.cuda.get_device_name() if _on_gpu(train) else "", bf16=_bf16())
    if train.bf16_gradients and (train.shard or not _on_gpu(train)):
        raise UsageError("`train.bf16_gradients` works between GPUs, without `train.shard`; leave it out")
    if train.shard and train.precision == "16-mixed":
        raise UsageError("`train.shard` works with bf16-mixed, bf16-true or 32-true, got `train.precision` 16-mixed")


def check_precision(precision: str, gpu: str, *, bf16: bool) -> None:
    """Refuse a precision that the device does not have: a GPU, by name, with or without bf16, or "" for a CPU."""
    if precision == "16-mixed" and not gpu:
        raise UsageError("`train.precision` 16-mixed needs a CUDA device; on a CPU use 32-true")
    if precision.startswith("bf16") and gpu and not bf16:
        raise UsageError(f"`train.precision` {precision} needs a GPU with bf16, {gpu} has none; use 16-mixed")


def _bf16() -> bool:
    """Whether the GPU, if there is one, computes in bf16 itself; older ones only pretend to, very slowly."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _on_gpu(train: TrainConfig) -> bool:
    return train.accelerator != "cpu" and torch.cuda.is_available()


def _precision(train: TrainConfig) -> str:
    if train.precision != "auto":
        return train.precision
    return "bf16-mixed" if _on_gpu(train) and _bf16() else "32-true"


def _check_splits(splits: Splits, train: TrainConfig) -> None:
    """Refuse a corpus that lacks what a run needs."""
    processes = train.devices * train.num_nodes
    for name in ("train", "valid"):
        if not len(splits.get(name, ())):
            got = ", ".join(f"{other} ({len(split)})" for other, split in splits.items()) or "none"
            raise UsageError(
                f"no utterances to {'validate on' if name == 'valid' else 'train on'}: expected a split '{name}', got "
                f"{got}; prepare the corpus with `valid_share`, or name its folders"
            )
        if len(splits[name]) < processes:
            raise UsageError(
                f"the {name} split has {len(splits[name])} utterances for {processes} processes; use fewer, "
                "by `train.devices` and `train.num_nodes`"
            )
