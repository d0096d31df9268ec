"""How the learning rate goes: up in a line during warm-up, then down by one of these."""

import math
from collections.abc import Callable

from regard.config import TrainConfig


def inverse_sqrt(step: int, config: TrainConfig) -> float:
    """Falls with 1 / √step from its height at the end of warm-up (Vaswani et al. 2017, eq. 3)."""
    return math.sqrt(max(config.warmup, 1) / step)


def cosine(step: int, config: TrainConfig) -> float:
    """Half a cosine from the end of warm-up down to 0 at the last step (Loshchilov and Hutter 2017, eq. 5)."""
    through = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))


def constant(step: int, config: TrainConfig) -> float:
    """Stays where warm-up left it."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, TrainConfig], float]] = {
    "inverse_sqrt": inverse_sqrt,
    "cosine": cosine,
    "constant": constant,
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of an update; the first has step 1."""
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    return config.learning_rate * SCHEDULES[config.schedule](step, config)
