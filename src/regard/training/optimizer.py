"""AdamW, and its state as named tensors, so that a checkpoint can hold it without a pickle."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from regard.config import TrainConfig
from regard.errors import CheckpointError

RANDOM = "random."
"""What the names of the random generators' states begin with."""


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), its weight decay on matrices only, not on biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [weights for weights in parameters if weights.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [weights for weights in parameters if weights.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=1e-9, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The running averages of each weight, "name/exp_avg" and so on, and the state of torch's random generators."""
    tensors = {f"{RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"{RANDOM}cuda"] = torch.cuda.get_rng_state()
    for name, weights in model.named_parameters():
        for kind, value in optimizer.state[weights].items():
            tensors[f"{name}/{kind}"] = value.detach()
    return tensors


def put_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Put back what `optimizer_tensors` gave: the running averages and the random generators' states.

    Raises:
        CheckpointError: the tensors are not those of this model.
    """
    parameters = dict(model.named_parameters())
    kinds: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for name, value in tensors.items():
        weights, _, kind = name.rpartition("/")
        if weights in kinds:
            kinds[weights][kind] = value.to(parameters[weights].device, copy=True)  # not the mapped file
        elif not name.startswith(RANDOM):
            raise CheckpointError(f"{where}: its optimizer knows a weight that this model has not: {name}")
    if any(not values for values in kinds.values()):
        raise CheckpointError(f"{where}: holds no optimizer state for this model, so a training cannot go on from it")
    for name, values in kinds.items():
        optimizer.state[parameters[name]] = values
    torch.set_rng_state(tensors[f"{RANDOM}cpu"])
    if f"{RANDOM}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"])
