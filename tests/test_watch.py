"""A training that diverges is told of early, once, and one that learns is not."""

import math
import random

import pytest

from regard.config_train import TrainConfig
from regard.training.standing import Standing
from regard.training.watch import UPDATES, divergence

SETTINGS = TrainConfig(learning_rate=0.03, warmup=20, clip=0.0)


def warnings(losses, settings=SETTINGS, size=8000, standing=None):
    """What is said, by the step at which it is."""
    standing, said = standing or Standing(), {}
    for loss in losses:
        if warning := divergence(standing, loss, size, settings):
            said[standing.step + 1] = warning
        standing.step += 1
    return said


def test_a_loss_that_rises_is_told_of_early_and_once():
    falling = [9 - 6 * step / 200 for step in range(200)]
    rising = [3 + step / 10 for step in range(300)]
    (step, said), = warnings(falling + rising).items()
    assert 210 < step < 260
    assert said.startswith(f"step {step}, epoch 0: the training loss has risen to ")
    assert "from 4." in said and said.endswith(
        "The learning rate, now 0.0085, is probably too high: try train.learning_rate = 0.01, train.clip = 1 or a "
        "longer train.warmup (it is 20)")
    assert list(warnings([5.0] * 30 + [1000.0] * 9)) == [31]


def test_a_model_that_knows_less_than_nothing_after_warm_up_is_told_of():
    size = 100
    (step, said), = warnings([math.log(size) + 0.1] * 200, size=size).items()
    assert step == SETTINGS.warmup + UPDATES
    assert "is 4.71 nats a token after warm-up, more than that of guessing (4.61)" in said
    assert not warnings([math.log(size) - 0.1] * 200, size=size)


@pytest.mark.parametrize("last", [0.05, 3.0])
def test_a_training_that_learns_is_not_told_of(last):
    """Its loss falls, then stays, with batches of short sentences that cost little and of long ones that cost much."""
    draw = random.Random(1)
    losses = [max(0.01, last + 6 * math.exp(-step / 300) + draw.uniform(-1.2, 1.2)) for step in range(20_000)]
    assert not warnings(losses)


def test_it_goes_on_where_it_stood():
    losses = [5 - step / 50 for step in range(150)] + [2 + step / 9 for step in range(100)]
    (expected, _), = warnings(losses).items()
    for stop in (expected - 1, expected):
        standing = Standing()
        said = warnings(losses[:stop], standing=standing)
        again = Standing(**{**vars(standing), "window": dict(standing.window)})
        assert [*said, *warnings(losses[stop:], standing=again)] == [expected]
