"""Scores as published, and rows of hypotheses."""

import math

import pytest
import torch

from regard.decode.hypotheses import UNSEEN, Paths, norm_of, ranked
from regard.text.tokenizer import BOS


@pytest.mark.parametrize("kind, length, alpha, norm", [
    ("power", 4, 0.0, 1.0), ("power", 4, 1.0, 4.0), ("power", 4, 0.5, 2.0), ("power", 0, 1.0, 1.0),
    ("gnmt", 1, 0.7, 1.0), ("gnmt", 7, 1.0, 2.0), ("gnmt", 7, 0.5, math.sqrt(2)), ("gnmt", 9, 0.0, 1.0)])
def test_length_penalties(kind, length, alpha, norm):
    assert norm_of(length, alpha, kind) == pytest.approx(norm)
    assert ranked(-6.0, length, alpha, kind) == pytest.approx(-6.0 / norm)
    assert ranked(-6.0, length, alpha) == -6.0 / norm_of(length, alpha, "power")


def some_paths():
    """Two beams of two: what a beam starts from, and two steps on."""
    paths = Paths.start(2, 2, torch.device("cpu"))
    for tokens in ([4, 5, 6, 4], [5, 5, 2, 6]):
        log_p = torch.arange(4 * 7).view(4, 7)[torch.arange(4), tokens] / -10.0
        paths = paths.extend(torch.arange(4), torch.tensor(tokens), paths.totals + log_p)
    return paths


def test_all_rows_of_a_beam_begin_alike_so_one_may_have_children():
    paths = Paths.start(2, 3, torch.device("cpu"))
    assert paths.totals.tolist() == [0.0, -math.inf, -math.inf] * 2 and paths.unit.tolist() == [0, 0, 0, 1, 1, 1]
    assert paths.tokens.tolist() == [[BOS]] * 6 and paths.length == 0


def test_children_add_a_token_and_its_log_probability():
    paths = some_paths()
    assert paths.length == 2 and paths.tokens.tolist() == [[1, 4, 5], [1, 5, 5], [1, 6, 2], [1, 4, 6]]
    assert paths.totals.tolist() == pytest.approx([-0.9, -math.inf, -3.6, -math.inf])
    chosen = paths.select(torch.tensor([2, 2, 0]))
    assert chosen.unit.tolist() == [1, 1, 0] and chosen.tokens.tolist() == [[1, 6, 2], [1, 6, 2], [1, 4, 5]]


def test_coverage_counts_a_place_fully_seen_no_more_than_once():
    paths = some_paths().select(torch.tensor([0, 2, 0]))
    seen = torch.tensor([[0.5, 1.7, 1.0], [0.25, 0.5, 0.0], [1.0, 1.0, 1.0]])
    paths = Paths(paths.unit, paths.tokens, paths.totals, seen=seen)
    first, second, third = paths.hypotheses(1.0, "power", 0.4)
    assert first.coverage == pytest.approx(0.4 * math.log(0.5)) and third.coverage == 0.0
    assert second.coverage == pytest.approx(0.4 * (math.log(0.25) + math.log(0.5) + math.log(UNSEEN)))
    assert first.score == pytest.approx(-0.45 + first.coverage) and first.length_norm == 2.0
    assert first.tokens == [4, 5] and first.log_probability == pytest.approx(-0.9)
