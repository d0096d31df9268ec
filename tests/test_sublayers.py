"""The sublayers that are written out compute what their modules do, and so do their gradients."""

import pytest
import torch

from conftest import make_batch, make_model
from regard.config_model import TransformerSideConfig
from regard.model.layers import Dropout, new_noise
from regard.model.positions import Order
from regard.model.rows import Packed
from regard.model.state import Memory, Past, State
from regard.model.sublayers import covers
from regard.model.transformer import DecoderLayer, EncoderLayer, source_mask, stack_of

WIDTH, LENGTHS = 12, [5, 2, 4]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
NORMS = pytest.mark.parametrize("norm", ["pre", "post"])
DROPS = pytest.mark.parametrize("drops", [False, True])
BIAS = pytest.mark.parametrize("bias", [None, torch.randn(3, 16, 16, dtype=torch.float64)])


def settings(norm, drops):
    rate = 0.3 if drops else 0.0
    return TransformerSideConfig(kind="transformer", width=WIDTH, heads=3, feedforward=20, norm=norm, dropout=rate,
                                 attention_dropout=rate, feedforward_dropout=rate)


def same_masks(monkeypatch):
    """Dropout that drops by size and place alone, whatever it draws from."""
    def mask(self, shape, like, noise=None):
        number = torch.Size(shape).numel()
        keep = torch.rand(number, generator=torch.Generator().manual_seed(number)) > 0.3
        return keep.to(like).mul_(self.scale).view(shape)

    monkeypatch.setattr(Dropout, "mask", mask)


def moved(layer):
    """Away from how weights begin, so that each of them matters."""
    for each in layer.parameters():
        torch.nn.init.normal_(each, std=0.5)
    return layer.double().train()


def rows_of(layout):
    torch.manual_seed(2)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    return x, layout.pack(x)


def told(layout, y, *weights):
    """What real rows say, and the gradient of all that led there."""
    y = layout.real(y)
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), weights)]


@NORMS
@DROPS
@BIAS
def test_an_encoder_layer_is_its_modules(norm, drops, bias, monkeypatch):
    same_masks(monkeypatch)
    torch.manual_seed(1)
    layer, layout = moved(EncoderLayer(settings(norm, drops))), Packed(MASK)
    order, found = Order(lambda x: x, bias), []
    for by_hand in (True, False):
        x, rows = rows_of(layout)
        stack = stack_of(by_hand, rows, layout, layout.mask[:, None, None], bias)
        assert (stack is not None) == by_hand
        found.append(told(layout, layer(rows, layout, order, "encoder.0", None, stack), x, *layer.parameters()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@NORMS
@DROPS
@BIAS
def test_a_decoder_layer_is_its_modules(norm, drops, bias, monkeypatch):
    same_masks(monkeypatch)
    torch.manual_seed(1)
    layer, layout = moved(DecoderLayer(settings(norm, drops), WIDTH)), Packed(MASK)
    source = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [True] * 6 + [False]])
    held, nothing = Packed(source), torch.empty(0)
    memory = Memory(nothing, source, nothing, nothing, nothing)
    seen, found = torch.ones(16, 16, dtype=torch.bool).tril(), []
    for by_hand in (True, False):
        x, rows = rows_of(layout)
        torch.manual_seed(3)
        states = torch.randn(3, 7, WIDTH, dtype=torch.float64, requires_grad=True)
        keys_values = layer.start(held.pack(states), held)
        state = State(memory, 0, {}, dict(zip(("0.keys", "0.values"), keys_values, strict=True)))
        stack = stack_of(by_hand, rows, layout, seen, bias, source_mask(state))
        past = Past(torch.empty(3, 0, dtype=torch.int64)).grow(16, 1)
        y = layer(rows, layout, state, past, seen, Order(lambda x: x, bias), 0, None, stack)
        found.append(told(layout, y, x, states, *layer.parameters()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_usual_model_trains_by_them_and_others_by_their_modules(monkeypatch):
    def refused(*inputs):
        raise AssertionError("a module ran")

    monkeypatch.setattr("regard.model.transformer.FeedForward.forward", refused)
    usual, other = make_model("transformer-pre").train(), make_model("transformer-rotary").train()
    batch = make_batch()
    usual.real(batch).sum().backward()
    assert all(each.grad is not None for each in usual.parameters())
    with pytest.raises(AssertionError, match="a module ran"):
        other.real(batch)
    with pytest.raises(AssertionError, match="a module ran"):
        usual(batch)


@pytest.mark.parametrize("changed", [
    {"activation": "gelu"}, {"norm_kind": "rms"}, {"kv_heads": 1}, {"stochastic_depth": 0.1}, {"positions": "rotary"},
    {"positions": "relative"}])
def test_what_is_not_written_out_is_not_covered(changed):
    assert covers(settings("pre", True))
    assert not covers(settings("pre", True).model_copy(update=changed))


def test_a_source_without_a_token_is_left_to_modules():
    rows, layout = torch.zeros(1, 16, WIDTH), Packed(MASK)
    assert stack_of(True, rows, layout, torch.zeros(3, 1, 1, 16, dtype=torch.bool), None) is None


@pytest.mark.parametrize("frozen", ["attention.query", "attention.key_value", "attention.output", "feedforward.inner",
                                    "feedforward.outer", "attention_residual.norm"])
def test_weights_that_are_frozen_learn_nothing_and_change_no_other_gradient(frozen):
    torch.manual_seed(1)
    layer, layout = moved(EncoderLayer(settings("post", False))), Packed(MASK)
    found = []
    for freeze in (False, True):
        layer.get_submodule(frozen).requires_grad_(not freeze)
        x, rows = rows_of(layout)
        stack = stack_of(True, rows, layout, layout.mask[:, None, None], None)
        learning = [each for name, each in layer.named_parameters() if not name.startswith(frozen)]
        found.append(told(layout, layer(rows, layout, Order(lambda x: x, None), "", None, stack), x, *learning))
    for whole, part in zip(*found, strict=True):
        assert torch.equal(whole, part)


def test_one_noise_gives_other_masks_each_time_and_the_same_from_a_seed():
    torch.manual_seed(1)
    noise, dropout, like = new_noise(), Dropout(0.5), torch.zeros(())
    first, second = dropout.mask((40, 5), like, noise), dropout.mask((40, 5), like, noise)
    assert not torch.equal(first, second) and set(first.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(1)
    assert torch.equal(dropout.mask((40, 5), like, new_noise()), first)
