"""The whole road in one call, offline, on a laptop CPU.

Audio, manifest, pretraining, fine-tuning beside the same without pretraining, evaluation on unseen speakers, a page.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2v2 import recipes
from w2v2.checkpoint.native import WEIGHTS, read_native
from w2v2.data.audio import load_audio
from w2v2.data.corpora import Split, Splits, describe, labelled_subset, read_corpus
from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import TunableDecoder, make_decoder
from w2v2.decoding.greedy import Decoder, Greedy
from w2v2.decoding.kneser_ney import estimate
from w2v2.errors import UsageError
from w2v2.evaluation.probe import best_layer, probe
from w2v2.evaluation.scoring import Tally
from w2v2.evaluation.tuning import tune_on
from w2v2.files import write_json
from w2v2.inference.recognizer import Recognizer, load_recognizer, weights_key
from w2v2.model.masking import keyed_generator
from w2v2.model.pretraining import Wav2Vec2ForPretraining
from w2v2.model.wav2vec2 import Wav2Vec2
from w2v2.preparation.run import prepare
from w2v2.report import write_demo_report
from w2v2.report.listening import listening_examples
from w2v2.synthetic.corpus import synthesize
from w2v2.synthetic.speakers import SyntheticConfig
from w2v2.text.spelling import normalize_text
from w2v2.training.config import PretrainConfig
from w2v2.training.data import SpeechDataModule
from w2v2.training.finetune import finetune
from w2v2.training.plan import peak_memory
from w2v2.training.pretrain import evaluate_pretrained, pretrain
from w2v2.training.resume import WARM_START

log = logging.getLogger(__name__)

LABELLED_MINUTES, PROBE_MINUTES, TUNE_TRIALS, BEAM_SIZE, TRIGRAM = 10.0, 10.0, 16, 500, "trigram.arpa"
TUNE_BEAM = BeamConfig(
    beam_size=100, beam_size_token=10, lm_weight=2.2, word_score=-3.0, blank_score=-2.2, sum_paths=True
)
ARMS = ("finetuned", "warm_start_only", "scratch")
FIGURES = ("accuracy", "accuracy_all_masked", "code_perplexity", "prob_perplexity", "codes_per_utterance")
_MARK = "demo.json"


def run_demo(out: Path, *, data: Path | None = None, seed: int = 0, hours: float = 2.0, shrink: float = 1.0) -> Path:
    """Run the demo, and return the path of its report.

    Args:
        out: ``summary.json``, ``report.html`` and run folders. What an earlier demo left is replaced, but its corpus.
        data: real speech in LibriSpeech layout; None: two hours of synthetic speech are made.
        seed: of everything random.
        hours: synthetic training audio.
        shrink: divides the number of updates of each stage; 1 is the demo, more is for a look at the machinery.

    Raises:
        UsageError: ``out`` holds something else, or ``data`` cannot be used.
    """
    _claim(out)
    seconds: dict[str, float] = {}
    corpus = data or out / f"corpus-{hours:g}h-seed{seed}"
    if data is None:
        with _stage("synthesise", seconds):
            synthesize(corpus, SyntheticConfig.sized(hours, seed))
    with _stage("prepare", seconds):
        prepare(corpus, out / "manifest")
        splits = read_corpus(out / "manifest")
        split = "test" if "test" in splits else "valid"
    texts = (text for _, _, text in splits["train"].transcripts(0.0) if text)
    estimate([normalize_text(text).split() for text in texts], 3).save(out / TRIGRAM)
    labelled = labelled_subset(splits["train"], LABELLED_MINUTES, seed)
    hear = partial(hear_arm, splits=splits, labelled=labelled, split=split, out=out, seed=seed, shrink=shrink)
    with _beside() as pool:
        others = [pool.submit(hear, "scratch")]
        with _stage("pretrain", seconds):
            config = _scaled(recipes.tiny(), seed, shrink)
            pretrained = pretrain(config, splits, out / "pretrain")
            assert isinstance(pretrained, Wav2Vec2ForPretraining)
            figures = evaluate_pretrained(out / "pretrain", splits, "valid")
        others.append(pool.submit(hear, "warm_start_only"))
        with _stage("finetune", seconds):
            heard = hear("finetuned")
        with _stage("probe", seconds):
            probed = _probe(pretrained, splits, split, corpus, out)
        with _stage("evaluate", seconds):
            _write_codebook(out, pretrained, splits, config)
            _write_example(out, splits, config)
            rows = heard_rows(splits[split], heard | others[0].result() | others[1].result())
    rates = {arm: arm_rates(rows, arm) for arm in ARMS}
    summary = {
        "schema": 2,
        "pretrain": {"loss": figures["contrastive"], **{name: figures[name] for name in FIGURES}},
        "warm_start": _warm_start(out, splits),
        "probe": probed,
        **rates,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_memory_gib": peak_memory("self", "children") / 2**30,
        "command": f"w2v2 demo {f'--data {data}' if data else f'--hours {hours:g}'} --seed {seed} --shrink {shrink:g}",
        "test_split": split,
        "labelled_minutes": labelled.seconds / 60,
        "data": describe(splits),
    }
    write_json(out / "summary.json", summary)
    _tell(rows, rates, splits[split], out)
    return write_demo_report(out)


def _tell(rows: list[dict[str, str]], rates: dict[str, Any], cuts: Split, out: Path) -> None:
    """What came of it, in figures and in some sentences, to the log; ten rows and three to listen to, to files."""
    write_json(out / "hypotheses.json", _spread(rows, 10))
    model = load_recognizer(out / "finetuned" / "best")
    write_json(out / "listening.json", listening_examples(list(cuts), rows, model))
    for row in _spread(rows, 3):
        log.info("%-15s %s", "spoken:", row["reference"])
        for arm, name in (("finetuned", "pretrained"), ("scratch", "random weights")):
            log.info("%-15s %s", f"{name}:", row[arm])
            if f"{arm}_trigram" in row:
                log.info("%-15s %s", "  + trigram:", row[f"{arm}_trigram"])
    log.info(
        "character error rate on unseen speakers: %.1f %% pretrained, %.1f %% warm start alone, %.1f %% random weights",
        *(100 * rates[arm]["cer"] for arm in ARMS),
    )


def _probe(model: Wav2Vec2, splits: Splits, split: str, data: Path, out: Path) -> dict[str, Any] | None:
    """Accuracies on phones of log-mel and the best layers (all: ``probe.json``), of 1 and 5 frames; None: no labels."""
    (out / "probe.json").unlink(missing_ok=True)  # of an earlier demo
    if not any(data.rglob("*.phones.ctm")):
        return None
    results = probe(model, splits, split, data, minutes=PROBE_MINUTES)
    write_json(out / "probe.json", results)
    kinds = {"log_mel": "log-mel", "random": "random", "pretrained": "model"}
    return {name: best_layer(results["rows"], kind) for name, kind in kinds.items()}


def _warm_start(out: Path, splits: Splits) -> dict[str, float]:
    """How long the stage took, by its file of metrics, and what it explains of the validation spectra."""
    folder = out / "pretrain" / WARM_START
    seconds = (folder / WEIGHTS).stat().st_mtime - (folder / "environment.json").stat().st_mtime
    return {"seconds": seconds, "r2": evaluate_pretrained(folder, splits, "valid")["r2"]}


@contextlib.contextmanager
def _beside() -> Iterator[ProcessPoolExecutor]:
    """A process of one thread, as this one has meanwhile: two at a time are quicker than two threads."""
    threads = torch.get_num_threads()
    one_thread()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        yield pool
    torch.set_num_threads(threads)


def one_thread() -> None:
    """What a process beside others begins with."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)


Heard = dict[str, dict[str, str]]
"""Text of each utterance, by its id, of each arm (``scratch``, with the trigram ``scratch_trigram``)."""


def hear_arm(arm: str, splits: Splits, labelled: Split, split: str, out: Path, seed: int, shrink: float) -> Heard:
    """Fine-tune one, and write down a split's utterances, greedily and with the trigram."""
    config = _scaled(recipes.tiny_ctc_scratch() if arm == "scratch" else recipes.tiny_ctc(), seed, shrink)
    start = {"finetuned": out / "pretrain", "warm_start_only": out / "pretrain" / WARM_START}.get(arm)
    if start is not None:
        config.adopt_architecture(read_native(start).config)
    finetune(config, splits | {"train": labelled}, out / arm, init_from=start)
    model = load_recognizer(out / arm / "best")
    decoders: dict[str, Decoder] = {arm: Greedy(model.vocabulary)}
    if arm != "warm_start_only" and (search := _trigram(model, out, arm, splits, split)):
        decoders[f"{arm}_trigram"] = search
    heard: Heard = {name: {} for name in decoders}
    for cut in splits[split]:
        log_probs = model.emissions([torch.from_numpy(load_audio(cut))])[0]
        for name, decoder in decoders.items():
            heard[name][cut.id] = decoder(log_probs).text
    log.info("%s: done", arm)
    return heard


def _trigram(model: Recognizer, out: Path, arm: str, splits: Splits, split: str) -> Decoder | None:
    """Beam search over the words of all training transcripts, weighed by their trigram; None: not installed.

    Its weights are tuned for each arm on the validation voices, unless these are what is scored. Models that spell so
    badly need a wide beam, whose paths are summed: narrow ones lose what the trigram would have chosen (LOG.md).
    """
    try:
        search = make_decoder(model.vocabulary, lm=out / TRIGRAM, beam=TUNE_BEAM)
    except UsageError as error:
        log.warning("%s, no trigram: %s", arm, error)
        return None
    assert isinstance(search, TunableDecoder)
    best, folder, data = search.config, out / arm / "best", recipes.tiny_ctc().data
    if split != "valid":
        best = tune_on(model, search, splits["valid"], data, folder, weights_key(folder), trials=TUNE_TRIALS).best
    return search.tuned(replace(best, beam_size=BEAM_SIZE))


def _claim(out: Path) -> None:
    """Make the folder ours, or clear what an earlier demo left but its corpus."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UsageError(f"{out} is not empty and not of an earlier demo; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARK, {})
    for name in ("pretrain", *ARMS, "manifest"):
        shutil.rmtree(out / name, ignore_errors=True)


def _scaled(config: Any, seed: int, shrink: float) -> Any:
    """A recipe with the demo's seed, all its lengths divided by ``shrink``."""
    config.train.seed = seed
    schedule, train, warm = config.optim.schedule, config.train, getattr(config, "warm_start", None)
    for owner, name in (
        (warm, "updates"), (schedule, "total_steps"), (schedule, "warmup_steps"),
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


def heard_rows(cuts: Split, heard: Heard) -> list[dict[str, str]]:
    """Reference and hypotheses of each arm, greedy and with the trigram, of every transcribed utterance."""
    rows = []
    for cut in cuts:
        if text := normalize_text(cut.supervisions[0].text or ""):
            row = {"id": cut.id, "speaker": cut.supervisions[0].speaker or "", "reference": text}
            rows.append(row | {name: texts[cut.id] for name, texts in heard.items()})
    return rows


def arm_rates(rows: list[dict[str, str]], arm: str) -> dict[str, Any]:
    """Error rates of one model, greedy and with the trigram, and an interval over speakers where there are enough."""
    summaries = {}
    for name in (arm, f"{arm}_trigram"):
        tally = Tally()
        for row in rows:
            if name in row:
                tally.add(row["reference"], row[name], speaker=row["speaker"])
        if tally.all.utterances:
            summaries[name] = tally.summary()
    greedy, trigram = summaries[arm], summaries.get(f"{arm}_trigram", {"wer": None, "cer": None})
    rates = {"wer": greedy["wer"], "cer": greedy["cer"]}
    beside = {f"{rate}_trigram": trigram[rate] for rate in rates} | {"cer_interval": greedy["characters"]["interval"]}
    return rates if arm == "warm_start_only" else rates | beside


def _spread(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """So many rows, evenly over the list: not the best ones."""
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def _write_codebook(out: Path, model: Wav2Vec2ForPretraining, splits: Splits, config: PretrainConfig) -> None:
    """How often each entry of each codebook is chosen over the masked frames of the validation set."""
    counts = torch.zeros(model.config.n_groups, model.config.n_entries)
    model.eval()
    with torch.no_grad():
        for batch in SpeechDataModule({"valid": splits["valid"]}, config.data).val_dataloader():
            counts += model(batch.audio, model.draw(batch), batch.lengths.tolist()).metrics["codes"]
    write_json(out / "codebook.json", {"counts": counts.int().tolist(), "n_entries": model.config.n_entries})


def _write_example(out: Path, splits: Splits, config: PretrainConfig) -> None:
    """One validation utterance with a mask as pretraining draws it."""
    cut = min(splits["valid"], key=lambda c: abs(c.duration - 4.0))
    audio = load_audio(cut)
    frames = config.model.frames([len(audio)])[0]
    mask = config.model.sample_mask(frames, keyed_generator(config.train.seed, 0, cut.id))
    hop = np.prod(config.model.conv_strides)
    np.savez_compressed(out / "example.npz", audio=audio, mask=mask.numpy(), hop=hop, id=cut.id)
