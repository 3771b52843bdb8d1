"""An hour of voices and pauses through `w2v2 transcribe MODEL --live --vad -`: memory, and whether times drift.

    python benchmarks/live_hour.py MODEL CORPUS --out benchmarks/results/live_hour.json

MODEL is a fine-tuning run, CORPUS a folder of the synthetic corpus, whose words have true times. Its utterances follow
one another in drawn order, with pauses of 1 to 3 s, until the hour is full; noise of 60 dB below full scale lies under
everything. The command is a process of its own, fed through a pipe as fast as it reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from live import Utterance, hits, quantiles, utterances

RATE = 16_000


def compose(spoken: list[Utterance], seconds: float) -> tuple[np.ndarray, list[tuple[float, Utterance]]]:
    """The recording, and when each utterance begins in it, seconds."""
    draws = np.random.default_rng(0)
    audio = draws.normal(0, 1e-3, round(seconds * RATE)).astype(np.float32)
    place, placed = RATE, []
    while True:
        utterance = spoken[draws.integers(len(spoken))]
        if place + len(utterance.audio) + 3 * RATE > len(audio):
            return audio, placed
        audio[place : place + len(utterance.audio)] += utterance.audio
        placed.append((place / RATE, utterance))
        place += len(utterance.audio) + int(draws.uniform(1, 3) * RATE)


def resident_mib(pid: int) -> float:
    """What a process holds in memory."""
    (line,) = (row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def stream(model: str, audio: np.ndarray) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """Updates of the command, and its resident set, MiB, after each minute of audio."""
    call = [sys.executable, "-m", "w2v2.cli.main", "transcribe", model, "--live", "--vad", "--format", "json", "-"]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        pcm = (audio * 32767).clip(-32768, 32767).astype("<i2").tobytes()

        def feed() -> None:
            process.stdin.write(pcm)  # type: ignore[union-attr]
            process.stdin.close()  # type: ignore[union-attr]

        threading.Thread(target=feed).start()
        updates, memory = [], {}
        for line in process.stdout:
            updates.append(json.loads(line))
            minute = int(updates[-1]["seconds"] // 60)
            if minute not in memory:
                memory[minute] = resident_mib(process.pid)
                print(f"minute {minute}: {memory[minute]} MiB", flush=True)
    assert process.returncode == 0
    return updates, memory


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="fine-tuning run")
    parser.add_argument("corpus", type=Path, help="synthetic corpus, or a split of it")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    audio, placed = compose(utterances(args.corpus), args.seconds)
    began = time.time()
    updates, memory = stream(args.model, audio)
    elapsed = time.time() - began
    words = [word for update in updates for word in update["words"]]
    errors: dict[int, list[float]] = {}  # of ends of words that are right, by ten minutes
    texts = []
    for start, utterance in placed:
        end = start + len(utterance.audio) / RATE
        near = [word for word in words if start - 0.5 < (word["start"] + word["end"]) / 2 < end + 0.5]
        texts.append(" ".join(word["text"] for word in near))
        for place, true_end in hits(utterance, [word["text"] for word in near]):
            errors.setdefault(int(start // 600), []).append(near[place]["end"] - (start + true_end))
    record = {
        "seconds": args.seconds,
        "utterances": len(placed),
        "ended": sum(update["ended"] for update in updates),
        "wer": round(jiwer.wer([utterance.text for _, utterance in placed], texts), 4),
        "words_outside": len(words) - sum(len(text.split()) for text in texts),
        "elapsed_seconds": round(elapsed),
        "resident_mib": {at: mib for at, mib in memory.items() if at % 5 == 0 or at == max(memory)},
        "end_of_word_error": {
            f"minutes {10 * part} to {10 * part + 10}": {
                "words": len(found),
                "mean": round(statistics.mean(found), 4),
                **quantiles(found),
            }
            for part, found in sorted(errors.items())
        },
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
