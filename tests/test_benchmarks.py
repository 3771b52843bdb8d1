"""The benchmark of a card, tried without one, and a stand-in for an encoder."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch

from w2v2 import recipes
from w2v2.evaluation.phones import frame_classes, read_labels
from w2v2.model.wav2vec2 import Wav2Vec2

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_benchmark_of_a_card_runs_on_a_cpu(tmp_path: Path) -> None:
    call = [sys.executable, str(SCRIPT), "--device", "cpu", "--model", "tiny", "--seconds", "4", "--crop", "2.5"]
    call += ["--rounds", "1", "--variants", "eager", "activation_checkpointing", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    kinds = [f"{kind} {way}" for kind in ("equal", "unequal") for way in ("eager", "activation_checkpointing")]
    assert set(results) == {f"tiny {kind}" for kind in [*kinds, "equal hubert"]}
    assert all(figures["audio_seconds_per_second"] > 0 for figures in results.values())


def test_the_names_in_place_of_convolutions_are_the_phones_of_the_frames(tmp_path: Path) -> None:
    """Against the classes that a probe gives frames, of two utterances of different lengths."""
    spec = importlib.util.spec_from_file_location("spelling", SCRIPT.with_name("spelling.py"))
    spelling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spelling)
    spoken, folder = tmp_path / "spoken", tmp_path / "spoken/test/7/70"
    folder.mkdir(parents=True)
    (spoken / "SPEAKERS.TXT").write_text("")
    rng, names, rows = np.random.default_rng(0), ["a:", "b", "c"], []
    for name, seconds in (("7-70-0", 1.7), ("7-70-1", 1.1)):
        soundfile.write(folder / f"{name}.flac", np.zeros(round(16_000 * seconds)), 16_000)
        edges = np.arange(0.1037, seconds, 0.0731)
        rows += [f"{name} 1 {start:.4f} 0.0731 {rng.choice(names)}" for start in edges[rng.random(len(edges)) < 0.8]]
    (folder / "7-70.phones.ctm").write_text("\n".join(rows))
    spelling.write_corpus(spoken, tmp_path / "named", wrong=0.0, seed=0)
    labels, model = read_labels(spoken), Wav2Vec2(recipes.tiny().model)
    lengths = [round(16_000 * seconds) for seconds in (1.7, 1.1)]
    audio = torch.zeros(2, max(lengths))
    for row, path in zip(audio, sorted((tmp_path / "named").rglob("*.flac")), strict=True):
        samples = soundfile.read(path, dtype="float32")[0]
        row[: len(samples)] = torch.from_numpy(samples)
    model.feature_encoder.__class__ = spelling.Phones
    named = model.feature_encoder(audio, lengths)[0].argmax(-1) - 1
    frames = model.feature_encoder.output_lengths(lengths)
    centers = [np.array([model.config.frame_seconds(t) for t in range(count)]) for count in frames]
    classes = {name: k for k, name in enumerate(names)}
    expected = [frame_classes(labels[name], at, classes) for name, at in zip(sorted(labels), centers, strict=True)]
    assert named.tolist() == np.concatenate(expected).tolist()
