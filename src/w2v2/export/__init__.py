"""A run as a graph that runs without this package: ONNX, in float32 and int8, and ``torch.export``.

The graph takes audio of any length, in batches whose rows have one length: the encoder here packs rows of unequal
lengths, row by row, and a loop over rows is no graph. Padding instead would change the norms' statistics and with them
the numbers. So utterances of unequal lengths are run one by one, which on a CPU costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from w2v2.checkpoint.card import CHECK
from w2v2.checkpoint.contents import Checkpoint
from w2v2.checkpoint.extractor import write_extractor
from w2v2.checkpoint.formats import GRAPH, INT8_GRAPH, file_hashes
from w2v2.checkpoint.native import CONFIG, VOCABULARY
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Splits
from w2v2.data.loader import whole_utterances
from w2v2.decoding.greedy import Greedy
from w2v2.errors import JobError, Show, UsageError, first_line, quiet
from w2v2.evaluation.evaluate import error_rates
from w2v2.export.int8 import quantize
from w2v2.files import write_json
from w2v2.inference.onnx import AUDIO, LOG_PROBS, VECTORS, Runs, open_session
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.packing import plain_path
from w2v2.model.wav2vec2 import SAMPLE_RATE, Wav2Vec2, Wav2Vec2Config
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary

TORCH = "model.pt2"
LIMIT = 1e-4
"""Largest difference to the model in PyTorch, where values are at most 1; relative to the largest value elsewhere."""
BATCHES = (1, 3)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Checks = list[dict[str, Any]]
"""Batch, samples, and the largest difference at that size."""


class Graph(nn.Module):
    """The part of a model that is exported: audio whose rows have one length, to what ``Runs`` says."""

    def __init__(self, model: Wav2Vec2) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio: Tensor) -> Tensor:
        """As ``Wav2Vec2.encode`` and ``Wav2Vec2ForCTC.forward``, which count frames in Python, where a graph cannot."""
        model = self.model
        _, x = model.feature_projection(model.feature_encoder(model.config.normalized(audio)))
        x = model.contextualize(x)
        return model.lm_head(x).float().log_softmax(-1) if isinstance(model, Wav2Vec2ForCTC) else x


def eager(model: Wav2Vec2) -> Runs:
    """Return what an export must agree with: the model itself, given audio as training gives it."""
    encode = model if isinstance(model, Wav2Vec2ForCTC) else model.encode
    return lambda audio: encode(model.config.normalized(audio))[0]


def export_onnx(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    int8: bool = False,
    speech: tuple[Splits, str] | None = None,
    show: Show = quiet,
) -> None:
    """Write ``model.onnx`` and, on demand, ``model.int8.onnx`` of a run, with what belongs to them.

    Args:
        checkpoint: whose graph it is.
        folder: exists.
        int8: also with linear layers and convolutions in 8 bits (``quantize``).
        speech: corpus and split to state word and character error rates on, of a CTC model.
        show: told how far that is.

    Raises:
        UsageError: onnxruntime is not installed.
        JobError: the model cannot be exported, or the export differs from it.
    """
    model, vocabulary = checkpoint.build(), checkpoint.vocabulary
    if speech is not None and vocabulary is None:
        raise UsageError(f"error rates need a CTC model; {checkpoint.source} is a pretraining run")
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"an ONNX export needs {', '.join(missing)}: pip install onnx onnxscript onnxruntime")
    with _exporting(), plain_path():
        program = torch.onnx.export(
            Graph(model),
            (check_audio(2, SAMPLE_RATE),),
            dynamo=True,
            input_names=[AUDIO],
            output_names=[VECTORS if vocabulary is None else LOG_PROBS],
            dynamic_shapes={"audio": {0: "batch", 1: "samples"}},
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph:
            node.metadata_props.clear()  # where in whose files each operation comes from
        program.save(folder / GRAPH)  # past 2 GB, ONNX's limit, with the weights in a file beside it
    runs = {"pytorch": eager(model), GRAPH: onnx_session(folder / GRAPH)}
    checks = compare(runs["pytorch"], runs[GRAPH], check_lengths(model.config))
    more: dict[str, Any] = {}
    if int8:
        with _exporting():
            quantize(folder / GRAPH, folder / INT8_GRAPH, model.config.n_head)
        runs[INT8_GRAPH] = onnx_session(folder / INT8_GRAPH)
        more["int8"] = distance(runs[GRAPH], runs[INT8_GRAPH], labels=vocabulary is not None)
    if speech is not None and vocabulary is not None:
        graphs = {name: run for name, run in runs.items() if name != "pytorch"}
        more["error_rates"] = _error_rates(graphs, vocabulary, *speech, check_lengths(model.config)[0], show)
    more["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx*"))}
    _finish(folder, checkpoint, "onnx", checks, _ONNX_PACKAGES, **more, speed=speed(runs))


def export_torch(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``model.pt2``, which ``torch.export.load`` reads, and what belongs to it. Raises as ``export_onnx``."""
    model = checkpoint.build()
    shape = {"audio": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    with _exporting(), plain_path(), torch.no_grad():
        program = torch.export.export(Graph(model), (check_audio(2, SAMPLE_RATE),), dynamic_shapes=shape)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, folder / TORCH)
        runs: dict[str, Runs] = {"pytorch": eager(model), TORCH: torch.export.load(folder / TORCH).module()}
    # Fewer than two frames are another program: sizes of 0 and 1 are special to torch.export.
    checks = compare(runs["pytorch"], runs[TORCH], check_lengths(model.config, fewest_frames=2))
    sizes = {TORCH: (folder / TORCH).stat().st_size}
    _finish(folder, checkpoint, "torch.export", checks, (), bytes=sizes, speed=speed(runs))


def onnx_session(path: Path) -> Runs:
    """Return a graph in onnxruntime as a function."""
    session = open_session(path)
    return lambda audio: torch.from_numpy(session.run(None, {AUDIO: audio.numpy()})[0])


def distance(one: Runs, other: Runs, *, labels: bool) -> dict[str, float]:
    """Root mean square of a difference over that of the values, on ten seconds of noise; of labels, how many agree."""
    audio = check_audio(1, 10 * SAMPLE_RATE)
    want, got = one(audio), other(audio)
    figures = {"relative_difference": ((want - got).norm() / want.norm()).item()}
    if labels:
        figures["same_label"] = (want.argmax(-1) == got.argmax(-1)).float().mean().item()
    return figures


def speed(runs: Mapping[str, Runs], *, seconds: float = 10.0, rounds: int = 3) -> dict[str, Any]:
    """Return median times for audio in one piece, the models in turn, and medians of their ratios to the first."""
    audio = check_audio(1, round(seconds * SAMPLE_RATE))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            with torch.no_grad():
                run(audio)
            if i:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    ratios = {name: map(truediv, first, values) for name, values in times.items()}
    return {
        "seconds_of_audio": seconds,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times_faster": {name: statistics.median(values) for name, values in ratios.items()},
    }


def _error_rates(
    runs: Mapping[str, Runs], vocabulary: Vocabulary, splits: Splits, name: str, least: int, show: Show
) -> dict[str, Any]:
    """WER and CER of each graph on a split, greedily decoded, utterance by utterance; of too short ones, no text."""
    split, decode = splits[name], Greedy(vocabulary)
    references: list[str] = []
    unreadable: dict[str, str] = {}
    hypotheses: dict[str, list[str]] = {run: [] for run in runs}
    for batch in whole_utterances(name, split, DataConfig(batch_seconds=60.0, num_workers=0)):
        for text, row, samples in zip(batch.texts, batch.audio, batch.lengths.tolist(), strict=True):
            if text is None:
                continue  # as in evaluation
            references.append(vocabulary.normalize(text))
            for graph, run in runs.items():
                hypothesis = decode(run(row[None, :samples])[0]).text if samples >= least else ""
                hypotheses[graph].append(vocabulary.normalize(hypothesis))
        unreadable |= batch.bad
        show("error rates", len(references) / len(split))
    if not any(references):
        raise UsageError(f"no utterance of {name} has words to compare with; name another `split`, or leave `data` out")
    rates = {graph: asdict(error_rates(references, texts)) for graph, texts in hypotheses.items()}
    return {"split": name, "utterances": len(references), "unreadable": unreadable, **rates}


def _finish(
    folder: Path, checkpoint: Checkpoint, name: str, checks: Checks, packages: Sequence[str], **more: Any
) -> None:
    """Write what belongs to a graph, and ``export.json``: what was compared, of which weights, with which versions."""
    save_config(checkpoint.config, folder / CONFIG)
    # What a model wants normalised an export normalises itself, exactly as in training.
    write_extractor(folder, normalize=False, attention_mask=False)
    if checkpoint.vocabulary is not None:
        checkpoint.vocabulary.save(folder / VOCABULARY)
    check = {
        "schema": 1,
        "format": name,
        "source": file_hashes(checkpoint.source),
        "limit": LIMIT,
        "largest_difference": max(check["difference"] for check in checks),
        "checks": checks,
        **more,
        "packages": {name: metadata.version(name) for name in ("w2v2", "torch", *packages)},
    }
    write_json(folder / CHECK, check)


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Silence exporters, who talk about themselves at length; a module of the user's own may do what no graph can."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except RuntimeError as error:
        raise JobError(f"this model cannot be exported: {first_line(error.__cause__ or error)}") from error
    finally:
        logging.disable(before)


def check_lengths(config: Wav2Vec2Config, fewest_frames: int = 1) -> tuple[int, ...]:
    """Return five numbers of samples: the least that give so many frames, and up to five seconds."""
    least = next(n for n in range(1, 8_000) if config.frames([n])[0] >= fewest_frames)
    return (least, 8_000, 16_001, 41_234, 80_000)


def check_audio(batch: int, samples: int) -> Tensor:
    """(B, S) the same noise for the same shape, each row at a loudness and an offset of its own."""
    noise = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))
    return noise * torch.logspace(-2, -0.5, batch)[:, None] + 0.01


def compare(expected: Runs, got: Runs, lengths: Sequence[int]) -> Checks:
    """Return the largest difference of two models on the same audio, at each length and batch size.

    Raises:
        JobError: another shape, or a difference above ``LIMIT``.
    """
    checks: Checks = []
    for samples in lengths:
        for batch in BATCHES:
            audio = check_audio(batch, samples)
            with torch.no_grad():
                want, output = expected(audio), got(audio)
            if want.shape != output.shape:
                got_shape, shape = tuple(output.shape), tuple(want.shape)
                raise JobError(f"the export gives {got_shape} for {batch} x {samples} samples, expected {shape}")
            difference = ((want - output).abs().max() / want.abs().max().clamp(min=1)).item()
            if not difference <= LIMIT:
                raise JobError(
                    f"the export differs from the model by {difference:.2g} at {batch} x {samples} samples, "
                    f"at most {LIMIT:g} is allowed; nothing is written"
                )
            checks.append({"batch": batch, "samples": samples, "difference": difference})
    return checks
