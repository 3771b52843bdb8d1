"""The encoder as features: hidden states of any layer, code indices, pooled vectors. Needs no Lightning.

From Python::

    model = w2v2.load("runs/pretrained")
    [features] = extract(model, [read_audio("song.mp3")], layers=(0, -1))
    features["layer_0"], features["times"]
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from w2v2.data.audio import SAMPLE_RATE, AudioError, AudioFile, Mixer, resample
from w2v2.data.names import utterance_id
from w2v2.data.sources import folder_rows
from w2v2.errors import UsageError, public
from w2v2.files import whole
from w2v2.inference.onnx import VECTORS, OnnxModel
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2

if TYPE_CHECKING:
    from w2v2.data.batch import Batch
    from w2v2.data.config import DataConfig

Features = dict[str, Tensor]
"""Of one utterance, on the host: ``layer_I`` (T, D) float32, ``codes`` (T, G) int64, ``times`` (T,) float64, seconds of
each frame's middle (``Wav2Vec2Config.frame_seconds``); pooled, ``layer_I`` (D,) alone."""


INDEX = "index.jsonl"
"""Of a folder of features: a line of JSON for each utterance."""


FORMATS = {"safetensors": ".safetensors", "numpy": ".npz"}


@torch.no_grad()
def extract(
    model: Wav2Vec2 | OnnxModel,
    audio: Sequence[Tensor],
    layers: Sequence[int] = (-1,),
    *,
    codes: bool = False,
    pool: bool = False,
) -> list[Features]:
    """Features of waveforms, together in one batch; the same as of each alone.

    Args:
        model: put into evaluation mode. An exported encoder gives its last layer.
        audio: (S,) float32 each, 16 kHz, as decoded: normalised here, if the model wants that.
        layers: which hidden states; 0 is the input of the first block, I the output of block I, -1 the last.
        codes: whether to give the quantizer's choices too; only a pretraining model has any.
        pool: give the mean over time of each layer.

    Raises:
        UsageError: no such layer, a model without codes, codes that would have to be pooled.
        ValueError: audio shorter than a frame.
    """
    places = check_wanted(model, layers, codes=codes, pool=pool)
    model.eval()
    rows = [model.config.normalized(row) for row in audio]
    lengths = [len(row) for row in rows]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    outputs: list[Features] = [{} for _ in rows]
    if places:
        if isinstance(model, OnnxModel):
            vectors, frames = model(batch, lengths, output=VECTORS)
            states = dict.fromkeys(places, vectors)
        else:
            hidden, frames = model.hidden_states(batch, lengths)
            states = dict(enumerate(hidden))
        for i, place in itertools.product(range(len(rows)), places):
            state = states[place][i, : frames[i]]
            outputs[i][f"layer_{place}"] = (state.mean(0) if pool else state).cpu().contiguous()
    if codes:
        assert isinstance(model, Wav2Vec2ForPretraining)
        chosen, frames = model.codes(batch, lengths)
        for features, row, count in zip(outputs, chosen, frames, strict=True):
            features["codes"] = row[:count].cpu().contiguous()
    if not pool:
        for features, count in zip(outputs, frames, strict=True):
            seconds = [model.config.frame_seconds(t) for t in range(count)]
            features["times"] = torch.tensor(seconds, dtype=torch.float64)
    return outputs


def check_wanted(model: Wav2Vec2 | OnnxModel, layers: Sequence[int], *, codes: bool, pool: bool) -> list[int]:
    """Layers counted from 0; refuses what the model does not have."""
    depth = model.config.n_layer
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise UsageError(f"no layer {layer}: expected 0 to {depth}, or -{depth + 1} to -1 from the end")
    if isinstance(model, OnnxModel):
        if VECTORS not in model.outputs:
            raise UsageError("the export of a CTC model gives labels and no features; extract from what it was made of")
        if codes or {layer % (depth + 1) for layer in layers} != {depth}:
            raise UsageError("an exported encoder gives its last layer alone; leave `layers` and `codes` out")
    if codes and not isinstance(model, Wav2Vec2ForPretraining):
        raise UsageError("the model has no quantizer, and so no codes; name a run of 'w2v2 pretrain'")
    if codes and pool:
        raise UsageError("codes are names, which have no mean; take codes and pooled vectors in two calls")
    if not layers and not codes:
        raise UsageError("nothing to extract: name layers, or ask for codes")
    return [layer % (depth + 1) for layer in layers]


def read_audio(path: str | Path, max_seconds: float | None = None, channel: int | None = None) -> Tensor:
    """A whole file as (S,) float32 at 16 kHz: one channel, counted from 1, or the mean over all.

    Raises:
        AudioError: it cannot be decoded, lacks its end or that channel, holds samples that are not finite, has channels
            that cancel each other out in the mean, or is longer than ``max_seconds``, of which no more is read.
        OSError: it cannot be read at all.
    """
    with AudioFile(str(path)) as file:
        limit = None if max_seconds is None else int(max_seconds * file.rate)
        mix = Mixer(channel)
        samples = mix(file.read(-1 if limit is None else limit + 1))
        if limit is not None and len(samples) > limit:
            raise AudioError(f"longer than {max_seconds:g} s; {_CUT_IT}")
        if not np.isfinite(samples).all():
            raise AudioError(_NOT_FINITE)
        if mix.cancels:
            raise AudioError("its channels cancel each other out; choose one with `channel`")
        file.check_end()
        return torch.from_numpy(resample(samples, file.rate))


_NOT_FINITE = "samples that are not finite"


_CUT_IT = "cut it with 'w2v2 prepare', or raise `max_seconds`"


@dataclass(frozen=True)
class Item:
    """An utterance, with audio once it has been read, or what is wrong with it."""

    id: str
    source: str
    """File, or corpus."""
    audio: Tensor | None = None
    fault: str = ""


def find_files(paths: Iterable[str]) -> list[Item]:
    """Files, and all audio of folders; ids are made as ``prepare`` makes them."""
    items = []
    for path in paths:
        if not os.path.isdir(path):
            items.append(Item(Path(public(path)).stem, path))
            continue
        try:
            inside = [Item(utterance_id(row.path), os.path.join(path, row.path)) for row in folder_rows(Path(path))]
            items += inside or [Item(path, path, fault="no audio in it: expected files such as .flac, .wav, .mp3")]
        except (UsageError, OSError) as error:
            items.append(Item(path, path, fault=str(error)))
    return items


def read_files(items: Iterable[Item], max_seconds: float, channel: int | None = None) -> Iterator[Item]:
    """The same with audio, of a channel or the mean over all, or what is wrong with it."""
    for item in items:
        try:
            yield item if item.fault else replace(item, audio=read_audio(item.source, max_seconds, channel))
        except (AudioError, OSError, UsageError) as error:
            yield replace(item, fault=str(error))


def read_split(corpus: str, name: str, data: DataConfig, max_seconds: float) -> tuple[Iterator[Item], int]:
    """Utterances of a split of a corpus, and how many."""
    from w2v2.data.corpora import choose_split, read_corpus  # late: files alone need no lhotse
    from w2v2.data.loader import whole_utterances

    data.check()
    split = choose_split(read_corpus(corpus, training=False), name, corpus)
    return _items(whole_utterances(name, split, data), corpus, max_seconds), len(split)


def _items(batches: Iterable[Batch], source: str, max_seconds: float) -> Iterator[Item]:
    for batch in batches:
        for name, audio, count in zip(batch.ids, batch.audio, batch.lengths.tolist(), strict=True):
            audio = audio[:count]
            fault = f"longer than {max_seconds:g} s; {_CUT_IT}" if count > max_seconds * SAMPLE_RATE else ""
            yield Item(name, source, audio.clone(), fault if audio.isfinite().all() else _NOT_FINITE)
        yield from (Item(name, source, fault=why) for name, why in batch.bad.items())


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to extract, and how it is written."""

    layers: tuple[int, ...] = (-1,)
    codes: bool = False
    pool: bool = False
    format: str = "safetensors"
    """One of ``FORMATS``."""


def extract_files(
    model: Wav2Vec2 | OnnxModel, items: Iterable[Item], out: Path, wanted: Wanted, batch_seconds: float = 60.0
) -> Iterator[dict[str, Any]]:
    """Write a file of features for each item into a folder, some items at a time, and ``INDEX`` of them.

    Yields:
        A row of the index for each: ``id``, ``source``, ``file``, ``seconds`` and ``frames``, or ``error`` in place of
        these three.
    """
    check_wanted(model, wanted.layers, codes=wanted.codes, pool=wanted.pool)
    out.mkdir(parents=True, exist_ok=True)
    with (out / INDEX).open("w", encoding="utf-8", errors="backslashreplace") as index:  # half a character as in JSON
        for row in _rows(model, items, out, wanted, batch_seconds):
            index.write(public(json.dumps(row, ensure_ascii=False)) + "\n")
            yield row


def _rows(
    model: Wav2Vec2 | OnnxModel, items: Iterable[Item], out: Path, wanted: Wanted, batch_seconds: float
) -> Iterator[dict[str, Any]]:
    taken: set[str] = set()
    waiting: list[Item] = []
    for item in items:
        fault = item.fault or _fault(model, item, taken)
        if fault:
            yield {"id": item.id, "source": item.source, "error": fault}
            continue
        taken.add(_stem(item))
        if waiting and _seconds([*waiting, item]) > batch_seconds:
            yield from _write(model, waiting, out, wanted)
            waiting = []
        waiting.append(item)
    if waiting:
        yield from _write(model, waiting, out, wanted)


def _fault(model: Wav2Vec2 | OnnxModel, item: Item, taken: set[str]) -> str:
    assert item.audio is not None
    if not model.config.frames([len(item.audio)])[0]:
        return f"{len(item.audio)} samples at 16 kHz are less than a frame needs"
    return f"another one goes to {_stem(item)} too; extract them into different folders" if _stem(item) in taken else ""


def _stem(item: Item) -> str:
    """Of its file, in one folder with all others."""
    return item.id.replace("/", "_")


def _seconds(items: Sequence[Item]) -> float:
    return sum(len(item.audio) for item in items if item.audio is not None) / SAMPLE_RATE


def _write(model: Wav2Vec2 | OnnxModel, items: Sequence[Item], out: Path, wanted: Wanted) -> Iterator[dict[str, Any]]:
    audio = [item.audio for item in items if item.audio is not None]
    outputs = extract(model, audio, wanted.layers, codes=wanted.codes, pool=wanted.pool)
    frames = model.config.frames([len(row) for row in audio])
    for item, row, features, count in zip(items, audio, outputs, frames, strict=True):
        file = _stem(item) + FORMATS[wanted.format]
        about: dict[str, Any] = {"file": file, "seconds": len(row) / SAMPLE_RATE, "frames": count}
        try:
            with whole(out / file) as partial:
                if wanted.format == "numpy":
                    np.savez(partial, **{name: value.numpy() for name, value in features.items()})  # type: ignore[arg-type]
                else:
                    save_file(features, partial, metadata={"id": item.id, "source": public(item.source)})
        except (OSError, SafetensorError, UnicodeEncodeError) as error:
            about = {"error": f"cannot write {file}: {getattr(error, 'strerror', None) or error}"}
        yield {"id": item.id, "source": item.source, **about}
