"""Schedules against their formulas."""

import math

import pytest

from regard.config_train import TrainConfig
from regard.training.schedule import SCHEDULES, learning_rate


def rates(steps=100, **settings):
    config = TrainConfig(learning_rate=0.5, steps=steps, **{"warmup": 10, **settings})
    return {step: learning_rate(step, config) for step in range(1, steps + 1)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_to_the_highest_rate(schedule):
    found = rates(schedule=schedule)
    assert [found[step] for step in range(1, 11)] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert max(found.values()) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule, formula", [
    ("inverse_sqrt", lambda step: 0.5 * math.sqrt(10 / step)),
    ("cosine", lambda step: 0.25 * (1 + math.cos(math.pi * (step - 10) / 90))),
    ("linear", lambda step: 0.5 * (100 - step) / 90),
    ("constant", lambda step: 0.5),
])
def test_what_follows_warm_up(schedule, formula):
    found = rates(schedule=schedule)
    assert [found[step] for step in range(10, 101)] == pytest.approx([formula(step) for step in range(10, 101)])


@pytest.mark.parametrize("schedule, second", [("inverse_sqrt", 0.5 / math.sqrt(2)), ("constant", 0.5)])
def test_without_warm_up_the_first_step_has_the_highest_rate(schedule, second):
    found = rates(schedule=schedule, warmup=0)
    assert (found[1], found[2]) == pytest.approx((0.5, second))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_what_falls_to_the_end_falls_to_its_final_share(schedule, share):
    found, to_0 = rates(schedule=schedule, final_learning_rate=share), rates(schedule=schedule)
    assert found[100] == pytest.approx(0.5 * share) and found[10] == pytest.approx(0.5)
    for step in range(10, 101):
        assert found[step] == pytest.approx(0.5 * share + (1 - share) * to_0[step])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_ends_at_0_also_when_warm_up_is_as_long_as_the_training(schedule):
    assert rates(schedule=schedule)[100] == pytest.approx(0)
    found = rates(steps=10, schedule=schedule, warmup=10)
    assert all(0 <= rate <= 0.5 for rate in found.values()) and found[9] == pytest.approx(0.45)
