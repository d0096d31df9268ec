"""The folded cross-entropy against torch's own, and its gradient."""

import pytest
import torch
from torch.nn import functional

from conftest import make_batch, make_model
from regard.training import objective
from regard.training.objective import coverage_loss, cross_entropy, loss_of

ROWS, WIDTH, SIZE = 20, 6, 11


def tensors():
    torch.manual_seed(1)
    features = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(SIZE, WIDTH, dtype=torch.float64, requires_grad=True)
    return features, weight, torch.randint(SIZE, (ROWS,))


@pytest.mark.parametrize("piece", [1, 8, 20, 512])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_torchs(smoothing, piece, monkeypatch):
    monkeypatch.setattr(objective, "PIECE", piece)
    features, weight, targets = tensors()
    logits = features @ weight.T
    expected = functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    expected_gradients = torch.autograd.grad(3 * expected, (features, weight))
    loss, surprise = cross_entropy(features, weight, targets, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(surprise, functional.cross_entropy(logits, targets, reduction="sum"))
    assert not surprise.requires_grad
    for found, right in zip(torch.autograd.grad(3 * loss, (features, weight)), expected_gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pieces", [1, 3, 4, 6])
def test_in_bfloat16_the_gradient_of_the_table_is_that_of_all_pieces(pieces, monkeypatch):
    monkeypatch.setattr(objective, "SUMMED", 3)
    monkeypatch.setattr(objective, "PIECE", 256)
    torch.manual_seed(1)
    features, targets = torch.randn(256 * pieces - 5, 16), torch.randint(50, (256 * pieces - 5,))
    weight, found = torch.randn(50, 16, requires_grad=True), []
    for kind in (torch.float64, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            given = features.to(kind), weight if kind == torch.bfloat16 else weight.double()
            found.append(torch.autograd.grad(cross_entropy(*given, targets, 0.1)[0], weight)[0])
    assert found[1].dtype == torch.float32
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.01


def test_gradients_are_those_of_differences():
    features, weight, targets = tensors()
    assert torch.autograd.gradcheck(lambda *given: cross_entropy(*given, targets, 0.1)[0], (features, weight))


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    features, weight, targets = tensors()
    expected = cross_entropy(features, weight, targets, 0.1)
    with torch.no_grad():
        for found, value in zip(cross_entropy(features, weight, targets, 0.1), expected, strict=True):
            assert torch.equal(found, value) and not found.requires_grad
    frozen = cross_entropy(features.detach(), weight, targets, 0.1)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen, weight), torch.autograd.grad(expected[0], weight))


def test_a_validation_makes_no_gradient(monkeypatch):
    def refused(*inputs):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(objective._TableGradient, "add", refused)
    with torch.no_grad():
        cross_entropy(*tensors())
    with pytest.raises(AssertionError, match="a gradient was made"):
        cross_entropy(*tensors())


def test_a_second_derivative_is_refused():
    features, weight, targets = tensors()
    loss = cross_entropy(features, weight, targets)[0] ** 2
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_loss_of_a_batch_is_over_its_real_tokens_in_any_pieces():
    model, batch = make_model("transformer-pre"), make_batch()
    logits = model.project(model(batch))
    targets = batch.target_out.masked_fill(~batch.target_mask, -100)
    expected = functional.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss_of(model, batch, 0.1)[0], expected)
    parts = [make_batch([pair], seed) for seed, pair in enumerate([(5, 4), (2, 6)])]
    rows = [[row[mask][:-1].tolist() for row, mask in zip(ids, masks, strict=True)]
            for part in parts for ids, masks in ((part.source, part.source_mask), (part.target_out, part.target_mask))]
    whole = type(batch).of([rows[0][0], rows[2][0]], [rows[1][0], rows[3][0]])
    torch.testing.assert_close(loss_of(model, whole)[0], sum(loss_of(model, part)[0] for part in parts))


def test_the_loss_of_a_model_that_copies_is_its_equation(monkeypatch):
    monkeypatch.setattr(objective, "PIECE", 12)  # two sentences of the batch at a time
    model, batch = make_model("after-copy"), make_batch()
    log_p = model.log_probabilities(model(batch), batch.source)
    targets = batch.target_out.masked_fill(~batch.target_mask, -100)
    surprise = functional.nll_loss(log_p.transpose(1, 2), targets, reduction="sum")
    expected = 0.9 * surprise - 0.1 * log_p.mean(-1)[batch.target_mask].sum()
    found = loss_of(model, batch, 0.1)
    torch.testing.assert_close(found, (expected, surprise))
    weights = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(found[0], weights), torch.autograd.grad(expected, weights))


def test_coverage_loss_is_its_equation():
    weights = torch.rand(2, 4, 3, dtype=torch.float64).softmax(-1)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    expected = 0.0
    for row, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            for i in range(3):
                expected += min(float(weights[row, t, i]), float(weights[row, :t, i].sum()))
    assert float(coverage_loss(weights, mask)) == pytest.approx(expected)
    model, batch, taps = make_model("after-coverage"), make_batch(), {}
    model(batch, taps)
    extra = loss_of(model, batch, 0.1, coverage=2.0)[0] - loss_of(model, batch, 0.1)[0]
    torch.testing.assert_close(extra, 2 * coverage_loss(taps["cross.0"], batch.target_mask))
    assert loss_of(model, batch, coverage=2.0)[1] == loss_of(model, batch)[1]
