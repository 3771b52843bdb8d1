"""How far word boundaries are from the true ones, which the synthesiser knows.

    python benchmarks/alignment.py MODEL CORPUS --out benchmarks/results/alignment.json

MODEL is a fine-tuning run, CORPUS a split of a synthetic corpus, of speakers that the model has not heard: beside each
``*.trans.txt`` lie the true times, ``*.words.jsonl``. Starts and ends of all words are compared, those of a forced
alignment of the transcript, and those of a greedy transcription where it has the word right.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch

from w2v2.decoding.greedy import Greedy
from w2v2.inference.align import align
from w2v2.inference.recognizer import load_recognizer
from w2v2.inference.recordings import source_of
from w2v2.inference.transcribe import transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.inference.words import Word

Pair = tuple[Word, Word]
"""True and found."""


def truths(corpus: Path) -> Iterator[tuple[Path, str, list[Word]]]:
    """Recording, transcript, true words."""
    for table in sorted(corpus.rglob("*.words.jsonl")):
        for line in table.read_text().splitlines():
            row = json.loads(line)
            words = [Word(text, start, end) for text, start, end in row["words"]]
            yield table.with_name(f"{row['id']}.flac"), " ".join(word.text for word in words), words


def matches(true: Sequence[Word], found: Sequence[Word]) -> list[Pair]:
    """Words that are right, by the alignment of least edits."""
    if not found:
        return []
    chunks = jiwer.process_words(" ".join(w.text for w in true), " ".join(w.text for w in found)).alignments[0]
    return [
        (true[chunk.ref_start_idx + i], found[chunk.hyp_start_idx + i])
        for chunk in chunks
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]


def errors(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Milliseconds: absolute errors, and the median with its sign: positive, too late."""
    starts = np.array([found.start - true.start for true, found in pairs]) * 1000
    ends = np.array([found.end - true.end for true, found in pairs]) * 1000
    figures: dict[str, Any] = {"words": len(pairs)}
    for name, values in (("start", starts), ("end", ends), ("boundary", np.concatenate([starts, ends]))):
        sizes = np.abs(values)
        figures[name] = {
            "median": round(float(np.median(sizes)), 1),
            "mean": round(float(sizes.mean()), 1),
            "percentile_90": round(float(np.percentile(sizes, 90)), 1),
            "bias": round(float(np.median(values)), 1),
        }
    return figures


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="fine-tuning run")
    parser.add_argument("corpus", type=Path, help="split of a synthetic corpus")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    recognizer = load_recognizer(args.model)
    greedy = Greedy(recognizer.vocabulary)
    aligned: list[Pair] = []
    said: list[Pair] = []
    references, hypotheses = [], []
    for file, text, words in truths(args.corpus):
        found = align(recognizer, source_of(str(file)), text)
        heard = next(transcribe(recognizer, [source_of(str(file))], greedy))
        assert isinstance(found, Transcript) and isinstance(heard, Transcript), file
        assert [word.text for word in found.words] == [word.text for word in words], file
        aligned += zip(words, found.words, strict=True)
        said += matches(words, heard.words)
        references.append(text)
        hypotheses.append(heard.text)
    record = {
        "command": "python benchmarks/alignment.py MODEL CORPUS",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "soundfile", "jiwer")}},
        "threads": torch.get_num_threads(),
        "model_wer": round(100 * jiwer.wer(references, hypotheses), 2),
        "milliseconds": {"forced": errors(aligned), "greedy": errors(said)},
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
