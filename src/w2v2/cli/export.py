"""``w2v2 export``."""

from __future__ import annotations

import argparse
import logging
from importlib.util import find_spec
from pathlib import Path

from w2v2.cli.options import AddVerb
from w2v2.errors import UsageError

log = logging.getLogger("w2v2")


def add(verb: AddVerb) -> None:
    """Add the verb."""
    text = "a model for use without this package, checked against the original"
    export = verb("export", _export, text)
    export.add_argument("model", type=Path, help="run folder, or folder of weights")
    export.add_argument("out", type=Path, help="folder to write; new or empty")
    export.add_argument(
        "--to",
        choices=("onnx", "torch"),
        required=True,
        help="onnx: model.onnx, for onnxruntime; torch: model.pt2, for torch.export.load",
    )
    export.add_argument("--int8", action="store_true", help="onnx: also model.int8.onnx, linear layers in 8 bits")
    export.add_argument("--data", help="onnx: corpus to state word error rates on, of a CTC model")
    export.add_argument("--split", default="test", help="of --data: train, valid or test (default: %(default)s)")
    export.add_argument("--license", help="what the model card says, an id of the hub such as mit or cc-by-4.0")
    export.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload the folder to this repository of the Hugging Face hub, made private if it is new",
    )


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from w2v2.checkpoint.card import write_card
    from w2v2.checkpoint.hub import expect_hub, push
    from w2v2.files import whole_folder

    if args.to != "onnx" and (args.int8 or args.data):
        raise UsageError(f"--int8 and --data are for --to onnx, got --to {args.to}")
    has_hub = find_spec("huggingface_hub") is not None
    if not has_hub and (args.license or args.push_to_hub):
        raise UsageError("--license and --push-to-hub need huggingface_hub: pip install 'w2v2[hf]'")
    if args.push_to_hub:
        expect_hub(args.push_to_hub)
    with whole_folder(args.out) as folder:
        _write(args, folder)
        if has_hub:
            write_card(args.model, folder, name=args.out.name, license_id=args.license)
    log.info("wrote %s; look at %s", args.out, args.out / ("README.md" if has_hub else "export.json"))
    if not has_hub:
        log.warning("without a model card, which needs huggingface_hub: pip install 'w2v2[hf]'")
    if args.push_to_hub:
        log.info("pushed to %s", push(args.out, args.push_to_hub))


def _write(args: argparse.Namespace, folder: Path) -> None:
    if args.to == "torch":
        from w2v2.export import export_torch

        export_torch(args.model, folder)
    else:
        from w2v2.export import export_onnx

        speech = None
        if args.data:
            from w2v2.data.corpora import read_corpus

            splits = read_corpus(args.data, training=False)
            if args.split not in splits:
                got = ", ".join(splits)
                raise UsageError(f"--split must be one of {got}, which {args.data} has; got {args.split!r}")
            speech = splits, args.split
        export_onnx(args.model, folder, int8=args.int8, speech=speech)
