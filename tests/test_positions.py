"""Sinusoids against the formula of Vaswani et al. (2017), section 3.5."""

import math

import pytest
import torch

from regard.model.positions import Sinusoidal


@pytest.mark.parametrize("start, length", [(0, 3), (7, 1), (250, 20), (1000, 2)])
def test_sinusoids_are_the_formula(start, length):
    width = 10
    added = Sinusoidal(width)(torch.zeros(2, length, width, dtype=torch.float64), start)
    for row, position in enumerate(range(start, start + length)):
        angles = [position / 10000 ** (2 * i / width) for i in range(width // 2)]
        expected = [wave(angle) for angle in angles for wave in (math.sin, math.cos)]
        assert added[1, row].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_grown_table_begins_as_before_and_is_not_saved():
    positions, x = Sinusoidal(8), torch.randn(1, 300, 8)
    before = positions(x[:, :200])
    assert torch.equal(positions(x)[:, :200], before) and positions.table.shape[0] >= 300
    assert not positions.state_dict()
