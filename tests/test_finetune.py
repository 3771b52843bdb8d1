"""Fine-tuning: masks, learning rates, low-rank updates, what a run starts from, what it says on the way."""

import csv
import io
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w2v2 import recipes
from w2v2.checkpoint.formats import read
from w2v2.checkpoint.native import save_weights
from w2v2.cli.main import main
from w2v2.data.corpora import Split, Splits, read_corpus
from w2v2.data.loader import whole_utterances
from w2v2.decoding.greedy import Greedy
from w2v2.errors import UsageError
from w2v2.evaluation.evaluate import evaluate
from w2v2.inference.recognizer import Recognizer, load_recognizer
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.model.lora import add_lora, merge_lora, merged_state
from w2v2.model.masking import keyed_generator, sample_channel_masks
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary, load_vocabulary
from w2v2.training import preflight as preflights
from w2v2.training.config import FinetuneConfig, PretrainConfig
from w2v2.training.ctc_task import FinetuneTask, Plateau, emission_counts
from w2v2.training.data import SpeechDataModule
from w2v2.training.finetune import finetune, label_fit
from w2v2.training.head_task import rate_share
from w2v2.training.preflight import preflight
from w2v2.training.run import validate_task
from w2v2.training.units import Phonemes, SentencePieces


def thin(**train) -> FinetuneConfig:
    """``tiny_ctc`` with less of everything."""
    config = recipes.tiny_ctc()
    model = config.model
    model.n_layer, model.n_embd, model.ffn_dim, model.conv_channels = 2, 48, 64, (16,) * 7
    model.conv_norm, model.pos_conv_kernel = "group:8", 16
    config.data.batch_seconds = 8.0
    config.optim.schedule.total_steps = 20
    settings = {"log_every": 1, "val_every": 5, "checkpoint_every": 5, "max_steps": 10} | train
    for name, value in settings.items():
        setattr(config.train, name, value)
    return config


@pytest.fixture(scope="module")
def splits(corpus: Path) -> Splits:
    return read_corpus(corpus)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the weights of a pretraining model of the thin shape."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = PretrainConfig(model=thin().model)
    save_config(config, folder / "config.json")
    torch.manual_seed(3)
    save_weights(config.model.build(), folder)
    return folder


@pytest.fixture(scope="module")
def tuned(splits: Splits, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    finetune(thin(), splits, out, init_from=pretrained)
    return out


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


# --- Masks ------------------------------------------------------------------------------------------------------------


def fairseq_channels(rows: int, width: int, prob: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """Written after ALGORITHM.md section 5: a number of spans for the batch, then rows equalised to the fewest."""
    n = int(prob * width / span + rng.random())
    found = []
    for _ in range(rows):
        starts = rng.choice(width - span, n, replace=False)
        found.append({c for start in starts for c in range(start, start + span)})
    fewest = min(map(len, found))
    mask = np.zeros((rows, width), bool)
    for row, channels in zip(mask, found, strict=True):
        row[rng.choice(sorted(channels), fewest, replace=False)] = True
    return mask


@pytest.mark.parametrize("prob", [0.25, 0.5, 0.1])
def test_channel_masks_are_distributed_as_published(prob: float) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for batch in range(150):
        rngs = [keyed_generator(batch, row) for row in range(8)]
        mask = torch.stack(sample_channel_masks(768, prob, 64, rngs, keyed_generator(batch, "batch")))
        assert len({int(n) for n in mask.sum(1)}) == 1
        ours.append(mask.float().mean().item())
        theirs.append(fairseq_channels(8, 768, prob, 64, rng).mean())
    error = (np.var(ours) / 150 + np.var(theirs) / 150) ** 0.5
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.4)


def test_no_channel_is_masked_where_the_share_rounds_to_no_span() -> None:
    assert not torch.stack(sample_channel_masks(48, 0.0, 8, [keyed_generator(0)], keyed_generator(1))).any()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("channel_mask_length", 40, "`channel_mask_length` must be at most half of the 48 channels, got 40"),
        ("channel_mask_prob", 1.5, "`channel_mask_prob` must be 0 or more, less than 1, got 1.5"),
        ("layer_decay", 1.1, "`layer_decay` must be more than 0, at most 1, got 1.1"),
        ("lora_rank", -1, "`lora_rank` must be 0 or more, got -1"),
        ("lora_alpha", 0.0, "`lora_alpha` must be more than 0, got 0"),
        ("freeze_encoder_steps", -1, "`freeze_encoder_steps` must be 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: float, said: str) -> None:
    config = thin()
    config.channel_mask_prob, config.channel_mask_length = 0.1, 8
    config.check()
    setattr(config, field, value)
    with pytest.raises(UsageError, match=said):
        config.check()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model.dropout", 1.5, "`model.dropout` must be 0 or more, less than 1, got 1.5"),
        ("model.layer_drop", 1.0, "`model.layer_drop` must be 0 or more, less than 1, got 1"),
        ("model.mask_length", 0, "`model.mask_length` must be 1 to 100000, got 0"),
        ("model.mask_prob", 1.7, "`model.mask_prob` must be 0 to 1, got 1.7"),
        ("model.logit_temperature", 0.0, "`model.logit_temperature` must be more than 0, got 0"),
        ("optim.schedule.peak", -1.0, "`optim.schedule.peak` must be 0 or more, got -1"),
        ("optim.schedule.peak", math.nan, "`optim.schedule.peak` must be 0 or more, got nan"),
        ("optim.schedule.total_steps", 0, "`optim.schedule.total_steps` must be 1 or more, got 0"),
        ("optim.clip_norm", -1.0, "`optim.clip_norm` must be more than 0, got -1"),
        ("optim.weight_decay", -0.1, "`optim.weight_decay` must be 0 or more, got -0.1"),
    ],
)
@pytest.mark.parametrize("recipe", [recipes.tiny, recipes.tiny_ctc])
def test_impossible_numbers_of_model_and_optimiser_are_refused_in_both_tasks(
    recipe: Callable[[], Any], field: str, value: float, said: str
) -> None:
    owner = config = recipe()
    *path, name = field.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, value)
    with pytest.raises(UsageError, match=said):
        config.check()


def test_utterances_shorter_than_a_mask_needs_are_refused() -> None:
    config = thin()
    config.data.min_seconds, config.model.mask_prob = 0.005, 0.0
    with pytest.raises(UsageError, match="must leave 1 frames or more of every"):
        config.check()
    config.data.min_seconds, config.model.mask_prob = 0.05, 0.5
    with pytest.raises(UsageError, match="must leave 3 frames"):
        config.check()


# --- Learning rates and low-rank updates ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_layer_decay_gives_each_depth_its_share_of_the_rate(norm_first: bool) -> None:
    config = thin()
    config.model.norm_first, config.model.n_layer, config.layer_decay = norm_first, 3, 0.5
    config.model.conv_gradient_scale, config.model.mask_prob = 0.1, 0.0
    model = Wav2Vec2ForCTC(config.model, 5)
    task = FinetuneTask(model, Vocabulary.from_texts(["AB"]), config)
    groups = task.parameter_groups()
    names = {id(p): name for name, p in model.named_parameters()}
    share = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert share.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    # By BEiT's numbering: what feeds the first block is layer 0, block i layer i + 1, the head layer n + 1.
    expected = {"feature_encoder": 0, "feature_projection": 0, "positional_embedding": 0, "lm_head": 4}
    expected |= {"transformer.0": 1, "transformer.1": 2, "transformer.2": 3, "ln_f": 4 if norm_first else 0}
    for prefix, layer in expected.items():
        found = {value for name, value in share.items() if name.startswith(prefix + ".")}
        assert found == {0.5 ** (4 - layer)}, prefix
    optimizer = task.configure_optimizers()
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**n for n in range(5)}
    config.layer_decay = 1.0
    assert len(task.parameter_groups()) == 1


def test_layer_decay_reaches_the_optimiser(splits: Splits, pretrained: Path, tmp_path: Path) -> None:
    """With next to no rate below it, the output layer alone moves. Adam's step does not depend on the gradient."""
    config = thin(max_steps=1, val_every=1)
    config.layer_decay = 1e-6
    moved = finetune(config, splits, tmp_path / "run", init_from=pretrained).model
    start = Wav2Vec2ForCTC(config.model, len(load_vocabulary(tmp_path / "run" / "vocab.json").labels))
    read(pretrained).fill_encoder(start)
    before, after = dict(start.named_parameters()), dict(moved.named_parameters())
    change = {
        name: (after[name] - before[name]).abs().max().item()
        for name in before
        if name.partition(".")[0] not in ("lm_head", "ln_f")
    }
    assert max(change.values()) < 1e-6 < config.optim.schedule(1)
    assert moved.lm_head.bias.abs().max().item() == pytest.approx(config.optim.schedule(1), rel=1e-3)
    assert rate_share("transformer.0.ln_1.weight", config.model, 0.5) == 0.25


def test_low_rank_updates_start_as_nothing_and_merge_to_the_same_output() -> None:
    torch.manual_seed(0)
    config = thin().model
    model = Wav2Vec2ForCTC(config, 7).eval()
    audio = torch.randn(2, 8000)
    plain, names = model(audio)[0], set(model.state_dict())
    add_lora(model, rank=3, alpha=6.0)
    torch.testing.assert_close(model(audio)[0], plain)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("attn.q_proj" in name for name in learning) == sum("attn.v_proj" in name for name in learning) == 4
    assert {name for name in learning if "_proj.parametrizations.weight.0." not in name} == {
        "lm_head.weight", "lm_head.bias",
    }  # fmt: skip
    with torch.no_grad():
        for name, p in learning.items():
            p.add_(0.3 * torch.randn_like(p)) if "lm_head" not in name else None
    adapted = model(audio)[0]
    assert (adapted - plain).abs().max() > 1e-2
    # The update of a weight is 6 / 3 times the product, written out.
    part = model.transformer[1].attn.q_proj.parametrizations.weight
    expected = part.original + 2.0 * part[0].up @ part[0].down
    state = merged_state(model, model.state_dict())
    assert set(state) == names
    torch.testing.assert_close(state["transformer.1.attn.q_proj.weight"], expected)
    other = Wav2Vec2ForCTC(config, 7).eval()
    other.load_state_dict(state)
    merge_lora(model)
    assert set(model.state_dict()) == names
    for merged in (other, model):
        torch.testing.assert_close(merged(audio)[0], adapted)


def lora(**train) -> FinetuneConfig:
    config = thin(**train)
    config.lora_rank, config.layer_decay, config.model.activation_dropout = 4, 0.8, 0.1
    config.model.mask_prob, config.channel_mask_prob, config.channel_mask_length = 0.3, 0.2, 8
    config.freeze_encoder_steps = 2
    return config


def test_a_run_with_low_rank_updates_changes_them_alone_resumes_exactly_and_leaves_plain_weights(
    splits: Splits, pretrained: Path, tmp_path: Path
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    recognizer = finetune(lora(), splits, whole, init_from=pretrained)
    finetune(lora(max_steps=5), splits, parted, init_from=pretrained)
    finetune(lora(), splits, parted, init_from=pretrained, resume=True)
    for name in ("train/loss", "train/grad_norm", "valid/loss", "valid/cer"):
        assert column(whole, name) == column(parted, name)
    states = [load_recognizer(run).model.state_dict() for run in (whole, parted)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(states[0][name], tensor) for name, tensor in recognizer.model.state_dict().items())
    start = Wav2Vec2ForCTC(lora().model, len(recognizer.vocabulary.labels))
    read(pretrained).fill_encoder(start)
    changed = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, states[0][name])}
    updated = {f"transformer.{i}.attn.{part}.weight" for i in range(2) for part in ("q_proj", "v_proj")}
    assert changed == updated | {"lm_head.weight", "lm_head.bias"}
    best = load_recognizer(whole / "best")  # plain weights with their vocabulary, as the run's own
    assert best.vocabulary == recognizer.vocabulary


def test_a_frozen_encoder_is_left_to_itself_even_by_weight_decay_and_learns_afterwards(
    splits: Splits, pretrained: Path, tmp_path: Path
) -> None:
    def changed(steps: int) -> set[str]:
        config = thin(max_steps=steps)
        config.freeze_encoder_steps, config.optim.weight_decay, config.optim.schedule.peak = 2, 0.5, 0.1
        recognizer = finetune(config, splits, tmp_path / str(steps), init_from=pretrained)
        start = Wav2Vec2ForCTC(config.model, len(recognizer.vocabulary.labels))
        read(pretrained).fill_encoder(start)
        after = recognizer.model.state_dict()
        return {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, after[name])}

    assert changed(2) == {"lm_head.weight", "lm_head.bias"}
    assert len(changed(4)) > 20


def test_low_rank_updates_of_random_weights_are_refused(splits: Splits, tmp_path: Path) -> None:
    for call in (lambda: finetune(lora(), splits, tmp_path / "run"), lambda: preflight(lora(), splits)):
        with pytest.raises(UsageError, match=r"`lora_rank` 4 keeps the weights of `init_from` RUN"):
            call()
    assert not (tmp_path / "run").exists()


# --- What a run starts from -------------------------------------------------------------------------------------------


def test_the_best_weights_are_those_with_the_lowest_cer_then_wer(tuned: Path) -> None:
    import json

    best = json.loads((tuned / "best" / "best.json").read_text())
    scores = list(zip(column(tuned, "valid/cer"), column(tuned, "valid/wer"), column(tuned, "valid/loss"), strict=True))
    assert tuple(best["score"]) == min(scores)


def start_weights(config: FinetuneConfig, splits: Splits, out: Path, init_from: Path) -> dict[str, torch.Tensor]:
    """Of a run whose rate is 0: what it began with."""
    config.optim.schedule.peak, config.train.max_steps = 0.0, 1
    return finetune(config, splits, out, init_from=init_from).model.state_dict()


def with_texts(splits: Splits, *texts: str) -> Splits:
    """The same audio, its transcripts in turn from some."""
    from lhotse import fastcopy

    def said(cut, text):
        return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], text=text)])

    return {
        name: Split.of(said(cut, texts[i % len(texts)]) for i, cut in enumerate(split))
        for name, split in splits.items()
    }


@pytest.mark.parametrize("texts", [("SUN MOON STAR",), ("sun", "moon")])
def test_a_fine_tuned_run_gives_its_output_layer_where_its_labels_cover_the_transcripts(
    splits: Splits, tuned: Path, tmp_path: Path, texts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "w2v2"):
        began = start_weights(thin(), with_texts(splits, *texts), tmp_path / "run", tuned)
    theirs = load_recognizer(tuned)
    assert all(torch.equal(began[name], tensor) for name, tensor in theirs.model.state_dict().items())
    assert load_vocabulary(tmp_path / "run" / "vocab.json") == theirs.vocabulary
    assert any(f"output layer are those of {tuned}" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("text", "units", "said"),
    [
        ("SÜN ZOO", None, "it has no label for Z Ü"),
        ("SUN", Phonemes(), "its labels are a Vocabulary, these a PhonemeVocabulary"),
    ],
)
def test_other_labels_start_the_output_layer_afresh_and_the_log_says_why(
    splits: Splits, tuned: Path, tmp_path: Path, text: str, units, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = thin()
    config.units = units or config.units
    with caplog.at_level(logging.INFO, "w2v2"):
        began = start_weights(config, with_texts(splits, text), tmp_path / "run", tuned)
    assert any(f"starts afresh, not from {tuned}: {said}" in record.getMessage() for record in caplog.records)
    theirs = load_recognizer(tuned).model.state_dict()
    same = {
        name for name in began if began[name].shape == theirs[name].shape and torch.equal(began[name], theirs[name])
    }
    assert began.keys() - same == {"lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize("units", [Phonemes(), SentencePieces(size=30)])
def test_other_units_train_and_their_folder_transcribes(splits: Splits, tmp_path: Path, units) -> None:
    config = thin(max_steps=2, val_every=2)
    config.units = units
    finetune(config, splits, tmp_path / "run")
    recognizer = load_recognizer(tmp_path / "run")
    text = "SUN MOON"
    assert recognizer.vocabulary.decode(recognizer.vocabulary.encode(text)) == text
    assert recognizer.emissions([torch.randn(16_000)])[0].shape[1] == len(recognizer.vocabulary.labels)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("SUN|MOON", "STAR"), "8 of 16 transcripts contain |, which the vocabulary has for itself"),
        (("SUN <unk>",), "16 of 16 transcripts contain <unk>"),
        (("A B C D E " * 40,), "none of 16 transcripts can be learned"),
        (("",), "no transcript has any character"),
    ],
)
def test_transcripts_that_cannot_be_learned_are_refused_before_anything_is_written(
    splits: Splits, tmp_path: Path, texts: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError) as error:
        finetune(thin(), with_texts(splits, *texts), tmp_path / "run")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_its_frames_is_named_and_never_trained_on(
    splits: Splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "LONG WORDS " * 30
    planted = with_texts(splits, *["SUN"] * 15, long)
    trained: list[str] = []

    class Spy(FinetuneTask):
        def training_step(self, batch, batch_idx):
            trained.extend(self.batch_ids)
            return super().training_step(batch, batch_idx)

    from unittest.mock import patch

    with caplog.at_level(logging.INFO, "w2v2"), patch("w2v2.training.finetune.FinetuneTask", Spy):
        finetune(thin(max_steps=12, val_every=12), planted, tmp_path / "run")
    bad = next(cut.id for cut in planted["train"] if cut.supervisions[0].text == long)
    assert len({*trained}) == 15 and bad not in trained
    said = [record.getMessage() for record in caplog.records]
    assert any("train: 1 of 16 transcripts have more labels" in line and bad in line for line in said)
    assert "train: 1 utterances with more labels than CTC can emit in their frames left out" in said


def test_feasibility_is_of_the_actual_labels(splits: Splits) -> None:
    model, text = thin().model, "AABBAABB " * 3
    characters = Vocabulary.from_texts([text])
    pieces = SentencePieces(size=12).vocabulary([text, "A B"])
    seconds = 0.5
    assert not label_fit(model, characters)(seconds, text)
    assert label_fit(model, pieces)(seconds, text)


# --- What is said on the way ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_counts_are_those_of_each_utterance_decoded_alone(paths: list[list[int]], data: st.DataObject) -> None:
    vocabulary = Vocabulary.from_texts(["AB"])
    width = max(map(len, paths))
    padded = torch.tensor(
        [
            row + data.draw(st.lists(st.integers(0, 4), min_size=width - len(row), max_size=width - len(row)))
            for row in paths
        ]
    )
    log_probs = torch.nn.functional.one_hot(padded, 5).float().log_softmax(-1)
    targets = data.draw(
        st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=len(paths), max_size=len(paths))
    )
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in targets], batch_first=True)
    lengths = torch.tensor([len(row) for row in targets])
    found = {
        k: int(v) for k, v in emission_counts(log_probs, [len(p) for p in paths], rows, lengths, vocabulary).items()
    }
    alone = [Greedy(vocabulary)(row[: len(path)]) for row, path in zip(log_probs, paths, strict=True)]
    assert found["blank"] == sum(path.count(0) for path in paths)
    assert found["emitted"] == sum(i != vocabulary.boundary for hypothesis in alone for i in hypothesis.ids)
    assert found["to_say"] == sum(i != vocabulary.boundary for row in targets for i in row)
    assert (found["frames"], found["labels"]) == (sum(map(len, paths)), sum(map(len, targets)))


def story(figures: list[tuple[float, float, float]], every: int = 25, frozen: int = 0) -> list[tuple[int, str]]:
    """News of a run by step, from (loss per label, blank share, length ratio) of its intervals."""
    plateau, told = Plateau(), []
    for number, (loss, blank, ratio) in enumerate(figures, 1):
        step = number * every
        line = plateau.look(step, {"loss_per_label": loss, "blank_share": blank, "length_ratio": ratio}, 900, frozen)
        told += [(step, line)] if line else []
    return told


FALL, FLAT, OUT = (4.0, 0.8, 0.05), (2.9, 0.97, 0.01), (2.0, 0.6, 0.7)


def test_a_plateau_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    told = story([(9.0, 0.1, 3.0), FALL, FLAT, *[FLAT] * 9, (2.7, 0.9, 0.15), OUT, OUT])
    assert [step for step, _ in told] == [125, 350]
    assert told[0][1].startswith("steps 75 to 125: 97% of the frames are blank, 0.01 labels are said")
    assert "every CTC run goes through" in told[0][1] and "until step 375" in told[0][1]
    assert told[1][1].startswith("step 350: out of the plateau of blanks after 275 steps")


def test_no_plateau_is_told_of_a_run_that_falls_all_the_way_speaks_or_only_pauses() -> None:
    assert story([(9.0 * 0.9**n, 0.97, 0.0) for n in range(12)]) == []
    assert story([(2.9, 0.6, 0.05)] * 12) == []  # not blank, whatever it is
    assert story([(2.9, 0.97, 0.5)] * 12) == []
    assert story([OUT, FLAT, FLAT, OUT, FLAT, FLAT, OUT], every=10) == []


def test_a_plateau_of_a_frozen_encoder_is_named_as_that() -> None:
    assert "the encoder is frozen until step 500" in story([FLAT] * 8, frozen=500)[0][1]


def test_validation_says_figures_and_samples_to_the_log_and_tensorboard(
    splits: Splits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with caplog.at_level(logging.INFO, "w2v2"):
        finetune(thin(max_steps=2, val_every=2), splits, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records]
    references = {" ".join((cut.supervisions[0].text or "").split()) for cut in splits["valid"]}
    shown = [line for line in said if line.startswith("  ") and line.split(" | ")[0].strip() in references]
    assert len(shown) == 3
    assert any(line.startswith("step 2, validation: loss ") and "% blank" in line for line in said)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tag = next(tag for tag in events.Tags()["tensors"] if "samples" in tag)
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert shown[0].split(" | ")[0].strip() in text
    assert 0 <= column(tmp_path / "run", "valid/blank_share")[-1] <= 1
    assert column(tmp_path / "run", "valid/length_ratio")[-1] >= 0


def test_validation_has_the_error_rates_of_evaluation_whatever_has_no_label(splits: Splits) -> None:
    config = thin()
    vocabulary = Vocabulary.from_texts(["SUN MOON"])
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config.model, len(vocabulary.labels)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        model.lm_head.bias[vocabulary.unknown] += 20  # says <unk>, now and then
    planted = with_texts(splits, "ü sun ü ü moon", "moon ß")
    data = SpeechDataModule(
        planted, replace(config.data, num_workers=0), normalize=config.model.normalize_audio, encode=vocabulary.encode
    )
    figures = validate_task(FinetuneTask(model, vocabulary, config), data, "valid")
    loader = whole_utterances("valid", planted["valid"], replace(config.data, num_workers=0))
    rows = io.StringIO()
    found = evaluate(Recognizer(model, vocabulary), Greedy(vocabulary), loader, rows).summary()
    assert "<UNK>" in rows.getvalue()
    assert (figures["wer"], figures["cer"]) == pytest.approx((found["wer"], found["cer"]))


# --- Preflight --------------------------------------------------------------------------------------------------------


def test_preflight_learns_what_can_be_learned_and_leaves_nothing(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = ["--model.n-layer", "2", "--model.n-embd", "48", "--model.ffn-dim", "64"]
    shape += ["--model.conv-channels", *["16"] * 7, "--model.conv-norm", "group:8"]
    shape += ["--model.mask-prob", "0.9", "--optim.schedule.peak", "1e-2"]  # nobody learns by heart with such masks
    with caplog.at_level(logging.INFO, "w2v2"):
        assert main(["finetune", "tiny_ctc", "--data", str(corpus), "--preflight", *shape]) == 0
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("preflight: 8 "))
    assert line.startswith("preflight: 8 utterances (") and line.endswith("this set-up can learn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["silent audio", "no learning rate", "one sound for all"])
def test_preflight_fails_where_nothing_can_be_learned(
    splits: Splits, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflights, "STEPS", 40)
    config = thin()
    config.optim.schedule.peak = 0.0 if fault == "no learning rate" else 1e-2
    if fault != "no learning rate":
        load = preflights.short_batch

        def broken(*args):
            batch = load(*args)
            batch.audio = (
                torch.zeros_like(batch.audio) if fault == "silent audio" else batch.audio[:1].expand_as(batch.audio)
            )
            batch.lengths = batch.lengths.clamp(max=int(batch.lengths.min()))
            return batch

        monkeypatch.setattr(preflights, "short_batch", broken)
    found = preflight(config, splits)
    assert not found.learns and "it does not learn them" in str(found)
    assert found.steps == 40


def test_preflight_on_the_command_line_fails_with_exit_code_1(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflights, "STEPS", 2)
    call = ["finetune", "tiny_ctc", "--data", str(corpus), "--out", str(tmp_path / "run"), "--preflight"]
    assert main([*call, "--optim.schedule.peak", "0"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("w2v2: failed: preflight: 8 utterances") and "it does not learn them" in last
    assert not (tmp_path / "run").exists()


def test_the_weights_of_a_run_load_as_those_of_its_model(tuned: Path) -> None:
    recognizer = load_recognizer(tuned)
    read(tuned).fill(Wav2Vec2ForCTC(thin().model, len(recognizer.vocabulary.labels)))
