"""Proof of a conversion: the model here and the one in transformers on the same audio, layer by layer.

transformers is loaded from files, by its own loader and without any of our names, so it is an independent reader of
the Hugging Face side. fairseq cannot be installed on current versions of Python: for its files the comparison is of the
tensors as read from them, once in our model and once in transformers'.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2v2.convert.contents import Contents
from w2v2.convert.huggingface import class_name
from w2v2.errors import JobError, UsageError
from w2v2.model.feature_encoder import receptive_field
from w2v2.model.masking import Draws, keyed_generator
from w2v2.model.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForPretraining

SCHEMA, SEED, TOLERANCE = 1, 0, 1e-5
FRAMES = (1, 24, 57, 99, 150)
"""Lengths of the audio, frames: one, and even and odd ones up to about three seconds."""
FEWEST_MASKED = 24
"""Losses are compared on utterances that have so many frames."""


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


Show = Callable[[str, float], None]
"""Takes a stage and the share of it done, as ``progress`` gives one."""


def certify(contents: Contents, theirs: Path | None, show: Show = lambda stage, share: None) -> dict[str, Any]:
    """Compare a model with transformers'.

    Args:
        contents: ours.
        theirs: folder for transformers to load; None: it is not installed, and nothing is compared.
        show: told how far it is.

    Returns:
        The part of the certificate that says what was compared and what came out; docs/convert.md has its keys.

    Raises:
        JobError: a difference above the tolerance.
        UsageError: transformers is needed and not installed.
    """
    packages = ["w2v2", "torch", *(["transformers"] if has_transformers() else [])]
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "model": class_name(contents.kind),
        "parameters": sum(tensor.numel() for tensor in contents.state.values()),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "dtype": "float32",
        "device": "cpu",
    }
    if theirs is None:
        return found | {"compared_with": None, "why_not": "transformers is not installed: pip install 'w2v2[hf]'"}
    audio = _audio(contents.config)
    pair = _Pair(contents, _load(theirs, class_name(contents.kind)))
    with torch.no_grad():
        rows = {}
        for share, part in ((0.5, "alone"), (1.0, "padded")):
            rows[part] = pair.compare(audio, padded=part == "padded")
            show("compare", share)
    largest = max(row["relative"] for part in rows.values() for row in part)
    found |= {
        "compared_with": f"transformers {class_name(contents.kind)}, loaded by transformers, eager attention",
        "audio": {
            "seed": SEED,
            "sample_rate": 16_000,
            "samples": [len(row) for row in audio],
            "kind": "Gaussian noise",
        },
        "measure": "largest absolute difference over all frames and channels; relative: divided by the largest "
        "absolute value of transformers' tensor, or by 1 if that is less",
        "tolerance": TOLERANCE,
        "largest": largest,
        "padding": pair.padding,
        **rows,
    }
    worst = [
        f"{row['what']} {row['relative']:.2g} ({part})" for part, rs in rows.items() for row in rs if not row["same"]
    ]
    if worst:
        raise JobError(
            f"the two models differ by more than {TOLERANCE:g}: {', '.join(worst)}; nothing is left of the conversion"
        )
    return found


def _audio(config: Wav2Vec2Config) -> list[Tensor]:
    """(S,) noise of unit variance for each length; not all lengths fill their last frame's hop."""
    field, hop = receptive_field(config.conv_kernel_sizes, config.conv_strides), 1
    for stride in config.conv_strides:
        hop *= stride
    rng = torch.Generator().manual_seed(SEED)
    samples = [field + hop * (n - 1) + (i * hop) // len(FRAMES) for i, n in enumerate(FRAMES)]
    return [torch.randn(n, generator=rng) for n in samples]


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars, no advice."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _load(folder: Path, name: str) -> nn.Module:
    """Their model from a folder, with nothing missing, left over or of another shape; float32, evaluation mode."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "comparing with transformers, which every conversion from or to Hugging Face does, needs it: "
            "pip install 'w2v2[hf]'"
        ) from error
    with _quiet(transformers):
        model, info = getattr(transformers, name).from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
        )
    faults = {key: sorted(map(str, names)) for key, names in info.items() if names}
    faults["missing_keys"] = [n for n in faults.get("missing_keys", []) if not n.endswith("masked_spec_embed")]
    if any(faults.values()):
        raise JobError(
            f"transformers does not take the weights as they are: {faults}; nothing is left of the conversion"
        )
    loaded: nn.Module = model.eval()
    return loaded


class _Pair:
    """Both models, and what they make of the same input."""

    def __init__(self, contents: Contents, theirs: Any) -> None:
        self.ours, self.theirs = contents.build(), theirs
        self.encoder = getattr(theirs, "wav2vec2", theirs)
        self.vocabulary = contents.vocabulary
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}
        # GroupNorm's statistics are over padding too in transformers: an utterance's numbers depend on its batch
        self.invariant = contents.config.conv_norm == "layer"
        if contents.vocabulary is not None:
            theirs.config.ctc_loss_reduction, theirs.config.ctc_zero_infinity = "sum", True
        theirs.config.apply_spec_augment = True  # else it takes no masks from outside either

    @property
    def padding(self) -> str:
        """How the padded batch is compared."""
        if self.invariant:
            return "padded: all utterances in one batch in both, with an attention mask in transformers"
        return (
            "padded: all utterances in one batch here, one by one without padding in transformers, whose GroupNorm "
            "lets padding into its statistics: there a padded utterance gives other numbers than the same alone"
        )

    def compare(self, audio: list[Tensor], *, padded: bool) -> list[dict[str, Any]]:
        """A row for each hidden state, output and loss; utterances one by one, or in one padded batch."""
        batches = [audio] if padded else [[row] for row in audio]
        ours = [self._ours(batch) for batch in batches]
        theirs = [self._theirs(batch) for batch in (batches if self.invariant else [[row] for row in audio])]
        rows = []
        for what in ours[-1]:
            if what == "code_perplexity" and len(ours) != len(theirs):
                continue  # of a batch, not a sum over its utterances
            mine = [tensor for found in ours for tensor in found.get(what, ())]
            other = [tensor for found in theirs for tensor in found.get(what, ())]
            rows.append(_row(what, mine, other))
        return rows

    def _ours(self, audio: list[Tensor]) -> dict[str, list[Tensor]]:
        """Tensors of each utterance by what they are."""
        batch, lengths = nn.utils.rnn.pad_sequence(audio, batch_first=True), [len(row) for row in audio]
        states, frames = self.ours.hidden_states(batch, lengths)
        found = {name: _cut(state, frames) for name, state in _named(states).items()}
        if isinstance(self.ours, Wav2Vec2ForCTC):
            log_probs, _ = self.ours(batch, lengths)
            rows = _cut(log_probs, frames)
            found |= {"log_probs": rows, "ctc": [self._ctc(row) for row in rows]}
        if isinstance(self.ours, Wav2Vec2ForPretraining):
            found |= self._ours_masked(self.ours, [row for row, n in zip(audio, frames, strict=True) if _maskable(n)])
        return found

    def _theirs(self, audio: list[Tensor]) -> dict[str, list[Tensor]]:
        batch, lengths = nn.utils.rnn.pad_sequence(audio, batch_first=True), [len(row) for row in audio]
        frames = self.ours.config.frames(lengths)
        mask = torch.stack([torch.arange(batch.shape[1]) < n for n in lengths]).long() if self.invariant else None
        out = self.encoder(batch, attention_mask=mask, output_hidden_states=True)
        states = [*out.hidden_states[:-1], out.last_hidden_state]
        if states[0].shape[1] != max(frames):
            raise JobError(
                f"transformers makes {states[0].shape[1]} frames of {max(lengths)} samples, expected {max(frames)}; "
                "nothing is left of the conversion"
            )
        found = {name: _cut(state, frames) for name, state in _named(states).items()}
        if isinstance(self.ours, Wav2Vec2ForCTC):
            logits = self.theirs(batch, attention_mask=mask).logits
            found["log_probs"] = _cut(logits.log_softmax(-1), frames)
            found["ctc"] = [self._their_ctc(row) for row in audio]
        if isinstance(self.ours, Wav2Vec2ForPretraining):
            found |= self._theirs_masked([row for row, n in zip(audio, frames, strict=True) if _maskable(n)])
        return found

    def _targets(self, frames: int) -> Tensor:
        """(U,) labels, no two the same in succession, so that they fit in the frames."""
        assert self.vocabulary is not None
        labels = [i for i in range(len(self.vocabulary.labels)) if i != self.vocabulary.blank]
        return torch.tensor([labels[i % len(labels)] for i in range(max(frames // 3, 1))])

    def _ctc(self, log_probs: Tensor) -> Tensor:
        assert self.vocabulary is not None
        targets = self._targets(len(log_probs))
        sizes = torch.tensor([len(log_probs)]), torch.tensor([len(targets)])
        return F.ctc_loss(
            log_probs[:, None], targets[None], *sizes, self.vocabulary.blank, reduction="sum", zero_infinity=True
        )

    def _their_ctc(self, row: Tensor) -> Tensor:
        targets = self._targets(self.ours.config.frames([len(row)])[0])
        loss: Tensor = self.theirs(row[None], labels=targets[None]).loss
        return loss

    def _draw(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) masked frames of an utterance and (N, K) distractors among them.

        Of other codes than the target's wherever there are such: equal ones are left out of the loss by comparing codes
        here, and by comparing projected vectors in transformers, whose last bits may differ for the same code.
        """
        ours = self.ours
        assert isinstance(ours, Wav2Vec2ForPretraining)
        config = ours.config
        frames = config.frames([len(row)])[0]
        if frames in self.drawn:
            return self.drawn[frames]
        rng = keyed_generator(SEED, frames)
        mask = Wav2Vec2Config().sample_mask(frames, rng)
        normalised, _ = ours.feature_projection(ours.feature_encoder(row[None]))
        codes = ours.quantizer(normalised[0][mask], 1.0).codes
        other = (codes[:, None] != codes[None]).any(-1)
        anyone = ~torch.eye(len(codes), dtype=torch.bool)
        usable = torch.where(other.any(1, keepdim=True), other, anyone)
        distractors = torch.multinomial(usable.float(), config.num_distractors, replacement=True, generator=rng)
        self.drawn[frames] = mask, distractors
        return mask, distractors

    def _ours_masked(self, model: Wav2Vec2ForPretraining, audio: list[Tensor]) -> dict[str, list[Tensor]]:
        if not audio:
            return {}
        drawn = [self._draw(row) for row in audio]
        masked = torch.cat([mask for mask, _ in drawn]).nonzero().flatten()
        counts = tuple(int(mask.sum()) for mask, _ in drawn)
        distractors = torch.cat([places for _, places in drawn])
        draws = Draws(masked=masked, counts=counts, distractors=distractors, covered=masked)
        assert model.project_q is not None
        batch, lengths = nn.utils.rnn.pad_sequence(audio, batch_first=True), [len(row) for row in audio]
        with _outputs(model.out_linear) as contexts, _outputs(model.project_q) as targets:
            out = model(batch, draws, lengths)
        probs = (out.metrics["codes"] / len(masked)).double()
        perplexity = torch.exp(-torch.xlogy(probs, probs).sum(-1)).sum()
        return {
            "contexts": list(contexts[0].split(counts)),
            "targets": list(targets[0].split(counts)),
            "contrastive": [out.losses["contrastive"]],
            "code_perplexity": [perplexity],
        }

    def _theirs_masked(self, audio: list[Tensor]) -> dict[str, list[Tensor]]:
        if not audio:
            return {}
        batch, lengths = nn.utils.rnn.pad_sequence(audio, batch_first=True), [len(row) for row in audio]
        frames = self.ours.config.frames(lengths)
        masks = torch.zeros(len(audio), max(frames), dtype=torch.bool)
        assert isinstance(self.ours, Wav2Vec2ForPretraining)
        negatives = torch.zeros(len(audio), max(frames), self.ours.config.num_distractors, dtype=torch.long)
        for b, row in enumerate(audio):
            mask, distractors = self._draw(row)
            masks[b, : len(mask)] = mask
            negatives[b, masks[b]] = mask.nonzero().flatten()[distractors] + b * max(frames)
        attention = torch.stack([torch.arange(batch.shape[1]) < n for n in lengths]).long() if self.invariant else None
        out = self.theirs(batch, attention_mask=attention, mask_time_indices=masks, sampled_negative_indices=negatives)
        return {
            "contexts": [states[mask] for states, mask in zip(out.projected_states, masks, strict=True)],
            "targets": [states[mask] for states, mask in zip(out.projected_quantized_states, masks, strict=True)],
            "contrastive": [out.contrastive_loss],
            "code_perplexity": [out.codevector_perplexity],
        }


def _maskable(frames: int) -> bool:
    return frames >= FEWEST_MASKED


def _named(states: Sequence[Tensor]) -> dict[str, Tensor]:
    """The input of the first block, the output of each, the last one after the norm where that comes last."""
    return {f"hidden_states.{i}": state for i, state in enumerate(states)}


def _cut(x: Tensor, frames: Sequence[int]) -> list[Tensor]:
    """(B, T, ...) without padding."""
    return [row[:n] for row, n in zip(x, frames, strict=True)]


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module gives back while this lasts."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def _row(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Any]:
    """Difference of the same tensor of all utterances; scalars are summed over them first."""
    if ours[0].ndim == 0:
        ours, theirs = [torch.stack(list(ours)).sum()], [torch.stack(list(theirs)).sum()]
    assert [x.shape for x in ours] == [x.shape for x in theirs], what
    difference = max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    value = max(b.abs().max().item() for b in theirs)
    relative = difference / max(value, 1.0)
    return {
        "what": what,
        "difference": difference,
        "largest_value": value,
        "relative": relative,
        "same": relative <= TOLERANCE,  # false for NaN too
    }
