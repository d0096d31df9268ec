"""Additive scores made piece by piece, against their formula."""

import pytest
import torch

from regard.model import pairs
from regard.model.pairs import along
from regard.training.plan import saved_bytes

SHAPES = {
    "a batch": ((5, 4, 3), (5, 6, 3)),
    "one query": ((5, 1, 3), (5, 6, 3)),
    "no batch": ((4, 3), (6, 3)),
    "keys of each query": ((5, 4, 1, 3), (5, 4, 6, 3)),
    "keys for all rows": ((5, 4, 3), (1, 6, 3)),
    "queries for all rows": ((4, 3), (5, 6, 3)),
}


@pytest.mark.parametrize("piece", [1, 40, 10_000], ids=["a query at a time", "some", "all at once"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_scores_and_their_gradients_are_the_formulas(shapes, piece, monkeypatch):
    monkeypatch.setattr(pairs, "PIECE", piece)
    torch.manual_seed(1)
    v, asked, told = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3,), *shapes))
    expected = torch.tanh(asked.unsqueeze(-2) + told.unsqueeze(-3)) @ v
    found = along(v, asked, told)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(found)
    for gradient, right in zip(*(torch.autograd.grad(each, (v, asked, told), upstream) for each in (found, expected)),
                               strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-12)


def test_pieces_keep_no_more_than_queries_and_keys():
    asked, told = (torch.randn(2, 200, 32, requires_grad=True) * 1 for _ in range(2))  # no leaves, so they are counted
    with saved_bytes() as saved:
        along(torch.nn.Parameter(torch.randn(32)), asked, told)
    assert sum(saved.values()) == 2 * asked.nbytes  # of the pairs: 200 times as much


def test_in_bfloat16_pieces_are_float32():
    torch.manual_seed(1)
    v, asked, told = torch.randn(32), torch.randn(2, 200, 32), torch.randn(2, 200, 32)
    exact = along(v, asked.bfloat16().float(), told.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = along(v, asked.bfloat16(), told.bfloat16())
    assert torch.equal(found, exact.bfloat16())
