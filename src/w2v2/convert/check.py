"""Whether an export computes what the model does, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2v2.convert.conversion import file_hashes
from w2v2.errors import JobError
from w2v2.model.wav2vec2 import Wav2Vec2Config

CHECK = "export.json"
LIMIT = 1e-4
"""Largest difference to the model in PyTorch, where values are at most 1; relative to the largest value elsewhere."""
BATCHES = (1, 3)


def check_lengths(config: Wav2Vec2Config, fewest_frames: int = 1) -> tuple[int, ...]:
    """Five numbers of samples: the least that give so many frames, and up to five seconds."""
    least = next(n for n in range(1, 8_000) if config.frames([n])[0] >= fewest_frames)
    return (least, 8_000, 16_001, 41_234, 80_000)


def check_audio(batch: int, samples: int) -> Tensor:
    """(B, S) the same noise for the same shape, each row at a loudness and an offset of its own."""
    noise = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))
    return noise * torch.logspace(-2, -0.5, batch)[:, None] + 0.01


def compare(
    expected: Callable[[Tensor], Tensor], got: Callable[[Tensor], Tensor], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Largest difference of two models on the same audio, at each length and batch size.

    Raises:
        JobError: another shape, or a difference above ``LIMIT``.
    """
    checks: list[dict[str, Any]] = []
    for samples in lengths:
        for batch in BATCHES:
            audio = check_audio(batch, samples)
            with torch.no_grad():
                want, found = expected(audio), got(audio)
            shapes = tuple(want.shape), tuple(found.shape)
            if shapes[0] != shapes[1]:
                raise JobError(f"the export gives {shapes[1]} for {batch} x {samples} samples, expected {shapes[0]}")
            difference = ((want - found).abs().max() / want.abs().max().clamp(min=1)).item()
            if not difference <= LIMIT:
                raise JobError(
                    f"the export differs from the model by {difference:.2g} at {batch} x {samples} samples, "
                    f"at most {LIMIT:g} is allowed; nothing is written"
                )
            checks.append({"batch": batch, "samples": samples, "difference": difference})
    return checks


def write_check(
    folder: Path, source: Path, format_name: str, checks: Sequence[dict[str, Any]], packages: Sequence[str], **more: Any
) -> None:
    """Write ``export.json``: what was compared, of which weights, with which versions."""
    found = {
        "schema": 1,
        "format": format_name,
        "source": file_hashes(source),
        "limit": LIMIT,
        "largest_difference": max(check["difference"] for check in checks),
        "checks": list(checks),
        **more,
        "packages": {name: metadata.version(name) for name in ("w2v2", "torch", *packages)},
    }
    (folder / CHECK).write_text(json.dumps(found, indent=2) + "\n")


def write_preprocessor(folder: Path) -> None:
    """Write ``preprocessor_config.json``, as transformers' feature extractor reads it.

    Nothing is normalised there: where a model wants that, an export does it itself, exactly as in training.
    """
    settings = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": False,
        "return_attention_mask": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
