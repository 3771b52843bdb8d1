"""Fine-tuning by two processes: the gradient of one with two micro-batches, and a validation of all utterances."""

import csv
from pathlib import Path

import pytest
from test_processes import torchrun
from test_resume import finish, launched

from w2v2.checkpoint.native import CONFIG
from w2v2.data.corpora import read_corpus
from w2v2.inference.recognizer import load_recognizer
from w2v2.serial import load_config
from w2v2.training.config import FinetuneConfig
from w2v2.training.ctc_task import FinetuneTask
from w2v2.training.data import SpeechDataModule
from w2v2.training.finetune import label_fit
from w2v2.training.run import validate_task

# Masks and everything else that is drawn by utterance or step; no dropout, which is drawn by rank.
SMALL = (
    "--model.n-layer 2 --model.n-embd 48 --model.ffn-dim 64 --model.conv-channels 16 16 16 16 16 16 16 "
    "--model.conv-norm group:8 --model.mask-prob 0.4 --channel-mask-prob 0.2 --channel-mask-length 8 "
    "--model.layer-drop 0.3 --data.batch-seconds 7 --data.num-buckets 1 --train.max-steps 2 --train.log-every 1 "
    "--train.val-every 2 --train.checkpoint-every 2 --optim.clip-norm None"
)


def trained(out: Path, corpus: Path, processes: int) -> dict[str, list[float]]:
    words = ["finetune", "tiny_ctc", "--data", str(corpus), "--out", str(out), *SMALL.split()]
    words += ["--train.devices", str(processes), "--train.accumulate", str(2 // processes)]
    if processes > 1:
        code, message = launched([*torchrun(), *words])
    else:
        code, message = finish(words)
    assert code == 0, message
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def validated_alone(out: Path, corpus: Path) -> dict[str, float]:
    recognizer, config = load_recognizer(out), load_config(out / CONFIG, FinetuneConfig)
    fits = label_fit(config.model, recognizer.vocabulary)
    data = SpeechDataModule(read_corpus(corpus), config.data, encode=recognizer.vocabulary.encode, fits=fits)
    return validate_task(FinetuneTask(recognizer.model, recognizer.vocabulary, config), data, "valid")


def test_two_processes_give_the_gradients_of_one_with_two_micro_batches_and_validate_all(
    corpus: Path, tmp_path: Path
) -> None:
    one, two = (trained(tmp_path / str(n), corpus, n) for n in (1, 2))
    assert len(one["train/loss"]) == 2
    for name in ("train/loss", "train/grad_norm", "train/blank_share", "train/length_ratio", "train/hours_heard"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    alone = validated_alone(tmp_path / "2", corpus)
    for name in ("wer", "cer", "loss", "blank_share", "length_ratio"):
        assert two[f"valid/{name}"][-1] == pytest.approx(alone[name], rel=1e-5), name
