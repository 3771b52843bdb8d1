"""A small corpus of our own making: syllable-like bursts of coloured noise and tones, no speech needed."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums equal those of commands to the bit, however pytest is called
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

LONGEST = [
    "docs", "demo", "resume", "ends", "processes", "export", "streaming", "train", "warm_start", "plan", "names",
    "health", "reading", "finetune", "serve", "live", "evaluate", "transcribe", "secrets", "results", "classify",
    "finetune_processes", "convert",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first (``--no-loadscope-reorder``), so that none waits at the end."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


# No result depends on how busy the machine is, and none of CI on luck; by hand the search goes on elsewhere each time.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("tests")

RATE = 16_000
WORDS = ("SUN", "MOON", "STAR", "SKY", "RAIN", "WIND")


def sound(seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """Bursts of harmonics whose pitch and formant change every 80-240 ms."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    audio = np.zeros_like(t)
    start = 0.0
    while start < seconds:
        length = rng.uniform(0.08, 0.24)
        inside = slice(*np.searchsorted(t, (start, start + length)))
        pitch, formant = rng.uniform(90, 220), rng.uniform(300, 2500)
        for k in range(1, 20):
            gain = np.exp(-(((k * pitch - formant) / 400) ** 2))
            audio[inside] += gain * np.sin(2 * np.pi * k * pitch * t[inside])
        start += length
    audio += 0.01 * rng.standard_normal(len(t))
    return (0.3 * audio / np.abs(audio).max()).astype(np.float32)


def utterances(samples: Sequence[int], ids: Sequence[str] | None = None, epoch: int = 0) -> SimpleNamespace:
    """What a model draws by: a batch without its audio."""
    names = [f"utt-{i}" for i in range(len(samples))] if ids is None else list(ids)
    zeros = torch.zeros(len(names), dtype=torch.long)
    return SimpleNamespace(lengths=torch.tensor(samples), offsets=zeros, ids=names, epochs=[epoch] * len(names))


def write_corpus(root: Path, subsets: dict[str, int], utterances: int = 4, suffix: str = "flac") -> Path:
    """LibriSpeech layout: so many speakers in each subset, utterances of 2 to 4 s."""
    speaker = 100
    for subset, speakers in subsets.items():
        for _ in range(speakers):
            speaker += 1
            folder = root / subset / str(speaker) / "1"
            folder.mkdir(parents=True)
            lines = []
            for i in range(utterances):
                name = f"{speaker}-1-{i:04d}"
                rng = np.random.default_rng([speaker, i])
                audio = sound(rng.uniform(2.0, 4.0), seed=speaker * 100 + i)
                soundfile.write(folder / f"{name}.{suffix}", audio, RATE)
                lines.append(f"{name} {' '.join(rng.choice(WORDS, 4))}\n")
            (folder / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training speakers, one to validate on, one to test on."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train-clean": 4, "dev-clean": 1, "test-clean": 1})


NANO = """
from w2v2 import recipes

def nano():
    config = recipes.tiny()
    config.model.n_layer, config.model.n_embd, config.model.ffn_dim = 2, 48, 96
    config.model.dropout, config.model.layer_drop = 0.1, 0.2
    config.model.conv_channels, config.model.conv_norm = (8, 8, 16, 16, 16, 32, 32), "group:8"
    config.model.n_entries, config.model.codebook_dim, config.model.similarity_dim = 32, 16, 32
    config.model.num_distractors = 20
    config.data.batch_seconds, config.data.max_seconds, config.data.num_workers = 4.0, 2.0, 2
    config.data.augment.speed, config.data.augment.noise, config.data.augment.room = 0.1, 0.5, 0.5
    config.warm_start.updates, config.model.conv_gradient_scale, config.model.neighbourhood = 0, 0.1, 0
    config.loss_weights = {"contrastive": 1.0, "diversity": 0.25, "feature_penalty": 10.0}
    config.optim.schedule.warmup_steps, config.optim.schedule.total_steps = 10, 500
    config.train.log_every, config.train.val_every, config.train.checkpoint_every = 1, 40, 7
    config.train.max_steps = 90
    return config
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe file for runs in processes of their own."""
    path = tmp_path_factory.mktemp("recipe") / "nano.py"
    path.write_text(NANO)
    return f"{path}:nano"


def override(config: Any, words: list[str], prog: str) -> Any:
    """A configuration with settings as of the command line."""
    from w2v2.cli.options import Settings, parse

    return parse(Settings[type(config)], words, prog, default=config)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waits between attempts; how long one may take is for the tests of silent servers to say."""
    from w2v2.data import storage

    monkeypatch.setattr(storage, "BACKOFF", 0.001)
