"""Memory, speed and fidelity of ``w2v2 transcribe``.

    python benchmarks/transcribe.py MODEL CORPUS --out benchmarks/results/transcribe.json

MODEL is a fine-tuning run, CORPUS a folder of unseen speakers in LibriSpeech layout. Its utterances, end to end, make a
recording of an hour; the other memory figures are of noise, with random weights. Memory is the largest resident set of
a process that does nothing else. Fidelity: recordings of a minute or two, each the utterances of a chapter some times
over, are transcribed in windows, in one piece, and utterance by utterance; with --lm by a language model too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch

from w2v2 import recipes
from w2v2.checkpoint.native import save_weights
from w2v2.decoding.config import BeamConfig
from w2v2.decoding.decoder import make_decoder
from w2v2.decoding.greedy import Decoder, Greedy
from w2v2.inference.recognizer import Recognizer, load_recognizer
from w2v2.inference.recordings import source_of
from w2v2.inference.transcribe import Layout, transcribe
from w2v2.inference.transcripts import Transcript
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.serial import save_config
from w2v2.text.vocabulary import Vocabulary

RATE = 16_000


def utterances(corpus: Path) -> Iterator[tuple[str, Path]]:
    """Text, file."""
    for table in sorted(corpus.rglob("*.trans.txt")):
        for line in table.read_text().splitlines():
            name, _, text = line.partition(" ")
            yield text, table.with_name(f"{name}.flac")


def join(files: list[Path], out: Path) -> float:
    """Lay recordings end to end; returns seconds."""
    audio = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in files])
    soundfile.write(out, audio, RATE)
    return len(audio) / RATE


@dataclass(frozen=True)
class Listener:
    """A model and how it decodes."""

    recognizer: Recognizer
    decoder: Decoder

    def hear(self, files: list[Path], layout: Layout | None = None, batch_size: int = 1) -> list[str]:
        """Text of each recording."""
        sources = [source_of(str(file)) for file in files]
        found = transcribe(self.recognizer, sources, self.decoder, layout=layout, batch_size=batch_size)
        return [transcript.text for transcript in found if isinstance(transcript, Transcript)]


def fidelity(listener: Listener, corpus: Path, folder: Path, groups: int, times: int) -> dict[str, Any]:
    """Error rates of ways to transcribe the same recordings, and between them, per cent."""
    hear = listener.hear
    chapters: dict[Path, list[tuple[str, Path]]] = {}
    for text, file in utterances(corpus):
        chapters.setdefault(file.parent, []).append((text, file))
    long, references, seconds, each = [], [], 0.0, []
    for i, rows in enumerate(list(chapters.values())[:groups]):
        long.append(folder / f"{i}.flac")
        seconds += join([file for _, file in times * rows], long[-1])
        references.append(" ".join(text for text, _ in times * rows))
        each.append([file for _, file in rows])
    texts = {
        "utterances": [" ".join(times * hear(files)) for files in each],
        "windows_of_15_s": hear(long, Layout(15.0, 2.0)),
        "windows_of_30_s": hear(long),
        "one_piece": hear(long, Layout(3600.0)),
    }
    short = [file for files in each for file in files]
    batches = {n: (hear(short, batch_size=n), hear(long, batch_size=n)) for n in (1, 16)}
    return {
        "recordings": len(long),
        "seconds": round(seconds, 1),
        "of_references": {name: rates(references, said) for name, said in texts.items()},
        "of_utterances": {name: rates(texts["utterances"], said) for name, said in list(texts.items())[1:]},
        "of_one_piece": {"windows_of_30_s": rates(texts["one_piece"], texts["windows_of_30_s"])},
        "batch_1_is_batch_16": batches[1] == batches[16],
        "batch_texts": len(short) + len(long),
    }


def rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """Per cent."""
    return {
        "wer": round(100 * jiwer.wer(references, hypotheses), 3),
        "cer": round(100 * jiwer.cer(references, hypotheses), 3),
    }


def measured(run: Path, file: Path, *options: str) -> dict[str, float]:
    """The command in a process of its own: seconds, share of real time, largest resident set."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(run), str(file), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(argv: list[str]) -> None:
    """What ``measured`` runs."""
    from w2v2.cli.main import main

    began, busy = time.perf_counter(), time.process_time()
    assert main(["transcribe", *argv, "--out", tempfile.mkdtemp()]) == 0
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    audio = soundfile.info(argv[1]).duration
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"audio_seconds": round(audio, 1), "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    figures |= {"real_time_factor": round(seconds / audio, 4), "cpu_per_audio_second": round(cpu / audio, 4)}
    print(json.dumps(figures | {"peak_rss_gib": round(peak, 3)}))


def random_run(folder: Path, name: str, config: Any) -> Path:
    """A run folder of random weights."""
    run = folder / name
    run.mkdir()
    vocabulary = Vocabulary.from_texts(["ABCDEFGHIJKLMNOPQRSTUVWXYZ'"])
    save_config(config, run / "config.json")
    vocabulary.save(run / "vocab.json")
    save_weights(Wav2Vec2ForCTC(config.model, len(vocabulary.labels)), run)
    return run


def noise(path: Path, seconds: int, rate: int = RATE) -> Path:
    """Noise in 8 bits, written in parts."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, 1, subtype="PCM_U8") as file:
        for _ in range(0, seconds, 30):
            file.write(0.1 * rng.standard_normal(30 * rate))
    return path


def memory(folder: Path) -> dict[str, Any]:
    """Ten hours through a very small model, and 90 s through one of BASE's size."""
    small = recipes.tiny_ctc()
    small.model.n_layer, small.model.conv_channels, small.model.conv_norm = 1, (8, 8, 8, 16, 16, 16, 16), "group:8"
    small.model.n_embd, small.model.ffn_dim = 48, 96
    base = recipes.tiny_ctc()
    base.model = recipes.base().model
    ten = noise(folder / "ten-hours.wav", 36_000, 8_000)
    small_run, base_run = random_run(folder, "small", small), random_run(folder, "base", base)
    found = {"ten_hours_of_very_small": measured(small_run, ten)}
    ten.unlink()
    found["ninety_seconds_of_base"] = measured(base_run, noise(folder / "short.wav", 90))
    return found


def speed_and_memory(run: Path, corpus: Path, seconds: float, folder: Path) -> dict[str, Any]:
    """A recording of so many seconds of speech, ten hours of noise, and a model of BASE's size."""
    files, chosen, length = [file for _, file in utterances(corpus)], list[Path](), 0.0
    while length < seconds:
        chosen.append(files[len(chosen) % len(files)])
        length += soundfile.info(chosen[-1]).duration
    join(chosen, folder / "long.flac")
    found = {"long_recording": measured(run, folder / "long.flac"), "memory": memory(folder)}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="fine-tuning run")
    parser.add_argument("corpus", type=Path, help="folder in LibriSpeech layout")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the long recording (default: %(default)s)")
    parser.add_argument("--chapters", type=int, default=36, help="to compare the texts of (default: %(default)s)")
    parser.add_argument("--times", type=int, default=6, help="that a chapter is repeated (default: %(default)s)")
    parser.add_argument("--lm", type=Path, help="ARPA file to compare the texts with too")
    parser.add_argument("--lm-weight", type=float, default=BeamConfig().lm_weight, help="(default: %(default)s)")
    parser.add_argument("--word-score", type=float, default=BeamConfig().word_score, help="(default: %(default)s)")
    parser.add_argument("--texts-only", action="store_true", help="no measurements of memory")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    record: dict[str, Any] = {
        "command": "python benchmarks/transcribe.py MODEL CORPUS",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "soundfile", "soxr")}},
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.chapters:
            model = load_recognizer(args.model)
            decoders: dict[str, Decoder] = {"greedy": Greedy(model.vocabulary)}
            if args.lm:
                beam = BeamConfig(lm_weight=args.lm_weight, word_score=args.word_score)
                decoders["lm"] = make_decoder(model.vocabulary, lm=args.lm, beam=beam)
                record["beam"] = asdict(beam)
            record["fidelity"] = {}
            for name, decoder in decoders.items():
                record["fidelity"][name] = fidelity(
                    Listener(model, decoder), args.corpus, folder, args.chapters, args.times
                )
                print(json.dumps(record["fidelity"][name]), flush=True)
        if not args.texts_only:
            record |= speed_and_memory(args.model, args.corpus, args.seconds, folder)
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[sys.argv.index("--measure") + 1 :])
    else:
        main()
