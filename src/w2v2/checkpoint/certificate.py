"""Proof of a conversion: the model here and the one in transformers give the same outputs and losses of the same audio.

transformers is loaded from files, by its own loader and without any of our names, so it is an independent reader of
the Hugging Face side. fairseq cannot be installed on current versions of Python: for its files the comparison is of the
tensors as read from them, once in our model and once in transformers'. Layer by layer it is done in
``tests/test_convert.py``. Legend: B utterances, S samples, T frames, N masked frames, K distractors, U labels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.huggingface import class_name
from w2v2.checkpoint.processor import compare_processor
from w2v2.errors import JobError, Show, UsageError, first_line, quiet
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.feature_encoder import receptive_field
from w2v2.model.losses import ctc_loss
from w2v2.model.masking import ContrastiveDraws, keyed_generator
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2Config

SCHEMA, SEED, TOLERANCE = 3, 0, 1e-5
FRAMES = (24, 57, 150)
"""Lengths of the audio, frames: even and odd, from half a second, the least that has masks, to three."""


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    """What was compared, and with which versions."""
    packages = ["w2v2", "torch", *(["transformers"] if has_transformers() else [])]
    return {
        "schema": SCHEMA,
        "model": class_name(checkpoint.kind),
        "parameters": sum(tensor.numel() for tensor in checkpoint.state.values()),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "dtype": "float32",
        "device": "cpu",
    }


def certify(
    checkpoint: Checkpoint, theirs: Path | None, show: Show = quiet, language: str | None = None
) -> dict[str, Any]:
    """Compare a model with transformers'.

    Args:
        checkpoint: ours.
        theirs: folder for transformers to load; None: it is not installed, and nothing is compared.
        show: told how far it is.
        language: whose adapter transformers is to load.

    Returns:
        The part of the certificate that says what was compared and what came out; docs/convert.md has its keys.

    Raises:
        JobError: a difference above the tolerance.
        UsageError: transformers is needed and not installed.
    """
    certificate = _about(checkpoint)
    if theirs is None:
        return certificate | {
            "compared_with": None,
            "why_not": "transformers is not installed: pip install transformers",
        }
    # GroupNorm's statistics are over padding too in transformers: an utterance's numbers depend on its batch.
    invariant = checkpoint.config.conv_norm == "layer"
    model, other = checkpoint.build(), _load(theirs, class_name(checkpoint.kind), language)
    with torch.no_grad():
        utterances = _utterances(model, checkpoint)
        singles, together = [[row] for row in utterances], [utterances]
        rows = {}
        for part, ours, their in (
            ("alone", singles, singles),
            ("padded", together, together if invariant else singles),
        ):
            results = [_ours(model, batch, checkpoint) for batch in ours]
            rows[part] = _rows(results, [_theirs(other, batch, checkpoint, attend=invariant) for batch in their])
            show("compare", len(rows) / 2)
        with quiet_transformers() as transformers:
            processor = compare_processor(transformers, theirs, checkpoint, utterances[0].audio, language)
    faults = [f"{row['what']} {row['relative']:.2g} ({part})" for part in rows for row in rows[part] if not row["same"]]
    if faults:
        raise JobError(
            f"the two models differ by more than {TOLERANCE:g}: {', '.join(faults)}; nothing is left of the conversion"
        )
    return certificate | {
        "compared_with": f"transformers {class_name(checkpoint.kind)}, loaded by transformers, eager attention",
        "audio": {"seed": SEED, "sample_rate": 16_000, "samples": [len(u.audio) for u in utterances], "kind": "noise"},
        "measure": "largest absolute difference, divided by transformers' largest absolute value, or by 1",
        "tolerance": TOLERANCE,
        "largest": max(row["relative"] for part in rows.values() for row in part),
        "padding": "all utterances in one batch in both"
        if invariant
        else "all utterances in one batch here, one by one without padding in transformers, whose GroupNorm is over it",
        **rows,
        "processor": processor,
    }


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Import transformers, without progress bars or advice.

    Raises:
        UsageError: it is not installed, or cannot do with a folder what is asked of it inside.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "comparing with transformers, which every conversion from or to Hugging Face does, needs it: "
            "pip install transformers"
        ) from error
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except (UsageError, JobError):
        raise
    except Exception as error:  # it checks little of what it reads
        reason = first_line(error)
        raise UsageError(f"transformers cannot read these files: {type(error).__name__} {reason}; mend them") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _load(folder: Path, name: str, language: str | None) -> nn.Module:
    """Their model from a folder, with nothing missing, left over or of another shape; float32, evaluation mode."""
    with quiet_transformers() as transformers:
        model, info = getattr(transformers, name).from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            # Another language has an output layer of another size, which comes with its adapter.
            **({} if language is None else {"target_lang": language, "ignore_mismatched_sizes": True}),
        )
    if language is not None:
        info.pop("mismatched_keys")
    faults = {key: sorted(map(str, names)) for key, names in info.items() if names}
    faults["missing_keys"] = [n for n in faults.get("missing_keys", []) if not n.endswith("masked_spec_embed")]
    if any(faults.values()):
        raise JobError(
            f"transformers does not take the weights as they are: {faults}; nothing is left of the conversion"
        )
    model.config.ctc_loss_reduction, model.config.ctc_zero_infinity = "sum", True
    model.config.apply_spec_augment = True  # else it takes no masks from outside either
    loaded: nn.Module = model.eval()
    return loaded


@dataclass
class _Utterance:
    """What both models are given of an utterance."""

    audio: Tensor
    """(S,)"""
    targets: Tensor
    """(U,) labels of a CTC model, no two the same in succession, so that they fit in the frames; else none."""
    mask: Tensor
    """(T,) masked frames of a pretraining model, bool; else none."""
    distractors: Tensor
    """(N, K) places of distractors among the masked frames."""


def _utterances(model: Any, checkpoint: Checkpoint) -> list[_Utterance]:
    """Noise of unit variance for each length; not all lengths fill their last frame's hop."""
    config, vocabulary = checkpoint.config, checkpoint.vocabulary
    field, hop = receptive_field(config.conv_kernel_sizes, config.conv_strides), 1
    for stride in config.conv_strides:
        hop *= stride
    rng = torch.Generator().manual_seed(SEED)
    labels = [] if vocabulary is None else [i for i in range(len(vocabulary.labels)) if i != vocabulary.blank]
    rows = []
    for turn, frames in enumerate(FRAMES):
        audio = torch.randn(field + hop * (frames - 1) + turn * hop // len(FRAMES), generator=rng)
        targets = torch.tensor([labels[i % len(labels)] for i in range(frames // 3)] if labels else [])
        mask, distractors = torch.zeros(frames, dtype=torch.bool), torch.zeros(0, 0).long()
        if isinstance(model, Wav2Vec2ForPretraining):
            mask = Wav2Vec2Config().sample_mask(frames, keyed_generator(SEED, frames))
            distractors = _distractors(model, audio, mask)
        rows.append(_Utterance(audio, targets, mask, distractors))
    return rows


def _distractors(model: Wav2Vec2ForPretraining, audio: Tensor, mask: Tensor) -> Tensor:
    """(N, K) of other codes than the target's wherever there are such.

    Equal ones are left out of the loss by comparing codes here, and by comparing projected vectors in transformers,
    whose last bits may differ for the same code.
    """
    normalised, _ = model.feature_projection(model.feature_encoder(audio[None]))
    codes = model.quantizer(normalised[0][mask], 1.0).codes  # (N, groups)
    other = (codes[:, None] != codes[None]).any(-1)  # (N, N)
    anyone = ~torch.eye(len(codes), dtype=torch.bool)
    usable = torch.where(other.any(1, keepdim=True), other, anyone).float()
    rng = keyed_generator(SEED, len(mask), "distractors")
    return torch.multinomial(usable, model.config.num_distractors, replacement=True, generator=rng)


def _pad(batch: Sequence[_Utterance]) -> tuple[Tensor, list[int]]:
    """(B, S) audio, and the samples of each."""
    return pad_sequence([row.audio for row in batch], batch_first=True), [len(row.audio) for row in batch]


def _ours(model: Any, batch: Sequence[_Utterance], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Outputs, (T of all utterances, ...), and summed losses, (), by name."""
    audio, lengths = _pad(batch)
    states, frames = model.encode(audio, lengths)
    results = {"last_hidden_state": _join(states, frames)}
    if isinstance(model, Wav2Vec2ForCTC):
        assert checkpoint.vocabulary is not None
        log_probs, _ = model(audio, lengths)
        targets, sizes = [row.targets for row in batch], torch.tensor([len(row.targets) for row in batch])
        padded = pad_sequence(targets, batch_first=True)
        loss = ctc_loss(log_probs, frames, padded, sizes, blank=checkpoint.vocabulary.blank)
        results |= {"log_probs": _join(log_probs, frames), "ctc": loss}
    if isinstance(model, Wav2Vec2ForPretraining):
        masked = torch.cat([row.mask for row in batch]).nonzero().flatten()
        counts = tuple(int(row.mask.sum()) for row in batch)
        distractors = torch.cat([row.distractors for row in batch])
        draws = ContrastiveDraws(
            masked=masked, covered=masked, counts=counts, distractors=distractors, n_frames=sum(frames)
        )
        results["contrastive"] = model(audio, draws, lengths).losses["contrastive"]
    return results


def _theirs(model: Any, batch: Sequence[_Utterance], checkpoint: Checkpoint, *, attend: bool) -> dict[str, Tensor]:
    """The same of transformers' model; ``attend``: with an attention mask."""
    audio, lengths = _pad(batch)
    frames = checkpoint.config.frames(lengths)
    mask = torch.stack([torch.arange(audio.shape[1]) < n for n in lengths]).long() if attend else None
    states = getattr(model, "wav2vec2", model)(audio, attention_mask=mask).last_hidden_state
    if states.shape[1] != max(frames):
        raise JobError(
            f"transformers makes {states.shape[1]} frames of {max(lengths)} samples, expected {max(frames)}; "
            "nothing is left of the conversion"
        )
    results = {"last_hidden_state": _join(states, frames)}
    if checkpoint.kind is Wav2Vec2ForCTC:
        targets = pad_sequence([row.targets for row in batch], batch_first=True, padding_value=-100)
        out = model(audio, attention_mask=mask, labels=targets)
        results |= {"log_probs": _join(out.logits.log_softmax(-1), frames), "ctc": out.loss}
    if checkpoint.kind is Wav2Vec2ForPretraining:
        masks = pad_sequence([row.mask for row in batch], batch_first=True)  # (B, T)
        negatives = torch.zeros(*masks.shape, batch[0].distractors.shape[1], dtype=torch.long)
        for b, row in enumerate(batch):
            negatives[b, masks[b]] = row.mask.nonzero().flatten()[row.distractors] + b * max(frames)
        out = model(audio, attention_mask=mask, mask_time_indices=masks, sampled_negative_indices=negatives)
        results["contrastive"] = out.contrastive_loss
    return results


def _join(x: Tensor, frames: Sequence[int]) -> Tensor:
    """(B, T, ...) -> (T of all utterances, ...), without padding."""
    return torch.cat([row[:n] for row, n in zip(x, frames, strict=True)])


def _rows(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Difference of each output, and of each loss summed over batches."""
    rows = []
    for what in ours[0]:
        pair = [torch.cat([x[what].double().reshape(-1) for x in side]) for side in (ours, theirs)]
        a, b = (x.sum() for x in pair) if ours[0][what].ndim == 0 else pair
        difference, value = (a - b).abs().max().item(), b.abs().max().item()
        relative = difference / max(value, 1.0)
        same = relative <= TOLERANCE  # false for NaN too
        row = {"what": what, "difference": difference, "largest_value": value, "relative": relative, "same": same}
        rows.append(row)
    return rows
