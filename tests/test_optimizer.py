"""Optimizers: what decays and learns, what is frozen, and a state that goes on to the bit."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from conftest import make_batch, make_model
from regard.config_train import TrainConfig
from regard.errors import CheckpointError, ConfigError
from regard.training.objective import loss_of
from regard.training.optimizer import OPTIMIZERS, freeze, learning, make_optimizer, optimizer_tensors, put_optimizer

SETTINGS = TrainConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9))
KINDS = {"adamw": SETTINGS, "adam": TrainConfig(optimizer="adam", learning_rate=0.01, weight_decay=0.01),
         "sgd": TrainConfig(optimizer="sgd", learning_rate=0.01, momentum=0.8),
         "sgd without momentum": TrainConfig(optimizer="sgd", learning_rate=0.01, momentum=0.0),
         "adafactor": TrainConfig(optimizer="adafactor", learning_rate=0.05, weight_decay=0.01)}


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


def test_each_choice_is_there_and_tested():
    choices = set(get_args(TrainConfig.model_fields["optimizer"].annotation))
    assert OPTIMIZERS.keys() == choices == {settings.optimizer for settings in KINDS.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_its_formula_and_more_of_them_learn(kind):
    settings, model = KINDS[kind], make_model("after-general")
    optimizer, batch = make_optimizer(model, settings), make_batch()
    before = loss_of(model.train(), batch)[0]
    before.backward()
    old, gradients = weights_after(model), [weights.grad.clone() for weights in model.parameters()]
    optimizer.step()
    for weight, gradient, new in zip(old, gradients, weights_after(model), strict=True):
        decay, rate = settings.weight_decay * (weight.dim() > 1), settings.learning_rate
        if kind == "adamw":  # the first step of Adam is the sign of the gradient
            expected = (1 - rate * decay) * weight - rate * gradient / (gradient.abs() + 1e-9)
        elif kind == "adam":
            total = gradient + decay * weight
            expected = weight - rate * total / (total.abs() + 1e-9)
        elif kind.startswith("sgd"):
            expected = weight - rate * gradient
        else:  # relative to the weights: the mean square of the step is at most that of rate x weights
            change = (new - (1 - rate * decay) * weight).square().mean().sqrt()
            assert 0 < change <= 1.0001 * rate * max(weight.square().mean().sqrt(), 1e-3)
            continue
        torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-9)
    optimizer.zero_grad()
    updates(model, optimizer, 20)
    assert loss_of(model, batch)[0] < before


@pytest.mark.parametrize("name, kind", [
    ("fixed-gru-reversed", "adamw"), *(("transformer-pre", kind) for kind in KINDS)])
def test_saved_and_put_back_goes_on_to_the_bit(name, kind):
    model = make_model(name, dropout=0.3)
    optimizer = make_optimizer(model, KINDS[kind])
    updates(model, optimizer, 3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    updates(model, optimizer, 2)
    other = make_model(name, seed=5, dropout=0.3)
    other.load_state_dict(weights)
    another = make_optimizer(other, KINDS[kind])
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
    with pytest.raises(CheckpointError, match="here: its optimizer knows a weight that this model does not learn: oth"):
        put_optimizer(optimizer, model, {**tensors, "other/step": torch.ones(())}, Path("here"))
    some = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.readout.weight")}
    assert some.keys() < tensors.keys()
    for incomplete in ({}, some):
        with pytest.raises(CheckpointError, match="here: holds no optimizer state for this model, so a training"):
            put_optimizer(optimizer, model, incomplete, Path("here"))


def test_before_the_first_update_there_is_nothing_to_keep():
    model = make_model("after-general")
    tensors = optimizer_tensors(make_optimizer(model, SETTINGS), model)
    assert [name for name in tensors if not name.startswith("random.")] == []
    put_optimizer(make_optimizer(model, SETTINGS), model, tensors, Path("here"))


@pytest.mark.parametrize("prefixes, names", [
    (["encoder"], lambda name: name.startswith("encoder.")),
    (["decoder.layers.0", "encoder.norm"], lambda name: name.startswith(("decoder.layers.0.", "encoder.norm."))),
    (["decoder.embedding"], lambda name: name == "output"),  # one table under two names
    (["encoder.norm.weight"], lambda name: name == "encoder.norm.weight"),
])
def test_what_is_frozen_takes_no_gradient_no_state_and_no_update(prefixes, names):
    model = make_model("transformer-pre")
    freeze(model, prefixes)
    before = {name: weights.detach().clone() for name, weights in model.named_parameters()}
    optimizer = make_optimizer(model, SETTINGS)
    updates(model, optimizer, 2)
    frozen = {name for name in before if names(name)}
    assert frozen and learning(model).keys() == before.keys() - frozen
    for name, weights in model.named_parameters():
        assert torch.equal(weights, before[name]) == (name in frozen), name
        assert (weights not in optimizer.state) == (name in frozen)
    kept = {name.rpartition("/")[0] for name in optimizer_tensors(optimizer, model)} - {""}
    assert kept == before.keys() - frozen


@pytest.mark.parametrize("prefixes, message", [
    (["decoder", "enc"], "no weight's name begins with \"enc\". There are: decoder, encoder, output"),
    (["encoder.layers.7"], 'begins with "encoder.layers.7". There are: encoder.layers.0, encoder.layers.1'),
    (["encoder.layer"], 'begins with "encoder.layer". There are: encoder.embedding, encoder.layers, encoder.norm'),
    ([""], 'no weight\'s name begins with ""'),
    (["encoder", "decoder"], "freeze = ['encoder', 'decoder'] leaves no weight to learn: leave some of it out"),
])
def test_names_that_cannot_be_frozen(prefixes, message):
    with pytest.raises(ConfigError) as error:
        freeze(make_model("transformer-pre"), prefixes)
    assert message in str(error.value)
