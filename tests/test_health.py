"""Recorded and forced collapses are named and stopped, healthy runs are left alone; what is not finite is named."""

import csv
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch
from conftest import write_corpus
from test_train import column, nano, same_numbers

from w2v2.data.corpora import Splits, read_corpus
from w2v2.errors import JobError
from w2v2.model.pretraining import ContrastiveConfig
from w2v2.model.transformer import PositionalConvEmbedding
from w2v2.training.collapse import Alarm, CollapseDetector
from w2v2.training.config import PretrainConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.health import describe
from w2v2.training.pretrain import PretrainTask, pretrain
from w2v2.training.resume import checkpoint_files, newest_good, step_of
from w2v2.training.task import MicroBatch, step_seed

CURVES = sorted((Path(__file__).parent / "curves").glob("*.csv"))
HEALTHY = [path.stem for path in CURVES if path.stem.startswith("h-")]


def curve(name: str) -> list[tuple[int, dict[str, float]]]:
    with (Path(__file__).parent / "curves" / f"{name}.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [(int(row.pop("step")), row) for row in rows]


def replay(rows: list[tuple[int, dict[str, float]]]) -> Alarm | None:
    detector = CollapseDetector()
    alarms = (detector.look(step, figures) for step, figures in rows)
    return next((alarm for alarm in alarms if alarm is not None), None)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("name", HEALTHY)
def test_recorded_healthy_runs_give_no_alarm(name: str, every: int) -> None:
    rows = curve(name)[every - 1 :: every]
    assert len(rows) >= 6
    assert replay(rows) is None


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("name", "begins", "says"),
    [
        ("c-lr", 20, "uniform logits"),  # learning rate x50
        ("c-const", 0, "no longer follow the probabilities"),  # constant audio
        ("c-div-nano", 0, "few codes"),  # nano, diversity 0, one crop per step
        ("c-div-rate-nano", 0, "few codes"),  # the same at five times the learning rate
    ],
)
def test_recorded_collapses_are_named_within_200_steps(name: str, every: int, begins: int, says: str) -> None:
    alarm = replay(curve(name)[every - 1 :: every])
    assert alarm is not None
    assert says in alarm.name
    assert alarm.step - begins <= 200


SLIDING = {200: (0.168, 0.072, 36.1), 400: (0.175, 0.048, 26.3), 600: (0.257, 0.107, 11.2), 800: (0.303, 0.215, 13.5)}
"""LOG.md's ``small`` on real speech at its validations: accuracy, the same with every frame masked, code perplexity."""


def sliding(stop: int, blind: float | None = None) -> Alarm | None:
    """That run, looked at every 20 steps, perplexity and accuracy on straight lines between its validations."""
    detector, steps = CollapseDetector(), sorted(SLIDING)
    for step in range(220, stop + 1, 20):
        if (last := step - 20) in SLIDING:
            accuracy, masked, _ = SLIDING[last]
            detector.validated(
                {"accuracy": accuracy, "accuracy_all_masked": masked if blind is None else blind * accuracy}
            )
        accuracy, codes = (float(np.interp(step, steps, [SLIDING[at][i] for at in steps])) for i in (0, 2))
        shown = figures(
            contrastive_of_chance=0.9, accuracy=accuracy, code_perplexity=codes, prob_perplexity=codes * 1.02,
            grad_norm=1.0, identical_distractors=0.1,
        )  # fmt: skip
        if (alarm := detector.look(step, shown)) is not None:
            return alarm
    return None


def test_the_slow_slide_of_log_md_is_named_at_its_fourth_validation() -> None:
    alarm = sliding(950)
    assert alarm is not None and "a few entries" in alarm.name
    assert alarm.since == 600 and alarm.step <= 820
    assert sliding(700) is None
    assert sliding(950, blind=0.3) is None  # with context in use, so few codes are no collapse


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_never_so_poor_in_codes_for_long_whatever_validation_says(name: str) -> None:
    detector = CollapseDetector()
    detector.validated({"accuracy": 0.3, "accuracy_all_masked": 0.3})
    assert not any(detector.look(step, shown) for step, shown in curve(name))


def test_a_run_that_lives_on_ten_codes_but_reads_from_context_is_let_go_on() -> None:
    """1,500 updates of ``small`` on real speech, diversity 0.35: a third of its accuracy is left with all masked."""
    detector = CollapseDetector()
    with (Path(__file__).parent / "curves" / "few-small.csv").open() as file:
        for row in csv.DictReader(file):
            shown = {name: float(value) for name, value in row.items() if value}
            assert detector.look(int(row["step"]), shown) is None
            if row["valid_accuracy"]:
                seen = {"accuracy": shown["valid_accuracy"], "accuracy_all_masked": shown["valid_accuracy_all_masked"]}
                detector.validated(seen)
    assert detector.step == 1500 and shown["code_perplexity"] < 12


def figures(**changed: float) -> dict[str, float]:
    """Of the released BASE in its first thousands of updates: at chance, with a gradient, its perplexity rising."""
    usual = {
        "loss": 4.7, "contrastive": math.log(101) * changed.get("contrastive_of_chance", 0.9995),
        "contrastive_of_chance": 0.9995, "accuracy": 0.012, "identical_distractors": 0.02, "prob_perplexity": 300.0,
        "code_perplexity": 270.0, "code_perplexity_0": 135.0, "code_perplexity_1": 135.0, "grad_norm": 0.3,
        "steps_left_out": 0.0,
    }  # fmt: skip
    return usual | changed


def judged(shown: dict[str, float], steps: int = 300) -> Alarm | None:
    return replay([(step, shown) for step in range(20, steps + 1, 20)])


def test_thousands_of_updates_at_chance_are_no_collapse_while_there_is_a_gradient() -> None:
    assert judged(figures(), 10_000) is None


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        (figures(grad_norm=0.05), "uniform logits"),
        (figures(contrastive_of_chance=0.0, accuracy=0.0, identical_distractors=1.0, code_perplexity=2.0), "few codes"),
        (figures(code_perplexity=20.0), "no longer follow"),
        (figures(prob_perplexity=2.2, code_perplexity=2.0, contrastive_of_chance=0.5), "fallen to almost nothing"),
        (figures(contrastive_of_chance=0.5, accuracy=0.9, grad_norm=0.001), "gradient norm is gone"),
        (figures(loss=math.nan), "not finite"),
    ],
)
def test_each_signature_is_named_with_a_cure(shown: dict[str, float], says: str) -> None:
    alarm = judged(shown)
    assert alarm is not None and says in alarm.name and alarm.cure
    assert alarm.step <= 120


def test_a_quantizer_without_probabilities_has_the_signatures_that_need_none() -> None:
    def without(**changed: float) -> dict[str, float]:
        return {name: value for name, value in figures(**changed).items() if name != "prob_perplexity"}

    assert judged(without(code_perplexity=20.0)) is None
    alarm = judged(without(grad_norm=0.05))
    assert alarm is not None and "uniform logits" in alarm.name


def test_a_signature_that_goes_away_is_forgotten() -> None:
    dead, alive = figures(grad_norm=0.05), figures()
    detector = CollapseDetector()
    steps = range(20, 2001, 20)
    assert all(detector.look(step, alive if step % 80 == 0 else dead) is None for step in steps)
    assert detector.trusted == 2000
    detector.look(2020, dead)
    detector.look(2040, dead)
    assert detector.trusted == 2000


def test_figures_of_another_kind_of_training_and_steps_left_out_are_passed_over() -> None:
    assert judged({"loss": 0.0, "grad_norm": 0.0}) is None
    assert judged(figures(loss=math.nan, steps_left_out=1.0)) is None


def constant(root: Path) -> Path:
    write_corpus(root, {"train-clean": 4, "dev-clean": 1})
    for path in root.rglob("*.flac"):
        soundfile.write(path, np.full(len(soundfile.read(path)[0]), 0.1), 16_000)
    return root


def long(**train) -> PretrainConfig:
    """300 steps at most, logged so seldom that nothing but the sentinel looks at them."""
    settings = {"max_steps": 300, "log_every": 1000, "val_every": 1000, "checkpoint_every": 10, "keep_checkpoints": 2}
    config = nano(**settings | train)
    config.data.num_workers = 0
    return config


def stopped_at(said: str) -> tuple[int, int]:
    since, step = said.split("since step ")[1].split(", seen at step ")
    return int(since), int(step.split(":")[0])


def no_diversity(config: PretrainConfig) -> None:
    config.loss_weights["diversity"] = 0.0
    config.data.batch_seconds, config.model.utterance_norm = 2.0, False


def fast(config: PretrainConfig) -> None:
    config.optim.schedule.peak *= 50


@pytest.mark.parametrize("cause", ["constant audio", "learning rate", "no diversity"])
def test_a_forced_collapse_stops_the_run_within_200_steps(cause: str, corpus: Path, tmp_path: Path) -> None:
    config = long()
    {"constant audio": lambda c: None, "learning rate": fast, "no diversity": no_diversity}[cause](config)
    data = constant(tmp_path / "constant") if cause == "constant audio" else corpus
    out = tmp_path / "run"
    with pytest.raises(JobError, match=r"what usually cures it: .*`train.sentinel` False") as error:
        pretrain(config, read_corpus(data), out)
    since, step = stopped_at(str(error.value))
    assert step <= 200
    kept = [step_of(path) for path in checkpoint_files(out)]
    assert all(at <= since for at in kept)
    assert (f"step={kept[0]:08d}.ckpt" in str(error.value)) if kept else "no checkpoint is older" in str(error.value)
    assert not (out / "model.safetensors").exists()


def test_a_healthy_run_has_no_alarm_and_the_same_numbers_as_one_without_a_sentinel(
    corpus: Path, tmp_path: Path
) -> None:
    for sentinel in (True, False):
        pretrain(long(sentinel=sentinel, max_steps=200, log_every=7), read_corpus(corpus), tmp_path / str(sentinel))
    same_numbers(tmp_path / "True", tmp_path / "False")


def test_a_collapse_on_the_way_keeps_the_checkpoint_and_the_best_weights_from_before(
    corpus: Path, tmp_path: Path
) -> None:
    out, splits = tmp_path / "run", read_corpus(corpus)
    pretrain(long(max_steps=60, val_every=10), splits, out)
    best = json.loads((out / "best" / "best.json").read_text())
    assert best["step"] <= 60
    # From now on one entry is always chosen: every distractor is identical to its target, and the loss is nothing.
    path, saved = newest_good(out)
    saved["state_dict"]["model.quantizer.projector.weight"].zero_()
    saved["state_dict"]["model.quantizer.projector.bias"].zero_()[::32] = 50.0
    torch.save(saved, path)
    with pytest.raises(JobError, match=r"fallen to almost nothing.*last good checkpoint is .*step=00000060"):
        pretrain(long(max_steps=400, val_every=10), splits, out, resume=True)
    assert min(column(out, "valid/contrastive")) < 1e-3
    assert step_of(checkpoint_files(out)[0]) == 60
    assert json.loads((out / "best" / "best.json").read_text()) == best
    pretrain(long(max_steps=220, sentinel=False), splits, out, resume=True)
    assert step_of(checkpoint_files(out)[0]) == 220


def plant_nan(root: Path, name: str) -> Path:
    """A float WAV with one value that is not a number, which an audit would have found."""
    write_corpus(root, {"train-clean": 4, "dev-clean": 1}, suffix="wav")
    (path,) = root.rglob(f"{name}.wav")
    audio, rate = soundfile.read(path)
    audio[: len(audio) // 2 : 50] = np.nan
    audio[len(audio) // 2 :: 50] = np.nan
    soundfile.write(path, audio, rate, subtype="FLOAT")
    return root


def test_a_nan_in_one_utterance_names_it_and_stops_the_run_when_the_budget_is_spent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = read_corpus(plant_nan(tmp_path / "corpus", "102-1-0002"))
    with (
        caplog.at_level(logging.WARNING, logger="w2v2"),
        pytest.raises(JobError, match=r"3 steps left out.*contrastive nan.*102-1-0002 \(their audio is not finite\)"),
    ):
        pretrain(long(max_steps_left_out=2), splits, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 3
    assert all("102-1-0002" in line and line.count("-1-000") == 1 and "\n" not in line for line in said)


def unwatched(config: PretrainConfig, splits: Splits) -> dict[str, torch.Tensor]:
    """Weights after the same steps by a Trainer that has no callbacks at all."""
    torch.manual_seed(step_seed(config.train.seed))
    task = PretrainTask(config.model.build(), config.optim, config.loss_weights, config.train.seed)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=config.train.max_steps, gradient_clip_val=config.optim.clip_norm, logger=False,
        limit_val_batches=0, enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False,
        max_epochs=-1,
    )  # fmt: skip
    trainer.fit(task, SpeechDataModule(splits, config.data, seed=config.train.seed))
    return task.model.state_dict()


def test_a_fault_within_the_budget_is_told_and_changes_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = read_corpus(plant_nan(tmp_path / "corpus", "102-1-0002"))
    config = long(max_steps=30, log_every=1)
    watched = pretrain(config, splits, tmp_path / "traced").state_dict()
    assert "102-1-0002" in caplog.text
    left_out = sum(column(tmp_path / "traced", "train/steps_left_out"))
    assert left_out == caplog.text.count("left out, its gradient") > 1
    plain = unwatched(config, splits)
    assert all(torch.equal(watched[name], plain[name]) for name in watched)


class Fragile(PositionalConvEmbedding):
    """Finite forwards, not backwards: the slope of a root at nothing."""

    def forward(self, x, lengths=None):
        out = super().forward(x, lengths)
        return out + (0 * out).abs().sqrt()


@dataclass(kw_only=True)
class FragileConfig(ContrastiveConfig):
    def build_positional_embedding(self):
        return Fragile(self.n_embd, self.pos_conv_kernel, self.pos_conv_groups)


def test_a_gradient_that_alone_is_not_finite_names_finite_losses_and_the_utterances_of_the_step(
    corpus: Path, tmp_path: Path
) -> None:
    config, splits = long(max_steps_left_out=0), read_corpus(corpus)
    config.model = FragileConfig(**vars(config.model))
    with pytest.raises(JobError, match=r"1 steps left out.*step 1: every loss here is finite") as error:
        pretrain(config, splits, tmp_path / "run")
    losses = dict(re.findall(r"(contrastive|diversity|feature_penalty) (\S+?)[,;]", str(error.value)))
    assert len(losses) == 3 and all(math.isfinite(float(loss)) for loss in losses.values())
    named = str(error.value).split("utterances ")[1].split("; repair")[0].split(", ")
    assert len(named) == len({*named} & {cut.id for cut in splits["train"]})


def test_weights_that_are_not_finite_are_named(corpus: Path, tmp_path: Path) -> None:
    out, splits = tmp_path / "run", read_corpus(corpus)
    pretrain(long(max_steps=10), splits, out)
    path, saved = newest_good(out)
    saved["state_dict"]["model.transformer.1.mlp.fc_1.weight"][0] = math.nan
    torch.save(saved, path)
    with pytest.raises(
        JobError, match=r"11 steps left out.*weights that are not finite: transformer\.1\.mlp\.fc_1\.weight; losses"
    ):
        pretrain(long(max_steps=60), splits, out, resume=True)


@pytest.mark.parametrize("losses", [(1.0, math.nan), (1.0, 2.0)])
def test_the_utterances_of_a_step_are_those_of_its_faulty_micro_batches(losses: tuple[float, float]) -> None:
    parts = [
        MicroBatch([f"{name}-{row}" for row in range(10)], {"a": torch.tensor(loss)}, torch.ones(10, dtype=torch.bool))
        for name, loss in zip("xy", losses, strict=True)
    ]
    line = describe(parts, torch.nn.Linear(2, 2))
    named = line.split("utterances ")[1].split(", ")
    if math.isfinite(losses[1]):
        assert named == parts[0].ids + parts[1].ids and "losses a 3;" in line
    else:
        assert named == parts[1].ids and "losses a nan;" in line
