"""Weights of a beam search, tuned on a development split whose log-probabilities are computed once and kept on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jiwer
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.quasirandom import SobolEngine

from w2v2.data.config import DataConfig
from w2v2.data.corpora import Split
from w2v2.data.loader import whole_utterances
from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import TunableDecoder
from w2v2.decoding.greedy import Decoder
from w2v2.errors import Show, UsageError, quiet
from w2v2.files import whole, write_json
from w2v2.inference.recognizer import Recognizer
from w2v2.serial import read_json

WEIGHTS = {"lm_weight": (0.0, 5.0), "word_score": (-5.0, 5.0), "blank_score": (-4.0, 0.0)}
"""Where weights are looked for (the first two: paper, appendix B)."""
_ROUND, _FILE_MB = 8, 64


@dataclass(frozen=True)
class Trial:
    """Error rates with some weights."""

    beam: BeamConfig
    wer: float
    """Word errors / reference words."""
    cer: float


@dataclass(frozen=True)
class Tuning:
    """What a search found."""

    best: BeamConfig
    """With the weights of the fewest word errors; of the fewest character errors among those."""
    trials: tuple[Trial, ...]
    """In the order in which they were made, that of the configuration to start from first."""

    def table(self) -> list[str]:
        """Lines to read, best first."""
        rows = sorted(self.trials, key=_errors)
        head = " ".join(f"{name.replace('_', ' '):>11}" for name in WEIGHTS) + f" {'WER %':>7} {'CER %':>7}"
        weights = (" ".join(f"{getattr(t.beam, name):11.3f}" for name in WEIGHTS) for t in rows)
        return [head, *(f"{w} {100 * t.wer:7.2f} {100 * t.cer:7.2f}" for w, t in zip(weights, rows, strict=True))]


def tune(
    make: Callable[[BeamConfig], Decoder],
    emissions: Iterable[tuple[str, Tensor]],
    references: Mapping[str, str],
    *,
    start: BeamConfig | None = None,
    trials: int = 64,
    seed: int = 0,
    progress: Show = quiet,
) -> Tuning:
    """Search for the weights of LM, words and blanks of the fewest word errors.

    The first trial is the configuration to start from; the others are a scrambled Sobol sequence, up to half of it over
    the whole of ``WEIGHTS`` (the paper searches its two with 128 trials of Bayesian optimisation), the rest over boxes
    around the best so far, which are half as wide after every eight.

    Args:
        make: a decoder with other weights; ``tuned`` of what ``make_decoder`` made.
        emissions: (utterance, (T, labels) log-probabilities), gone through once in each trial; such as a cache.
        references: text of each utterance, as the vocabulary spells it; those without one are passed over.
        trials: at least 1.

    Raises:
        UsageError: no words in the references.
    """
    start = start or BeamConfig()
    if trials < 1:
        raise UsageError(f"`trials` must be 1 or more, got {trials}")
    tried: list[Trial] = []
    for beam in _proposals(start, trials, seed, tried):
        tried.append(_trial(make, beam, emissions, references))
        progress("tune", len(tried) / trials)
    return Tuning(min(tried, key=_errors).beam, tuple(tried))


def _errors(trial: Trial) -> tuple[float, float]:
    return trial.wer, trial.cer


def _proposals(start: BeamConfig, trials: int, seed: int, tried: list[Trial]) -> Iterator[BeamConfig]:
    """Weights to try, given those that were tried."""
    yield start
    points = SobolEngine(len(WEIGHTS), scramble=True, seed=seed).draw(trials - 1).tolist() if trials > 1 else []
    whole = max(len(points) // 2, min(len(points), _ROUND))
    for turn, point in enumerate(points):
        best, share = min(tried, key=_errors).beam, 0.5 ** (1 + (turn - whole) // _ROUND) if turn >= whole else None
        weights: dict[str, Any] = {}
        for x, (name, limits) in zip(point, WEIGHTS.items(), strict=True):
            weights[name] = _within(x, limits, getattr(best, name), share)
        yield replace(start, **weights)


def _within(x: float, limits: tuple[float, float], center: float, share: float | None) -> float:
    """A point, given in [0, 1], of an interval, or of a ``share`` of it around its center, cut at its limits."""
    half = (limits[1] - limits[0]) / 2 * (share or 0.0)
    low, high = limits if share is None else (max(limits[0], center - half), min(limits[1], center + half))
    return low + x * (high - low)


def _trial(
    make: Callable[[BeamConfig], Decoder],
    config: BeamConfig,
    emissions: Iterable[tuple[str, Tensor]],
    references: Mapping[str, str],
) -> Trial:
    decode = make(config)
    spoken, texts = [], []
    for name, log_probs in emissions:
        if name not in references:  # a cache may have more, of when there were more
            continue
        spoken.append(references[name])
        texts.append(decode(log_probs).text)
    if not any(spoken):
        raise UsageError("no word in the transcripts to tune with; tune on a split that is transcribed")
    return Trial(config, jiwer.wer(spoken, texts), jiwer.cer(spoken, texts))


def tune_on(
    recognizer: Recognizer,
    decoder: TunableDecoder,
    split: Split,
    data: DataConfig,
    folder: Path,
    key: str,
    *,
    trials: int = 64,
    show: Show = quiet,
) -> Tuning:
    """``tune`` on a split, whose log-probabilities are computed where a folder does not keep them yet.

    Args:
        data: how the split is read.
        folder: of the model, if it has one; they are kept in ``emissions`` below it.
        key: of the model (``weights_key``).
    """
    cache = EmissionCache(folder / "emissions" / f"{split.audio}-{key[:16]}", key, len(recognizer.vocabulary.labels))
    spoken = ((u.id, u.text) for u in split.utterances())
    references = {name: recognizer.vocabulary.normalize(text) for name, text in spoken if text is not None}
    lacking = {name for name in references if name not in cache}

    def missing() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for batch in whole_utterances("tune", split, data):
            wanted = [i for i, name in enumerate(batch.ids) if name in lacking]
            lengths = batch.lengths.tolist()
            rows = recognizer.emissions([batch.audio[i, : lengths[i]] for i in wanted])
            yield from zip((batch.ids[i] for i in wanted), rows, strict=True)
            done += len(wanted)
            show("emissions", done / len(lacking))

    if lacking:
        cache.fill(missing())
    return tune(decoder.tuned, cache, references, start=decoder.config, trials=trials, progress=show)


class EmissionCache:
    """Log-probabilities of utterances in a folder of safetensors files, filled bit by bit.

    Iterates over (utterance, (T, labels) float32), one file in memory at a time. What was written stays when the work
    is interrupted: compute only what is not ``in`` it yet, and ``fill`` it with that.
    """

    def __init__(self, folder: Path, key: str, labels: int) -> None:
        """Open or create.

        Args:
            labels: of the model.
            key: of what the log-probabilities come from, such as ``weights_key``.

        Raises:
            UsageError: the folder has those of another model, or something else.
        """
        self.folder, self.labels = folder, labels
        about = folder / "cache.json"
        if not about.exists() and folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty and no cache of log-probabilities; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if about.exists() and read_json(about) != {"key": key}:
            raise UsageError(
                f"{folder} has the log-probabilities of another model; remove it, or choose another folder"
            )
        write_json(about, {"key": key})
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for path in dict.fromkeys(self._files.values()):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    log_probs = file.get_tensor(name)
                    if log_probs.dtype != torch.float32 or log_probs.shape[1:] != (self.labels,):
                        raise UsageError(
                            f"{path}: {name} must be (frames, {self.labels} labels) float32, got "
                            f"{tuple(log_probs.shape)} {log_probs.dtype}; remove the folder"
                        )
                    yield name, log_probs

    def fill(self, emissions: Iterable[tuple[str, Tensor]]) -> None:
        """Add utterances; in files of about 64 MB, each written whole or not at all."""
        waiting: dict[str, Tensor] = {}
        size = 0
        try:
            for name, log_probs in emissions:
                waiting[name] = log_probs.float().contiguous()
                size += log_probs.numel() * 4
                if size > _FILE_MB * 1e6:
                    self._write(waiting)
                    waiting, size = {}, 0
        finally:  # what was computed before an interruption is kept
            if waiting:
                self._write(waiting)

    def _write(self, tensors: dict[str, Tensor]) -> None:
        path = self.folder / f"{len(set(self._files.values())):05d}.safetensors"
        with whole(path) as partial:
            save_file(tensors, partial)
        self._files |= dict.fromkeys(tensors, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UsageError(f"{path} is not a regular file; remove it")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged: {error}; remove it") from error
