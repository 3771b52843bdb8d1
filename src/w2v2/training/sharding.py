"""FSDP2: parameters, gradients and optimiser state shared out over the processes instead of kept whole by each.

What torch and Lightning do not do by themselves: which modules are gathered together, LayerDrop, and tensors that
everybody needs whole.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from w2v2.errors import UsageError


def transformer_blocks(model: nn.Module, option: str) -> nn.ModuleList:
    """The blocks of a model, for an option that treats each alone.

    Raises:
        UsageError: it has no list of that name.
    """
    blocks = getattr(model, "transformer", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UsageError(f"{option} needs a model with a list 'transformer' of blocks; leave it out")
    return blocks


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep of every parameter this process's part; a block is whole only while it runs, the rest during a whole pass.

    Nothing is done to a model that is sharded already.
    """
    if isinstance(model, FSDPModule):
        return
    for block in transformer_blocks(model, "`train.shard`"):
        fully_shard(block, mesh=mesh)
        if hasattr(block, "skip"):
            # A block that LayerDrop leaves out still takes part with all its parameters: gradients of zero.
            register_fsdp_forward_method(block, "skip")
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that every process has all of; of a sharded one, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` with everything whole; of a sharded model on the host of the first process, and {} on the others.

    Every process must call this.
    """
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
