"""Dropout and embeddings."""

import math

import pytest
import torch

from conftest import make_batch, make_model
from regard.model.layers import INIT, Dropout, Embedding, StochasticDepth, drop, linear, new_noise


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.9, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(probability):
    torch.manual_seed(1)
    dropout, x = Dropout(probability), torch.ones(400, 500)
    dropped = dropout(x)
    share = dropout.threshold / 256
    assert abs(share - probability) <= 1 / 256
    deviation = math.sqrt(share * (1 - share) / x.numel())
    assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=5 * deviation)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - share)])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_bits_leave_whole_values_and_are_those_of_the_mask(kind):
    dropout, x = Dropout(0.3), torch.randn(7, 9).to(kind)
    torch.manual_seed(1)
    mask = dropout.mask(x.shape, x)
    torch.manual_seed(1)
    bits = dropout.bits(x.shape, x, new_noise())
    assert bits.element_size() == x.element_size() and mask.dtype == kind
    left = drop(x.clone(), bits)
    assert torch.equal(left, torch.where(mask == 0, 0, x)) and 0 < int((left == 0).sum()) < x.numel()
    assert mask.unique().tolist() == pytest.approx([0, dropout.scale], rel=0.01)
    assert dropout.eval().bits(x.shape, x, new_noise()) is None and dropout.scale == 1 and drop(x, None) is x


def test_dropout_is_independent_between_values():
    torch.manual_seed(1)
    kept = (Dropout(0.5)(torch.ones(1000, 257)) > 0).float()
    agreement = [float((kept[:, :-lag] == kept[:, lag:]).float().mean()) for lag in (1, 7, 8, 64)]
    assert agreement == pytest.approx([0.5] * 4, abs=0.01)


def test_dropout_follows_the_seed_and_rests_in_eval_mode():
    dropout, x = Dropout(0.5), torch.randn(5, 7, dtype=torch.float64)
    first, second = [(torch.manual_seed(3), dropout(x))[1] for _ in range(2)]
    assert torch.equal(first, second) and not torch.equal(dropout(x), first) and first.dtype == x.dtype
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


def test_embedding_is_scaled_by_the_root_of_its_width():
    torch.manual_seed(1)
    embedding = Embedding(500, 16)
    tokens = torch.tensor([[3, 4], [3, 0]])
    assert torch.equal(embedding(tokens), embedding.weight[tokens] * 4)
    assert float(embedding.weight.detach().std()) == pytest.approx(INIT, rel=0.05)


def test_a_linear_map_begins_small():
    torch.manual_seed(1)
    module = linear(40, 50)
    assert module.weight.shape == (50, 40) and not module.bias.any()
    assert float(module.weight.detach().std()) == pytest.approx(INIT, rel=0.1)


def test_stochastic_depth_leaves_out_the_branch_of_whole_sequences_and_keeps_the_mean():
    torch.manual_seed(1)
    depth, branch = StochasticDepth(0.3), torch.ones(4000, 3, 2, dtype=torch.float64)
    values = depth(branch)
    assert (values == values[:, :1, :1]).all() and values.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert float((values[:, 0, 0] == 0).double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 4000))
    first, second = [(torch.manual_seed(3), depth(branch))[1] for _ in range(2)]
    assert torch.equal(first, second) and not torch.equal(depth(branch), first)
    assert depth.eval()(branch) is branch and StochasticDepth(0.0)(branch) is branch


@pytest.mark.parametrize("name", ["transformer-none", "conv-kernel-5", "mixed-transformer-conv"])
def test_deeper_layers_leave_out_more(name):
    """Huang et al. (2016), eq. 4: l / L of the last layer's share, in the encoder and the decoder alike."""
    model = make_model(name, stochastic_depth=0.6)
    for side in (model.encoder, model.decoder):
        shares = [[part.probability for part in layer.modules() if isinstance(part, StochasticDepth)]
                  for layer in side.layers]
        assert all(shares)
        for index, found in enumerate(shares, start=1):
            assert found == pytest.approx([0.6 * index / len(shares)] * len(found))


@pytest.mark.parametrize("name", ["transformer-pre", "transformer-post", "conv"])
def test_a_layer_without_its_branches_hands_on_what_it_gets(name):
    model, batch = make_model(name, stochastic_depth=0.999999999, layers=1).train(), make_batch()
    features = model(batch)
    batch.source.random_(3, 8)
    torch.testing.assert_close(model(batch), features)  # no attention reaches the source, so it changes nothing
