"""Low-rank adaptation (Hu et al., arXiv:2106.09685): pretrained weights stay, and learn an update of a small rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from w2v2.model.head import Wav2Vec2WithHead
from w2v2.model.transformer import TransformerBlock


class LowRank(nn.Module):
    """A weight (out, in) plus ``alpha / rank * up @ down``; at first no change, as ``up`` is zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, of the weight's shape."""
        return weight + self.scale * self.up @ self.down


def add_lora(model: Wav2Vec2WithHead, rank: int, alpha: float) -> None:
    """Let only low-rank updates of the queries' and values' weights learn, and the head."""
    model.requires_grad_(False)
    model.get_submodule(model.HEAD).requires_grad_(True)
    for block in model.transformer:
        assert isinstance(block, TransformerBlock)
        for linear in (block.attn.q_proj, block.attn.v_proj):
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, alpha))


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose weight is updated so, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        and any(isinstance(part, LowRank) for part in module.parametrizations.weight)
    }


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with its updates added to the weights: that of a model which never had any."""
    merged = dict(state)
    for name, module in _adapted(model).items():
        own = f"{name}.parametrizations.weight."
        update: LowRank = module.parametrizations.weight[0]  # type: ignore[index, union-attr, assignment]
        weight, down, up = (merged.pop(own + part) for part in ("original", "0.down", "0.up"))
        merged[f"{name}.weight"] = weight + update.scale * up @ down
    return merged


def merge_lora(model: nn.Module) -> None:
    """Add the updates to the weights, and be rid of them."""
    for module in _adapted(model).values():
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
