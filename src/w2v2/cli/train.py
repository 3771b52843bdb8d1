"""``w2v2 pretrain`` and ``finetune``."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from w2v2.cli.options import REQUIRED, Language, Settings, default, optional_value
from w2v2.cli.progress import progress
from w2v2.errors import JobError, Positive, UsageError
from w2v2.training.config import FinetuneConfig, PretrainConfig

log = logging.getLogger("w2v2")

Recipe = Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint=REQUIRED)]


@dataclass(kw_only=True)
class _Run:
    recipe: Recipe = ""
    """Name of a recipe, or FILE.py:FUNCTION, which is run."""
    data: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="DIR")] = ()
    """Prepared corpus (folder, https:// or s3://), or folder of audio as it is; again for several."""
    out: Annotated[Path | None, default("runs/RECIPE-DATE", "DIR")] = None
    """Run folder."""
    init_from: Annotated[str | None, default("none", "MODEL")] = None
    """Whose encoder, in pretraining also its objective, to start from: whatever 'w2v2 convert' reads."""
    language: Language = None
    resume: Annotated[str, optional_value("yes", "yes", "auto"), default("no", "[yes|auto]")] = ""
    """Go on from the last good checkpoint in --out; auto: if there is one."""

    def start(self) -> dict[str, Any]:
        """What to start from."""
        if self.language is not None and self.init_from is None:
            raise UsageError("`language` is of the model that `init_from` names; name one, or leave `language` out")
        return {"init_from": self.init_from, "language": self.language}

    def prepared(self, config: Any) -> tuple[Path, bool]:
        """The folder to run in, and whether to go on with what is there, once the configuration has been checked."""
        from w2v2.training.folder import clear_begun
        from w2v2.training.resume import can_resume

        if self.data:
            config.data.sources = self.data
        if not config.data.sources:
            raise UsageError("name the audio with --data DIR: a prepared corpus, or a folder of audio")
        config.check()
        name = Path(self.recipe.rpartition(":")[0]).stem if ":" in self.recipe else self.recipe
        out = self.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        resume = self.resume == "yes" or (self.resume == "auto" and can_resume(out))
        if self.resume == "auto" and not resume:
            clear_begun(out)
        return out, resume


@dataclass(kw_only=True)
class Pretrain(_Run):
    """See ``main.VERBS``."""

    config: Settings[PretrainConfig] = field(default_factory=PretrainConfig)

    def run(self, named: Collection[str]) -> None:
        """Pretrain, and write the page of the run."""
        from w2v2.data.corpora import read_run
        from w2v2.training.pretrain import pretrain

        out, resume = self.prepared(self.config)
        pretrain(self.config, read_run(self.config.data), out, **self.start(), resume=resume)
        _report(out)


@dataclass(kw_only=True)
class Finetune(_Run):
    """See ``main.VERBS``."""

    minutes: Annotated[Positive | None, default("all", "FLOAT")] = None
    """Use only about so many minutes of labels, over all speakers."""
    label: Annotated[str | None, default("the recipe's", "NAME")] = None
    """Of recipes that classify utterances: speaker, text, language, gender, or another label of the manifest."""
    preflight: bool = False
    """See whether the set-up can learn eight short utterances by heart, and stop; exit code 1: it cannot."""
    config: Settings[FinetuneConfig] = field(default_factory=FinetuneConfig)

    def run(self, named: Collection[str]) -> None:
        """Fine-tune, and write the page of the run."""
        from w2v2.data.corpora import labelled_subset, read_run
        from w2v2.training.classify import classify
        from w2v2.training.finetune import finetune
        from w2v2.training.preflight import preflight
        from w2v2.training.units import Classes, FrameClasses

        units = self.config.units
        if isinstance(units, Classes):
            units.label = self.label or units.label
        elif self.label is not None:
            raise UsageError(f"`label` is of recipes such as classify_utterances; {self.recipe} has none")
        classifies = isinstance(units, Classes | FrameClasses)
        if classifies and (self.preflight or self.minutes is not None):
            raise UsageError("`preflight` and `minutes` are of transcripts; leave them out with classes")
        if self.preflight and self.resume:
            raise UsageError("`preflight` writes nothing and goes on with nothing; leave `resume` out")
        out, resume = self.prepared(self.config)
        splits = read_run(self.config.data)
        if classifies:
            classify(self.config, splits, out, **self.start(), resume=resume)
            _report(out)
            return
        if self.minutes is not None:
            splits["train"] = labelled_subset(splits["train"], self.minutes, self.config.train.seed)
        if self.preflight:
            with progress("preflight") as show:
                verdict = preflight(self.config, splits, **self.start(), show=show)
            if not verdict.learns:
                raise JobError(str(verdict))
            log.info("%s", verdict)
            return
        with progress("check transcripts") as show:
            finetune(self.config, splits, out, **self.start(), resume=resume, show=show)
        _report(out)


def _report(out: Path) -> None:
    """Write the page of a run; of several processes, the first one does."""
    from w2v2.training.run import is_first_process

    if is_first_process():
        from w2v2.report import write_run_report

        log.info("look at %s", write_run_report(out))
