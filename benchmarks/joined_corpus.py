"""Four synthetic voices that a small model learns to recognise within an hour: for ``benchmarks/transcribe.py``.

    python benchmarks/joined_corpus.py OUT
    w2v2 finetune tiny_ctc --data OUT --init-from PRETRAINED --out MODEL --optim.schedule.peak 2e-3 \
        --optim.schedule.total-steps 3000 --data.batch-seconds 40

Three hours; the last chapter of each voice is kept for ``valid`` and ``test``, in parts of seven utterances, so that
sentences and rooms are unseen, voices are not. In ``train`` every chapter comes three times: utterance by utterance,
and twice as recordings of up to 36 s that utterances in random order were joined to, which long recordings are like.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from w2v2.synthetic.acoustics import SAMPLE_RATE
from w2v2.synthetic.corpus import synthesize
from w2v2.synthetic.speakers import SyntheticConfig

PART = 7
"""Utterances of a held-out chapter."""
JOINED_SECONDS = (20.0, 36.0)
"""The next utterance starts a new recording where it would be longer than a number drawn between these."""

Utterance = tuple[str, np.ndarray]
"""Transcript, (samples,) int16."""


def read_chapter(folder: Path) -> list[Utterance]:
    """Its utterances in order."""
    (table,) = folder.glob("*.trans.txt")
    rows = (line.split(" ", 1) for line in table.read_text().splitlines())
    return [(text, soundfile.read(folder / f"{name}.flac", dtype="int16")[0]) for name, text in rows]


def write_chapter(folder: Path, utterances: list[Utterance]) -> None:
    """In LibriSpeech's layout."""
    folder.mkdir(parents=True)
    name, lines = f"{folder.parent.name}-{folder.name}", []
    for i, (text, audio) in enumerate(utterances):
        soundfile.write(folder / f"{name}-{i:04d}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{name}-{i:04d} {text}\n")
    (folder / f"{name}.trans.txt").write_text("".join(lines))


def joined(utterances: list[Utterance], rng: random.Random) -> Iterator[Utterance]:
    """Some of them end to end, in random order; what is left in the end is not used."""
    order = utterances[:]
    rng.shuffle(order)
    held: list[Utterance] = []
    goal = rng.uniform(*JOINED_SECONDS)
    for text, audio in order:
        if held and sum(len(part) for _, part in [*held, (text, audio)]) > goal * SAMPLE_RATE:
            yield " ".join(part for part, _ in held), np.concatenate([part for _, part in held])
            held, goal = [], rng.uniform(*JOINED_SECONDS)
        held.append((text, audio))


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder, new")
    out = parser.parse_args().out
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        voices = SyntheticConfig(hours=3.0, valid_hours=0.05, test_hours=0.05, n_speakers=6, seed=5)
        synthesize(Path(scratch) / "voices", voices)
        for speaker in sorted((Path(scratch) / "voices" / "train").iterdir()):
            *chapters, last = sorted(speaker.iterdir())
            for chapter in chapters:
                utterances = read_chapter(chapter)
                longer = [row for _ in range(2) for row in joined(utterances, rng)]
                write_chapter(out / "train" / speaker.name / chapter.name, utterances + longer)
            held_out = read_chapter(last)
            for i in range(0, len(held_out), PART):
                split = "test" if i else "valid"
                write_chapter(out / split / speaker.name / f"{last.name}{i // PART:02d}", held_out[i : i + PART])


if __name__ == "__main__":
    main()
