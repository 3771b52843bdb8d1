"""bf16 without a kernel for each weight: parameters cast together, and norms that take and give bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from w2v2.model.packing import is_plain


class _CastTogether(torch.autograd.Function):
    """Parameters in another type, by one kernel for all of them; so are their gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [p.dtype for p in parameters]
        return _cast(parameters, [dtype] * len(parameters))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        known = [(grad, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True) if grad is not None]
        cast = iter(_cast([grad for grad, _ in known], [dtype for _, dtype in known]))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Any, dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
    out = [torch.empty(t.shape, dtype=dtype, device=t.device) for t, dtype in zip(tensors, dtypes, strict=True)]
    if out:
        torch._foreach_copy_(out, list(tensors))
    return tuple(out)


Casts = dict[tuple[object, ...], tuple[Tensor, ...]]
"""Cast parameters by the modules that they are of, and whether gradients are taken."""
_kept = ContextVar[Casts | None]("kept", default=None)


@contextlib.contextmanager
def casts_kept(casts: Casts | None) -> Iterator[None]:
    """Cast nothing inside that has been before, until ``casts`` is cleared: as soon as the parameters change."""
    token = _kept.set(casts)
    try:
        yield
    finally:
        _kept.reset(token)


def _cast_once(modules: tuple[nn.Module, ...]) -> tuple[Tensor, ...]:
    casts, key = _kept.get(), (*modules, torch.is_grad_enabled())
    known = None if casts is None else casts.get(key)
    if known is None:
        known = _CastTogether.apply(torch.bfloat16, *(p for m in modules for p in m.parameters()))
        if casts is not None:
            casts[key] = known
    return known


class Methods(nn.Module):
    """A module's methods by name, to be called with other parameters than its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, name: str, *args: Any) -> Any:
        """The method."""
        return getattr(self.module, name)(*args)


@contextlib.contextmanager
def low_precision(x: Tensor, *modules: nn.Module) -> Iterator[tuple[Any, ...]]:
    """x and modules as they are; under bf16 autocast in bf16 from end to end, autocast off.

    LayerNorm computes in fp32 inside, as ever; its input, output and parameters are bf16, like those of products.
    Inside of ``torch.compile``, which joins the casts with other work by itself, they stay as they are.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if not autocast or is_plain() or torch.compiler.is_compiling():
        yield (x, *modules)
        return
    with torch.autocast(device, enabled=False):
        names = [[name for name, _ in module.named_parameters()] for module in modules]
        parameters = iter(_cast_once(modules))
        yield (
            x.bfloat16(),
            *(
                _with(module, dict(zip(own, parameters, strict=False)))
                for module, own in zip(modules, names, strict=True)
            ),
        )


def _with(module: nn.Module, parameters: dict[str, Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        out: Tensor = functional_call(module, parameters, args)
        return out

    return call
