"""How the learning rate goes: up in a line during warm-up, then as one of these says."""

import math
from collections.abc import Callable

from regard.config_train import TrainConfig


def inverse_sqrt(step: int, config: TrainConfig) -> float:
    """Falls with 1 / √step from its height at the end of warm-up (Vaswani et al. 2017, eq. 3)."""
    return math.sqrt(max(config.warmup, 1) / step)


def cosine(step: int, config: TrainConfig) -> float:
    """Half a cosine from the end of warm-up down to `final_learning_rate` (Loshchilov and Hutter 2017, eq. 5)."""
    return _down_to_the_end(config, 0.5 * (1 + math.cos(math.pi * _through(step, config))))


def linear(step: int, config: TrainConfig) -> float:
    """A line from the end of warm-up down to `final_learning_rate` (as in Devlin et al. 2019, appendix A.2)."""
    return _down_to_the_end(config, 1 - _through(step, config))


def constant(step: int, config: TrainConfig) -> float:
    """Stays where warm-up left it."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, TrainConfig], float]] = {
    "inverse_sqrt": inverse_sqrt,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}
"""The share of the highest learning rate at a step after warm-up."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of an update; the first has step 1."""
    if step < config.warmup:
        return config.learning_rate * step / config.warmup
    return config.learning_rate * SCHEDULES[config.schedule](step, config)


def _through(step: int, config: TrainConfig) -> float:
    """How much of the way from the end of warm-up to the last step is done, 0 to 1."""
    return min((step - config.warmup) / max(1, config.steps - config.warmup), 1.0)


def _down_to_the_end(config: TrainConfig, left: float) -> float:
    """From 1 down to `final_learning_rate` as `left` goes from 1 down to 0."""
    return config.final_learning_rate + (1 - config.final_learning_rate) * left
