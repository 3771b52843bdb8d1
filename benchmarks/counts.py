"""Kernels, bytes and activations of a training step on a GPU, counted on fake CUDA tensors: no card, no time.

    python benchmarks/counts.py --fake-cuda fake.so --out benchmarks/results/counts.json

Needs a shim that lets a CPU build of torch accept the device ``cuda`` for fake tensors (``--fake-cuda``); without it,
it says so and stops. Forward and backward of ``base`` under bf16 autocast run on tensors without data, attention by the
flash kernel; every operator that is not a view is a kernel. Bytes are those of the inputs and outputs of everything but
products and attention, with no cache and no fusion; activations are the storages kept for the backward pass, without
parameters.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nested._internal import sdpa
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from w2v2 import recipes
from w2v2.data.batch import Batch
from w2v2.model.precision import Casts, casts_kept
from w2v2.training.pretrain import weighted_sum
from w2v2.training.run import tune

WORKLOADS = {
    "5 x 15.6 s": [249_600] * 5,
    "28 equal": [49_600] * 28,
    "28 unequal": [32_000 + 1_280 * i for i in range(28)],
}
VIEWS = {
    "aten::detach", "aten::t", "aten::alias", "aten::lift_fresh", "aten::is_pinned", "aten::record_stream",
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
    "aten::empty_permuted",
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::set_", "aten::resize_", "prim::device",
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "convolution", "convolution_backward")


def is_view(func: Any) -> bool:
    """Whether an operator launches nothing."""
    name = func._schema.name
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return aliases or name in VIEWS or name.startswith("aten::_nested")


class Counts(TorchDispatchMode):
    """What passes by: kernels, casts among them, bytes outside of products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and go on."""
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(args if out is None else out) if isinstance(t, Tensor)]
        if is_view(func) or not any(t.is_cuda and not t.is_nested for t in made):
            return out
        name = func._schema.name.removeprefix("aten::")
        self.kernels[name] += 1
        if name not in PRODUCTS and "attention" not in name:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and not t.is_nested]
            tensors = tensors[1:-1] if name == "index_fill_" else tensors  # it touches a few rows
            self.bytes[name] += sum(int(t.numel()) * t.element_size() for t in tensors)
        return out


class Kept:
    """The storages kept for the backward pass, parameters left out; alive, so that no two share an address."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters:
            self.storages[storage._cdata] = storage
        return tensor.detach()  # an output that held itself would never be freed

    def bytes(self) -> int:
        """Of all of them."""
        return sum(int(storage.nbytes()) for storage in self.storages.values())


def step(samples: list[int], *, again: bool = False, second: bool = False) -> dict[str, Any]:
    """Figures of one forward and backward pass of ``base``, without LayerDrop: of an update's second, if asked for."""
    config = recipes.base()
    config.model.layer_drop = 0.0
    with torch.device("meta"):
        meta = config.model.build()
    n = len(samples)
    batch = Batch(
        torch.empty(n, 0), torch.tensor(samples), torch.zeros(n, dtype=torch.long), [f"{i}" for i in range(n)], [0] * n
    )
    draws = meta.draw(batch, (0, 0))
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as fake:
        with torch.device("cuda"):
            model = config.model.build().train()
            audio = torch.empty(len(samples), max(samples))
        train = config.train
        train.activation_checkpointing = again
        tune(model, train)
        for name in ("masked", "distractors", "covered"):
            setattr(draws, name, fake.from_tensor(getattr(draws, name)).to("cuda"))
        casts: Casts = {}
        for _ in range(2 if second else 1):
            kept = Kept(model)
            hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
            with Counts() as counts, casts_kept(casts):
                with hooks, torch.autocast("cuda", torch.bfloat16):
                    out = model(audio, draws, samples if min(samples) < max(samples) else None)
                    loss = weighted_sum(out.losses, config.loss_weights)
                forward = counts.kernels.total()
                loss.backward()
    seconds = sum(samples) / 16_000
    return {
        "seconds_of_audio": seconds,
        "kernels": counts.kernels.total(),
        "forward_kernels": forward,
        "casts": counts.kernels["_to_copy"],
        "bytes_outside_products": counts.bytes.total(),
        "activation_bytes_per_second": kept.bytes() / seconds,
        "most": dict(counts.kernels.most_common(30)),
        "most_bytes": dict(counts.bytes.most_common(15)),
    }


def flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """The kernel that a card would choose; the shim does not know what it has."""
    if q.is_nested:
        return sdpa.jagged_scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    return out


def install(shim: Path) -> None:
    """Start over with the shim loaded before torch, and make torch believe in a device."""
    if os.environ.get("LD_PRELOAD") != str(shim):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(shim)})
    ctypes.CDLL(str(shim)).install()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # what autocast asks
    torch.nn.functional.scaled_dot_product_attention = flash
    sdpa._select_sdp_backend = lambda *args: SDPBackend.FLASH_ATTENTION
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake-cuda", type=Path, default=Path("fake.so"), help="the shim (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if not args.fake_cuda.is_file():
        print(f"skipped: there is no shim for fake CUDA tensors at {args.fake_cuda}; build it and give --fake-cuda")
        return
    install(args.fake_cuda.resolve())
    results = {name: step(samples) for name, samples in WORKLOADS.items()}
    results["5 x 15.6 s, recomputed"] = step(WORKLOADS["5 x 15.6 s"], again=True)
    results["5 x 15.6 s, second of an update"] = step(WORKLOADS["5 x 15.6 s"], second=True)
    for name, figures in results.items():
        print(name, json.dumps(figures))
    if args.out:
        record = {"versions": {"torch": torch.__version__}, "results": results}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
