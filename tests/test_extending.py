"""Quantizers, masks and objectives of one's own, as docs/extending.md shows them, and what becomes of their types."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import utterances
from test_train import column, nano, rows

from w2v2 import recipes
from w2v2.checkpoint.formats import convert, read
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from w2v2.recipes import load_recipe
from w2v2.training.config import PretrainConfig
from w2v2.training.finetune import finetune
from w2v2.training.pretrain import evaluate_pretrained, pretrain


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "a"
    pretrain(nano(max_steps=1), read_corpus(corpus), out)
    return out


def page_file(name: str, folder: Path) -> Path:
    """A file that docs/extending.md shows."""
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    (folder / name).write_text(page.split(f"```python\n# {name}\n")[1].split("```")[0])
    return folder / name


def shrunk(recipe: str, **train) -> PretrainConfig:
    """A recipe of a user's file with the encoder and the batch of ``nano``, which has no warm start."""
    config, small = load_recipe(recipe, PretrainConfig), nano(**train)
    for name in ("n_layer", "n_embd", "ffn_dim", "conv_channels", "conv_norm", "conv_gradient_scale"):
        setattr(config.model, name, getattr(small.model, name))
    config.data, config.optim, config.train, config.warm_start = small.data, small.optim, small.train, small.warm_start
    if config.loss_weights.pop("neighbourhood", None):
        config.model.neighbourhood = 0
    return config


def test_quantizers_and_a_mask_of_ones_own_live_in_ones_recipe_file(corpus: Path, tmp_path: Path) -> None:
    path = page_file("quantizers.py", tmp_path)
    config = shrunk(f"{path}:random_projection", max_steps=2)
    config.model.random_entries = 32
    model = pretrain(config, read_corpus(corpus), tmp_path / "random")
    assert model.quantizer.codebook.shape == (32, 16)
    assert read(tmp_path / "random").build().config.random_entries == 32
    assert "train/codes_per_utterance" in rows(tmp_path / "random")[0]
    assert not any("perplexity" in name or "diversity" in name for name in rows(tmp_path / "random")[0])
    config = shrunk(f"{path}:fsq", max_steps=2)
    config.loss_weights["diversity"] = 0.1
    with pytest.raises(UsageError, match=r"got contrastive, feature_penalty, diversity: leave out diversity"):
        pretrain(config, read_corpus(corpus), tmp_path / "diverse")
    # A fresh process does not import a file that a configuration merely names.
    code = (
        f"from w2v2.checkpoint.formats import read; from pathlib import Path; read(Path({str(tmp_path / 'random')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert "needs the type 'quantizers:RandomModel', which is not known here" in done.stderr


def test_finite_scalar_quantization_rounds_to_its_levels_and_lets_gradients_through(tmp_path: Path) -> None:
    load_recipe(f"{page_file('quantizers.py', tmp_path)}:fsq", PretrainConfig)
    torch.manual_seed(0)
    quantizer = sys.modules["quantizers"].FSQ(6, (4, 3, 5))
    x = (10 * torch.randn(4_000, 6)).requires_grad_()
    out = quantizer(x, 1.0)
    values = [column.unique().tolist() for column in out.quantized.detach().unbind(1)]
    assert values == [[-1.0, -0.5, 0.0, 0.5], [-1.0, 0.0, 1.0], [-1.0, -0.5, 0.0, 0.5, 1.0]]
    assert out.codes.min() == 0 and out.codes.max() == 59 and out.code_counts.sum() == 4_000
    distinct = torch.cat([out.codes, out.quantized.detach()], dim=1).unique(dim=0)
    assert len(distinct) == len(out.codes.unique())  # a code is one combination of levels
    (gradient,) = torch.autograd.grad(out.quantized.sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_model_type_of_ones_own_survives_another_runs_weights_and_its_own(
    run: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = f"{page_file('quantizers.py', tmp_path)}:fsq"
    config = shrunk(recipe, max_steps=1)
    config.model.n_layer, config.model.levels, config.model.mask_length = 1, (4, 4), 3
    config.adopt_architecture(read(run).config)
    assert (type(config.model).__name__, config.model.levels, config.model.n_layer) == ("FSQModel", (4, 4), 2)
    assert config.model.mask_length == 3
    config.optim.schedule.peak = config.optim.weight_decay = 0.0
    model = pretrain(config, read_corpus(corpus), tmp_path / "fsq", init_from=run)
    assert "ContrastiveConfig: its encoder is taken, what FSQModel has beside starts afresh" in caplog.text
    encoder = Wav2Vec2(config.model).state_dict()
    old, new = read(run).state, model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in encoder)
    assert type(model.quantizer).__name__ == "FSQ"

    config.train.max_steps = 2
    pretrain(config, read_corpus(corpus), tmp_path / "fsq", resume=True)
    assert type(read(tmp_path / "fsq").config).__name__ == "FSQModel"
    with pytest.raises(UsageError, match=r"model\._type was quantizers:FSQModel, is ContrastiveConfig"):
        pretrain(nano(max_steps=3), read_corpus(corpus), tmp_path / "fsq", resume=True)
    with pytest.raises(UsageError, match="its configuration is a FSQModel"):
        convert(tmp_path / "fsq", tmp_path / "hf", "hf")
    config.model.levels = (4, 4, 4)
    with pytest.raises(UsageError, match="does not fit the model"):
        pretrain(config, read_corpus(corpus), tmp_path / "other", init_from=tmp_path / "fsq")


def test_a_type_whose_encoder_is_another_is_refused_by_name(run: Path) -> None:
    @dataclass(kw_only=True)
    class Unplaced(ContrastiveConfig):
        def build_positional_embedding(self) -> torch.nn.Module:
            return torch.nn.Identity()

    config = nano()
    config.model = Unplaced(**vars(config.model))
    with pytest.raises(UsageError, match="is ContrastiveConfig, the recipe's is Unplaced, and they differ in build_po"):
        config.adopt_architecture(read(run).config)


def test_a_model_without_an_objective_is_refused_in_a_line(corpus: Path, tmp_path: Path) -> None:
    config = nano()
    config.model = Wav2Vec2Config()
    with pytest.raises(UsageError, match=r"Wav2Vec2Config builds a Wav2Vec2, which has no draw, summarize, baseline"):
        pretrain(config, read_corpus(corpus), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cluster_targets_live_in_ones_recipe_file_and_are_learned(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = shrunk(f"{page_file('mine.py', tmp_path)}:hubert", max_steps=100, val_every=100, checkpoint_every=100)
    config.model.n_clusters = 12
    config.model.mask_prob, config.model.mask_length, config.optim.schedule.peak = 0.3, 2, 5e-3  # learned in 100 steps
    sys.modules["mine"].cluster(str(corpus), "labels.npz", n_clusters=12)
    pretrain(config, read_corpus(corpus), tmp_path / "run")
    assert column(tmp_path / "run", "valid/clusters")[-1] < 0.8 * column(tmp_path / "run", "valid/unigram")[-1]
    assert evaluate_pretrained(tmp_path / "run", read_corpus(corpus), "valid")["clusters"] == pytest.approx(
        column(tmp_path / "run", "valid/clusters")[-1], rel=1e-5
    )
    # Labels are those of the crop's own frames: an utterance that is cropped has those of the whole, from there on.
    model, batch = sys.modules["mine"], utterances([8_000], ["a"])
    model.read_labels = lambda path: {"a": np.arange(400)}
    batch.offsets += 24_000
    drawn = read(tmp_path / "run").build().draw(batch, None)
    seconds = 1.5 + drawn.covered * 0.02 + 0.01
    assert (drawn.labels - 100 * seconds).abs().max() <= 1
    # Its encoder is fine-tuned like any other.
    tuned = recipes.tiny_ctc()
    tuned.adopt_architecture(read(tmp_path / "run").config)
    tuned.train.max_steps, tuned.optim.schedule.peak = 1, 0.0
    recognizer = finetune(tuned, read_corpus(corpus), tmp_path / "ctc", init_from=tmp_path / "run")
    old, new = read(tmp_path / "run").state, recognizer.model.state_dict()
    assert all(torch.equal(old[name], tensor) for name, tensor in new.items() if not name.startswith("lm_head."))
