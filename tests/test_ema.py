"""The average of the weights against its formula, and where it stands in the model."""

import pytest
import torch

from conftest import make_model
from regard.training.ema import WeightAverage
from regard.training.optimizer import freeze


def weights_of(model):
    return {name: weights.detach().clone() for name, weights in model.named_parameters()}


def change(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights += torch.randn_like(weights) * weights.requires_grad


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_it_is_its_formula(decay):
    model = make_model("after-general")
    average, expected = WeightAverage(model, decay), weights_of(model)
    for step in range(1, 16):
        change(model, step)
        average.update(step)
        share = min(decay, (1 + step) / (10 + step))
        expected = {name: share * expected[name] + (1 - share) * now for name, now in weights_of(model).items()}
    for name, weights in average.averages.items():
        torch.testing.assert_close(weights, expected[name])
        assert not torch.equal(weights, dict(model.named_parameters())[name])


def test_it_stands_in_the_model_for_a_while_and_leaves_it_to_the_bit():
    model = make_model("transformer-pre").float()
    average = WeightAverage(model, 0.9)
    for step in (1, 2, 3):
        change(model, step)
        average.update(step)
    before = weights_of(model), {name: weights.clone() for name, weights in average.averages.items()}
    with pytest.raises(KeyError), average.in_model() as trained:
        assert all(torch.equal(weights, before[1][name]) for name, weights in model.named_parameters())
        assert {name: weights.tolist() for name, weights in trained.items()} == {
            f"trained.{name}": weights.tolist() for name, weights in before[0].items()}
        raise KeyError
    assert all(torch.equal(weights, before[0][name]) for name, weights in model.named_parameters())
    assert all(torch.equal(weights, before[1][name]) for name, weights in average.averages.items())


def test_what_is_frozen_is_its_own_average():
    model = make_model("transformer-pre")
    freeze(model, ["encoder"])
    average = WeightAverage(model, 0.9)
    assert average.averages and not any(name.startswith("encoder.") for name in average.averages)


def test_without_a_decay_nothing_happens():
    model = make_model("after-general")
    average, before = WeightAverage(model, 0.0), weights_of(model)
    average.update(1)
    with average.in_model() as trained:
        assert trained == {}
    average.put({})
    assert all(torch.equal(weights, before[name]) for name, weights in model.named_parameters())


@pytest.mark.parametrize("before, after", [(0.9, 0.9), (0.9, 0.0), (0.0, 0.9)])
def test_going_on_with_or_without_it(before, after):
    """The weights that learn go on; an average that begins anew begins with them."""
    model, other = make_model("after-general"), make_model("after-general", seed=2)
    average = WeightAverage(model, before)
    change(model, 1)
    average.update(1)
    with average.in_model() as trained:
        saved, trained = weights_of(model), {name: weights.clone() for name, weights in trained.items()}
    other.load_state_dict(saved, strict=False)
    another = WeightAverage(other, after)
    another.put(trained)
    for name, weights in model.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], weights)
        if after:
            assert torch.equal(another.averages[name], saved[name])
