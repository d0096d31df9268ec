"""Rules one at a time, against plain loops; test_search.py tries them together, against every output there is."""

import random

import pytest
import torch

from regard.decode.hypotheses import Paths
from regard.decode.rules import NEVER, Limits, Rules, forbid_repeats
from regard.text.tokenizer import BOS, EOS

V = 8


def apply(tokens, *, shortest=0, prefixes=None, ban=(), n=0, sentence=None):
    """Log-probabilities, -1 each where nothing is ruled out, after the rules."""
    tokens = torch.tensor(tokens)
    R = len(tokens)
    given = torch.full((R, 0), -1) if prefixes is None else torch.tensor(prefixes)
    least = torch.tensor(shortest if isinstance(shortest, list) else [shortest] * R)
    rules = Rules(least, given, ban, n, None, torch.tensor(sentence or range(R)))
    unit = torch.arange(R)
    log_p = torch.full((R, V), -1.0)
    rules.apply(log_p, Paths(unit, torch.cat([torch.full((R, 1), BOS), tokens.view(R, -1)], 1), torch.zeros(R)))
    return [{token for token in range(V) if row[token] == -1.0} for row in log_p]


ANY = set(range(V)) - set(NEVER)


@pytest.mark.parametrize("limits, source, between", [
    (Limits(), 1, (0, 12)), (Limits(), 6, (0, 22)), (Limits(7), 6, (0, 7)), (Limits(1), 1, (0, 1)),
    (Limits(100, 0.5, 0), 5, (0, 2)), (Limits(100, 0.0, 0), 5, (0, 1)), (Limits(100, 1.0, 3), 5, (0, 8)),
    (Limits(least=4), 1, (4, 12)), (Limits(least_ratio=0.5), 5, (3, 20)), (Limits(most=4, least=9), 5, (4, 4)),
    (Limits(least=2, least_ratio=0.5), 5, (3, 20))])
def test_limits(limits, source, between):
    assert limits.between(source) == between
    mask = torch.arange(9) < torch.tensor([[source], [9]])
    assert [bound.tolist() for bound in limits.of(mask)] == [list(bound) for bound in zip(
        between, limits.between(9), strict=True)]


def test_nothing_is_ruled_out_but_what_no_output_holds():
    assert apply([[4, 5], [6, 6]]) == [ANY, ANY]


def test_no_end_before_the_shortest_output():
    assert apply([[4], [4], [4]], shortest=[2, 3, 1]) == [ANY, ANY - {EOS}, ANY]
    assert apply([[4], [4]], shortest=[3, 0], sentence=[1, 1]) == [ANY, ANY]


def test_a_prefix_is_followed_whatever_else_is_ruled_out():
    assert apply([[4], [4], [4]], prefixes=[[4, 5, 5], [4, -1, -1], [4, 4, -1]]) == [{5}, ANY, {4}]
    assert apply([[4], [4]], prefixes=[[4, 4], [4, -1]], ban=[[4]], n=1) == [{4}, ANY - {4}]
    assert apply([[4, 5, 6]], prefixes=[[4, 5, 6]]) == [ANY]


@pytest.mark.parametrize("ban, tokens, left", [
    ([[5]], [], ANY - {5}), ([[5], [6]], [5, 6], ANY - {5, 6}), ([[4, 5]], [4], ANY - {5}), ([[4, 5]], [5], ANY),
    ([[4, 5]], [], ANY), ([[4, 4, 5], [4, 6]], [4, 4], ANY - {5, 6}), ([[4, 5, 6]], [4], ANY),
    ([[4, 5, 6, 7]], [3, 4, 5, 6], ANY - {7})])
def test_bans(ban, tokens, left):
    assert apply([tokens], ban=ban) == [left]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_no_repeated_ngram(n):
    draw = random.Random(n)
    for _ in range(50):
        length = draw.randint(n, 9)
        rows = [[draw.randint(3, 5) for _ in range(length)] for _ in range(4)]
        log_p = torch.zeros(4, V)
        forbid_repeats(log_p, torch.tensor(rows), n)
        for row, tokens in enumerate(rows):
            grams = {tuple(tokens[start : start + n]) for start in range(length - n + 1)}
            expected = {token for token in range(V) if tuple([*tokens, token][-n:]) in grams}
            assert {token for token in range(V) if log_p[row, token] < 0} == expected
