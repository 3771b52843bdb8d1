"""Named experiments: functions that return a whole typed configuration; a variant calls another and changes fields.

Your own live outside the package: ``w2v2 pretrain ./mine.py:experiment``.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from w2v2.data.config import AugmentConfig, DataConfig
from w2v2.errors import UsageError
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.training.config import FinetuneConfig, PretrainConfig, TrainConfig, WarmStartConfig
from w2v2.training.optim import OptimConfig, TriStage, WarmupCosine, WarmupLinear
from w2v2.training.units import Classes, FrameClasses

T = TypeVar("T")


def base() -> PretrainConfig:
    """BASE with small changes: 95.7 M parameters, 12 blocks of 768, padded convolutions, pre-norm, warm-up and cosine.

    LibriSpeech, 960 h, 1.6 h of audio per update however many GPUs there are: 64 micro-batches of 87.5 s, shared out::

        w2v2 pretrain base --data LibriSpeech --out runs/base
        w2v2 pretrain base --data LibriSpeech --out runs/8 --train.devices 8 --train.accumulate 8
        w2v2 pretrain base --data LibriSpeech --out runs/64 --train.num-nodes 8 --train.devices 8 --train.accumulate 1

    The third is started on each of 8 machines (``torchrun`` or SLURM). ``w2v2 plan base --gpus 8`` says what a run
    takes where you are. Hours: not measured here; reckoned for such a model on 8 A100 from NVIDIA's figures, 66.
    Metrics: not measured here; published for about this batch, with ``paper_base``'s architecture: accuracy .25 after
    5k updates, .49 to .51 after 50k, .54 after 100k, .56 to .63 after 400k, perplexity 160 to 170 of 320.
    """
    return PretrainConfig(
        recipe="base",
        model=ContrastiveConfig(),
        optim=OptimConfig(schedule=WarmupCosine(peak=5e-4, warmup_steps=32_000, total_steps=400_000)),
        warm_start=WarmStartConfig(updates=0),  # known to pay in short runs of ``tiny`` alone (LOG.md)
        train=TrainConfig(accumulate=64),
    )


def paper_base() -> PretrainConfig:
    """The released wav2vec 2.0 BASE: 95,044,608 parameters, weights interchangeable with fairseq and Hugging Face.

    LibriSpeech, 960 h; GPUs as for ``base``::

        w2v2 pretrain paper_base --data LibriSpeech --out runs/paper_base --train.devices 8 --train.accumulate 8

    Published: 64 V100, 1.6 days, 400k updates of 1.6 h; NVIDIA's with a shortened transformer, 8 A100, 48 hours,
    accuracy .491 / .537 / .580 / .629 on dev-other after 50k / 100k / 200k / 400k updates. After fine-tuning on 960 h
    3.4 / 8.5 % WER on test-clean / test-other without a language model, on 100 h 6.1 / 13.3, on 10 minutes 46.9 / 50.9.
    Here: not measured.
    """
    config = base()
    config.recipe = "paper_base"
    config.model = ContrastiveConfig(
        n_head=12,
        conv_paddings=(0,) * 7,
        conv_norm="group:512",
        norm_first=False,
        target_features="encoder",
        codebook_dim=128,
        similarity_dim=256,
    )
    config.optim.schedule = WarmupLinear(peak=5e-4, warmup_steps=32_000, total_steps=400_000)
    config.optim.clip_norm = None
    return config


def paper_large_lv60k() -> PretrainConfig:
    """The released LARGE trained on Libri-Light's 60k hours: 317,390,592 parameters, layer-norm encoder, pre-norm.

    Here mainly for conversion and fine-tuning; from scratch::

        w2v2 pretrain paper_large_lv60k --data LibriLight --out runs/large --train.devices 8 --train.accumulate 16

    Published: 128 V100, 5.2 days, 600k updates of 2.7 h; after fine-tuning on 960 h 2.2 / 4.5 % WER on test-clean /
    test-other without a language model, on 10 minutes 40.2 / 38.7. Here: not measured.
    """
    config = paper_base()
    config.recipe = "paper_large_lv60k"
    config.model = ContrastiveConfig(
        n_layer=24,
        n_head=16,
        n_embd=1024,
        ffn_dim=4096,
        conv_paddings=(0,) * 7,
        conv_bias=True,
        conv_norm="layer",
        conv_gradient_scale=1.0,
        normalize_audio=True,
        norm_first=True,
        dropout=0.0,
        attention_dropout=0.0,
        dropout_input=0.0,
        dropout_features=0.0,
        layer_drop=0.0,
        target_features="encoder",
        codebook_dim=384,
        similarity_dim=768,
        gumbel_end=0.1,
    )
    config.loss_weights["feature_penalty"] = 0.0
    config.data.max_seconds = 20.0
    config.data.batch_seconds = 75.0
    config.optim.schedule = WarmupLinear(peak=3e-4, warmup_steps=32_000, total_steps=600_000)
    config.train.accumulate = 128
    return config


def small() -> PretrainConfig:
    """A narrow ``base`` of 12.9 M parameters, for one GPU in a day or a patient CPU.

    20,000 updates of 20 s, 111 h heard::

        w2v2 pretrain small --data my_speech --out runs/small

    Hours on a GPU: not measured; ``w2v2 plan small`` measures them. One CPU thread took 2.6 s for an update, 14 hours
    in all. Metrics: followed for 650 updates only, at 600 accuracy .053 and perplexity 295 (LOG.md, "``small`` on real
    speech"): safe from collapse, slow to learn.

    Its convolutions widen on the way down, which makes them five times cheaper than 512 channels throughout. Two
    options that the paper does not have let a short run leave chance at once: smoothed initial kernels, and features
    normalised over the utterance; with them the diversity loss needs more weight, or few codes suffice (LOG.md). The
    warm start is not measured at this size, the figures above are of a run without it.
    """
    config = base()
    config.recipe = "small"
    config.model = ContrastiveConfig(
        n_layer=6,
        n_head=6,
        n_embd=384,
        ffn_dim=1536,
        conv_channels=(64, 96, 128, 192, 256, 256, 256),
        utterance_norm=True,
        conv_init_smoothing=0.8,
        conv_gradient_scale=0.0,
        dropout=0.05,
        attention_dropout=0.0,
        dropout_input=0.05,
        dropout_features=0.05,
        layer_drop=0.0,
        target_features="encoder",
        codebook_dim=128,
        similarity_dim=256,
        gumbel_decay=0.25 ** (1 / 12_000),
    )
    config.loss_weights |= {"diversity": 0.5, "feature_penalty": 0.0}
    config.warm_start.updates = 1_500
    config.data = DataConfig(batch_seconds=20.0, max_seconds=5.0)
    config.optim.schedule = WarmupCosine(peak=7e-4, warmup_steps=500, total_steps=20_000)
    config.train = TrainConfig(val_every=200, checkpoint_every=200)
    return config


def tiny() -> PretrainConfig:
    """1.3 M parameters that learn in minutes on two CPU cores; what ``make demo`` trains.

    1,500 updates on the spectrum (``warm_start``) and 1,600 of masked prediction, of 12 s each, 10.3 h heard; hours:
    five minutes of one CPU core. Metrics on synthetic speech, one seed (LOG.md): accuracy .20; a linear probe tells .52
    of the phones of unseen voices from one frame, .55 from five; log-mel .38 and .46. ::

        w2v2 pretrain tiny --data my_speech --out runs/tiny

    ``small`` made smaller, with spans of 100 ms, and an auxiliary loss on the frames that are seen: they tell what lies
    around them (``neighbourhood``). Convolutions stay as the warm start leaves them.
    """
    config = small()
    config.recipe = "tiny"
    assert isinstance(config.model, ContrastiveConfig)
    config.model = replace(
        config.model,
        n_layer=3,
        n_head=4,
        n_embd=192,
        ffn_dim=384,
        conv_channels=(32, 48, 64, 96, 96, 128, 128),
        dropout=0.0,
        dropout_input=0.0,
        dropout_features=0.0,
        pos_conv_kernel=48,
        mask_prob=0.5,
        mask_length=5,
        codebook_dim=64,
        similarity_dim=128,
        gumbel_decay=0.25 ** (1 / 960),
        neighbourhood=9,
    )
    config.loss_weights |= {"diversity": 0.25, "neighbourhood": 1.5, "feature_penalty": 0.0}
    config.data = DataConfig(batch_seconds=12.0, max_seconds=3.0, num_buckets=2, num_workers=0)
    config.optim.schedule = WarmupCosine(peak=1.2e-3, warmup_steps=128, total_steps=1_600)
    config.train = TrainConfig(log_every=50, val_every=400, checkpoint_every=400)
    return config


def adapt() -> PretrainConfig:
    """Pretraining continued on other audio, from a run whose model it takes as it is.

    ::

        w2v2 pretrain adapt --init-from runs/base --data my_speech --out runs/adapted

    A tenth of ``base``'s peak, after 1,000 updates constant, so that the run can end where validation says. The Gumbel
    temperature is a function of the step, which starts again: here it starts at its end. Regularisation is this
    recipe's; a small model wants its own and its batch, for ``tiny`` ``--model.dropout 0 --model.layer-drop 0
    --loss-weights.diversity 0.25 --optim.schedule.peak 1.2e-4 --data.max-seconds 3 --data.batch-seconds 12
    --train.accumulate 1``. GPUs as for ``base``; hours: ``w2v2 plan adapt``; metrics: not measured.
    """
    config = base()
    config.recipe = "adapt"
    config.model = ContrastiveConfig(gumbel_start=ContrastiveConfig.gumbel_end)
    config.optim.schedule = WarmupCosine(peak=5e-5, warmup_steps=1_000, total_steps=50_000, floor=1.0)
    return config


def ctc_10m() -> FinetuneConfig:
    """CTC on ten minutes of labels, BASE encoder: fairseq's published settings.

    13,000 updates of 1,600 s, however many GPUs there are: 8 micro-batches of 200 s, shared out. The first 10,000 teach
    the output layer alone, the convolutions stay as they are throughout::

        w2v2 finetune ctc_10m --init-from runs/paper_base --data LibriSpeech --minutes 10 --out runs/ctc_10m

    On 8 GPUs add ``--train.devices 8 --train.accumulate 1``. ``--minutes`` takes ten minutes over all speakers; the
    published ones are a list of ids (Libri-light), for ``prepare --labelled``. Hours: not measured here, about 2 on an
    A100, reckoned from NVIDIA's for ``ctc_960h``. Published WER on test-clean / test-other: 46.9 / 50.9 greedy,
    9.1 / 15.6 with a 4-gram. Here: not measured.
    """
    model = paper_base().model
    model.conv_gradient_scale = 0.0
    model.dropout = model.attention_dropout = model.dropout_input = 0.0
    model.activation_dropout = model.layer_drop = 0.1
    return FinetuneConfig(
        recipe="ctc_10m",
        model=model,
        channel_mask_prob=0.25,
        freeze_encoder_steps=10_000,
        data=DataConfig(batch_seconds=200.0, max_seconds=200.0, min_seconds=0.1),
        optim=OptimConfig(schedule=TriStage(peak=5e-5, total_steps=13_000), eps=1e-8, weight_decay=0.0, clip_norm=None),
        train=TrainConfig(accumulate=8, val_every=500),
    )


def ctc_1h() -> FinetuneConfig:
    """CTC on one hour of labels, BASE encoder: as ``ctc_10m``.

    ::

        w2v2 finetune ctc_1h --init-from runs/paper_base --data LibriSpeech --minutes 60 --out runs/ctc_1h

    GPUs and hours as for ``ctc_10m``. Published WER on test-clean / test-other: 24.5 / 29.7 greedy, 5.5 / 11.3 with a
    4-gram. Here: not measured.
    """
    config = ctc_10m()
    config.recipe = "ctc_1h"
    return config


def ctc_10h() -> FinetuneConfig:
    """CTC on ten hours of labels, BASE encoder: 20,000 updates, more channels masked, fewer layers dropped.

    ::

        w2v2 finetune ctc_10h --init-from runs/paper_base --data LibriSpeech --minutes 600 --out runs/ctc_10h

    GPUs as for ``ctc_10m``; hours: not measured here, about 3 on an A100. Published WER on test-clean / test-other:
    11.1 / 17.6 greedy, 4.3 / 9.5 with a 4-gram. Here: not measured.
    """
    config = ctc_10m()
    config.recipe = "ctc_10h"
    config.model.layer_drop = 0.05
    config.channel_mask_prob = 0.5
    config.optim.schedule = TriStage(peak=5e-5, total_steps=20_000)
    return config


def ctc_100h() -> FinetuneConfig:
    """CTC on a hundred hours of labels (train-clean-100), BASE encoder: 80,000 updates, the encoder learns at once.

    ::

        w2v2 finetune ctc_100h --init-from runs/paper_base --data LibriSpeech --out runs/ctc_100h

    The corpus must hold train-clean-100 alone of the training subsets. GPUs as for ``ctc_10m``; hours: not measured
    here, about 13 on an A100. Published WER on test-clean / test-other: 6.1 / 13.3 greedy, 3.4 / 8.0 with a 4-gram.
    Here: not measured.
    """
    config = ctc_10h()
    config.recipe = "ctc_100h"
    config.model.layer_drop = 0.1
    config.freeze_encoder_steps = 0
    config.optim.schedule = TriStage(peak=3e-5, total_steps=80_000)
    config.train.val_every = 1_000
    return config


def ctc_960h() -> FinetuneConfig:
    """CTC on all of LibriSpeech, BASE encoder: 320,000 updates, fewer frames and channels masked.

    ::

        w2v2 finetune ctc_960h --init-from runs/paper_base --data LibriSpeech --out runs/ctc_960h

    GPUs as for ``ctc_10m``; hours: not measured here, NVIDIA's on 8 A100: 6.5. Published WER on test-clean /
    test-other: 3.4 / 8.5 greedy, 2.6 / 6.1 with a 4-gram; NVIDIA's on dev-other 11.2 after 50k updates, 9.6 after 200k,
    8.8 after 320k. Here: not measured.
    """
    config = ctc_100h()
    config.recipe = "ctc_960h"
    config.model.mask_prob = 0.5
    config.channel_mask_prob = 0.1
    config.optim.schedule = TriStage(peak=1e-4, total_steps=320_000)
    config.train.val_every = 5_000
    return config


def small_ctc() -> FinetuneConfig:
    """CTC on an hour or two of real speech with the ``small`` encoder, for one GPU or a patient CPU.

    1,000 updates of 40 s, 11 h heard, some six times 1.8 h::

        w2v2 finetune small_ctc --init-from runs/small --data my_speech --out runs/small_ctc

    The convolutions learn too: frozen they cost ``tiny`` 3 points of CER (LOG.md). Spans of 100 ms are masked, about
    a quarter of the frames, no channels. Hours: not measured on a GPU; a CPU thread takes some 4 s for an update, an
    hour in all. On 1.8 h of LibriSpeech and unseen speakers CER .737, WER 1.06; without masks .691 and 1.01 after 600
    updates already: docs/results.md.
    """
    model = small().model
    model.conv_gradient_scale = 1.0
    model.mask_prob, model.mask_length = 0.3, 5
    return FinetuneConfig(
        recipe="small_ctc",
        model=model,
        channel_mask_prob=0.0,
        data=DataConfig(batch_seconds=40.0, max_seconds=40.0, min_seconds=0.1, num_buckets=6),
        optim=OptimConfig(schedule=TriStage(peak=1e-3, total_steps=1_000), eps=1e-8, weight_decay=0.0),
        train=TrainConfig(val_every=100, checkpoint_every=200, log_every=25),
    )


def small_ctc_scratch() -> FinetuneConfig:
    """``small_ctc`` from random weights: the same labels, updates and learning rate.

    GPU or CPU, hours as for ``small_ctc``. On the same speakers CER .734, WER .993: LOG.md. ::

        w2v2 finetune small_ctc_scratch --data my_speech --out runs/small_ctc_scratch
    """
    config = small_ctc()
    config.recipe = "small_ctc_scratch"
    return config


def tiny_ctc() -> FinetuneConfig:
    """CTC on ten minutes of labels with the ``tiny`` encoder; ``make demo`` fine-tunes it twice.

    1,600 updates of 12 s, each utterance as a voice and a microphone of its own, in 200 s of a CPU core::

        w2v2 finetune tiny_ctc --init-from runs/tiny --data my_speech --minutes 10 --out runs/tiny_ctc

    Convolutions stay frozen, a quarter of the frames is masked in spans of 100 ms. On synthetic speech and unseen
    voices CER .372, WER .85, with a tuned trigram .41, one seed; LOG.md.
    """
    model = tiny().model
    model.mask_prob, model.conv_gradient_scale = 0.3, 0.0
    data = DataConfig(batch_seconds=12.0, max_seconds=40.0, min_seconds=0.1, num_buckets=4, num_workers=0)
    data.augment = AugmentConfig(speed=0.15, tilt_db=4.0, noise=0.75)
    return FinetuneConfig(
        recipe="tiny_ctc",
        model=model,
        channel_mask_prob=0.0,
        data=data,
        optim=OptimConfig(schedule=TriStage(peak=3e-3, total_steps=1_600), eps=1e-8, weight_decay=0.0),
        train=TrainConfig(log_every=100, val_every=200, checkpoint_every=800),
    )


def tiny_ctc_scratch() -> FinetuneConfig:
    """``tiny_ctc`` from random weights: the same labels and updates, in the regime that is best for it.

    Everything learns, as random convolutions must, nothing is masked. On a CPU in 300 s. CER .461, WER .91; LOG.md. ::

        w2v2 finetune tiny_ctc_scratch --data my_speech --minutes 10 --out runs/tiny_ctc_scratch
    """
    config = tiny_ctc()
    config.recipe = "tiny_ctc_scratch"
    config.model.mask_prob, config.model.conv_gradient_scale = 0.0, 1.0
    config.optim.schedule.peak = 1.5e-3
    return config


def classify_utterances() -> FinetuneConfig:
    """A classifier of whole utterances, on a BASE encoder: speakers, or by ``--label`` language, emotion, keyword.

    SUPERB's head, a learned mix of all layers, averaged over time; the encoder learns too after 1,000 updates::

        w2v2 finetune classify_utterances --label speaker --init-from runs/base --data my_speech --out runs/speakers

    GPUs: one. Hours and metrics: not measured. For an encoder such as ``tiny`` on a CPU: ``--train.max-steps 300
    --optim.schedule.total-steps 300 --optim.schedule.peak 1e-3 --data.batch-seconds 24``.
    """
    return FinetuneConfig(
        recipe="classify_utterances",
        model=Wav2Vec2Config(mask_prob=0.0, layer_drop=0.0, dropout=0.1, conv_gradient_scale=0.0),
        channel_mask_prob=0.0,
        freeze_encoder_steps=1_000,
        units=Classes(),
        data=DataConfig(batch_seconds=90.0, max_seconds=40.0, min_seconds=0.1),
        optim=OptimConfig(schedule=TriStage(peak=1e-4, total_steps=20_000), eps=1e-8, weight_decay=0.0),
        train=TrainConfig(val_every=500, checkpoint_every=500),
    )


def classify_frames() -> FinetuneConfig:
    """As ``classify_utterances``, of each frame: its phone, or whatever ``*.ctm`` or ``*.TextGrid`` give times of.

    GPUs: one. Hours and metrics: not measured. ::

        w2v2 finetune classify_frames --units.labels phones --init-from runs/base --data my_speech --out runs/phones
    """
    config = classify_utterances()
    config.recipe, config.units = "classify_frames", FrameClasses()
    return config


def load_recipe(name: str, kind: type[T]) -> T:
    """The configuration of a recipe of ours, by name, or of FILE.py:FUNCTION.

    Raises:
        UsageError: no such recipe, or one of another kind.
    """
    function: Callable[[], Any] | None
    if ".py:" in name:
        function = _from_file(name)
    else:
        function = _ours(kind).get(name)
        if function is None:
            raise UsageError(f"unknown recipe {name!r}: expected one of {', '.join(_ours(kind))}, or FILE.py:FUNCTION")
    config = function()
    if not isinstance(config, kind):
        raise UsageError(f"recipe {name} must return a {kind.__name__}, got a {type(config).__name__}")
    config.recipe = name  # type: ignore[attr-defined]
    return config


def recipe_names(kind: type[T]) -> list[str]:
    """Names of the recipes that return this kind of configuration."""
    return list(_ours(kind))


def _ours(kind: type[T]) -> dict[str, Callable[[], T]]:
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    wanted = {name: f for name, f in functions if f.__annotations__.get("return") == kind.__name__}
    return dict(sorted(wanted.items(), key=lambda item: item[1].__code__.co_firstlineno))


def _from_file(name: str) -> Callable[[], Any]:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"no recipe file {path}: expected FILE.py:FUNCTION")
    if Path(path).stem in sys.stdlib_module_names or hasattr(sys.modules.get(Path(path).stem), "__path__"):
        raise UsageError(f"{path} has the name of a module that Python or w2v2 uses; rename it")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that a saved configuration finds the file's own types
    spec.loader.exec_module(module)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"no function {attribute!r} in {path}")
    return function  # type: ignore[no-any-return]
