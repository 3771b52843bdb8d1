"""``w2v2 demo``, ``evaluate`` and ``report``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from w2v2.cli.decoding import Decoding
from w2v2.cli.options import MODEL, Device, Language, Workers, default, refuse_without
from w2v2.cli.progress import progress
from w2v2.data.config import DataConfig
from w2v2.data.corpora import Splits
from w2v2.errors import Count, Positive, UsageError, public
from w2v2.files import write_json

if TYPE_CHECKING:
    from w2v2.inference.recognizer import Classifier, FrameClassifier
    from w2v2.model.wav2vec2 import Wav2Vec2

log = logging.getLogger("w2v2")


@dataclass(kw_only=True)
class Demo:
    """See ``main.VERBS``."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/demo")
    """Folder of results."""
    data: Annotated[Path | None, default("the synthetic corpus", "DIR")] = None
    """Real speech in LibriSpeech layout."""
    seed: int = 0
    """Of everything random."""
    hours: Positive = 2.0
    """Synthetic training audio, hours."""
    shrink: Positive = 1.0
    """Divide the number of updates by this, for a quick look."""

    def run(self, named: Collection[str]) -> None:
        """Go the whole road."""
        from w2v2.demo import run_demo

        page = run_demo(self.out, data=self.data, seed=self.seed, hours=self.hours, shrink=self.shrink)
        log.info("look at %s", page)


@dataclass(kw_only=True)
class Evaluate(Decoding):
    """See ``main.VERBS``."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help=MODEL)]
    data: Annotated[str, arg(metavar="DIR")]
    """Prepared corpus, or folder of audio."""
    split: str = "test"
    """Split, or subset such as test-other."""
    tune: Annotated[str | None, default("none", "SPLIT")] = None
    """Split to tune the weights of LM, words and blanks on, such as valid."""
    trials: Count = 64
    """Weights to try with --tune."""
    json: bool = False
    """Print JSON instead of a table."""
    out: Annotated[Path | None, default("RUN/evaluation/SPLIT", "DIR")] = None
    """Folder of results, replaced; of --probe, which writes none otherwise, probe.json in it."""
    against: Annotated[Path | None, default("none", "DIR")] = None
    """Results of another system on the same utterances, a folder as of --out, to test."""
    probe: bool = False
    """Phones and speakers that a linear classifier tells from each layer, beside log-mel, MFCC and random weights."""
    labels: Annotated[Path | None, default("that of --data", "DIR")] = None
    """Folder of phones with times for --probe, or of what frames are: *.ctm, *.TextGrid."""
    layers: Annotated[tuple[int, ...], default("all", "[INT ...]")] = ()
    """Of --probe: blocks from 1, 0 the convolutions."""
    minutes: Positive = 20.0
    """Of --probe: labelled audio of either split at most."""
    abx: bool = False
    """Of --probe: ABX within and across speakers too, by fastabx."""
    batch_seconds: float = 87.5
    """Audio in a batch at most, s."""
    num_workers: Workers = 2
    """Processes that decode audio."""
    max_bad: str = "0.1%"
    """Share of utterances that may be unreadable; named."""
    language: Language = None
    device: Device = None
    """cpu, cuda, cuda:1, mps."""

    def run(self, named: Collection[str]) -> None:
        """Evaluate, and print a table or JSON."""
        from w2v2.data.corpora import choose_split, read_corpus
        from w2v2.inference.recognizer import Classifier, FrameClassifier, Recognizer, load, network_of
        from w2v2.model.wav2vec2 import Wav2Vec2
        from w2v2.training.pretrain import evaluate_pretrained

        splits = read_corpus(self.data, training=False)
        choose_split(splits, self.split, self.data)
        model = load(self.model, self.language)
        of_probe = ("layers", "minutes", "abx", "labels")
        if self.probe:
            encoder = network_of(model)
            if not isinstance(encoder, Wav2Vec2):
                raise UsageError(f"{self.model} is an exported graph without layers to probe; name what it was made of")
            self._only(
                ("probe", "out", "language", "device", *of_probe), named, "`probe` decodes nothing", "leave it out"
            )
            self._probe(splits, encoder)
            return
        needless = of_probe[:-1] if isinstance(model, FrameClassifier) else of_probe  # its labels are frames' classes
        refuse_without("probe", needless, named)
        if isinstance(model, Recognizer):
            refuse_without("tune", ("trials",), named, given=self.tune is not None)
            self._warn(one_split=len(splits) == 1)
            self._recognizer(splits, named)
            return
        if isinstance(model, Classifier | FrameClassifier):
            of_classes = ("labels", "out", "language", "device", "batch_seconds", "workers", "max_bad")
            self._only(of_classes, named, f"{self.model} tells classes and decodes nothing", "leave it out")
            self._classifier(splits, model)
            return
        self._only((), named, f"{self.model} has no CTC head", "name a run of 'w2v2 finetune'")
        if not self._is_ours():
            raise UsageError(f"{self.model} has no CTC head, and is no run of 'w2v2 pretrain' with losses to compute")
        sys.stdout.write(json.dumps(evaluate_pretrained(Path(self.model), splits, self.split), indent=2) + "\n")

    def _only(self, used: Collection[str], named: Collection[str], why: str, remedy: str) -> None:
        """Refuse what was given and would not be used."""
        if needless := [f"`{name}`" for name in named if name not in ("data", "split", "json", *used)]:
            raise UsageError(f"{why}, so {', '.join(needless)} cannot be used; {remedy}")

    def _is_ours(self) -> bool:
        """Whether the model is a run folder, or a folder of weights as of one."""
        from w2v2.checkpoint.native import CONFIG
        from w2v2.serial import read_json

        path = Path(self.model) / CONFIG
        return path.is_file() and "_type" in read_json(path)

    def _probe(self, splits: Splits, model: Wav2Vec2) -> None:
        from w2v2.evaluation.probe import probe
        from w2v2.evaluation.table import probe_table
        from w2v2.inference.recognizer import place

        place(model, self.device)
        labels, layers = self.labels or Path(self.data), self.layers or None
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
        with progress("probe") as show:
            results = probe(
                model, splits, self.split, labels, layers=layers, minutes=self.minutes, abx=self.abx, show=show
            )
        if self.out:
            write_json(self.out / "probe.json", results)
        lines = [json.dumps(results, indent=2, ensure_ascii=False)] if self.json else probe_table(results)
        sys.stdout.write("\n".join(lines) + "\n")

    def _classifier(self, splits: Splits, model: Classifier | FrameClassifier) -> None:
        from w2v2.evaluation.classes import classes_table, evaluate_classifier

        about = {"run": str(self.model), "data": self.data, "split": self.split}
        data = DataConfig(batch_seconds=self.batch_seconds, num_workers=self.num_workers, max_bad=self.max_bad)
        data.check()
        out, labels = self.out or Path(self.model) / "evaluation" / self.split, self.labels or Path(self.data)
        with progress("evaluate") as show:
            results = evaluate_classifier(
                model, splits, self.split, out, about, labels=labels, data=data, device=self.device, show=show
            )
        lines = [json.dumps(results, indent=2, ensure_ascii=False)] if self.json else classes_table(results)
        sys.stdout.write(public("\n".join(lines)) + "\n")

    def _recognizer(self, splits: Splits, named: Collection[str]) -> None:
        from w2v2.evaluation.evaluate import evaluate_model
        from w2v2.evaluation.table import evaluation_table

        with progress("evaluate") as show:
            results = evaluate_model(
                self.model,
                splits,
                self.split,
                corpus=self.data,
                **self.decoder(named),
                tune=self.tune,
                trials=self.trials,
                out=self.out,
                language=self.language,
                against=self.against,
                data=DataConfig(batch_seconds=self.batch_seconds, num_workers=self.num_workers, max_bad=self.max_bad),
                device=self.device,
                show=show,
            )
        lines = [json.dumps(results, indent=2, ensure_ascii=False)] if self.json else evaluation_table(results)
        sys.stdout.write(public("\n".join(lines)) + "\n")

    def _warn(self, *, one_split: bool) -> None:
        from w2v2.training.config import FinetuneConfig, run_config

        trained = run_config(Path(self.model)) if self._is_ours() else None
        if one_split and isinstance(trained, FinetuneConfig) and public(self.data) in trained.data.sources:
            log.warning(
                "%s is one split here, and what the model was trained on: for a score of unseen speakers, hold some "
                "out with 'w2v2 prepare'",
                self.data,
            )


@dataclass(kw_only=True)
class Report:
    """See ``main.VERBS``."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""

    def run(self, named: Collection[str]) -> None:
        """Write the page."""
        from w2v2.report import write_demo_report, write_run_report

        demo = (self.folder / "summary.json").exists()
        log.info("look at %s", (write_demo_report if demo else write_run_report)(self.folder))
