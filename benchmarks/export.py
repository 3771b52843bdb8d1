"""Seconds for ten seconds of audio on this CPU: PyTorch, ONNX, ONNX in 8 bits and torch.export, taken in turn.

    python benchmarks/export.py --rounds 9 --out benchmarks/results/onnx.json
    python benchmarks/export.py --ctc runs/ctc --data corpus --out benchmarks/results/onnx.json

CTC models of the shape of ``base`` and of ``tiny``, random weights, batch 1, float32, the same number of threads for
all. A ratio is the median over rounds, in each of which every one runs once. Random weights say nothing about what
8 bits cost in words: ``--ctc`` exports a trained run and states error rates on the test split.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from w2v2 import Wav2Vec2ForCTC, recipes
from w2v2.checkpoint.formats import GRAPH, INT8_GRAPH, read
from w2v2.checkpoint.native import save_weights
from w2v2.data.corpora import read_corpus
from w2v2.export import CHECK, TORCH, eager, export_onnx, export_torch, onnx_session, speed
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary

PACKAGES = ("w2v2", "torch", "onnx", "onnxscript", "onnxruntime")


def measure(name: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Sizes and times of a recipe's shape."""
    with tempfile.TemporaryDirectory() as root:
        run, onnx, exported = (Path(root) / part for part in ("run", "onnx", "torch"))
        for folder in (run, onnx, exported):
            folder.mkdir()
        config = getattr(recipes, name)().model
        vocabulary = Vocabulary.from_texts(["the quick brown fox jumps over a lazy dog's"])
        torch.manual_seed(0)
        model = Wav2Vec2ForCTC(config, len(vocabulary.labels)).eval()
        save_weights(model, run)
        save_config(config, run / "config.json")
        vocabulary.save(run / "vocab.json")
        export_onnx(read(run), onnx, int8=True)
        export_torch(read(run), exported)
        checks = [json.loads((folder / CHECK).read_text()) for folder in (onnx, exported)]
        runs = {
            "pytorch": eager(model),
            GRAPH: onnx_session(onnx / GRAPH),
            INT8_GRAPH: onnx_session(onnx / INT8_GRAPH),
            TORCH: torch.export.load(exported / TORCH).module(),
        }
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": checks[0]["bytes"] | checks[1]["bytes"],
            "largest_difference": {GRAPH: checks[0]["largest_difference"], TORCH: checks[1]["largest_difference"]},
            "int8": checks[0]["int8"],
            **speed(runs, seconds=seconds, rounds=rounds),
        }


def trained(run: Path, data: str) -> dict[str, Any]:
    """Error rates of a trained run in float32 and in 8 bits."""
    with tempfile.TemporaryDirectory() as root:
        export_onnx(read(run), Path(root), int8=True, speech=(read_corpus(data, training=False), "test"))
        check = json.loads((Path(root) / CHECK).read_text())
    return {name: check[name] for name in ("error_rates", "int8", "bytes", "speed", "largest_difference")}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["base", "tiny"], help="recipes (default: base tiny)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--ctc", type=Path, help="trained CTC run, for error rates")
    parser.add_argument("--data", help="its corpus")
    parser.add_argument("--out", type=Path, help="JSON file to write; what it has of other shapes stays")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    results["packages"] = {name: metadata.version(name) for name in PACKAGES}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    results["machine"] = {
        "python": platform.python_version(),
        "processor": next((line.partition(": ")[2] for line in flags.splitlines() if "model name" in line), ""),
        "vnni": "vnni" in flags,
    }
    for name in args.shapes:
        results[name] = measure(name, args.seconds, args.rounds)
    if args.ctc:
        results["trained"] = trained(args.ctc, args.data)
    text = json.dumps(results, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
