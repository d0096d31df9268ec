"""R-Drop against a plain loop over tokens, in float64, and its gradient."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import make_batch, make_model, said
from regard.training import r_drop
from regard.training.objective import coverage_loss, loss_of
from regard.training.r_drop import r_drop_loss_of

NAMES = ["transformer-pre", "after-copy", "after-coverage"]


def two_passes(model, batch, coverage):
    """Log-probabilities of two passes, and their coverage losses, as drawn by seed 3."""
    torch.manual_seed(3)
    taps = [{} if coverage else None for _ in range(2)]
    features = [said(model, batch, each) for each in taps]
    lost = sum(coverage_loss(each["cross.0"], batch.target_mask) for each in taps) if coverage else 0.0
    return [model.log_probabilities(each, batch.source) for each in features], lost


def plainly(log_p, log_q, batch, alpha, smoothing):
    """Half of eq. 4 of Liang et al. (2021), token by token."""
    loss, surprise = 0.0, 0.0
    for row in range(len(batch)):
        for t in range(int(batch.target_mask[row].sum())):
            p, q, right = log_p[row, t], log_q[row, t], batch.target_out[row, t]
            for each in (p, q):
                loss = loss - (1 - smoothing) * each[right] / 2 - smoothing * each.mean() / 2
                surprise = surprise - each[right] / 2
            kl = functional.kl_div(q, p, log_target=True, reduction="sum")  # KL(p || q)
            kl = (kl + functional.kl_div(p, q, log_target=True, reduction="sum")) / 2
            loss = loss + alpha * kl / 2
    return loss, surprise


def test_in_bfloat16_both_passes_are_summed_in_float32():
    torch.manual_seed(1)
    first, second = (torch.randn(1000, 16).bfloat16() for _ in range(2))
    targets, found = torch.randint(500, (1000,)), []
    weight = (0.1 * torch.randn(500, 16)).requires_grad_()
    for kind in (torch.float64, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            table = weight if kind == torch.bfloat16 else weight.double()
            loss, _ = r_drop.agreeing_cross_entropy(first.to(kind), second.to(kind), table, targets, 0.0, 0.1)
            found.append(torch.autograd.grad(loss, weight)[0])
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-3


@pytest.mark.parametrize("piece", [1, 7, 256])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_a_plain_loop(name, piece, monkeypatch):
    monkeypatch.setattr(r_drop, "PIECE", piece)
    model, batch = make_model(name, dropout=0.3).train(), make_batch()
    coverage = 0.7 if name == "after-coverage" else 0.0
    (log_p, log_q), lost = two_passes(model, batch, coverage)
    assert not torch.equal(log_p, log_q)
    loss, surprise = plainly(log_p, log_q, batch, 5.0, 0.1)
    loss = loss + coverage / 2 * lost
    weights = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(3 * loss, weights)
    torch.manual_seed(3)
    found = r_drop_loss_of(model, batch, 5.0, 0.1, coverage)
    torch.testing.assert_close(found, (loss, surprise), rtol=1e-12, atol=1e-12)
    assert not found[1].requires_grad
    for gradient, right in zip(torch.autograd.grad(3 * found[0], weights), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES[:2])
def test_gradients_are_those_of_differences(name):
    model, batch = make_model(name, dropout=0.3).train(), make_batch([(3, 2), (1, 3)])
    weights = tuple(model.parameters())

    def loss(*_):
        torch.manual_seed(3)
        return r_drop_loss_of(model, batch, 5.0, 0.1)[0]

    assert torch.autograd.gradcheck(loss, weights, fast_mode=True)


def test_passes_that_agree_lose_what_one_loses():
    model, batch = make_model("transformer-pre").train(), make_batch()
    torch.testing.assert_close(r_drop_loss_of(model, batch, 5.0, 0.1), loss_of(model, batch, 0.1))


def test_a_frozen_table_gets_no_gradient():
    model, batch = make_model("transformer-post", dropout=0.3).train(), make_batch()
    model.output.requires_grad_(False)
    r_drop_loss_of(model, batch, 5.0)[0].backward()
    assert model.output.grad is None and model.decoder.embedding.weight.grad.abs().sum() > 0


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    """No tensor that the loss makes has more rows of the vocabulary's size than a piece; none is kept."""
    monkeypatch.setattr(r_drop, "PIECE", 4)
    monkeypatch.setattr("regard.model.rows.ROWS", 4)
    rows, size = 30, 50
    first, second = (torch.randn(rows, 6, requires_grad=True) for _ in range(2))
    weight, targets = torch.randn(size, 6, requires_grad=True), torch.randint(size, (rows,))
    shapes, kept = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            made = function(*arguments, **named or {})
            shapes.extend(tuple(each.shape) for each in tree_leaves(made) if isinstance(each, torch.Tensor))
            return made

    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        r_drop.agreeing_cross_entropy(first, second, weight, targets, 5.0, 0.1)[0].backward()
    assert {shape for shape in shapes if shape[-1:] == (size,)} == {(4, size), (30 % 4, size), (6, size)}
    assert set(kept) == {(rows, 6), (size, 6)}


@pytest.mark.parametrize("piece", [1, 8, 20, 512])
def test_it_is_as_exact_where_products_are_rounded(piece, monkeypatch):
    """Under autocast the products alone are rounded, to 8 bits."""
    monkeypatch.setattr(r_drop, "PIECE", piece)
    torch.manual_seed(1)
    given = [torch.randn(20, 6, requires_grad=True) for _ in range(2)] + [torch.randn(11, 6, requires_grad=True)]
    targets = torch.randint(11, (20,))
    expected = r_drop.agreeing_cross_entropy(*given, targets, 5.0, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = r_drop.agreeing_cross_entropy(*(each.bfloat16() for each in given[:2]), given[2], targets, 5.0, 0.1)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for left, right in zip(torch.autograd.grad(found[0], given), torch.autograd.grad(expected[0], given), strict=True):
        assert float((left - right).norm() / right.norm()) < 0.02
