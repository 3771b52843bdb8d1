"""The folder of a run: refused where it holds something else, begun, resumed; the record of what ran on what."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch
from pytorch_lightning.utilities import rank_zero_only

from w2v2.checkpoint.native import CONFIG, VOCABULARY, WEIGHTS
from w2v2.data.corpora import Splits, describe
from w2v2.errors import UsageError
from w2v2.files import write_json
from w2v2.serial import differences, load_config, read_checked, save_config, to_dict
from w2v2.training.config import RunConfig
from w2v2.training.resume import WARM_START, can_resume, checkpoint_files, newest_good, step_of

METRICS, TENSORBOARD = "metrics.csv", "tensorboard"
_BEGUN = (CONFIG, "environment.json", VOCABULARY, METRICS, TENSORBOARD, WARM_START, "best", "checkpoints")
"""What a run writes before its first checkpoint."""


class _Every(TypedDict):
    checkpoint_every: int


class _Begun(TypedDict):
    train: _Every


class _Step(TypedDict):
    step: int


@rank_zero_only
def clear_begun(out: Path) -> None:
    """Remove what a run left that ended before its first checkpoint; a folder with anything else stays as it is."""
    entries = list(out.iterdir()) if out.is_dir() else []
    if any(path.name not in _BEGUN and not re.fullmatch(r"\.\w+\.partial(\.\w+)?", path.name) for path in entries):
        return
    best, warm = out / "best" / "best.json", out / WARM_START / WEIGHTS
    every = read_checked(out / CONFIG, _Begun)["train"]["checkpoint_every"] if best.exists() else 0
    kept = any((out / "checkpoints").glob("[!.]*"))  # of somebody else, as ours would be resumed
    if kept or warm.exists() or (best.exists() and read_checked(best, _Step)["step"] >= every):
        return  # its checkpoints were there, and somebody took them away
    for path in entries:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@rank_zero_only
def check_folder(out: Path, resume: bool, max_steps: int) -> None:
    """Refuse a run folder that would be overwritten, or has nothing to resume, or more steps than are asked for."""
    if resume:
        if not can_resume(out):
            raise UsageError(f"nothing to resume in {out}: expected a file in {out / 'checkpoints'}")
        done = max(map(step_of, checkpoint_files(out)), default=0)
        if done > max_steps and (done := step_of(newest_good(out)[0])) > max_steps:  # the newest may be damaged
            raise UsageError(f"{out} has done {done} steps, `train.max_steps` is {max_steps}; give {done} or more")
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another `out`, or go on with `resume`")


@rank_zero_only
def start_folder(out: Path, config: RunConfig, splits: Splits, resume: bool) -> None:
    """Make the run folder and write what is run on what."""
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        _refuse_changes(out, config, splits)
    save_config(config, out / CONFIG)
    if not resume:
        write_json(out / "environment.json", environment(splits, config.threads))


_MAY_CHANGE = (
    "recipe", "train.max_steps", "train.log_every", "train.val_every", "train.checkpoint_every",
    "train.keep_checkpoints", "train.compile", "train.activation_checkpointing", "data.num_workers", "data.sources",
    "data.max_bad", "train.sentinel", "train.max_steps_left_out", "train.wandb",
    "train.shard", "probe.every", "probe.labels", "probe.minutes",
)  # fmt: skip


class _Environment(TypedDict):
    data: dict[str, dict[str, Any]]


def _refuse_changes(out: Path, config: RunConfig, splits: Splits) -> None:
    """Another model, schedule, batching or corpus would not continue the run but be another one.

    Raises:
        UsageError: naming every difference.
    """
    changes = differences(to_dict(load_config(out / CONFIG, type(config))), to_dict(config))
    faults = [f"{name} was {old}, is {new}" for name, (old, new) in changes.items() if name not in _MAY_CHANGE]
    data = read_checked(out / "environment.json", _Environment)["data"]
    for name, now in describe({name: splits[name] for name in ("train", "valid")}).items():
        faults += [
            f"{name} {key} was {data.get(name, {}).get(key)}, is {now[key]}"
            for key in now
            if now[key] != data.get(name, {}).get(key)
        ]
    if faults:
        raise UsageError(
            f"cannot resume {out} as another run: {'; '.join(faults)}; undo that, or start one with `init_from`"
        )


def environment(splits: Splits, threads: int) -> dict[str, Any]:
    """Versions, machine, source revision and data of a run."""
    packages = ("w2v2", "torch", "pytorch-lightning", "lhotse", "soundfile", "numpy")
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    has_git = shutil.which("git") is not None
    revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout if has_git else ""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "git_revision": revision.strip() or None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": threads,
        "data": describe(splits),
    }
