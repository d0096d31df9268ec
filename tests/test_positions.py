"""Each kind of position against a plain loop from its paper's equation."""

import math

import pytest
import torch

from conftest import model_config
from regard.errors import DataError
from regard.model.positions import POSITIONS, Alibi, Learned, Positions, Relative, Rotary, Sinusoidal, slopes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_a_table_that_another_thread_has_made_shorter_is_not_read():
    class Raced(Sinusoidal):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "table" and len(value) > 600:  # the other thread's comes right after
                super().__setattr__(name, value[:600])

    assert Raced(8).waves(699, 700, normal(1)).shape == (1, 8)


# --- the oracles, which test_transformer.py uses too ---------------------------------------------------------------


def sinusoid(position, width):
    """Vaswani et al. (2017), section 3.5."""
    angles = [position / 10000 ** (2 * i / width) for i in range(width // 2)]
    return [wave(angle) for angle in angles for wave in (math.sin, math.cos)]


def turned(vector, position):
    """Su et al. (2021), eq. 15, the pairs being the values i and i + D/2."""
    half, result = len(vector) // 2, list(vector)
    for i in range(half):
        angle = position * 10000 ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return result


def bucket(distance, both_sides, buckets=32, greatest=128):
    """Raffel et al. (2020), section 2.1, in whole numbers; distance is key minus query.

    log(n/m) / log(M/m) * N >= j where n^N >= m^N (M/m)^j.
    """
    first = 0
    if both_sides:
        buckets //= 2
        first = buckets if distance > 0 else 0
    exact, away = buckets // 2, abs(distance) if both_sides else max(-distance, 0)
    if away < exact:
        return first + away
    wide = buckets - exact
    steps = [j for j in range(wide) if away**wide >= exact**wide * (greatest // exact) ** j]
    return first + exact + max(steps)


def slope(head, heads):
    """Press et al. (2022), section 3 and its released rule: head counts from 0."""
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))


# --- the kinds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start, length", [(0, 3), (7, 1), (250, 20), (1000, 2)])
def test_sinusoids_are_the_formula(start, length):
    width = 10
    added = Sinusoidal(width)(torch.zeros(2, length, width, dtype=torch.float64), start)
    for row, position in enumerate(range(start, start + length)):
        assert added[1, row].tolist() == pytest.approx(sinusoid(position, width), abs=1e-6)


def test_a_grown_table_begins_as_before_and_is_not_saved():
    positions, x = Sinusoidal(8), torch.randn(1, 300, 8)
    before = positions(x[:, :200])
    assert torch.equal(positions(x)[:, :200], before) and positions.table.shape[0] >= 300
    assert not positions.state_dict()


def test_learned_positions_are_rows_of_a_table():
    positions, x = Learned(4, 9).double(), normal(2, 3, 4)
    for start in (0, 2, 6):
        expected = [[x[b, t] + positions.table[start + t] for t in range(3)] for b in range(2)]
        assert torch.equal(positions(x, start), torch.stack([torch.stack(row) for row in expected]))
    assert torch.autograd.gradcheck(lambda x, _: positions.embed(x, 2), (x.requires_grad_(), positions.table))


def test_learned_positions_that_run_out_say_what_to_do():
    positions = Learned(4, 9)
    positions(torch.zeros(1, 1, 4), 8)
    for start, length in ((0, 10), (9, 1)):
        with pytest.raises(DataError, match=r"has 10 tokens, .* max_positions = 9 places: give it shorter sequences, "
                                            r"or train a model with max_positions = 10 or more"):
            positions(torch.zeros(1, length, 4), start)


@pytest.mark.parametrize("start, length", [(0, 5), (3, 1), (300, 4)])
def test_rotary_is_the_formula(start, length):
    positions, heads = Rotary(6).double(), normal(2, 3, length, 6)
    found = positions.rotate(heads, start)
    for b in range(2):
        for h in range(3):
            for t in range(length):
                expected = turned(heads[b, h, t].tolist(), start + t)
                assert found[b, h, t].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), heads.norm(dim=-1))


def test_rotary_scores_know_the_distance_alone():
    positions, query, key = Rotary(8).double(), normal(1, 1, 1, 8), normal(1, 1, 1, 8)

    def score(asks, answers):
        return float((positions.rotate(query, asks) * positions.rotate(key, answers)).sum())

    for distance in (0, 1, 5, 40):
        scores = [score(place + distance, place) for place in (0, 1, 17, 200)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)
    assert abs(score(0, 0) - score(5, 0)) > 0.01 and abs(score(5, 0) - score(0, 5)) > 0.01


def test_gradients_of_rotary():
    positions = Rotary(4).double()
    assert torch.autograd.gradcheck(lambda heads: positions.rotate(heads, 3), normal(1, 2, 3, 4).requires_grad_())


@pytest.mark.parametrize("both_sides", [True, False])
def test_relative_buckets_are_the_papers(both_sides):
    distances = range(-400, 401)
    found = Relative(2, both_sides).bucket(torch.tensor(distances)).tolist()
    assert found == [bucket(distance, both_sides) for distance in distances]
    reached = set(range(32)) - {16} if both_sides else set(range(32))  # no distance is 0 and positive
    assert set(found) == reached


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize("start, length", [(0, 40), (7, 1), (140, 3)])
def test_relative_bias_is_the_formula(both_sides, start, length):
    positions = Relative(3, both_sides).double()
    found = positions.bias(normal(2, length, 4), start)
    assert found.shape == (3, length, start + length)
    for h in range(3):
        for t in range(length):
            rows = [bucket(s - (start + t), both_sides) for s in range(start + length)]
            assert torch.equal(found[h, t], positions.table[rows, h])


def test_gradients_of_relative():
    positions = Relative(2, True, buckets=8, greatest=16).double()
    assert torch.autograd.gradcheck(lambda _: positions.bias(normal(1, 20, 4)), positions.table)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16])
def test_alibi_is_the_formula(heads):
    found = Alibi(heads).double().bias(normal(2, 3, 4), 5)
    assert found.shape == (heads, 3, 8) and found.dtype == torch.float64
    for h in range(heads):
        for t in range(3):
            expected = [-slope(h, heads) * abs(5 + t - s) for s in range(8)]
            assert found[h, t].tolist() == pytest.approx(expected, rel=1e-6)


def test_alibi_slopes_are_those_that_the_paper_prints():
    assert slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slopes(16)[:4] == pytest.approx([2**-0.5, 2**-1, 2**-1.5, 2**-2])
    assert slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


# --- the shape they share ------------------------------------------------------------------------------------------

PLACES = {"none": None, "sinusoidal": "embed", "learned": "embed", "relative": "bias", "rotary": "rotate",
          "alibi": "bias"}


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("name", POSITIONS)
def test_each_kind_enters_in_one_place(name, decoder):
    positions = POSITIONS[name](model_config("transformer-pre", positions=name).encoder, decoder).double()
    x, heads = normal(2, 3, 8), normal(2, 2, 3, 4)
    order = positions.order(x, 1)
    acts = {"embed": not torch.equal(positions(x, 1), x), "rotate": not torch.equal(order.rotate(heads), heads),
            "bias": order.bias is not None}
    assert [place for place, found in acts.items() if found] == [PLACES[name]] * (name != "none")
    assert isinstance(positions, Positions) and getattr(positions, "both_sides", not decoder) != decoder
    assert torch.equal(order.rotate(heads), positions.rotate(heads, 1))
    if order.bias is not None:
        assert torch.equal(order.bias, positions.bias(x, 1))
