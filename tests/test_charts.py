"""Charts: ticks, geometry, and what is left out."""

import math

import pytest

from regard.evaluate.charts import SIZES, Series, chart, number, thin, ticks


@pytest.mark.parametrize(("low", "high", "most"), [
    (0, 100, 6), (0.2, 0.9, 6), (3.2, 3.4, 6), (0, 2400, 8), (0, 1e-5, 6), (-3, 7, 6), (5, 5, 6), (0, 0, 6), (0, 98, 6),
])
def test_ticks_are_round_reach_both_ends_and_are_few(low, high, most):
    found = ticks(low, high, most)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= most + 1
    step = found[1] - found[0]
    assert found == pytest.approx([found[0] + place * step for place in range(len(found))])
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - good) for good in (1, 2, 5, 10)) < 1e-6


def test_numbers_as_an_axis_shows_them():
    assert [number(value) for value in (0, 12.0, 2400, 0.005, 1.5e6, 0.25)] == ["0", "12", "2,400", "0.005", "1.5M",
                                                                               "0.25"]


def test_thin_keeps_the_mean():
    points = [(float(x), float(x * x)) for x in range(1000)]
    kept = thin(points, 160)
    assert len(kept) <= 160 and thin(points[:100], 160) == points[:100]
    assert kept[0] == (pytest.approx(3), pytest.approx(13)) and thin([], 10) == []


def test_points_go_where_their_values_are():
    found = chart([Series("a", [(0, 0), (100, 50)], 0), Series("b", [(100, 100)], 1)], "x", "y", "alt", from_zero=True)
    assert found is not None and list(found.drawings) == list(SIZES)
    for name, drawing in found.drawings.items():
        assert (drawing.width, drawing.height) == SIZES[name]
        (first, second), (third,) = (line.marks for line in drawing.lines)
        assert (first.x, first.y) == (drawing.left, drawing.bottom) and third.x == second.x == drawing.right
        assert second.y == pytest.approx((first.y + third.y) / 2, abs=0.1)
        assert second.title == "a, 100: 50"
        zero = next(tick for tick in drawing.y_ticks if tick.label == "0")
        assert zero.at == first.y


def test_categories_stand_apart_and_are_thinned_where_they_would_collide():
    names = [(f"{place}–{place + 1}", str(place)) for place in range(11)]
    found = chart([Series("a", [(float(place), 1.0) for place in range(11)], 0)], "x", "y", "alt", categories=names)
    assert found is not None
    wide, narrow = found.drawings["wide"], found.drawings["narrow"]
    assert [tick.label for tick in wide.x_ticks] == [name for name, _ in names]
    assert len(narrow.x_ticks) == 6 and narrow.x_ticks[1].label == "2–3" and narrow.x_ticks[1].below == "2"
    assert [mark.title for mark in narrow.lines[0].marks][3] == "a, 3–4: 1"


def test_what_is_not_finite_is_left_out():
    found = chart([Series("a", [(1, math.nan), (2, 3.0)], 0), Series("b", [(1, math.inf)], 1)], "x", "y", "alt")
    assert found is not None and [each.name for each in found.series] == ["a"]
    assert found.series[0].points == [(2, 3.0)]
    assert chart([Series("a", [], 0)], "x", "y", "alt") is None and chart([], "x", "y", "alt") is None


def test_many_points_carry_no_marks():
    found = chart([Series("a", [(float(x), 1.0) for x in range(100)], 0)], "x", "y", "alt")
    assert found is not None and found.drawings["wide"].lines[0].marks == []
    assert found.drawings["wide"].lines[0].path.count("L") == 99
