"""Every recipe by the commands of its own docstring, shrunk; and what ``adapt`` takes from a run."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import override

from w2v2 import recipes
from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import save_weights
from w2v2.cli.main import main
from w2v2.errors import UsageError
from w2v2.model.quantizer import gumbel_temperature
from w2v2.recipes import recipe_names
from w2v2.serial import load_config, save_config
from w2v2.training.config import FinetuneConfig, PretrainConfig

FEWER = (
    "--train.max-steps 2 --train.log-every 1 --train.val-every 2 --train.checkpoint-every 2 --train.accumulate 1 "
    "--train.devices 1 --train.num-nodes 1 --train.accelerator cpu --data.num-workers 0 --data.batch-seconds 4 "
    "--data.max-seconds 2"
)
THIN = (
    "--model.n-layer 2 --model.n-embd 48 --model.n-head 4 --model.ffn-dim 96 --model.n-entries 32 "
    "--model.codebook-dim 16 --model.num-distractors 20 --model.conv-channels 16 16 16 16 16 16 16"
)


def commands(name: str) -> list[list[str]]:
    """The ``w2v2`` lines of a recipe's docstring, as words."""
    text = getattr(recipes, name).__doc__ or ""
    return [shlex.split(line) for line in re.findall(r"^ {8}(w2v2 .*)$", text, re.MULTILINE)]


def thin(config: PretrainConfig) -> list[str]:
    norm = "layer" if config.model.conv_norm == "layer" else "group:16"
    warm = ["--warm-start.updates", "1"] if config.warm_start.updates else []
    return [*shlex.split(THIN), "--model.conv-norm", norm, *warm]


@pytest.mark.parametrize("name", recipe_names(PretrainConfig))
def test_the_commands_of_a_recipe_run_for_two_steps(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("LibriSpeech", "LibriLight", "my_speech"):
        (tmp_path / folder).symlink_to(corpus)
    found = commands(name)
    assert found and all(words[:3] == ["w2v2", "pretrain", name] for words in found)
    for words in found:
        shape = thin(getattr(recipes, name)())
        if "--init-from" in words:
            run = words[words.index("--init-from") + 1]
            start = ["pretrain", Path(run).name, "--data", "LibriSpeech", "--out", run]
            assert main([*start, *shlex.split(FEWER), *thin(recipes.base())]) == 0
            shape = []
        assert main([*words[1:], *shlex.split(FEWER), *shape]) == 0
        out = Path(words[words.index("--out") + 1])
        with (out / "metrics.csv").open() as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
        assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))
        shutil.rmtree(out)


CTC = [name for name in recipe_names(FinetuneConfig) if not name.startswith("classify_")]  # those need classes


@pytest.mark.parametrize("name", CTC)
def test_the_commands_of_a_ctc_recipe_run_for_two_steps(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("LibriSpeech", "my_speech"):
        (tmp_path / folder).symlink_to(corpus)
    found = commands(name)
    assert found and all(words[:3] == ["w2v2", "finetune", name] for words in found)
    for words in found:
        shape = [*shlex.split(FEWER), "--channel-mask-length", "16"]
        if "--init-from" in words:
            start = Path(words[words.index("--init-from") + 1])
            start.mkdir(parents=True)
            config = override(getattr(recipes, start.name)(), thin(recipes.base()), "test")
            save_config(config, start / "config.json")
            save_weights(config.model.build(), start)
        else:
            shape += thin(recipes.base())
        assert main([*words[1:], *shape]) == 0
        out = Path(words[words.index("--out") + 1])
        with (out / "metrics.csv").open() as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
        assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))


def test_the_ctc_recipes_are_the_published_table() -> None:
    """Updates, peak, time and channel share, LayerDrop, frozen updates of fairseq's base_*.yaml."""
    table = {
        "ctc_10m": (13_000, 5e-5, 0.65, 0.25, 0.1, 10_000),
        "ctc_1h": (13_000, 5e-5, 0.65, 0.25, 0.1, 10_000),
        "ctc_10h": (20_000, 5e-5, 0.65, 0.5, 0.05, 10_000),
        "ctc_100h": (80_000, 3e-5, 0.65, 0.5, 0.1, 0),
        "ctc_960h": (320_000, 1e-4, 0.5, 0.1, 0.1, 0),
    }
    for name, row in table.items():
        config = getattr(recipes, name)()
        schedule, model = config.optim.schedule, config.model
        settings = (schedule.total_steps, schedule.peak, model.mask_prob, config.channel_mask_prob)
        assert (*settings, model.layer_drop, config.freeze_encoder_steps) == row, name
        assert config.data.batch_seconds * config.train.accumulate == 1600
        assert (model.mask_length, config.channel_mask_length, model.conv_gradient_scale) == (10, 64, 0.0)
        assert (model.dropout, model.attention_dropout, model.dropout_input) == (0.0, 0.0, 0.0)
        assert (model.activation_dropout, config.optim.eps, config.optim.weight_decay) == (0.1, 1e-8, 0.0)
        assert config.optim.clip_norm is None


@pytest.mark.parametrize("name", [*recipe_names(PretrainConfig), *recipe_names(FinetuneConfig)])
def test_a_recipe_says_its_hardware_hours_and_metrics(name: str) -> None:
    text = (getattr(recipes, name).__doc__ or "").lower()
    assert re.search(r"gpu|v100|cpu|cores", text)
    assert re.search(r"hours|days|in \d+ s", text)
    assert re.search(r"accuracy|\bwer\b|metrics: not measured", text)
    assert "published" in text or "not measured" in text or "log.md" in text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of a model of unusual shape."""
    config = recipes.tiny()
    config.model.n_layer, config.model.mask_length, config.model.n_entries, config.model.dropout = 1, 7, 24, 0.3
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.json")
    torch.manual_seed(0)
    save_weights(config.model.build(), folder)
    return folder


def test_adapt_takes_model_and_objective_from_the_run_and_keeps_its_own_regularisation(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapted"
    call = ["pretrain", "adapt", "--init-from", str(run), "--data", str(corpus), "--out", str(out), *shlex.split(FEWER)]
    assert main([*call, "--model.layer-drop", "0.2", "--optim.schedule.peak", "0", "--optim.weight-decay", "0"]) == 0
    before, now = (
        load_config(run / "config.json", PretrainConfig).model,
        load_config(out / "config.json", PretrainConfig),
    )
    assert (now.model.n_layer, now.model.n_entries, now.model.conv_channels) == (1, 24, before.conv_channels)
    assert (now.model.mask_length, now.model.utterance_norm) == (7, True)
    assert (now.model.dropout, now.model.layer_drop) == (0.1, 0.2)
    old, new = read(run).state, read(out).state
    assert all(torch.equal(old[name], new[name]) for name in new)  # at rate 0: the weights, quantizer too, were loaded
    assert {name.partition(".")[0] for name in old.keys() - new.keys()} == {"neighbourhood"}  # tiny's loss, not adapt's
    with (out / "metrics.csv").open() as file:
        assert {float(row["train/temperature"]) for row in csv.DictReader(file)} == {0.5}


def test_another_shape_than_the_runs_is_refused_not_forgotten(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["pretrain", "adapt", "--init-from", str(run), "--data", str(corpus), "--out", str(tmp_path / "out")]
    assert main([*call, *shlex.split(FEWER), "--model.n-layer", "3"]) == 2
    assert "missing transformer.1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["random", "torch"])
def test_a_recipe_file_that_would_stand_in_for_a_module_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("from w2v2 import recipes\n\n\ndef mine():\n    return recipes.tiny()\n")
    with pytest.raises(UsageError, match=f"{name}.py has the name of a module that Python or w2v2 uses; rename it"):
        recipes.load_recipe(f"{tmp_path / name}.py:mine", PretrainConfig)


def test_adapt_has_a_constant_low_rate_and_the_final_temperature_at_every_step() -> None:
    config, base = recipes.adapt(), recipes.base()
    rates = [config.optim.schedule(step) for step in (1_000, 10_000, 50_000, 100_000)]
    assert rates == pytest.approx([base.optim.schedule.peak / 10] * 4)
    model = config.model
    taus = {gumbel_temperature(n, model.gumbel_start, model.gumbel_end, model.gumbel_decay) for n in (0, 10, 10**6)}
    assert taus == {base.model.gumbel_end}


def test_tiny_as_adapted_by_the_docstring_parses(run: Path, corpus: Path, tmp_path: Path) -> None:
    text = " ".join((recipes.adapt.__doc__ or "").split())
    words = shlex.split(re.search(r"``tiny`` ``(--model.*?)``", text)[1])
    out = tmp_path / "out"
    call = ["pretrain", "adapt", "--init-from", str(run), "--data", str(corpus), "--out", str(out), *words]
    assert main([*call, *shlex.split(FEWER)]) == 0
    assert json.loads((out / "config.json").read_text())["loss_weights"]["diversity"] == 0.25
