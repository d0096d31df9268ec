"""What is tied to what, and the whole model's shapes; the laws check the rest."""

import pytest
import torch

from conftest import make_batch, model_config
from regard.model.seq2seq import build_model


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


def test_weights_follow_the_seed():
    first, second, other = [
        (torch.manual_seed(seed), build_model(model_config("transformer-pre"), 11, 9))[1] for seed in (1, 1, 2)]
    for one, same, different in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same) and (one.dim() == 1 or not torch.equal(one, different))
