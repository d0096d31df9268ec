"""The count of shapes: what it calls new, and that it notes every product of an update."""

from pathlib import Path

import pytest
import torch

from conftest import make_batch, make_model
from regard.training.objective import loss_of


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import shapes

    return shapes


def test_new_is_what_was_not_used_lately(shapes):
    updates = [["a", "b"], ["a", "b"], ["a", "c"], ["b", "a"]]
    assert [shapes.new(updates, kept) for kept in (1, 2, 3)] == [2, 1.5, 0.5]


def test_a_product_and_both_of_its_gradients_are_noted_in_bfloat16(shapes):
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with shapes.Noted() as noted:
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.nn.functional.linear(x, weight)
        y.sum().backward()
    assert [[tuple(size) for _, size, _ in product] for product in noted.shapes] == [
        [(2, 3), (3, 4)], [(4, 2), (2, 3)], [(2, 4), (4, 3)]]
    assert {kind for product in noted.shapes for kind, *_ in product} == {torch.bfloat16}
    assert not y.any() and not weight.grad.any()


def test_a_product_into_a_tensor_that_is_there_is_noted_and_gives_zeros_too(shapes):
    x, out = torch.randn(3, 3).bfloat16(), torch.full((3, 3), torch.nan).bfloat16()
    with shapes.Noted() as noted:
        assert torch.mm(x, x, out=out) is out and torch.full_like(x, torch.nan).addmm_(x, x).eq(0).all()
    assert not out.any() and len(noted.shapes) == 2


def test_products_of_float32_have_no_program_and_are_made(shapes):
    x = torch.randn(3, 3)
    with shapes.Noted() as noted:
        assert (x @ x).any()
    assert not noted.shapes


@pytest.mark.parametrize("name", [
    "fixed-gru-every-step", "after-general", "after-feeding", "before-additive", "before-concat"])
def test_other_lengths_make_no_new_shapes_of_a_recurrent_network(shapes, name):
    """Its memory grew with them: each is a program, which stays (docs/log.md, 2026-11-30)."""
    model, found = make_model(name).float().train(), []
    for lengths in ([(5, 4), (2, 6), (1, 1)], [(9, 2), (3, 8), (4, 4)]):
        with shapes.Noted() as noted, torch.autocast("cpu", torch.bfloat16):
            loss, _ = loss_of(model, make_batch(lengths))
        with noted:
            loss.backward()
        found.append(set(noted.shapes))
    assert found[0] and found[1] <= found[0]
