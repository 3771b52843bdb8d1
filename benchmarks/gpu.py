"""Pretraining steps on a card: audio-seconds per second, share of its peak, memory, and how long it waits for the host.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

``base`` and ``paper_base`` under bf16 autocast: forward, backward, clipping, fused AdamW, on crops of one length and on
utterances of 2 s to that length; as they are, with ``train.compile``, with ``train.activation_checkpointing``. Beside
them, on the equal crops: ``hubert``, the same encoder by torch's own modules with a cross-entropy over 504 clusters on
masked frames, which is the step of a small HuBERT code base; and, beside ``paper_base``, Hugging Face's step. Steps are
timed together, so nothing waits but where the code does; ``idle`` is the share of three profiled steps in which no
kernel runs. On a CPU (``--device cpu --model tiny --seconds 6 --crop 3 --rounds 1``) the script can be tried.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

from w2v2 import recipes
from w2v2.data.batch import Batch
from w2v2.model.flops import peak_flops, training_flops
from w2v2.model.packing import plain_path, to_device
from w2v2.training.config import PretrainConfig
from w2v2.training.pretrain import weighted_sum
from w2v2.training.run import tune

RATE, CLUSTERS, PROFILED = 16_000, 504, 3
VARIANTS = ["eager", "compile", "activation_checkpointing"]
Loss = Callable[[], Tensor]


def workloads(seconds: float, crop: float) -> dict[str, list[int]]:
    """Samples of each utterance; about as much audio in both."""
    equal = [round(crop * RATE)] * max(int(seconds // crop), 1)
    unequal: list[int] = []
    while sum(unequal) < 0.95 * sum(equal):
        unequal.append(round((2 + (crop - 2) * (0.618 * len(unequal) % 1)) * RATE))
    return {"equal": equal, "unequal": unequal}


def ours(config: PretrainConfig, samples: list[int], device: torch.device) -> tuple[torch.nn.Module, Loss]:
    """A preset and its loss on one batch."""
    model = config.model.build()
    n = len(samples)
    batch = Batch(
        torch.empty(n, 0), torch.tensor(samples), torch.zeros(n, dtype=torch.long), [f"{i}" for i in range(n)], [0] * n
    )
    draws = model.draw(batch, (0, 0))
    for field in fields(draws):
        if isinstance(tensor := getattr(draws, field.name), Tensor):
            setattr(draws, field.name, to_device(tensor, device))
    model = model.to(device).train()
    tune(model, config.train)
    audio = torch.randn(n, max(samples), device=device)
    lengths = samples if min(samples) < max(samples) else None

    def loss() -> Tensor:
        out = model(audio, draws, lengths)
        return weighted_sum(out.losses, config.loss_weights) / out.num_targets

    return model, loss


def hubert(config: PretrainConfig, samples: list[int], device: torch.device) -> tuple[torch.nn.Module, Loss]:
    """The same encoder by torch's own modules, which tells a cluster of each masked frame."""
    encoder = recipes.paper_base().model if config.recipe == "paper_base" else config.model
    model = torch.nn.ModuleList([encoder.build(), torch.nn.Linear(encoder.n_embd, CLUSTERS)]).to(device).train()
    audio = torch.randn(len(samples), max(samples), device=device)
    count = sum(encoder.frames(samples))
    masked = torch.arange(0, count, 2, device=device)
    labels = torch.randint(CLUSTERS, (len(masked),), device=device)

    def loss() -> Tensor:
        wav2vec2, head = model
        with plain_path():
            _, x = wav2vec2.feature_projection(wav2vec2.feature_encoder(audio))
            x = wav2vec2.contextualize(wav2vec2.feature_projection.dropout(x), covered=masked)
        return F.cross_entropy(head(x.flatten(0, 1)[masked]).float(), labels)

    return model, loss


def peer(samples: list[int], device: torch.device) -> tuple[torch.nn.Module, Loss]:
    """Hugging Face's model of ``paper_base``'s shape."""
    from step import hugging_face  # late: it needs transformers

    model, inputs = hugging_face(samples, torch.randn(len(samples), max(samples)), shipped=True)
    model, inputs = model.to(device), {name: tensor.to(device) for name, tensor in inputs.items()}
    count = int(inputs["mask_time_indices"].sum())
    return model, lambda: model(**inputs).loss / count


def stepper(model: torch.nn.Module, loss: Loss, device: torch.device) -> Callable[[], None]:
    """One optimiser step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def idle(step: Callable[[], None]) -> float:
    """Share of some steps in which no kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    events = profile.events() or []
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    if not spans:
        return float("nan")  # the profiler saw no kernel
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def measure(model: torch.nn.Module, loss: Loss, samples: list[int], flops: float | None, rounds: int) -> dict[str, Any]:
    """Figures of so many steps after three."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    step = stepper(model, loss, device)
    for _ in range(3 if cuda else 1):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(rounds):
        step()
    queued = time.perf_counter()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / rounds
    rate = sum(samples) / RATE / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    return {
        "seconds_of_audio": sum(samples) / RATE,
        "utterances": len(samples),
        "milliseconds_a_step": 1e3 * seconds,
        "host_milliseconds_a_step": 1e3 * (queued - began) / rounds,
        "audio_seconds_per_second": rate,
        "share_of_peak": flops * rate / peak if flops and peak else None,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "idle": idle(step) if cuda else None,
    }


def cases(
    names: list[str], variants: list[str], seconds: float, crop: float, device: torch.device
) -> Iterator[tuple[str, Any]]:
    """What is measured: its name, and a function that builds it."""
    for name in names:
        flops = training_flops(getattr(recipes, name)().model, crop)
        for kind, samples in workloads(seconds, crop).items():
            for variant in variants:
                config = getattr(recipes, name)()
                if variant != "eager":
                    setattr(config.train, variant, True)
                yield f"{name} {kind} {variant}", lambda c=config, s=samples, f=flops: (*ours(c, s, device), s, f)
            if kind == "equal":
                config = getattr(recipes, name)()
                yield f"{name} {kind} hubert", lambda c=config, s=samples: (*hubert(c, s, device), s, None)
                if name == "paper_base":
                    yield f"{name} {kind} hugging_face", lambda s=samples: (*peer(s, device), s, None)


def main() -> None:
    """Measure, one after another, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--model", nargs="+", default=["base", "paper_base"], help="presets (default: %(default)s)")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=175.0, help="of audio a step (default: %(default)s)")
    parser.add_argument("--crop", type=float, default=15.6, help="seconds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; --device cpu tries the script")
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__},
        "rounds": args.rounds,
        "results": {},
    }
    for name, build in cases(args.model, args.variants, args.seconds, args.crop, device):
        gc.collect()
        torch.manual_seed(0)
        torch.compiler.reset()
        if cuda:
            torch.cuda.empty_cache()
        try:
            record["results"][name] = measure(*build(), args.rounds)
        except Exception as error:  # the others are measured all the same
            record["results"][name] = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        print(name, json.dumps(record["results"][name]), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
