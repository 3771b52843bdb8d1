"""What people who come with their own scripts find: ``w2v2.load``, the tasks under a plain Trainer, names."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import sound
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

import w2v2
from w2v2 import (
    FinetuneTask,
    PretrainTask,
    Recognizer,
    SpeechDataModule,
    Wav2Vec2,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPretraining,
    recipes,
)
from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import save_weights
from w2v2.data.corpora import read_corpus
from w2v2.errors import UsageError
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary
from w2v2.training.config import FinetuneConfig, PretrainConfig

WORDS = Vocabulary.from_texts(["SUN MOON STAR SKY RAIN WIND"])


def nano() -> PretrainConfig:
    config = recipes.tiny()
    config.model.n_layer, config.model.n_embd, config.model.ffn_dim = 1, 48, 48
    config.model.conv_channels, config.model.conv_norm = (8, 8, 16, 16, 16, 32, 32), "group:8"
    config.model.n_entries, config.model.codebook_dim, config.model.similarity_dim = 16, 8, 16
    config.data.batch_seconds, config.data.max_seconds, config.data.num_workers = 5.0, 3.0, 0
    config.warm_start.updates, config.model.conv_gradient_scale, config.model.neighbourhood = 0, 0.1, 0
    config.loss_weights = {"contrastive": 1.0, "diversity": 0.25, "feature_penalty": 10.0}
    return config


def nano_ctc() -> FinetuneConfig:
    config = recipes.tiny_ctc()
    config.model, config.data.batch_seconds = nano().model, 8.0
    return config


@pytest.mark.parametrize("of", ["run", "weights"])
def test_load_gives_each_kind_as_it_was_saved_ready_to_use(tmp_path: Path, of: str) -> None:
    torch.manual_seed(0)
    pre, ctc = nano().model.build(), Wav2Vec2ForCTC(nano().model, len(WORDS.labels))
    for name, model, run in (("pre", pre, nano()), ("ctc", ctc, nano_ctc())):
        (tmp_path / name).mkdir()
        save_weights(model, tmp_path / name)
        save_config(run if of == "run" else model.config, tmp_path / name / "config.json")
    WORDS.save(tmp_path / "ctc" / "vocab.json")
    loaded, recognizer = w2v2.load(str(tmp_path / "pre")), w2v2.load(tmp_path / "ctc")
    assert type(loaded) is Wav2Vec2ForPretraining and not loaded.training
    assert type(recognizer) is Recognizer and not recognizer.model.training
    assert recognizer.vocabulary == WORDS
    for model, again in ((pre, loaded), (ctc, recognizer.model)):
        assert again.config == model.config
        assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


class Mine(Wav2Vec2):
    """An objective of a user's own: a head, a count, and a table that no file holds."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        self.clusters = nn.Linear(config.n_embd, 7)
        self.register_buffer("window", torch.hann_window(400), persistent=False)
        self.register_buffer("seen", torch.tensor(5))


@dataclass(kw_only=True)
class MyConfig(Wav2Vec2Config):
    def build(self) -> Wav2Vec2:
        return Mine(self)


def test_an_objective_of_ones_own_loads_whole_and_gives_its_encoder_to_another_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MyConfig(n_layer=1, n_head=2, n_embd=32, ffn_dim=32, conv_channels=(16,) * 7, conv_norm="group:4")
    model = config.build()
    save_weights(model, tmp_path)
    save_config(config, tmp_path / "config.json")
    loaded = w2v2.load(tmp_path)
    assert type(loaded) is Mine and loaded.window.equal(torch.hann_window(400))
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    ctc = Wav2Vec2ForCTC(config, 4)
    head = ctc.lm_head.weight.clone()
    read(tmp_path).fill_encoder(ctc)
    assert all(ctc.state_dict()[name].equal(model.state_dict()[name]) for name in Wav2Vec2(config).state_dict())
    assert ctc.lm_head.weight.equal(head)
    with pytest.raises(UsageError, match=r"missing lm_head\.weight.*unexpected clusters\.weight"):
        read(tmp_path).fill(ctc)
    with pytest.raises(UsageError, match=r"transformer\.0\.ln_1\.weight has \(32,\), expected \(64,\)"):
        read(tmp_path).fill_encoder(Wav2Vec2ForCTC(replace(config, n_embd=64), 4))


def test_load_takes_a_model_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    audio = torch.from_numpy(sound(1.0, seed=0))[None]
    with torch.no_grad():
        vectors, frames = w2v2.load(tmp_path).encode(audio)
        expected = theirs(audio).last_hidden_state
    assert frames == [expected.shape[1]]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no .*config.json"),
        (lambda path: path.write_bytes(b"PK"), "it"),
        (lambda path: path.mkdir(), "no .*config.json"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text('{"model_type": "bert"}')), "bert"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text('{"model_type": "w2v2"}')), "w2v2"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "is not JSON"),
        (lambda path: (path.mkdir(), save_config(nano(), path / "config.json")), "no .*model.safetensors"),
    ],
)
def test_load_says_what_is_wrong_with_a_folder(tmp_path: Path, write, message: str) -> None:
    write(tmp_path / "it")
    with pytest.raises(UsageError, match=message):
        w2v2.load(tmp_path / "it")


def test_a_recognizer_takes_arrays_of_any_rate() -> None:
    torch.manual_seed(0)
    recognizer = Recognizer(Wav2Vec2ForCTC(nano().model, len(WORDS.labels)).eval(), WORDS)
    audio = sound(1.5, seed=0)
    text = recognizer(audio, 16_000)
    assert text and text == recognizer(torch.from_numpy(audio), 16_000) == recognizer(audio.astype(np.float64), 16_000)
    heard: list[int] = []
    recognizer.model.register_forward_pre_hook(lambda _, args: heard.append(args[0].shape[1]))
    recognizer(sound(1.5, seed=0, rate=8_000), 8_000)
    assert heard == [24_000]
    assert recognizer(np.zeros(10), 16_000) == ""
    with pytest.raises(UsageError, match="must be floating-point, full scale 1, got int16; divide int16 by 32768"):
        recognizer((audio * 32_767).astype(np.int16), 16_000)
    with pytest.raises(UsageError, match="take the mean of channels"):
        recognizer(np.zeros((2, 16_000)), 16_000)


def test_a_plain_trainer_trains_either_task_and_monitors_it(corpus: Path, tmp_path: Path) -> None:
    splits, config, ctc = read_corpus(corpus), nano(), nano_ctc()
    torch.manual_seed(0)
    pretrain = PretrainTask(config.model.build(), config.optim, config.loss_weights, seed=0)
    finetune = FinetuneTask(Wav2Vec2ForCTC(ctc.model, len(WORDS.labels)), WORDS, ctc)
    for task, data, monitor in (
        (pretrain, SpeechDataModule(splits, config.data), "valid/accuracy"),
        (finetune, SpeechDataModule(splits, ctc.data, encode=WORDS.encode), "valid/wer"),
    ):
        before = {name: p.detach().clone() for name, p in task.model.named_parameters() if p.requires_grad}
        best = ModelCheckpoint(tmp_path / monitor.replace("/", "-"), monitor=monitor)
        trainer = pl.Trainer(
            max_steps=3, gradient_clip_val=1.0, accelerator="cpu", accumulate_grad_batches=2, val_check_interval=2,
            check_val_every_n_epoch=None, callbacks=[best], logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, data)
        assert trainer.global_step == 3
        assert all(not p.equal(before[name]) for name, p in task.model.named_parameters() if name in before)
        assert task.train_figures()["steps_left_out"] == 0
        seen = {name.removeprefix("valid/"): value.item() for name, value in trainer.callback_metrics.items()}
        assert seen == pytest.approx(task.valid_figures)
        assert best.best_model_score is not None
        again = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        assert again.keys() == task.state_dict().keys()


def test_names_are_there_without_the_wait() -> None:
    code = "import sys, w2v2; assert not {'torch', 'pytorch_lightning', 'lhotse', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(w2v2, name) is not None for name in w2v2.__all__)
    assert issubclass(w2v2.PretrainTask, pl.LightningModule) and issubclass(w2v2.FinetuneTask, pl.LightningModule)
    assert issubclass(w2v2.SpeechDataModule, pl.LightningDataModule)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        w2v2.nothing  # noqa: B018
