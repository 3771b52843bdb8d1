"""A training step on this CPU: ours beside Hugging Face's, same shapes, same audio, taken in turn, by CPU time.

    python benchmarks/step.py --rounds 5 --out benchmarks/results/step.json

Both run wav2vec 2.0 BASE (12 heads, GroupNorm first, 2 x 320 entries): forward, backward, AdamW (fused for both),
fp32, with masks and distractors given. Two workloads: four crops of one length, as pretraining has them, and four
utterances of unequal lengths; there Hugging Face pads, and we do not. Twice each: with equal dropouts, and as both
ship, where attention probabilities have dropout in both and feed-forward activations in theirs. LayerDrop is off.
Ratios are medians over pairs taken in turn; activations are the storages kept for the backward pass.

``--peers`` adds the encoders of ``encoders.py`` with our quantizer and loss. Their modules are Python alone;
torchaudio's wheel is built for CUDA and fails beside a CPU build of torch, so it runs without what is compiled:

    peers="torchaudio spidr speechbrain hyperpyyaml ruamel.yaml joblib"
    pip install --no-deps --ignore-requires-python --target peers $peers && rm peers/torchaudio/lib/*.so
    PYTHONPATH=peers python benchmarks/step.py --peers
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from encoders import ENCODERS, with_our_objective
from torch import Tensor
from transformers import Wav2Vec2Config as HFConfig
from transformers import Wav2Vec2ForPreTraining

from w2v2 import recipes
from w2v2.data.batch import Batch
from w2v2.model.masking import ContrastiveDraws
from w2v2.training.pretrain import weighted_sum

WORKLOADS = {"equal": (3.0, 3.0, 3.0, 3.0), "unequal": (4.68, 3.6, 2.4, 1.2)}


def ours(samples: list[int], audio: torch.Tensor, *, shipped: bool) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """``paper_base`` and its loss."""
    config = recipes.paper_base()
    config.model.layer_drop = 0.0
    if not shipped:
        config.model.attention_dropout = 0.0
    model = config.model.build()
    draws = draw(samples)

    def loss() -> Tensor:
        out = model(audio, draws, samples)
        return weighted_sum(out.losses, config.loss_weights) / out.num_targets

    return model, loss


def draw(samples: list[int]) -> ContrastiveDraws:
    """Masks and distractors, the same for both sides."""
    model = recipes.paper_base().model
    model.n_layer = 0
    n = len(samples)
    batch = Batch(
        torch.empty(n, 0), torch.tensor(samples), torch.zeros(n, dtype=torch.long), [f"{i}" for i in range(n)], [0] * n
    )
    return model.build().draw(batch)


def hugging_face(
    samples: list[int], audio: torch.Tensor, *, shipped: bool
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """``Wav2Vec2ForPreTraining`` (sdpa attention) and what it is given."""
    dropouts = {} if shipped else {"attention_dropout": 0.0, "activation_dropout": 0.0}
    config = HFConfig(
        layerdrop=0.0, feat_quantizer_dropout=0.1, do_stable_layer_norm=False, feat_extract_norm="group",
        attn_implementation="sdpa", **dropouts,
    )  # fmt: skip
    model = Wav2Vec2ForPreTraining(config).train()
    frames = recipes.paper_base().model.frames(samples)
    draws, rows, width = draw(samples), len(samples), max(frames)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    negatives = torch.zeros(rows, width, draws.distractors.shape[1], dtype=torch.long)
    offset = start = 0
    for i, (count, length) in enumerate(zip(draws.counts, frames, strict=True)):
        at = draws.masked[start : start + count].long() - offset
        mask[i, at] = True
        negatives[i, at] = at[draws.distractors[start : start + count].long()] + i * width
        start, offset = start + count, offset + length
    inputs = {"input_values": audio, "mask_time_indices": mask, "sampled_negative_indices": negatives}
    if min(samples) < max(samples):
        inputs["attention_mask"] = (torch.arange(audio.shape[1]) < torch.tensor(samples)[:, None]).long()
    return model, inputs


def stepper(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """One training step, which returns the CPU seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        start = time.process_time()
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return time.process_time() - start

    return step


def kept(model: torch.nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes kept for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()  # an output that held itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def compare(samples: list[int], rounds: int, *, shipped: bool, peers: bool) -> dict[str, Any]:
    """All sides in turn."""
    audio = torch.randn(len(samples), max(samples), generator=torch.Generator().manual_seed(0))
    for row, length in zip(audio, samples, strict=True):
        row[length:] = 0
    torch.manual_seed(0)
    peer, inputs = hugging_face(samples, audio, shipped=shipped)
    sides = {
        "w2v2": ours(samples, audio, shipped=shipped),
        "hugging_face": (peer, lambda: peer(**inputs).loss / inputs["mask_time_indices"].sum()),
    }
    dropouts = (0.1, 0.1) if shipped else (0.0, 0.0)
    for name, build in ENCODERS.items() if peers else ():
        sides[name] = with_our_objective(*build(*dropouts), audio, samples, draw(samples))
    activations = {side: kept(*parts) for side, parts in sides.items()}
    steps = {side: stepper(*parts) for side, parts in sides.items()}
    times = [{side: step() for side, step in steps.items()} for _ in range(rounds + 1)][1:]  # the first is a warm-up
    ratios = [pair["hugging_face"] / pair["w2v2"] for pair in times]
    return {
        "speed": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "speed_against": {side: statistics.median(pair[side] / pair["w2v2"] for pair in times) for side in sides},
        "cpu_seconds": {side: statistics.median(pair[side] for pair in times) for side in sides},
        "activation_bytes": activations,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="other encoders too; see above")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name, seconds in WORKLOADS.items():
        samples = [round(s * 16_000) for s in seconds]
        equal = compare(samples, args.rounds, shipped=False, peers=args.peers)
        shipped = compare(samples, args.rounds, shipped=True, peers=args.peers)
        results[name] = {
            "seconds_of_audio": sum(seconds),
            "speed_against_hugging_face": equal["speed"],
            "speed_against_hugging_face_as_shipped": shipped["speed"],
            "activations_against_hugging_face_as_shipped": (
                shipped["activation_bytes"]["w2v2"] / shipped["activation_bytes"]["hugging_face"]
            ),
            "equal_dropouts": equal,
            "as_shipped": shipped,
        }
        print(name, json.dumps(results[name]), flush=True)
    record = {
        "command": f"python benchmarks/step.py --rounds {args.rounds} --threads {args.threads}"
        + (" --peers" if args.peers else ""),
        "versions": {name: version(name) for name in ("torch", "transformers", *(ENCODERS if args.peers else ()))},
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
