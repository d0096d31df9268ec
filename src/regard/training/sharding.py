"""Weights that no process holds in whole (FSDP2; Rajbhandari et al. 2020, ZeRO, stage 3): `[train] shard = true`.

Each of N processes keeps 1 / N of every weight, of its gradient and of what the optimizer keeps of it. A layer is
gathered when it is needed and let go after it; the tables of tokens stay until the update's backward pass has ended.
For models that one device does not train: validation and checkpoints need the weights alone in one place, the first
process, as translating does.
"""

import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from regard.model.rnn import RNNDecoder
from regard.model.seq2seq import Seq2Seq


def shard(model: Seq2Seq, device: torch.device) -> None:
    """Leave to each process its part of the weights, in place; all processes must have made the same model.

    Args:
        model: not on the device yet.
        device: where this process computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here alters it in place
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.encoder, model.decoder):
        if isinstance(part, RNNDecoder):  # its cells are asked step by step, so they stay with the tables
            continue
        for layer in part.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh)
            for method in {"start", "rows"} & set(dir(layer)):
                register_fsdp_forward_method(layer, method)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the output table after the forward pass
    register_fsdp_forward_method(model, "real")


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes, each of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name, those that were shared out in the processor's memory, one after the other.

    Args:
        tensors: by name, in the same order on all processes.
        keep: whether this process needs them.
    """
    found = {}
    for name, tensor in tensors.items():
        all_of_it = whole(tensor)
        if keep:
            found[name] = all_of_it.cpu() if isinstance(tensor, DTensor) else all_of_it
    return found


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value, shared out as a tensor of its shape is; each process has the value."""
    if not isinstance(tensor, DTensor) or tensor.shape != value.shape:
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
