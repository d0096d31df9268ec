"""What makes an update of a gradient; its state as named tensors, so that a checkpoint can hold it without a pickle."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.config_train import TrainConfig
from regard.errors import CheckpointError, ConfigError
from regard.training.ema import TRAINED
from regard.training.sharding import like

RANDOM = "random."
"""What the names of the random generators' states begin with."""
Groups = list[dict[str, Any]]


OPTIMIZERS: dict[str, Callable[[Groups, TrainConfig], torch.optim.Optimizer]] = {
    # Loshchilov and Hutter (2019): the weight decay does not pass through the running averages.
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, betas=settings.betas, eps=1e-9, fused=True),
    # Kingma and Ba (2015): the weight decay is added to the gradient.
    "adam": lambda groups, settings: torch.optim.Adam(groups, betas=settings.betas, eps=1e-9, fused=True),
    # Torch has no fused step of this one for weights that are shared out.
    "sgd": lambda groups, settings: torch.optim.SGD(groups, momentum=settings.momentum, fused=not settings.shard),
    # Shazeer and Stern (2018): of a matrix it keeps means of rows and columns alone. Steps are relative to the size of
    # the weights, and the learning rate is at most 1 / √step.
    "adafactor": lambda groups, settings: torch.optim.Adafactor(groups),
}


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings over the weights that learn; weight decay on matrices, not on biases and norms."""
    weights, groups = learning(model).values(), []
    for are_matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
        if params := [each for each in weights if (each.dim() > 1) == are_matrices]:
            groups.append({"params": params, "lr": settings.learning_rate, "weight_decay": decay})
    return OPTIMIZERS[settings.optimizer](groups, settings)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by name."""
    return {name: weights for name, weights in model.named_parameters() if weights.requires_grad}


def freeze(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Keep weights from learning. A table that serves in several places stays if any of its names is meant.

    Args:
        model: whose weights.
        prefixes: whole names, or their beginnings up to a dot.

    Raises:
        ConfigError: no weight's name begins so, or none would be left to learn.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for prefix in prefixes:
        if not (found := [name for name in weights if f"{name}.".startswith(f"{prefix}.")]):
            raise ConfigError(f'[train]: freeze: no weight\'s name begins with "{prefix}". There are: '
                              f"{', '.join(_names_near(prefix, weights))}")
        for name in found:
            weights[name].requires_grad_(False)
    if not learning(model):
        raise ConfigError(f"[train]: freeze = {list(prefixes)} leaves no weight to learn: leave some of it out")


def _names_near(prefix: str, names: Iterable[str]) -> list[str]:
    """The beginnings of names that are one part longer than what is right of a prefix."""
    wanted, parts = prefix.split("."), [name.split(".") for name in names]
    depth = max(depth for depth in range(len(wanted)) if any(name[:depth] == wanted[:depth] for name in parts))
    return sorted({".".join(name[: depth + 1]) for name in parts if name[:depth] == wanted[:depth]})


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """What is kept of each weight, "name/exp_avg" and so on, and the state of torch's random generators."""
    tensors = {f"{RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"{RANDOM}cuda"] = torch.cuda.get_rng_state()
    for name, weights in learning(model).items():
        for kind, value in optimizer.state[weights].items():
            tensors[f"{name}/{kind}"] = value.detach()
    return tensors


def put_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Put back what `optimizer_tensors` gave: what is kept of each weight, and the random generators' states.

    Raises:
        CheckpointError: the tensors are not those of this model, or of the weights that learn.
    """
    parameters = learning(model)
    kinds: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for name, value in tensors.items():
        weights, _, kind = name.rpartition("/")
        if weights in kinds:
            kinds[weights][kind] = value
        elif not name.startswith((RANDOM, TRAINED)):
            raise CheckpointError(f"{where}: its optimizer knows a weight that this model does not learn: {name}")
    begun = any(kinds.values())  # where no update was made yet, nothing is kept
    if f"{RANDOM}cpu" not in tensors or (begun and not all(kinds.values())):
        raise CheckpointError(f"{where}: holds no optimizer state for this model, so a training cannot go on from it")
    for name, values in kinds.items():
        optimizer.state[parameters[name]] = {
            kind: like(parameters[name], value.to(_place(kind, optimizer, parameters[name]), copy=True))
            for kind, value in values.items()}  # a copy, since the file is only mapped
    torch.set_rng_state(tensors[f"{RANDOM}cpu"])
    if f"{RANDOM}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"])


def _place(kind: str, optimizer: torch.optim.Optimizer, weights: Tensor) -> torch.device:
    """Where torch keeps a part of the state: the count of steps is on the processor, unless the kernel reads it."""
    aside = kind == "step" and not optimizer.defaults.get("fused")
    return torch.device("cpu") if aside else weights.device
