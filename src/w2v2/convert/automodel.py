"""Models of ours as models of transformers: importing this makes ``AutoModel`` and ``AutoModelForCTC`` know them.

For those that Hugging Face has no class for, such as ``base``: padded convolutions, GroupNorm of 32. No
``trust_remote_code``: the code is this package's. Inside is our own model, so an utterance gives the same numbers alone
and in any padded batch. It is for inference and features; masks and dropped layers of training are drawn by ``w2v2
finetune``, not here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCTC,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import w2v2
from w2v2.checkpoint import VOCABULARY
from w2v2.convert.check import check_audio, check_lengths, compare, write_check, write_preprocessor
from w2v2.convert.onnx import eager
from w2v2.convert.tokenizer import tokenizer_misfits, write_tokenizer
from w2v2.errors import JobError
from w2v2.model.wav2vec2 import CTCHead, Wav2Vec2, Wav2Vec2Config, init_weights
from w2v2.recognizer import Recognizer, normalize_waveform
from w2v2.serial import from_dict, to_dict
from w2v2.text import Vocabulary

MODEL_TYPE = "w2v2"
_IGNORED = -100
_IMPOSSIBLE = -1e4


class W2V2Config(PretrainedConfig):
    """Our model configuration inside one of transformers.

    Args:
        network: ``to_dict`` of a ``Wav2Vec2Config``; None: its defaults.
        vocab_size: labels of a CTC model.
        pad_token_id: its blank.
        ctc_loss_reduction, ctc_zero_infinity: as of ``transformers.Wav2Vec2Config``.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        pad_token_id: int | None = None,
        ctc_loss_reduction: str = "sum",
        ctc_zero_infinity: bool = True,
        **kwargs: Any,
    ) -> None:
        self.network = to_dict(Wav2Vec2Config()) if network is None else network
        self.vocab_size = vocab_size
        self.ctc_loss_reduction, self.ctc_zero_infinity = ctc_loss_reduction, ctc_zero_infinity
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    def build(self) -> Wav2Vec2Config:
        """Ours."""
        return from_dict(self.network, Wav2Vec2Config)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors."""
        return int(self.network["n_embd"])

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks."""
        return int(self.network["n_layer"])

    @property
    def num_attention_heads(self) -> int:
        """Of each block."""
        return int(self.network["n_head"])

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples of a frame's hop; asked for by transformers' pipelines."""
        return int(torch.tensor(self.network["conv_strides"]).prod())


class W2V2PreTrainedModel(PreTrainedModel):
    """What both models have in common: weights that do not fit are an error, never new random ones."""

    config_class = W2V2Config
    base_model_prefix = "w2v2"
    main_input_name = "input_values"

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: tensors of the encoder missing. A head may be: an encoder is made a CTC model that way.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("lm_head."))
        if missing:
            raise ValueError(f"the weights do not fit the model: missing {missing}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CTCHead):  # all else has its values from its construction
            init_weights(module)

    def frame_lengths(self, input_values: Tensor, attention_mask: Tensor | None) -> list[int]:
        """Samples of each row, from a mask that has ones before zeros.

        Raises:
            ValueError: another mask, such as one of padding on the left.
        """
        if attention_mask is None:
            return [input_values.shape[1]] * len(input_values)
        if attention_mask.shape != input_values.shape or (attention_mask.diff(dim=1) > 0).any():
            raise ValueError(
                f"attention_mask must be {tuple(input_values.shape)} ones for samples, then zeros for padding on the "
                f"right, got {tuple(attention_mask.shape)}"
            )
        lengths: list[int] = attention_mask.sum(1).tolist()
        return lengths


class W2V2Model(W2V2PreTrainedModel):
    """The encoder."""

    def __init__(self, config: W2V2Config) -> None:
        super().__init__(config)
        self.model = Wav2Vec2(config.build())
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Encode audio.

        Args:
            input_values: (B, S) float32 at 16 kHz, as decoded: normalised here, if the model wants that.
            attention_mask: (B, S) ones for samples, then zeros for padding.

        Returns:
            ``last_hidden_state`` (B, T, D), zero after an utterance's end, and on demand ``hidden_states``: the input
            of the first block, and what each block makes of it, the last one being ``last_hidden_state``.
        """
        lengths = self.frame_lengths(input_values, attention_mask)
        if self.model.config.normalize_audio:
            rows = [normalize_waveform(row[:n]) for row, n in zip(input_values, lengths, strict=True)]
            input_values = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        states: list[Tensor] | None = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            states, _frames = self.model.hidden_states(input_values, lengths)
            last = states[-1]
        else:
            last, _frames = self.model.encode(input_values, lengths)
        out = BaseModelOutput(last_hidden_state=last, hidden_states=None if states is None else tuple(states))
        return out if self._wants_dict(return_dict) else out.to_tuple()

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)


class W2V2ForCTC(W2V2PreTrainedModel):
    """The encoder with a linear layer over the vocabulary."""

    def __init__(self, config: W2V2Config) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("a CTC model needs config.vocab_size: expected the number of labels, got None")
        self.w2v2 = W2V2Model(config)
        self.lm_head = CTCHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits, and the loss if there are labels.

        Args:
            input_values, attention_mask, output_hidden_states: as for ``W2V2Model``.
            labels: (B, U) ids, -100 where there is none.

        Returns:
            ``logits`` (B, T, labels); after an utterance's end they say blank. ``loss`` is CTC's, reduced as
            ``config.ctc_loss_reduction`` says; ``hidden_states`` as of ``W2V2Model``.
        """
        out = self.w2v2(input_values, attention_mask, output_hidden_states, return_dict=True)
        lengths = self.frame_lengths(input_values, attention_mask)
        frames = torch.tensor(self.w2v2.model.config.frames(lengths), device=out.last_hidden_state.device)
        logits = self.lm_head(out.last_hidden_state)
        after = torch.arange(logits.shape[1], device=logits.device) >= frames[:, None]
        silence = torch.full_like(logits[0, 0], _IMPOSSIBLE)
        silence[self.config.pad_token_id or 0] = 0.0
        logits = torch.where(after[..., None], silence, logits)
        loss = None if labels is None else self._loss(logits, frames, labels)
        made = CausalLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return made if self.w2v2._wants_dict(return_dict) else made.to_tuple()

    def _loss(self, logits: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        real = labels != _IGNORED
        return F.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            labels[real],
            frames,
            real.sum(1),
            blank=self.config.pad_token_id or 0,
            reduction=self.config.ctc_loss_reduction,
            zero_infinity=self.config.ctc_zero_infinity,
        )


AutoConfig.register(MODEL_TYPE, W2V2Config, exist_ok=True)
AutoModel.register(W2V2Config, W2V2Model, exist_ok=True)
AutoModelForCTC.register(W2V2Config, W2V2ForCTC, exist_ok=True)


def wrap(loaded: Recognizer | Wav2Vec2) -> W2V2Model | W2V2ForCTC:
    """A model of ours as one of transformers; of a pretraining model the encoder."""
    if not isinstance(loaded, Recognizer):
        made = W2V2Model(W2V2Config(to_dict(loaded.config)))
        _copy_encoder(loaded, made)
        return made
    vocabulary = loaded.vocabulary
    config = W2V2Config(to_dict(loaded.model.config), vocab_size=len(vocabulary.labels), pad_token_id=vocabulary.blank)
    ctc = W2V2ForCTC(config)
    _copy_encoder(loaded.model, ctc.w2v2)
    ctc.lm_head.load_state_dict(loaded.model.lm_head.state_dict())
    ctc.eval()
    return ctc


def _copy_encoder(ours: Wav2Vec2, wrapper: W2V2Model) -> None:
    state = ours.state_dict()
    wrapper.model.load_state_dict({name: state[name] for name in wrapper.model.state_dict()})
    wrapper.eval()


def export_transformers(source: Path, folder: Path) -> None:
    """Write a run as ``AutoModel`` reads it, with what processors and tokenizers read.

    Of a pretraining run the encoder; quantizer and projections are left out.

    Raises:
        UsageError: no such run.
        JobError: what was written does not give the original's numbers.
    """
    loaded = w2v2.load(source)
    model = wrap(loaded)
    more: dict[str, str] = {}
    with _no_bars():
        model.save_pretrained(folder)
        if isinstance(loaded, Recognizer):
            if type(loaded.vocabulary) is Vocabulary and not tokenizer_misfits(loaded.vocabulary):
                write_tokenizer(loaded.vocabulary, folder)
                more["processor_class"] = "Wav2Vec2Processor"
            else:
                loaded.vocabulary.save(folder / VOCABULARY)
        write_preprocessor(folder, return_attention_mask=True, **more)
        again = type(model).from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, again.state_dict()[name]):
            raise JobError(f"{name} is not what was written; nothing is kept")

    def run(audio: Tensor) -> Tensor:
        if isinstance(again, W2V2Model):
            return Tensor(again(audio).last_hidden_state)
        return again(audio).logits.float().log_softmax(-1)  # type: ignore[no-any-return]

    ours = loaded.model if isinstance(loaded, Recognizer) else loaded
    checks = compare(eager(ours), run, check_lengths(ours.config))
    checks.append(_check_padding(again))
    write_check(folder, source, "transformers", checks, ("transformers",))


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Their progress bars, for what takes no time, would be in the way of ours."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _check_padding(model: W2V2Model | W2V2ForCTC) -> dict[str, Any]:
    """A short utterance beside a long one, padded with noise, against the same alone."""
    audio = check_audio(2, 16_000)
    mask = torch.ones(2, 16_000, dtype=torch.long)
    mask[1, 9_000:] = 0
    with torch.no_grad():
        together, alone = model(audio, mask)[0][1], model(audio[1:, :9_000])[0][0]
    difference = (together[: len(alone)] - alone).abs().max().item()
    if not difference <= 1e-4:
        raise JobError(f"an utterance differs by {difference:.2g} in a padded batch; nothing is written")
    return {"batch": 2, "samples": [16_000, 9_000], "difference": difference}
