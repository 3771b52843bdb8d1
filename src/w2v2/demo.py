"""The whole road in one call, offline, on a laptop CPU.

Audio, manifest, pretraining, fine-tuning beside the same without pretraining, evaluation on unseen speakers, a page.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2v2 import recipes
from w2v2.data.audio import load_audio
from w2v2.data.corpora import Splits, describe, labelled_subset, read_corpus
from w2v2.errors import UsageError
from w2v2.evaluation.scoring import Tally
from w2v2.files import write_json
from w2v2.inference.recognizer import Recognizer
from w2v2.model.masking import keyed_generator
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.preparation.run import prepare
from w2v2.report import write_demo_report
from w2v2.synthetic.corpus import synthesize
from w2v2.synthetic.speakers import SyntheticConfig
from w2v2.text.spelling import normalize_text
from w2v2.training.config import PretrainConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.finetune import finetune, transcripts
from w2v2.training.plan import peak_memory
from w2v2.training.pretrain import evaluate_pretrained, pretrain

log = logging.getLogger(__name__)

LABELLED_MINUTES = 10.0
_MARK = "demo.json"
_OWN = ("pretrain", "finetuned", "scratch", "manifest")


def run_demo(out: Path, *, data: Path | None = None, seed: int = 0, hours: float = 2.0, shrink: float = 1.0) -> Path:
    """Run the demo and leave its results in a folder.

    Args:
        out: ``summary.json``, ``report.html``, and a run folder per stage go here. The results of an earlier demo are
            replaced, its corpus is used again.
        data: real speech in LibriSpeech layout; None: two hours of synthetic speech are made.
        seed: of everything random.
        hours: synthetic training audio.
        shrink: divides the number of updates of each stage; 1 is the demo, more is for a look at the machinery.

    Returns:
        Path of the report.

    Raises:
        UsageError: ``out`` holds something else, or ``data`` cannot be used.
    """
    _claim(out)
    seconds: dict[str, float] = {}
    source = f"--data {data}" if data is not None else f"--hours {hours:g}"
    if data is None:
        data = out / f"corpus-{hours:g}h-seed{seed}"
        with _stage("synthesise", seconds):
            synthesize(data, SyntheticConfig.sized(hours, seed))
    with _stage("prepare", seconds):
        prepare(data, out / "manifest")
        splits = read_corpus(out / "manifest")
    with _stage("pretrain", seconds):
        config = _scaled(recipes.tiny(), seed, shrink)
        pretrained = pretrain(config, splits, out / "pretrain")
        assert isinstance(pretrained, Wav2Vec2ForPretraining)
        figures = evaluate_pretrained(out / "pretrain", splits, "valid")
    labelled = splits | {"train": labelled_subset(splits["train"], LABELLED_MINUTES, seed)}
    with _stage("finetune", seconds):
        tuned = finetune(
            _scaled(recipes.tiny_ctc(), seed, shrink), labelled, out / "finetuned", init_from=out / "pretrain"
        )
    with _stage("scratch", seconds):
        scratch = finetune(_scaled(recipes.tiny_ctc_scratch(), seed, shrink), labelled, out / "scratch")
    with _stage("evaluate", seconds):
        split = "test" if "test" in splits else "valid"
        rows = _hypotheses({"finetuned": tuned, "scratch": scratch}, labelled, split)
        write_json(out / "hypotheses.json", _spread(rows, 10))
        _write_codebook(out, pretrained, splits, config)
        _write_example(out, splits, config)
    rates = {arm: _rates(rows, arm) for arm in ("finetuned", "scratch")}
    names = ("accuracy", "accuracy_all_masked", "code_perplexity", "prob_perplexity", "codes_per_utterance")
    summary = {
        "schema": 1,
        "pretrain": {"loss": figures["contrastive"], **{name: figures[name] for name in names}},
        **rates,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_memory_gib": _peak_memory_gib(),
        "command": f"w2v2 demo {source} --seed {seed} --shrink {shrink:g}",
        "test_split": split,
        "labelled_minutes": sum(cut.duration for cut in labelled["train"]) / 60,
        "data": describe(splits),
    }
    write_json(out / "summary.json", summary)
    log.info(
        "character error rate on unseen speakers: %.1f %% pretrained, %.1f %% from scratch",
        100 * rates["finetuned"]["cer"], 100 * rates["scratch"]["cer"],
    )  # fmt: skip
    return write_demo_report(out)


def _claim(out: Path) -> None:
    """Make the folder ours, or clear what an earlier demo left but its corpus."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UsageError(f"{out} is not empty and not of an earlier demo; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARK, {})
    for name in _OWN:
        shutil.rmtree(out / name, ignore_errors=True)


def _scaled(config: Any, seed: int, shrink: float) -> Any:
    """A recipe with the demo's seed, all its lengths divided by ``shrink``."""
    config.train.seed = seed
    schedule, train = config.optim.schedule, config.train
    for owner, name in (
        (schedule, "total_steps"), (schedule, "warmup_steps"),
        (train, "log_every"), (train, "val_every"), (train, "checkpoint_every"),
    ):  # fmt: skip
        if hasattr(owner, name):
            setattr(owner, name, max(1, round(getattr(owner, name) / shrink)))
    return config


@contextlib.contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    log.info("%s ...", name)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    log.info("%s: %.0f s", name, seconds[name])


def _hypotheses(models: dict[str, Recognizer], splits: Splits, split: str) -> list[dict[str, str]]:
    """Reference and each model's hypothesis for every transcribed utterance of a split."""
    encode = models["finetuned"].vocabulary.encode
    data = SpeechDataModule({split: splits[split]}, recipes.tiny_ctc().data, encode=encode, normalize=False)
    hypotheses = {name: transcripts(model, data.eval_dataloader(split)) for name, model in models.items()}
    rows = []
    for utterance in splits[split].utterances():
        text, name = normalize_text(utterance.text or ""), utterance.id
        if text and all(name in by_id for by_id in hypotheses.values()):
            heard = {model: by_id[name] for model, by_id in hypotheses.items()}
            rows.append({"id": name, "speaker": utterance.speaker or "", "reference": text, **heard})
    return rows


def _rates(rows: list[dict[str, str]], arm: str) -> dict[str, Any]:
    """Error rates of one model, and an interval over speakers where there are enough."""
    tally = Tally()
    for row in rows:
        tally.add(row["reference"], row[arm], speaker=row["speaker"])
    found = tally.summary()
    return {"wer": found["wer"], "cer": found["cer"], "cer_interval": found["characters"]["interval"]}


def _spread(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """So many rows, evenly over the list: not the best ones."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def _write_codebook(out: Path, model: Wav2Vec2ForPretraining, splits: Splits, config: PretrainConfig) -> None:
    """How often each entry of each codebook is chosen over the masked frames of the validation set."""
    data = SpeechDataModule({"valid": splits["valid"]}, config.data)
    counts = torch.zeros(model.config.n_groups, model.config.n_entries)
    model.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            counts += model(batch.audio, model.draw(batch), batch.lengths.tolist()).metrics["codes"]
    write_json(out / "codebook.json", {"counts": counts.int().tolist(), "n_entries": model.config.n_entries})


def _write_example(out: Path, splits: Splits, config: PretrainConfig) -> None:
    """One validation utterance with a mask as pretraining draws it."""
    cut = min(splits["valid"], key=lambda c: abs(c.duration - 4.0))
    audio = load_audio(cut)
    frames = config.model.frames([len(audio)])[0]
    mask = config.model.sample_mask(frames, keyed_generator(config.train.seed, 0, cut.id))
    hop = int(np.prod(config.model.conv_strides))
    np.savez_compressed(out / "example.npz", audio=audio, mask=mask.numpy(), hop=hop, id=cut.id)


def _peak_memory_gib() -> float:
    """Largest resident set of this process or of a helper process, GiB."""
    return peak_memory("self", "children") / 2**30
