"""A model that ``w2v2 export`` wrote, in onnxruntime on the CPU: used like the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2v2.checkpoint.extractor import PREPROCESSOR
from w2v2.checkpoint.native import CONFIG, VOCABULARY
from w2v2.errors import UsageError
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2Config
from w2v2.serial import from_dict, read_json
from w2v2.text.vocabulary import Vocabulary, load_vocabulary

AUDIO, LOG_PROBS, VECTORS = "audio", "log_probs", "vectors"
"""Names of the graph's input and of its outputs; a CTC model has the second one too."""

Runs = Callable[[Tensor], Tensor]
"""(B, S) float32 audio at 16 kHz -> (B, T, labels) log-probabilities, or (B, T, D) contextual vectors."""


def open_session(path: Path) -> Any:
    """Return a graph in onnxruntime, on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OnnxModel(nn.Module):
    """A graph in the place of a model in PyTorch. Rows go through one by one: in 8 bits a batch has common scales."""

    def __init__(self, path: Path, config: Wav2Vec2Config) -> None:
        super().__init__()
        # The graph normalises by itself.
        self.config = replace(config, normalize_audio=False)
        self.device = torch.device("cpu")
        self.session = open_session(path)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, audio: Tensor, output: str) -> Tensor:
        """(B, S) audio without padding -> one of the outputs, (B, T, ...)."""
        return torch.from_numpy(self.session.run([output], {AUDIO: audio.numpy()})[0])

    def forward(
        self, audio: Tensor, lengths: Sequence[int] | None = None, output: str = LOG_PROBS
    ) -> tuple[Tensor, list[int]]:
        """As ``Wav2Vec2ForCTC.forward``, or, of ``VECTORS``, as ``Wav2Vec2.encode``."""
        samples = [audio.shape[1]] * len(audio) if lengths is None else list(lengths)
        rows = [self.run(audio[i : i + 1, :n].contiguous(), output)[0] for i, n in enumerate(samples)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), self.config.frames(samples)


def load_onnx(path: Path) -> tuple[OnnxModel, Vocabulary | None]:
    """Load a graph, with the vocabulary of a CTC model from the files that were written beside it.

    Raises:
        UsageError: no onnxruntime, files missing or damaged, or files beside it that are of another model.
    """
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{path} needs onnxruntime: pip install onnxruntime") from error
    folder = path.parent
    for name in (CONFIG, PREPROCESSOR):
        if not (folder / name).is_file():
            raise UsageError(f"no {folder / name}: expected what 'w2v2 export' wrote beside {path.name}; copy it too")
    config = from_dict(read_json(folder / CONFIG), Wav2Vec2Config)
    rate = read_json(folder / PREPROCESSOR).get("sampling_rate")
    if rate != SAMPLE_RATE:
        raise UsageError(f"{folder / PREPROCESSOR} wants audio at {rate} Hz; models here hear {SAMPLE_RATE} Hz")
    try:
        model = OnnxModel(path, config)
    except Exception as error:  # onnxruntime has an exception for each of its codes, with no class in common
        raise UsageError(f"{path} is damaged or no ONNX model: {str(error).splitlines()[0]}") from error
    inputs = [entry.name for entry in model.session.get_inputs()]
    if inputs != [AUDIO] or not {*model.outputs} & {LOG_PROBS, VECTORS}:
        raise UsageError(
            f"{path} takes {', '.join(inputs)} and gives {', '.join(model.outputs)}; expected an export of "
            f"'w2v2 export', which takes {AUDIO} and gives {LOG_PROBS} or {VECTORS}"
        )
    vocabulary = load_vocabulary(folder / VOCABULARY) if LOG_PROBS in model.outputs else None
    output, width = (VECTORS, config.n_embd) if vocabulary is None else (LOG_PROBS, len(vocabulary.labels))
    expected = (1, config.frames([SAMPLE_RATE])[0], width)
    if (shape := tuple(model.run(torch.zeros(1, SAMPLE_RATE), output).shape)) != expected:
        beside = CONFIG if shape[1] != expected[1] or vocabulary is None else VOCABULARY
        raise UsageError(
            f"{path} gives {shape[1]} frames of {shape[2]} for a second, by the {beside} beside it "
            f"{expected[1]} of {width}; expected the files of one export"
        )
    return model, vocabulary
