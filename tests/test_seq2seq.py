"""What is tied to what, and the whole model's shapes; the laws check the rest."""

import copy

import pytest
import torch
from torch import nn

from conftest import MODELS, make_batch, make_model, model_config
from regard.model import seq2seq
from regard.model.seq2seq import build_model
from regard.products import LARGE
from regard.training.objective import loss_of


@pytest.mark.parametrize("name", ["fixed-elman", "transformer-pre"])
@pytest.mark.parametrize("tie, tables", [("all", 1), ("decoder", 2), ("none", 3)])
def test_tie(name, tie, tables):
    model = build_model(model_config(name, tie=tie), 9, 9)
    found = {id(model.encoder.embedding.weight), id(model.decoder.embedding.weight), id(model.output)}
    assert len(found) == tables
    assert sum(weights.shape == (9, 8) for weights in model.parameters()) == tables


def test_shapes():
    model, batch = build_model(model_config("after-general"), 11, 9), make_batch()
    features = model(batch)
    assert features.shape == (*batch.target_in.shape, 8)
    assert model.project(features).shape == (*batch.target_in.shape, 9)
    torch.testing.assert_close(model.project(features), features @ model.output.T)


@pytest.mark.parametrize("name", ["before-copy", "after-feeding", "fixed-lstm-max", "mixed-rnn-conv",
                                  "mixed-transformer-after"])
def test_in_bfloat16_a_recurrent_network_learns_from_its_own_rows_alone(name, monkeypatch):
    """The rows that `sentences` adds change no feature, no weight of attention and no gradient."""
    found, batch = [], make_batch()
    for count in (len(batch), 7):
        monkeypatch.setattr(seq2seq, "sentences", lambda _, count=count: count)
        torch.manual_seed(1)
        model, taps, rows = build_model(model_config(name), 9, 9).train(), {}, []
        model.decoder.register_forward_pre_hook(lambda _, given, rows=rows: rows.append(len(given[0])))
        with torch.autocast("cpu", torch.bfloat16):
            features = model(batch, taps)
        features[batch.target_mask].float().square().sum().backward()
        assert rows == [count] and len(features) == len(batch)
        found.append([features, *taps.values(), *(weights.grad for weights in model.parameters())])
    for right, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, right, rtol=0.02, atol=0.02 * float(right.detach().abs().max()))


@pytest.fixture
def new_memory_is_nan():
    """What nobody has written to shows in whatever it enters."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", [name for name in MODELS if model_config(name).encoder.kind == "rnn"
                                  or model_config(name).decoder.kind == "rnn"])
def test_a_recurrent_network_learns_from_no_memory_that_nobody_wrote(name, narrow, new_memory_is_nan):
    model, batch = make_model(name).float().train(), make_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss, _ = loss_of(model, batch, 0.1)
    loss.backward()
    assert all(weights.grad.isfinite().all() for weights in model.parameters() if weights.grad is not None)


@pytest.mark.parametrize("name, training, learns, kind", [
    ("after-feeding", True, True, torch.float32), ("after-feeding", True, False, torch.bfloat16),
    ("after-feeding", False, True, torch.bfloat16), ("conv", True, True, torch.bfloat16)])
def test_rows_are_added_only_where_they_pay(name, training, learns, kind, monkeypatch):
    monkeypatch.setattr(seq2seq, "sentences", None)
    model = build_model(model_config(name), 11, 9).train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16), torch.set_grad_enabled(learns):
        model(make_batch())


@torch.no_grad()
def test_logits_of_a_search_are_those_of_training_also_after_an_update():
    torch.manual_seed(1)
    model, features = build_model(model_config("transformer-pre"), 9, 40000), torch.randn(10, 2, 8)
    model.requires_grad_(False)
    assert model.output.numel() >= LARGE
    for x in (features, features[::2, -1:], features.double(), features):
        model.to(x.dtype)
        for _ in range(2):
            torch.testing.assert_close(model.project(x), nn.functional.linear(x, model.output))
            model.output.add_(torch.randn_like(model.output))
    log_p = model.log_probabilities(features, torch.zeros(10, 1))
    torch.testing.assert_close(log_p, nn.functional.linear(features, model.output).log_softmax(-1))
    other = copy.deepcopy(model)
    torch.testing.assert_close(other.project(features), model.project(features), rtol=0, atol=0)


def test_logits_of_a_search_are_those_of_training_also_after_a_fused_optimizer():
    """Which tells nobody that it has changed the weights."""
    model, features = build_model(model_config("transformer-pre"), 9, 40000), torch.randn(10, 2, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model.project(features), nn.functional.linear(features, model.output))
        model.project(features).sum().backward()
        optimizer.step()


def test_weights_follow_the_seed():
    first, second, other = [
        (torch.manual_seed(seed), build_model(model_config("transformer-pre"), 11, 9))[1] for seed in (1, 1, 2)]
    for one, same, different in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same) and (one.dim() == 1 or not torch.equal(one, different))
