"""Run-level configuration: what a recipe returns, what the run folder keeps, and the checks across its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from w2v2.errors import UsageError
from w2v2.model.feature_encoder import receptive_field
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config
from w2v2.optim import OptimConfig
from w2v2.units import Characters, Phonemes, SentencePieces


@dataclass(kw_only=True)
class DataConfig:
    """Where the audio is and how it is batched."""

    sources: tuple[str, ...] = ()
    """Prepared corpora (folders, ``https://`` or ``s3://`` addresses), or folders of audio as they are (``--data``)."""
    weights: tuple[float, ...] = ()
    """How many times a pass each utterance of each corpus comes; none: once."""
    train_split: str = "train"
    """Split to train on, such as a labelled subset that ``prepare`` made: ``train-10m``."""
    batch_seconds: float = 87.5
    """Audio in one micro-batch at most, seconds (fairseq ``max_tokens`` 1.4M samples); a longer utterance is alone."""
    max_seconds: float = 15.625
    """Crop of an utterance in pretraining at most, seconds (``max_sample_size`` 250,000 samples)."""
    min_seconds: float = 2.0
    """Shorter utterances are left out, and counted (``min_sample_size`` 32,000 samples)."""
    num_buckets: int = 10
    """Groups of similar duration that batches are drawn from."""
    shuffle_buffer: int = 10_000
    """Utterances (not audio) held to draw batches from: what shuffling can reach beyond the order of the pieces."""
    num_workers: int = 2
    """Processes that decode audio, per rank; 0: in the training process."""
    max_bad: str = "0.1%"
    """Share of the utterances of a split that may turn out unreadable before the run stops; 0.1% or 0.001."""


@dataclass(kw_only=True)
class TrainConfig:
    """How long, on what, and what is written."""

    max_steps: int | None = None
    """Optimiser steps at which this run ends; None: at the end of the schedule. It does not change the schedule."""
    accumulate: int = 1
    """Micro-batches per optimiser step and rank (``update_freq``)."""
    precision: str = "auto"
    """``bf16-mixed``, ``16-mixed``, ``bf16-true``, ``32-true``; ``auto``: bf16-mixed on a GPU that has it, else 32-true
    (on a CPU bf16 is many times slower)."""
    accelerator: str = "auto"
    """Lightning's name: ``auto``, ``cpu``, ``gpu``."""
    devices: int = 1
    """Processes on each machine, one per device."""
    num_nodes: int = 1
    """Machines."""
    seed: int = 0
    """Of everything random."""
    log_every: int = 50
    """Optimiser steps between rows of metrics.csv."""
    val_every: int = 1000
    """Optimiser steps between validations."""
    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = 3
    """Checkpoints kept, the newest ones; the best weights are kept beside them."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, a third more
    time."""
    shard: bool = False
    """Share parameters, gradients and optimiser state out over the processes, block by block (FSDP2), instead of
    keeping all of them on each (DDP): for models that would not fit otherwise. The numbers are the same."""
    compile: bool = False
    """``torch.compile`` each block."""
    sentinel: bool = True
    """Stop a pretraining run that has collapsed, and keep the last checkpoint before that (``tasks/health.py``)."""
    max_steps_left_out: int = 10
    """Steps that may be left out because their gradient is not finite, before the run stops; each is traced to a module
    and utterances in the log."""
    wandb: str = ""
    """Log to this project of Weights & Biases too (``pip install 'w2v2[wandb]'``); empty: only to files."""


def _loss_weights() -> dict[str, float]:
    return {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 10.0}


@dataclass(kw_only=True)
class PretrainConfig:
    """A whole pretraining run."""

    recipe: str = ""
    """Name of the recipe, or FILE.py:FUNCTION."""
    model: Wav2Vec2Config = field(default_factory=Wav2Vec2Config)
    """The network and its objective."""
    loss_weights: dict[str, float] = field(default_factory=_loss_weights)
    """Weight of each of the model's losses, per masked frame; the keys must be the model's."""
    data: DataConfig = field(default_factory=DataConfig)
    """Audio."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Run."""

    def take_shape(self, pretrained: Wav2Vec2Config) -> None:
        """Make the model and its objective that of another run; regularisation and temperature stay this recipe's."""
        kept = {name: getattr(self.model, name) for name in _OF_A_PRETRAINING_RECIPE}
        self.model = dataclasses.replace(pretrained, **kept)

    def check(self) -> None:
        """Refuse what cannot work, before anything is written.

        Raises:
            UsageError: with the field, what it must be, and what it is.
        """
        check_model(self.model)
        check_run(self.data, self.train)
        check_optim(self.optim)
        frames = self.model.frames([int(self.data.max_seconds * SAMPLE_RATE)])[0]
        if frames > self.model.max_seq_len:
            raise UsageError(
                f"--data.max-seconds {self.data.max_seconds:g} gives crops of {frames} frames, more than "
                f"--model.max-seq-len {self.model.max_seq_len}; crop at "
                f"{self.model.max_seq_len * 0.02:g} s or less, or raise max-seq-len"
            )
        if self.data.batch_seconds < self.data.max_seconds:
            raise UsageError(
                f"--data.batch-seconds must hold at least one crop of --data.max-seconds "
                f"({self.data.max_seconds:g}), got {self.data.batch_seconds:g}"
            )
        field_seconds = receptive_field(self.model.conv_kernel_sizes, self.model.conv_strides) / SAMPLE_RATE
        if self.data.min_seconds < 4 * field_seconds:
            raise UsageError(
                f"--data.min-seconds must leave a few frames to mask, at least {4 * field_seconds:g}, "
                f"got {self.data.min_seconds:g}"
            )


@dataclass(kw_only=True)
class FinetuneConfig:
    """A whole CTC fine-tuning run."""

    recipe: str = ""
    """Name of the recipe, or FILE.py:FUNCTION."""
    model: Wav2Vec2Config = field(default_factory=Wav2Vec2Config)
    """The network; with a pretrained one its shape comes from there, its regularisation from here."""
    channel_mask_prob: float = 0.25
    """Share of channels that would be masked if no spans overlapped (``mask_channel_prob``)."""
    channel_mask_length: int = 64
    """Channels of a span (``mask_channel_length``)."""
    freeze_encoder_steps: int = 0
    """Optimiser steps in which only the output layer learns (``freeze_finetune_updates``)."""
    layer_decay: float = 1.0
    """Learning rate of a block as a share of that of the one above it; the top block's is the schedule's times this,
    the feature encoder's the lowest, the output layer has the whole (``layer_decay``). 1: off, as published."""
    lora_rank: int = 0
    """Rank of the update that queries and values learn while the pretrained weights stay (arXiv:2106.09685); 0: off."""
    lora_alpha: float = 16.0
    """The update is multiplied by this over the rank."""
    units: Characters | Phonemes | SentencePieces = field(default_factory=Characters)
    """What the labels are; the recipe chooses which."""
    data: DataConfig = field(default_factory=DataConfig)
    """Audio with transcripts."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Run."""

    def take_shape(self, pretrained: Wav2Vec2Config) -> None:
        """Make the model that of a pretraining run, but for the regularisation, which stays this recipe's."""
        kept = {name: getattr(self.model, name) for name in _REGULARISATION}
        self.model = dataclasses.replace(pretrained, **kept)

    def check(self) -> None:
        """Refuse what cannot work, before anything is written.

        Raises:
            UsageError: with the field, what it must be, and what it is.
        """
        check_model(self.model)
        check_run(self.data, self.train)
        for name, frozen in (("--freeze-encoder-steps", self.freeze_encoder_steps), ("--lora-rank", self.lora_rank)):
            if self.train.shard and frozen:
                raise UsageError(f"--train.shard cannot freeze weights: it needs {name} 0, got {frozen}")
        least = 3 if self.model.mask_prob > 0 else 1
        if self.model.frames([int(self.data.min_seconds * SAMPLE_RATE)])[0] < least:
            raise UsageError(
                f"--data.min-seconds must leave {least} frames or more of every utterance, such as 0.1, "
                f"got {self.data.min_seconds:g}"
            )
        check_optim(self.optim)
        width = self.model.n_embd
        if self.channel_mask_prob > 0 and not 0 < self.channel_mask_length <= width // 2:
            raise UsageError(
                f"--channel-mask-length must be at most half of the {width} channels, got {self.channel_mask_length}; "
                "give a shorter one, or --channel-mask-prob 0"
            )
        _expect(self, "", "channel_mask_prob", lambda x: 0 <= x < 1, "0 to 1")
        _expect(self, "", "freeze_encoder_steps", lambda x: x >= 0, "0 or more")
        _expect(self, "", "layer_decay", lambda x: 0 < x <= 1, "more than 0, at most 1")
        _expect(self, "", "lora_rank", lambda x: 0 <= x <= width, f"0 to {width}")
        _expect(self, "", "lora_alpha", lambda x: x > 0, "more than 0")


_OF_A_PRETRAINING_RECIPE = (
    "conv_gradient_scale",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
    "dropout_features",
    "layer_drop",
    "gumbel_start",
    "gumbel_end",
    "gumbel_decay",
)

_REGULARISATION = (
    "conv_gradient_scale",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
    "layer_drop",
    "mask_prob",
    "mask_length",
)


def check_model(model: Wav2Vec2Config) -> None:
    """Refuse a model that cannot be built or trained; :class:`UsageError` names the field."""
    for name in ("n_layer", "n_head", "n_embd", "ffn_dim", "pos_conv_groups", "mask_length", "n_groups", "n_entries",
                 "codebook_dim", "num_distractors"):  # fmt: skip
        _expect(model, "--model", name, lambda x: x >= 1, "1 or more")
    for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "dropout_features",
                 "layer_drop"):  # fmt: skip
        _expect(model, "--model", name, lambda x: 0 <= x < 1, "0 or more, less than 1")
    for name in ("conv_init_smoothing", "mask_prob"):
        _expect(model, "--model", name, lambda x: 0 <= x <= 1, "0 to 1")
    for name in ("logit_temperature", "gumbel_start", "gumbel_end", "gumbel_decay"):
        _expect(model, "--model", name, lambda x: x > 0, "more than 0")
    shape = [model.conv_kernel_sizes, model.conv_strides, model.conv_paddings]
    if any(len(part) != len(model.conv_channels) for part in shape):
        raise UsageError(
            f"--model.conv-kernel-sizes, conv-strides and conv-paddings need one number for each of the "
            f"{len(model.conv_channels)} conv-channels, got {', '.join(str(len(part)) for part in shape)}"
        )
    if model.n_embd % model.n_head:
        raise UsageError(f"--model.n-embd must be a multiple of n-head ({model.n_head}), got {model.n_embd}")
    if model.n_embd % model.pos_conv_groups:
        raise UsageError(
            f"--model.n-embd must be a multiple of pos-conv-groups ({model.pos_conv_groups}), got {model.n_embd}"
        )
    kind, _, groups = model.conv_norm.partition(":")
    if model.conv_norm != "layer" and (kind != "group" or not groups.isdigit() or int(groups) == 0):
        raise UsageError(f"--model.conv-norm must be 'layer' or 'group:N' such as 'group:32', got {model.conv_norm!r}")
    if kind == "group" and model.conv_channels[0] % int(groups):
        raise UsageError(
            f"--model.conv-norm needs groups that divide the first of conv-channels ({model.conv_channels[0]}), "
            f"got {groups}"
        )
    if model.target_features not in ("projected", "encoder"):
        raise UsageError(f"--model.target-features must be 'projected' or 'encoder', got {model.target_features!r}")


def check_optim(optim: OptimConfig) -> None:
    """Refuse impossible numbers; :class:`UsageError` names the field."""
    schedule = optim.schedule
    _expect(schedule, "--optim.schedule", "peak", lambda x: 0 <= x < math.inf, "0 or more")
    _expect(schedule, "--optim.schedule", "total_steps", lambda x: x >= 1, "1 or more")
    for name in ("warmup_steps", "warmup", "hold", "floor", "initial_scale"):
        if hasattr(schedule, name):
            _expect(schedule, "--optim.schedule", name, lambda x: x >= 0, "0 or more")
    _expect(optim, "--optim", "weight_decay", lambda x: x >= 0, "0 or more")
    _expect(optim, "--optim", "eps", lambda x: x > 0, "more than 0")
    if optim.clip_norm is not None:
        _expect(optim, "--optim", "clip_norm", lambda x: x > 0, "more than 0, or None")


def _expect(owner: Any, under: str, name: str, fine: Callable[[Any], bool], expected: str) -> None:
    value = getattr(owner, name)
    if not fine(value):
        flag = f"{under}.{name}" if under else f"--{name}"
        raise UsageError(f"{flag.replace('_', '-')} must be {expected}, got {value:g}")


def check_run(data: DataConfig, train: TrainConfig) -> None:
    """Refuse impossible numbers; :class:`UsageError` names the field."""
    if train.max_steps is not None:
        _expect(train, "--train", "max_steps", lambda x: x > 0, "more than 0")
    for name in ("accumulate", "devices", "log_every", "val_every", "checkpoint_every", "keep_checkpoints"):
        _expect(train, "--train", name, lambda x: x > 0, "more than 0")
    for name in ("batch_seconds", "max_seconds", "num_buckets", "shuffle_buffer"):
        _expect(data, "--data", name, lambda x: x > 0, "more than 0")
    _expect(train, "--train", "max_steps_left_out", lambda x: x >= 0, "0 or more")
    _expect(data, "--data", "num_workers", lambda x: x >= 0, "0 or more")
    bad_share(data.max_bad)
    if not all(0 < weight < 1_000 for weight in data.weights):
        raise UsageError(
            f"--data.weights must be more than 0 and less than 1000, got {' '.join(map(str, data.weights))}"
        )
    if data.min_seconds > data.max_seconds:
        raise UsageError(
            f"--data.min-seconds must not exceed max-seconds ({data.max_seconds:g}), got {data.min_seconds:g}"
        )


def bad_share(text: str) -> float:
    """``0.1%`` or ``0.001`` as a share."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--data.max-bad must be a share such as 0.1% or 0.001, got {text!r}")
    return share
