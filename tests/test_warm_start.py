"""The warm start as an objective and as a stage of a run, and convolutions that stay as they are after it."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from commands import start
from conftest import sound
from test_resume import MODULE, command, finish, launched, losses, until
from test_train import nano
from transformers.audio_utils import mel_filter_bank

from w2v2 import recipes
from w2v2.checkpoint.native import read_native
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.model.neighbourhood import Neighbourhood
from w2v2.model.warm_start import SpectralConfig, log_mel, mel_filters
from w2v2.model.wav2vec2 import Wav2Vec2Config
from w2v2.training.pretrain import evaluate_pretrained, pretrain


@pytest.mark.parametrize("paddings", [(0,) * 7, (4, 1, 1, 1, 1, 0, 0)])
def test_the_spectrum_is_that_of_another_implementation(paddings: tuple[int, ...]) -> None:
    config, audio = Wav2Vec2Config(conv_paddings=paddings), sound(1.7, seed=1)
    filters = mel_filter_bank(257, 40, 40.0, 7800.0, 16_000, norm=None, mel_scale="htk")
    window = np.hanning(400)
    rows = []
    for frame in range(config.frames([len(audio)])[0]):
        center = config.frame_seconds(frame) * 16_000
        at = np.arange(400) + round(center - 199.5)
        inside = (at >= 0) & (at < len(audio))
        cut = np.where(inside, audio[at.clip(0, len(audio) - 1)], 0.0)
        rows.append(np.log(np.abs(scipy.fft.rfft(cut * window, 512)) ** 2 @ filters + 1e-7))
    expected = np.array(rows)
    expected = (expected - expected.mean(0)) / (expected.std(0) + 1e-3)
    found = log_mel(torch.from_numpy(audio)[None], config, mel_filters(40))[0]
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_an_utterance_costs_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = SpectralConfig(**vars(nano().warm_start_run().model)).build().eval()
    lengths = [20_000, 16_000]
    audio = torch.zeros(2, 20_000)
    for row, n in zip(audio, lengths, strict=True):
        row[:n] = torch.from_numpy(sound(n / 16_000, seed=n))
    together = model(audio, model.draw(None), lengths)
    alone = [model(audio[i : i + 1, :n], model.draw(None)) for i, n in enumerate(lengths)]
    assert together.num_targets == sum(out.num_targets for out in alone)
    for name, loss in together.losses.items():
        torch.testing.assert_close(loss, sum(out.losses[name] for out in alone))


def warm(updates: int, **train):
    config = nano(**train)
    config.warm_start.updates, config.model.conv_gradient_scale, config.model.neighbourhood = updates, 0.0, 5
    config.loss_weights["neighbourhood"] = 1.0
    return config


def test_the_stage_learns_the_spectrum_and_the_run_keeps_its_stack_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    splits = read_corpus(corpus)
    pretrain(warm(100, max_steps=3), splits, tmp_path / "run")
    assert evaluate_pretrained(tmp_path / "run" / "warm_start", splits, "valid")["r2"] > 0.25  # 0: means of the bands
    before, after = (read_native(tmp_path / name).state for name in ("run/warm_start", "run"))
    stack = [name for name in after if name.startswith("feature_encoder.")]
    assert stack and all(torch.equal(before[name], after[name]) for name in stack)
    state = torch.load(next((tmp_path / "run" / "checkpoints").iterdir()), weights_only=True)
    model = read_native(tmp_path / "run").build()
    frozen = len(stack) + 2  # the norm after it
    assert len(state["optimizer_states"][0]["state"]) == len(list(model.parameters())) - frozen


def test_of_a_frozen_stack_no_graph_is_kept() -> None:
    torch.manual_seed(0)
    model = warm(1).model.build().train()
    audio = torch.randn(2, 16_000)
    assert not model.feature_encoder(audio).requires_grad
    assert not any(p.requires_grad for p in model.feature_encoder.parameters())


def test_the_neighbourhoods_targets_are_whitened_principal_components() -> None:
    torch.manual_seed(0)
    beside = Neighbourhood(6, 16, 3, 5)
    features = torch.randn(2, 400, 6).cumsum(1) * torch.arange(1, 7) * 0.1
    stacks = beside.stack(features)
    padded = np.pad(features[1].numpy(), ((1, 1), (0, 0)), mode="edge")
    windows = np.concatenate([padded[:-2], padded[1:-1], padded[2:]], 1)
    np.testing.assert_array_equal(stacks[400:], windows)
    beside.fit(stacks)
    whitened = ((stacks - beside.mean) @ beside.basis).double().numpy()
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(5), atol=1e-3)
    centred = stacks.double().numpy() - stacks.double().numpy().mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:5]
    basis = beside.basis.double().numpy()
    cosines = np.abs((basis.T * directions).sum(1)) / np.linalg.norm(basis, axis=0)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-3)


def test_the_neighbourhoods_loss_weighs_seen_frames_as_much_as_masked_ones_and_knows_no_batch() -> None:
    torch.manual_seed(0)
    beside = Neighbourhood(4, 8, 3, 5)
    frames, counts, covered = [20, 12], [5, 3], torch.tensor([1, 2, 3, 9, 10, 24, 25, 26])
    features, context = torch.randn(1, 32, 4), torch.randn(1, 32, 8)
    beside.fit(torch.cat([beside.stack(torch.randn(1, 500, 4)), beside.stack(features, frames)]))
    total, expected, start = beside(context, features, covered, frames, counts, frames), 0.0, 0
    for n, count in zip(frames, counts, strict=True):
        rows = slice(start, start + n)
        target = (beside.stack(features[:, rows]) - beside.mean) @ beside.basis
        error = (beside.head(context[0, rows]) - target).square().mean(1)
        masked = torch.zeros(n, dtype=torch.bool)
        masked[covered[(covered >= start) & (covered < start + n)] - start] = True
        expected += count * (error[masked].mean() + error[~masked].mean())
        start += n
    torch.testing.assert_close(total, expected)


NANO = """
def warm():
    config = nano()
    config.warm_start.updates, config.model.conv_gradient_scale, config.model.neighbourhood = 40, 0.0, 5
    config.loss_weights["neighbourhood"] = 1.0
    config.train.max_steps = 9
    return config
"""


@pytest.fixture(scope="module")
def stage(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("stage") / "warm.py"
    path.write_text(Path(recipe.rpartition(":")[0]).read_text() + NANO)
    return f"{path}:warm"


def test_a_run_killed_in_its_stage_goes_on_to_the_same_bits(stage: str, corpus: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    code, message = finish(command(stage, corpus, whole))
    assert code == 0, message
    process = start(command(stage, corpus, out))
    until(process, out / "warm_start", 9)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert not (out / "checkpoints").exists() and max(losses(out / "warm_start")) < 40
    code, message = finish(command(stage, corpus, out, "--resume"))
    assert code == 0, message
    assert losses(out / "warm_start") == losses(whole / "warm_start") and losses(out) == losses(whole)
    # After its stage, and before its first checkpoint, a run begins with the stack that the stage has left.
    for file in (out / "checkpoints").iterdir():
        file.unlink()
    code, message = finish(command(stage, corpus, out, "--resume"))
    assert code == 0, message
    assert losses(out) == losses(whole)


def test_two_processes_go_through_the_stage_and_the_run(stage: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, message = launched(
        [*MODULE, *command(stage, corpus, out, "--train.devices", "2", "--warm-start.updates", "8")]
    )
    assert code == 0, message
    assert max(losses(out / "warm_start")) == 8 and max(losses(out)) == 9
    before, after = (read_native(folder).state for folder in (out / "warm_start", out))
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("feature_encoder."))
    assert after["neighbourhood.basis"].any()


def test_a_warm_start_where_none_belongs_is_refused_in_one_line(corpus: Path, tmp_path: Path) -> None:
    splits = read_corpus(corpus)
    pretrain(nano(max_steps=5), splits, tmp_path / "run")
    config = nano(max_steps=5)
    config.warm_start.updates = 9
    with pytest.raises(UsageError, match=r"warm_start.updates was 0, is 9"):
        pretrain(config, splits, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "warm_start").exists()
    with pytest.raises(UsageError, match=r"`warm_start.updates` 9 would undo the convolutions of `init_from`"):
        pretrain(config, splits, tmp_path / "new", init_from=tmp_path / "run")
    with pytest.raises(UsageError, match=r"`model.conv_gradient_scale` 0 freezes convolutions that are random"):
        pretrain(warm(0), splits, tmp_path / "new")
    config = recipes.tiny()
    config.adopt_architecture(nano().model)
    assert not config.warm_start.updates
