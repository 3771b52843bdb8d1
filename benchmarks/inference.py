"""Transcription beside transformers' pipeline: CPU time of ours in PyTorch, as ONNX and in 8 bits.

    python benchmarks/inference.py --out benchmarks/results/inference.json

A CTC model of the released BASE's shape, built by transformers with random weights, transcribes noise of 10 s, 60 s and
10 minutes and 100 recordings of 2 to 6 s. It is loaded here from transformers' folder, and from its exports. All take
their turn in each round; what counts is the ratio of CPU times to the pipeline's in the same round. The pipeline is
given windows as ours are (30 s, 3 s of context at each side) and a batch of one, its fastest on a CPU. Texts are
compared: in float32 they are to be equal. In 8 bits their error rates, of the texts in float32, are an upper bound that
says little: random weights are undecided far more often than trained ones, and write words as long as a recording.
``w2v2 export MODEL OUT --int8 --data CORPUS`` states those of a trained model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch
import transformers

from w2v2.checkpoint.formats import GRAPH, INT8_GRAPH, read
from w2v2.decoding.greedy import Greedy
from w2v2.export import export_onnx
from w2v2.inference.recognizer import Recognizer, load_recognizer
from w2v2.inference.recordings import source_of
from w2v2.inference.transcribe import transcribe
from w2v2.inference.transcripts import Transcript

RATE = 16_000
LABELS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
Transcriber = Callable[[list[Path]], list[str]]


def published(folder: Path) -> None:
    """A folder as of facebook/wav2vec2-base-960h, weights random and spread so that labels change."""
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=len(LABELS)))
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
        model.lm_head.bias[1:4] = -1e4  # never said
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({label: i for i, label in enumerate(LABELS)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)


def noise(folder: Path, name: str, seconds: list[float]) -> list[Path]:
    """Recordings of noise whose colour and loudness wander."""
    files = []
    for i, length in enumerate(seconds):
        rng = np.random.default_rng(i)
        white = rng.standard_normal(round(length * RATE))
        slow = np.repeat(rng.standard_normal(len(white) // 1_600 + 1), 1_600)[: len(white)]
        files.append(folder / f"{name}-{i}.wav")
        soundfile.write(files[-1], 0.05 * (white + slow * np.roll(white, 1)), RATE)
    return files


def ours(recognizer: Recognizer) -> Transcriber:
    """``w2v2 transcribe``."""
    decoder = Greedy(recognizer.vocabulary)

    def run(files: list[Path]) -> list[str]:
        results = list(transcribe(recognizer, [source_of(str(file)) for file in files], decoder))
        assert all(isinstance(result, Transcript) for result in results), results
        return [result.text for result in results if isinstance(result, Transcript)]

    return run


def pipeline(folder: Path) -> Transcriber:
    """transformers'; it is given samples, since reading files it needs ffmpeg for."""
    pipe = transformers.pipeline(
        "automatic-speech-recognition", str(folder), device="cpu", chunk_length_s=30, stride_length_s=3
    )

    def run(files: list[Path]) -> list[str]:
        rows = ({"raw": soundfile.read(file, dtype="float32")[0], "sampling_rate": RATE} for file in files)
        return [" ".join(result["text"].split()) for result in pipe(rows)]

    return run


def measure(systems: dict[str, Transcriber], files: list[Path], rounds: int) -> dict[str, Any]:
    """CPU seconds of each, medians; ratios of the first's to each, round by round; texts beside ours in float32."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    texts: dict[str, list[str]] = {}
    for i in range(rounds):
        for name in sorted(systems, reverse=bool(i % 2)):
            started = time.process_time()
            texts[name] = systems[name](files)
            times[name].append(time.process_time() - started)
    first, reference = next(iter(systems)), texts["pytorch"]
    figures: dict[str, Any] = {}
    for name, values in times.items():
        ratios = sorted(theirs / own for theirs, own in zip(times[first], values, strict=True))
        figures[name] = {
            "cpu_seconds": round(statistics.median(values), 3),
            "times_pipeline": round(statistics.median(ratios), 3),
            "from_to": [round(ratios[0], 3), round(ratios[-1], 3)],
            "equal_texts": sum(a == b for a, b in zip(reference, texts[name], strict=True)),
            "wer_of_pytorch": round(jiwer.wer(reference, texts[name]), 5),
            "cer_of_pytorch": round(jiwer.cer(reference, texts[name]), 5),
        }
    return {"texts": len(files), "characters": sum(map(len, reference)), **figures}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the long recording (default: %(default)s)")
    parser.add_argument("--files", type=int, default=100, help="short recordings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    packages = ("w2v2", "torch", "transformers", "onnxruntime")
    record: dict[str, Any] = {
        "command": f"python {' '.join(['benchmarks/inference.py', *sys.argv[1:]])}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "graph").mkdir()
        published(folder / "model")
        export_onnx(read(folder / "model"), folder / "graph", int8=True)
        systems = {
            "pipeline": pipeline(folder / "model"),
            "pytorch": ours(load_recognizer(folder / "model")),
            "onnx": ours(load_recognizer(folder / "graph" / GRAPH)),
            "int8": ours(load_recognizer(folder / "graph" / INT8_GRAPH)),
        }
        lengths = np.random.default_rng(0).uniform(2.0, 6.0, args.files).tolist()
        jobs = {"10 s": [10.0], "60 s": [60.0], f"{args.minutes:g} min": [60.0 * args.minutes], "short": lengths}
        for system in systems.values():
            system(noise(folder, "warm", [2.0]))
        for name, seconds in jobs.items():
            files = noise(folder, name.replace(" ", "-"), seconds)
            rounds = args.rounds if sum(seconds) > 10 else 3 * args.rounds
            record[name] = {"rounds": rounds, **measure(systems, files, rounds)}
            print(name, json.dumps(record[name]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
