"""AdamW: what decays, and a state that goes on to the bit."""

from pathlib import Path

import pytest
import torch

from conftest import make_batch, make_model
from regard.config import TrainConfig
from regard.errors import CheckpointError
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer, optimizer_tensors, put_optimizer

SETTINGS = TrainConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9))


def updates(model, optimizer, count):
    model.train()
    for seed in range(count):
        loss_of(model, make_batch(seed=seed), 0.1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_after(model):
    return [weights.detach().clone() for weights in model.parameters()]


def test_decay_falls_on_matrices_alone():
    model = make_model("transformer-pre")
    before = weights_after(model)
    for weights in model.parameters():
        weights.grad = torch.zeros_like(weights)
    make_optimizer(model, SETTINGS).step()
    for old, new in zip(before, weights_after(model), strict=True):
        torch.testing.assert_close(new, old * (0.95 if old.dim() > 1 else 1.0))


@pytest.mark.parametrize("name", ["transformer-pre", "fixed-gru-reversed"])
def test_saved_and_put_back_goes_on_to_the_bit(name):
    model = make_model(name, dropout=0.3)
    optimizer = make_optimizer(model, SETTINGS)
    updates(model, optimizer, 3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    updates(model, optimizer, 2)
    other = make_model(name, seed=5, dropout=0.3)
    other.load_state_dict(weights)
    another = make_optimizer(other, SETTINGS)
    put_optimizer(another, other, saved, Path("here"))
    saved.clear()
    updates(other, another, 2)
    assert all(map(torch.equal, weights_after(model), weights_after(other)))
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(value, another.state[right][kind]) for kind, value in optimizer.state[left].items())


def test_tensors_of_another_model_are_refused():
    model = make_model("after-general")
    optimizer = make_optimizer(model, SETTINGS)
    updates(model, optimizer, 1)
    tensors = optimizer_tensors(optimizer, model)
    with pytest.raises(CheckpointError, match="here: its optimizer knows a weight that this model has not: other/step"):
        put_optimizer(optimizer, model, {**tensors, "other/step": torch.ones(())}, Path("here"))
    some = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.readout.weight")}
    assert some.keys() < tensors.keys()
    for incomplete in ({}, some):
        with pytest.raises(CheckpointError, match="here: holds no optimizer state for this model, so a training"):
            put_optimizer(optimizer, model, incomplete, Path("here"))
