"""Latency and WER of recognition while one speaks, by look-ahead.

    python benchmarks/live.py MODEL CORPUS --out benchmarks/results/live.json

MODEL is a fine-tuning run, CORPUS a folder of the synthetic corpus, whose words have true times, of speakers that the
model has not heard. Each utterance is a stream of its own. Latency of a word that is recognised: from its true end
until it is shown to stay (in partial text or final), and until it is final; in audio time, and beside it the seconds
that a window takes on this machine. 'whole' is the greedy transcription of the utterance in one piece.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch

from w2v2.decoding.greedy import Greedy
from w2v2.inference.live import Live, LiveLayout
from w2v2.inference.recognizer import Recognizer, load_recognizer

STEP = 1600
"""Samples that come at a time: 0.1 s."""


@dataclass(frozen=True)
class Utterance:
    """A recording, what is said in it, and when each word ends."""

    audio: np.ndarray
    text: str
    ends: list[float]


def utterances(corpus: Path) -> list[Utterance]:
    """Those of the synthetic corpus."""
    found = []
    for table in sorted(corpus.rglob("*.words.jsonl")):
        for line in table.read_text().splitlines():
            row = json.loads(line)
            audio, _ = soundfile.read(table.with_name(f"{row['id']}.flac"), dtype="float32")
            ends = [end for _, _, end in row["words"]]
            found.append(Utterance(audio, " ".join(text for text, _, _ in row["words"]), ends))
    return found


@dataclass
class Figures:
    """Of one look-ahead."""

    texts: list[str] = field(default_factory=list)
    shown: list[float] = field(default_factory=list)
    final: list[float] = field(default_factory=list)
    windows: list[float] = field(default_factory=list)

    def hear(self, recognizer: Recognizer, utterance: Utterance, layout: LiveLayout) -> None:
        """Stream an utterance."""
        live, words, history = Live(recognizer, layout), [], []
        final: list[float] = []  # when each word became so

        def take(windows: Any) -> None:
            for window in windows:
                began = time.process_time()
                update = live.take(window, recognizer.emissions([window.audio])[0])
                self.windows.append(time.process_time() - began)
                words.extend(word.text for word in update.words)
                final.extend([update.seconds] * len(update.words))
                history.append((update.seconds, [*words, *update.partial.split()]))

        for start in range(0, len(utterance.audio), STEP):
            take(live.hear(utterance.audio[start : start + STEP]))
        take(live.finish())
        self.texts.append(" ".join(words))
        for place, end in hits(utterance, words):
            stays = history[-1][0]
            for seconds, shown in reversed(history):
                if shown[place : place + 1] != words[place : place + 1]:
                    break
                stays = seconds
            self.shown.append(stays - end)
            self.final.append(final[place] - end)


def hits(utterance: Utterance, words: list[str]) -> list[tuple[int, float]]:
    """Place among the words that were heard, and true end, of each that is right."""
    found = jiwer.process_words(utterance.text, " ".join(words)).alignments[0] if words else []
    return [
        (chunk.hyp_start_idx + i, utterance.ends[chunk.ref_start_idx + i])
        for chunk in found
        if chunk.type == "equal"
        for i in range(chunk.hyp_end_idx - chunk.hyp_start_idx)
    ]


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 90th percentile, seconds."""
    return {"median": round(statistics.median(values), 3), "p90": round(float(np.quantile(values, 0.9)), 3)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="fine-tuning run")
    parser.add_argument("corpus", type=Path, help="synthetic corpus, or a split of it")
    parser.add_argument("--look-ahead", type=float, nargs="+", default=[0.16, 0.32, 0.64, 1.28])
    parser.add_argument("--step", type=float, default=LiveLayout.step)
    parser.add_argument("--context", type=float, default=LiveLayout.context)
    parser.add_argument("--utterances", type=int, help="at most (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recognizer, spoken = load_recognizer(args.model), utterances(args.corpus)[: args.utterances]
    references = [utterance.text for utterance in spoken]
    greedy = Greedy(recognizer.vocabulary)
    whole = [greedy(recognizer.emissions([torch.from_numpy(u.audio)])[0]).text for u in spoken]
    wer = jiwer.wer(references, whole)
    seconds = sum(len(u.audio) for u in spoken) / 16_000
    record: dict[str, Any] = {"utterances": len(spoken), "seconds": round(seconds), "step": args.step}
    record |= {"context": args.context, "whole": {"wer": round(wer, 4), "cer": round(jiwer.cer(references, whole), 4)}}
    for look_ahead in args.look_ahead:
        figures = Figures()
        for utterance in spoken:
            figures.hear(recognizer, utterance, LiveLayout(look_ahead, args.step, args.context))
        record[f"{look_ahead:g}"] = {
            "wer": round(jiwer.wer(references, figures.texts), 4),
            "cer": round(jiwer.cer(references, figures.texts), 4),
            "wer_to_whole": round(jiwer.wer(references, figures.texts) / wer, 3),
            "shown_to_stay": quantiles(figures.shown),
            "final": quantiles(figures.final),
            "window_cpu_seconds": quantiles(figures.windows),
        }
        print(look_ahead, json.dumps(record[f"{look_ahead:g}"]), flush=True)
    print(json.dumps(record["whole"]))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
