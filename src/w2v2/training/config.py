"""Run-level configuration: what a recipe returns, what the run folder keeps, and the checks across its parts."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch

from w2v2.checkpoint.native import CONFIG
from w2v2.data.config import DataConfig
from w2v2.errors import Count, Positive, Range, ShareBelowOne, UsageError, Whole, check_ranges
from w2v2.model.feature_encoder import receptive_field
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.warm_start import SpectralConfig
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config
from w2v2.serial import load_config
from w2v2.training.optim import OptimConfig, WarmupCosine
from w2v2.training.units import Characters, Classes, FrameClasses, Phonemes, SentencePieces


def run_config(folder: Path) -> RunConfig | Wav2Vec2Config:
    """The configuration of a run folder, or of a folder of weights, whose ``config.json`` is the model's alone."""
    kinds: Any = (RunConfig, Wav2Vec2Config)
    return cast(RunConfig | Wav2Vec2Config, load_config(folder / CONFIG, kinds))


@dataclass(kw_only=True)
class TrainConfig:
    """How long, on what, and what is written."""

    max_steps: Count | None = None
    """Optimiser steps at which this run ends; None: at the end of the schedule. It does not change the schedule."""
    accumulate: Count = 1
    """Micro-batches per optimiser step and rank (``update_freq``)."""
    precision: str = "auto"
    """``bf16-mixed``, ``16-mixed``, ``bf16-true``, ``32-true``; ``auto``: bf16-mixed on a GPU that has it, else 32-true
    (few CPUs are quicker in bf16)."""
    accelerator: str = "auto"
    """Lightning's name: ``auto``, ``cpu``, ``gpu``."""
    devices: Count = 1
    """Processes on each machine, one per device."""
    num_nodes: Count = 1
    """Machines."""
    seed: int = 0
    """Of everything random."""
    log_every: Count = 50
    """Optimiser steps between rows of metrics.csv."""
    val_every: Count = 1000
    """Optimiser steps between validations."""
    checkpoint_every: Count = 1000
    """Optimiser steps between checkpoints."""
    keep_checkpoints: Count = 3
    """Checkpoints kept, the newest ones; the best weights are kept beside them."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, a third more
    time."""
    shard: bool = False
    """Share parameters, gradients and optimiser state out over the processes, block by block (FSDP2), instead of
    keeping all of them on each (DDP): for models that would not fit otherwise. The numbers are the same."""
    bf16_gradients: bool = False
    """Send gradients between GPUs as bf16: half the traffic, sums less exact."""
    compile: bool = False
    """``torch.compile`` each block, around its attention: three graphs for all batches."""
    sentinel: bool = True
    """Stop a pretraining run that has collapsed, and keep the last checkpoint before that (``training/health.py``)."""
    max_steps_left_out: Whole = 10
    """Steps that may be left out because their gradient is not finite, before the run stops; the log names the
    losses, utterances and weights of each."""
    wandb: str = ""
    """Log to this project of Weights & Biases too (``pip install wandb``); empty: only to files."""


@dataclass(kw_only=True)
class WarmStartConfig:
    """The spectral warm start of the convolutions, a stage before a pretraining run. Defaults: LOG.md's study."""

    updates: Whole = 0
    """Optimiser steps, of as much audio as the run's own; 0: none. 1,500 of 12 s in ``tiny``; 3,000 still gain."""
    peak: Positive = 4e-3
    """Highest learning rate, after a twentieth of the updates; from there a cosine to 0."""
    bands: Count = 40
    """Mel bands of the spectrum. 80 taught no more (probe .502 on five frames, with 40 .507)."""


@dataclass(kw_only=True)
class ProbeConfig:
    """Probes of the layers while a pretraining run goes on (``evaluation/probe.py``), into its metrics."""

    every: Whole = 0
    """Optimiser steps between probes; 0: none."""
    labels: str = ""
    """Folder of phones with times, ``*.ctm`` or ``*.TextGrid``, of utterances of ``train`` and ``valid``."""
    minutes: Positive = 2.0
    """Of labelled audio of either split, spread over all of it: what is told is less than by ``evaluate --probe``."""


def _loss_weights() -> dict[str, float]:
    return {"contrastive": 1.0, "diversity": 0.1, "feature_penalty": 10.0}


_REGULARISATION = (
    "conv_gradient_scale", "dropout", "attention_dropout", "activation_dropout", "dropout_input", "layer_drop",
)  # fmt: skip
_MASKS = ("mask_prob", "mask_length")
_TEMPERATURE = ("gumbel_start", "gumbel_end", "gumbel_decay")


@dataclass(kw_only=True)
class RunConfig:
    """What the configurations of all runs have."""

    recipe: str = ""
    """Name of the recipe, or FILE.py:FUNCTION."""
    model: Wav2Vec2Config
    """The network; with a pretrained one its architecture comes from there, its regularisation from here."""
    data: DataConfig = field(default_factory=DataConfig)
    """Audio, with transcripts for fine-tuning."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Run."""
    KEPT: ClassVar[tuple[str, ...]]
    """Fields of the model that are the recipe's, whatever it starts from."""

    @property
    def max_steps(self) -> int:
        """Optimiser steps at which the run ends."""
        return self.train.max_steps or self.optim.schedule.total_steps

    @property
    def threads(self) -> int:
        """CPU threads: one for a model whose products are so small that threads would mostly wait for each other."""
        small = self.model.n_embd < 256 and "OMP_NUM_THREADS" not in os.environ
        return 1 if small else torch.get_num_threads()

    def adopt_architecture(self, pretrained: Wav2Vec2Config) -> None:
        """Take a pretrained model's architecture.

        A pretrained type that is the recipe's, or extends it, has all that the recipe's has, and is taken whole. Else
        the recipe's type stays, and with it its objective; the encoder's fields are taken.

        Raises:
            UsageError: the two types build different encoders.
        """
        own, given = type(self.model), type(pretrained)
        if issubclass(given, own):
            kept = {name: getattr(self.model, name) for name in self.KEPT if hasattr(self.model, name)}
            self.model = dataclasses.replace(pretrained, **kept)
            return
        for name in ("build_conv_norms", "build_positional_embedding"):
            if getattr(own, name) is not getattr(given, name):
                raise UsageError(
                    f"the model of `init_from` is {given.__name__}, the recipe's is {own.__name__}, and they differ in "
                    f"{name}; make the recipe's `model` a {given.__name__}"
                )
        names = {f.name for f in dataclasses.fields(Wav2Vec2Config)} - {*self.KEPT, *_MASKS}
        self.model = dataclasses.replace(self.model, **{name: getattr(pretrained, name) for name in names})

    def check(self) -> None:
        """Refuse what cannot work, before anything is written.

        Raises:
            UsageError: with the field, what it must be, and what it is.
        """
        self.model.check()
        self.data.check()
        check_ranges(self)


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """A whole pretraining run."""

    model: Wav2Vec2Config = field(default_factory=ContrastiveConfig)
    """The network and its objective."""
    loss_weights: dict[str, float] = field(default_factory=_loss_weights)
    """Weight of each of the model's losses, per masked frame; the keys must be the model's."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    """Stage before the run; off where it starts from a model that hears already."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """What is told of phones by each layer, now and then."""
    KEPT = (*_REGULARISATION, "dropout_features", *_TEMPERATURE, "neighbourhood", "neighbourhood_dim")

    def adopt_architecture(self, pretrained: Wav2Vec2Config) -> None:
        """Take a pretrained model's architecture, as every run does, and no warm start: its convolutions are trained.

        Raises:
            UsageError: as of every run.
        """
        super().adopt_architecture(pretrained)
        self.warm_start.updates = 0

    def warm_start_run(self) -> PretrainConfig:
        """The run that the warm start is: on the same audio, with an objective and a schedule of its own."""
        warm, train = self.warm_start, self.train
        encoder = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(Wav2Vec2Config)}
        schedule = WarmupCosine(
            peak=warm.peak, warmup_steps=warm.updates // 20, total_steps=max(1, warm.updates), floor=0.0
        )
        return PretrainConfig(
            recipe=self.recipe,
            model=SpectralConfig(**encoder | {"conv_gradient_scale": 1.0}, bands=warm.bands),
            loss_weights={"spectrum": 1.0, "feature_penalty": 1e-4},
            data=self.data,
            optim=dataclasses.replace(self.optim, schedule=schedule, clip_norm=1.0),
            train=dataclasses.replace(train, max_steps=None, shard=False, val_every=max(1, warm.updates), wandb=""),
        )

    def check(self) -> None:
        """Refuse what cannot work, as every run does; crops that do not fit or leave nothing to mask."""
        super().check()
        if self.warm_start.updates and type(self.model).build_conv_norms is not Wav2Vec2Config.build_conv_norms:
            raise UsageError(
                f"`warm_start.updates` must be 0 for a {type(self.model).__name__}, whose build_conv_norms is its own; "
                f"got {self.warm_start.updates}"
            )
        if self.probe.every and (self.train.shard or not self.probe.labels):
            raise UsageError(
                "`probe.every` needs `probe.labels`, a folder of phones with times, and no `train.shard`; got "
                f"{self.probe.labels!r} and {self.train.shard}"
            )
        if getattr(self.model, "neighbourhood", 0) and (self.train.shard or self.model.conv_gradient_scale):
            raise UsageError(
                "`model.neighbourhood` needs convolutions that stay as they are, by `model.conv_gradient_scale` 0, and "
                f"no `train.shard`; got {self.model.conv_gradient_scale:g} and {self.train.shard}"
            )
        frames = self.model.frames([int(self.data.max_seconds * SAMPLE_RATE)])[0]
        if frames > self.model.max_seq_len:
            raise UsageError(
                f"`data.max_seconds` {self.data.max_seconds:g} gives crops of {frames} frames, more than "
                f"`model.max_seq_len` {self.model.max_seq_len}; crop at "
                f"{self.model.max_seq_len * 0.02:g} s or less, or raise `model.max_seq_len`"
            )
        if self.data.batch_seconds < self.data.max_seconds:
            raise UsageError(
                f"`data.batch_seconds` must hold at least one crop of `data.max_seconds` "
                f"({self.data.max_seconds:g}), got {self.data.batch_seconds:g}"
            )
        field_seconds = receptive_field(self.model.conv_kernel_sizes, self.model.conv_strides) / SAMPLE_RATE
        if self.data.min_seconds < 4 * field_seconds:
            raise UsageError(
                f"`data.min_seconds` must leave a few frames to mask, at least {4 * field_seconds:g}, "
                f"got {self.data.min_seconds:g}"
            )


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """A whole fine-tuning run, of CTC, or of a classifier where ``units`` are classes."""

    model: Wav2Vec2Config = field(default_factory=Wav2Vec2Config)
    """The network; with a pretrained one its architecture comes from there, masks and regularisation from here."""
    channel_mask_prob: ShareBelowOne = 0.25
    """Share of channels that would be masked if no spans overlapped (``mask_channel_prob``)."""
    channel_mask_length: Count = 64
    """Channels of a span (``mask_channel_length``)."""
    freeze_encoder_steps: Whole = 0
    """Optimiser steps in which only the output layer learns (``freeze_finetune_updates``)."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Learning rate of a block as a share of that of the one above it; the top block's is the schedule's times this,
    the feature encoder's the lowest, the output layer has the whole (``layer_decay``). 1: off, as published."""
    lora_rank: Whole = 0
    """Rank of the update that queries and values learn while the pretrained weights stay (arXiv:2106.09685); 0: off."""
    lora_alpha: Positive = 16.0
    """The update is multiplied by this over the rank."""
    units: Characters | Phonemes | SentencePieces | Classes | FrameClasses = field(default_factory=Characters)
    """What the labels are; the recipe chooses which."""
    KEPT = (*_REGULARISATION, *_MASKS)

    def check(self) -> None:
        """Refuse what cannot work, as every run does; frozen weights in parts, masks wider than the model."""
        super().check()
        for name, frozen in (("`freeze_encoder_steps`", self.freeze_encoder_steps), ("`lora_rank`", self.lora_rank)):
            if self.train.shard and frozen:
                raise UsageError(f"`train.shard` cannot freeze weights: it needs {name} 0, got {frozen}")
        least = 3 if self.model.mask_prob > 0 else 1
        if self.model.frames([int(self.data.min_seconds * SAMPLE_RATE)])[0] < least:
            raise UsageError(
                f"`data.min_seconds` must leave {least} frames or more of every utterance, such as 0.1, "
                f"got {self.data.min_seconds:g}"
            )
        if isinstance(self.units, FrameClasses) and self.data.augment.speed:
            raise UsageError("`data.augment.speed` would move the times of frames' labels; leave it at 0")
        width = self.model.n_embd
        if self.channel_mask_prob > 0 and not 0 < self.channel_mask_length <= width // 2:
            raise UsageError(
                f"`channel_mask_length` must be at most half of the {width} channels, got {self.channel_mask_length}; "
                "give a shorter one, or `channel_mask_prob` 0"
            )
        if self.lora_rank > width:
            raise UsageError(f"`lora_rank` must be 0 to {width}, got {self.lora_rank}")
