"""``w2v2 convert`` and ``export``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from w2v2.cli.options import MODEL, Language, default, refuse_without
from w2v2.cli.progress import progress
from w2v2.errors import UsageError

if TYPE_CHECKING:
    from w2v2.checkpoint.contents import Checkpoint

log = logging.getLogger("w2v2")

Out = Annotated[Positional[Path], arg(metavar="OUT")]
_MODEL = MODEL.replace(", fairseq or 'w2v2 export'", " or fairseq")


@dataclass(kw_only=True)
class Convert:
    """See ``main.VERBS``."""

    source: Annotated[Positional[str], arg(metavar="SOURCE", help=_MODEL)]
    out: Out
    """Folder to write; new or empty."""
    to: Literal["ours", "hf", "fairseq"]
    """Format to write."""
    language: Language = None

    def run(self, named: Collection[str]) -> None:
        """Convert, and say what was compared."""
        from w2v2.checkpoint.formats import CERTIFICATE, convert

        with progress("convert") as show:
            certificate = convert(self.source, self.out, self.to, show, self.language)
        if certificate["compared_with"] is None:
            log.warning("not compared with another implementation: %s", certificate["why_not"])
        else:
            log.info("compared with %s: largest difference %.2g", certificate["compared_with"], certificate["largest"])
        log.info("wrote %s, with %s", self.out, CERTIFICATE)


@dataclass(kw_only=True)
class Export:
    """See ``main.VERBS``."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help=_MODEL)]
    out: Out
    """Folder to write; new or empty."""
    to: Literal["onnx", "torch"]
    """onnx: model.onnx, for onnxruntime; torch: model.pt2, for torch.export.load."""
    int8: bool = False
    """Of onnx: also model.int8.onnx, linear layers and convolutions in 8 bits."""
    data: Annotated[str | None, default("none", "DIR")] = None
    """Of onnx: corpus to state word error rates on, of a CTC model."""
    split: str = "test"
    """Of --data: train, valid or test."""
    language: Language = None
    license: Annotated[str | None, default("none", "ID")] = None
    """What the model card says, an id of the hub such as mit or cc-by-4.0."""
    push_to_hub: Annotated[str | None, default("not", "OWNER/NAME")] = None
    """Also upload the folder to this repository of the Hugging Face hub, made private if it is new."""

    def run(self, named: Collection[str]) -> None:
        """Export, with a model card where that can be written."""
        from w2v2.checkpoint.card import write_card
        from w2v2.checkpoint.formats import read
        from w2v2.checkpoint.hub import expect_hub, push
        from w2v2.files import whole_folder

        if self.to != "onnx" and (self.int8 or self.data):
            raise UsageError(f"`int8` and `data` are for `to` onnx, got `to` {self.to}")
        refuse_without("data", ("split",), named, given=bool(self.data))
        has_hub = find_spec("huggingface_hub") is not None
        if not has_hub and (self.license or self.push_to_hub):
            raise UsageError("`license` and `push_to_hub` need huggingface_hub: pip install huggingface_hub")
        if self.push_to_hub:
            expect_hub(self.push_to_hub)
        checkpoint = read(self.model, self.language)
        if checkpoint.classes:
            raise UsageError(f"{self.model} is a classifier, which is not exported; use it by w2v2.load")
        with whole_folder(self.out) as folder:
            self._write(checkpoint, folder)
            if has_hub:
                write_card(checkpoint.source, folder, name=self.out.name, license_id=self.license)
        log.info("wrote %s; look at %s", self.out, self.out / ("README.md" if has_hub else "export.json"))
        if not has_hub:
            log.warning("without a model card, which needs huggingface_hub: pip install huggingface_hub")
        if self.push_to_hub:
            log.info("pushed to %s", push(self.out, self.push_to_hub))

    def _write(self, checkpoint: Checkpoint, folder: Path) -> None:
        from w2v2.export import export_onnx, export_torch

        if self.to == "torch":
            export_torch(checkpoint, folder)
            return
        speech = None
        if self.data:
            from w2v2.data.corpora import choose_split, read_corpus

            splits = read_corpus(self.data, training=False)
            choose_split(splits, self.split, self.data)
            speech = splits, self.split
        export_onnx(checkpoint, folder, int8=self.int8, speech=speech)
