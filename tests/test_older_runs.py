"""Runs saved by released layouts of the code load, and compute what they did (``runs/DATE/expected.json``)."""

import json
from pathlib import Path

import pytest
import torch

import w2v2
from w2v2.training.config import FinetuneConfig, PretrainConfig, run_config

LAYOUTS = sorted((Path(__file__).parent / "runs").iterdir())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("folder", [".", "best"])
def test_models_of_older_runs_compute_what_they_did(layout: Path, folder: str) -> None:
    expected = json.loads((layout / "expected.json").read_text())
    audio = torch.randn(16_000, generator=torch.Generator().manual_seed(7))
    encoder = w2v2.load(layout / "pretrained" / folder)
    assert isinstance(encoder, w2v2.Wav2Vec2ForPretraining)
    recognizer = w2v2.load(layout / "finetuned" / folder)
    assert isinstance(recognizer, w2v2.Recognizer)
    with torch.no_grad():
        vectors, _ = encoder.encode(audio[None])
    torch.testing.assert_close(vectors[0, 10, :8], torch.tensor(expected["encoded"]), atol=1e-4, rtol=0)
    log_probs = recognizer.emissions([audio])[0]
    torch.testing.assert_close(log_probs[10], torch.tensor(expected["log_probs"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_configurations_of_older_runs_are_read_whole(layout: Path) -> None:
    pretraining, finetuning = run_config(layout / "pretrained"), run_config(layout / "finetuned")
    assert isinstance(pretraining, PretrainConfig) and isinstance(finetuning, FinetuneConfig)
    saved = json.loads((layout / "pretrained/config.json").read_text())
    assert pretraining.model.n_entries == saved["model"]["n_entries"] == 8
    assert pretraining.optim.schedule(10) == saved["optim"]["schedule"]["peak"]
    assert finetuning.train.max_steps == 4
