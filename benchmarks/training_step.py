"""Seconds per training step on this CPU: ours beside Hugging Face's, same shapes, same audio, taken in turn.

    python benchmarks/training_step.py --rounds 5 --out benchmarks/results/training_step.json

Both run wav2vec 2.0 BASE (12 heads, GroupNorm first, 2 x 320 entries): forward, backward, AdamW (fused for both),
fp32, with masks and distractors given. Two workloads: four crops of one length, as pretraining has them, and four
utterances of unequal lengths, as fine-tuning has them; there Hugging Face pads, and we do not. Attention and feed-
forward dropout are set to 0 for both: Hugging Face would also drop out feed-forward activations, and the fused CPU
attention has none. Times are of one process with the given threads; the ratio is the median over pairs taken in
turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import ContrastiveConfig as HFConfig
from transformers import Wav2Vec2ForPreTraining

from w2v2 import recipes
from w2v2.model.masking import Draws
from w2v2.training.pretrain import weighted_sum

WORKLOADS = {"equal": (3.0, 3.0, 3.0, 3.0), "unequal": (4.68, 3.6, 2.4, 1.2)}


def ours(samples: list[int], audio: torch.Tensor) -> Callable[[], float]:
    """One step of ``paper_base``."""
    config = recipes.paper_base()
    config.model.attention_dropout = 0.0
    config.model.layer_drop = 0.0
    model = config.model.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    draws = draw(samples)

    def step() -> float:
        out = model(audio, draws, samples)
        loss = weighted_sum(out.losses, config.loss_weights) / out.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def draw(samples: list[int]) -> Draws:
    """Masks and distractors, the same for both sides."""
    model = recipes.paper_base().model
    model.n_layer = 0
    return model.build().draw(samples, [("bench", i) for i in range(len(samples))])


def hugging_face(samples: list[int], audio: torch.Tensor) -> Callable[[], float]:
    """The same step with ``Wav2Vec2ForPreTraining`` (sdpa attention)."""
    torch.manual_seed(0)
    config = HFConfig(
        attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, feat_quantizer_dropout=0.1,
        do_stable_layer_norm=False, feat_extract_norm="group", attn_implementation="sdpa",
    )  # fmt: skip
    model = Wav2Vec2ForPreTraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    frames = recipes.paper_base().model.frames(samples)
    draws, rows, width = draw(samples), len(samples), max(frames)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    negatives = torch.zeros(rows, width, draws.distractors.shape[1], dtype=torch.long)
    offset = start = 0
    for i, (count, length) in enumerate(zip(draws.counts, frames, strict=True)):
        at = draws.masked[start : start + count] - offset
        mask[i, at] = True
        negatives[i, at] = at[draws.distractors[start : start + count]] + i * width
        start, offset = start + count, offset + length
    attention = (
        (torch.arange(audio.shape[1]) < torch.tensor(samples)[:, None]).long() if min(samples) < max(samples) else None
    )

    def step() -> float:
        out = model(audio, attention_mask=attention, mask_time_indices=mask, sampled_negative_indices=negatives)
        loss = out.loss / len(draws.masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name, seconds in WORKLOADS.items():
        samples = [round(s * 16_000) for s in seconds]
        audio = torch.randn(len(samples), max(samples), generator=torch.Generator().manual_seed(0))
        for row, length in zip(audio, samples, strict=True):
            row[length:] = 0
        steps = {"w2v2": ours(samples, audio), "hugging_face": hugging_face(samples, audio)}
        times: dict[str, list[float]] = {side: [] for side in steps}
        for i in range(args.rounds + 1):
            for side, step in steps.items():
                start = time.perf_counter()
                step()
                if i:  # the first is a warm-up
                    times[side].append(time.perf_counter() - start)
        ratios = [hf / us for us, hf in zip(times["w2v2"], times["hugging_face"], strict=True)]
        results[name] = {
            "seconds_of_audio": sum(seconds),
            **{f"{side}_seconds": statistics.median(values) for side, values in times.items()},
            "speed_against_hugging_face": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
        print(name, json.dumps(results[name]))
    record = {
        "command": f"python benchmarks/training_step.py --rounds {args.rounds} --threads {args.threads}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.processor() or platform.machine(),
        "rounds": args.rounds,
        "threads": args.threads,
        "results": results,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
