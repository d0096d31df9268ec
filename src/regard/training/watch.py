"""Tells early that a training diverges."""

import math

from regard.config_train import TrainConfig
from regard.training.schedule import learning_rate
from regard.training.standing import Standing

UPDATES = 50
"""How many updates the running loss is an average of, and how many after warm-up must show that something is learnt."""
RISE = 1.0
"""Nats a token that the running loss may lie above its lowest. Batches of short and of long sentences differ too, but
the average of 50 by far less."""


def divergence(standing: Standing, loss: float, size: int, settings: TrainConfig) -> str | None:
    """Take in the loss of an update, and tell, once in a training, that it diverges.

    Args:
        standing: before the update; its running loss is brought up to date.
        loss: nats a token, without smoothing.
        size: V of the target; who knows nothing loses log V nats a token.
        settings: of the training.
    """
    last = standing.running
    standing.running = loss if last is None else last + (loss - last) / UPDATES
    standing.lowest = min(standing.running, standing.running if standing.lowest is None else standing.lowest)
    risen = standing.running > standing.lowest + RISE
    ignorant = standing.step + 1 >= settings.warmup + UPDATES and standing.running > math.log(size)
    if standing.warned or not (risen or ignorant):
        return None
    standing.warned = True
    rate = learning_rate(standing.step + 1, settings)
    what = (f"has risen to {standing.running:.2f} nats a token, from {standing.lowest:.2f} at its lowest" if risen else
            f"is {standing.running:.2f} nats a token after warm-up, more than that of guessing ({math.log(size):.2f})")
    clip = "" if settings.clip else ", train.clip = 1"
    return (f"step {standing.step + 1}, epoch {standing.epoch}: the training loss {what}. The learning rate, "
            f"now {rate:.2g}, is probably too high: try train.learning_rate = {settings.learning_rate / 3:.1g}{clip} "
            f"or a longer train.warmup (it is {settings.warmup})")
