"""What perfect phones would give: the demo's ten minutes of labels, with phones' names where the convolutions would be.

    w2v2 demo --seed 2 --out DEMO
    python benchmarks/spelling.py DEMO --seed 2 --wrong 0.2

Convolutions are replaced by one-hot vectors of the phone at each frame's middle, as espeak-ng made it; a share of the
phones is replaced by others, at random, in training and in test. Blocks, CTC, labels, updates, trigram and its tuning
are the demo's; nothing is augmented. Three minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from w2v2 import demo, recipes
from w2v2.data.config import AugmentConfig
from w2v2.data.corpora import labelled_subset, read_corpus
from w2v2.evaluation.phones import read_labels
from w2v2.model import wav2vec2
from w2v2.model.feature_encoder import FeatureEncoder, frame_center
from w2v2.preparation.run import prepare
from w2v2.training.config import FinetuneConfig

STEP = 64
"""16-bit samples of phone k are (k + 1) STEP, those of silence 0."""


class Phones(FeatureEncoder):
    """One-hot vectors of what the samples at the frames' middles name, where the convolutions would be."""

    def forward(self, audio: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """As ``FeatureEncoder.forward``."""
        counts = [audio.shape[1]] * len(audio) if lengths is None else lengths
        first = round(frame_center(0, self.kernel_sizes, self.strides, self.paddings))
        width, hop = self.conv_weights()[-1].shape[0], int(np.prod(self.strides))
        rows = []
        for row, samples in zip(audio, counts, strict=True):
            middles = first + hop * torch.arange(self.output_lengths([samples])[0])
            names = (row[middles.clamp(max=samples - 1)] * 2**15 / STEP).round().long()
            rows.append(torch.nn.functional.one_hot(names, width).float())
        return torch.stack(rows) if lengths is None else torch.cat(rows)[None]


def write_corpus(spoken: Path, out: Path, wrong: float, seed: int) -> None:
    """A corpus of the same utterances, whose samples name the phones."""
    labels = read_labels(spoken)
    names = sorted({phone.label for phones in labels.values() for phone in phones})
    rng = np.random.default_rng(seed)
    for source in sorted(spoken.rglob("*.flac")):
        audio = np.zeros(soundfile.info(source).frames, np.int16)
        for phone in labels[source.stem]:
            name = names.index(phone.label)
            if rng.random() < wrong:
                name = (name + int(rng.integers(1, len(names)))) % len(names)
            start, end = (round(16_000 * at) for at in (phone.start, phone.end))
            audio[start:end] = STEP * (name + 1)
        path = out / source.relative_to(spoken)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, 16_000)
    for path in (spoken / "SPEAKERS.TXT", *spoken.rglob("*.trans.txt")):
        shutil.copy(path, out / path.relative_to(spoken))


def recipe() -> FinetuneConfig:
    """``tiny_ctc`` as it is, but for augmentation."""
    config = recipes.tiny_ctc()
    config.data.augment = AugmentConfig()
    return config


def hear(folder: Path, wrong: float, seed: int) -> dict[str, Any]:
    """Error rates on the demo's test voices."""
    out = folder / f"spelling-{wrong:g}"
    shutil.rmtree(out, ignore_errors=True)
    write_corpus(next(folder.glob("corpus-*")), out / "corpus", wrong, seed)
    prepare(out / "corpus", out / "manifest")
    (out / demo.TRIGRAM).symlink_to(folder.resolve() / demo.TRIGRAM)
    splits = read_corpus(out / "manifest")
    labelled = labelled_subset(splits["train"], demo.LABELLED_MINUTES, seed)
    heard = demo.hear_arm("scratch", splits, labelled, "test", out, seed, 1.0)
    return {"wrong": wrong, "seed": seed} | demo.arm_rates(demo.heard_rows(splits["test"], heard), "scratch")


def main() -> None:
    """Run it, and print its rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the phones that others replace")
    options = parser.parse_args()
    demo.one_thread()
    wav2vec2.FeatureEncoder = Phones  # type: ignore[attr-defined]
    recipes.tiny_ctc_scratch = recipe
    print(json.dumps(hear(options.demo, options.wrong, options.seed)))


if __name__ == "__main__":
    main()
