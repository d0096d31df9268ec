"""The sublayers that are written out compute what their modules do, and so do their gradients."""

import pytest
import torch

from conftest import make_batch, make_model
from regard.config_model import TransformerSideConfig
from regard.model.layers import INTEGERS, Dropout
from regard.model.positions import POSITIONS
from regard.model.rows import Packed
from regard.model.state import Memory, Past, State
from regard.model.sublayers import Stack
from regard.model.transformer import DecoderLayer, EncoderLayer, source_mask, told

WIDTH = 12
MASK = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
SOURCE = torch.arange(20) < torch.tensor([20, 3, 6])[:, None]
VARIANTS = pytest.mark.parametrize("variant", [
    {}, {"activation": "gelu"}, {"activation": "swiglu"}, {"norm_kind": "rms"}, {"kv_heads": 1},
    {"positions": "rotary"}, {"positions": "rotary", "kv_heads": 1}, {"positions": "relative"},
    {"positions": "alibi"}, {"stochastic_depth": 0.5}], ids=lambda variant: " ".join(map(str, variant.values())))
NORMS = pytest.mark.parametrize("norm", ["pre", "post"])
DRAWN = Dropout.bits
DROPS = pytest.mark.parametrize("rate", [0.0, 0.3])


def settings(norm="post", rate=0.0, **variant):
    return TransformerSideConfig(kind="transformer", width=WIDTH, heads=3, feedforward=20, norm=norm, dropout=rate,
                                 attention_dropout=rate, feedforward_dropout=rate, **variant)


@pytest.fixture(autouse=True)
def same_masks(monkeypatch):
    """Dropout that drops whole columns, which rows and padded sequences have in common."""
    def bits(self, shape, like, noise):
        columns = torch.arange(shape[-1]) % 7 < 5
        return -columns.to(INTEGERS[like.element_size()]).expand(shape).clone() if self.drops else None

    monkeypatch.setattr(Dropout, "bits", bits)
    monkeypatch.setattr("regard.model.layers.new_noise", lambda: None)  # torch's generator is for stochastic depth


def moved(*modules):
    """Away from how weights begin, so that each of them matters."""
    torch.manual_seed(1)
    for module in modules:
        module.double().train()
        for each in module.parameters():
            torch.nn.init.normal_(each, std=0.5)
    return modules


def vectors(*shape):
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def result(y, *weights):
    """What real rows say, and the gradient of all that led there."""
    torch.manual_seed(4)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), weights)]


def same(found):
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@NORMS
@DROPS
@VARIANTS
def test_an_encoder_layer_is_its_modules(norm, rate, variant):
    config = settings(norm, rate, **variant)
    layer, positions = moved(EncoderLayer(config), POSITIONS[config.positions](config, False))
    found = []
    for by_hand in (True, False):
        x = vectors(3, 5, WIDTH)
        if by_hand:
            layout = Packed(MASK)
            stack = Stack.of(layout, x, positions.order(layout.mask), layout.mask[:, None, None])
            torch.manual_seed(3)  # which branches are left out
            y = layout.real(layer.rows(layout.pack(x), stack))
        else:
            torch.manual_seed(3)
            y = layer(x, MASK, positions.order(MASK), "encoder.0", None)[MASK]
        found.append(result(y, x, *layer.parameters(), *positions.parameters()))
    same(found)


@NORMS
@DROPS
@VARIANTS
def test_a_decoder_layer_is_its_modules(norm, rate, variant):
    config = settings(norm, rate, **variant)
    layer, positions = moved(DecoderLayer(config, 6), POSITIONS[config.positions](config, True))
    nothing, found = torch.empty(0), []
    memory = Memory(nothing, SOURCE, nothing, nothing, nothing)
    for by_hand in (True, False):
        x, states = vectors(3, 5, WIDTH), vectors(3, 20, 6)
        held = Packed(SOURCE) if by_hand else None
        keys_values = layer.start(held.pack(states), held) if held else layer.start(states)
        state = State(memory, 0, {}, dict(zip(("0.keys", "0.values"), keys_values, strict=True)))
        if by_hand:
            layout = Packed(MASK)
            seen = torch.ones(16, 16, dtype=torch.bool).tril()
            stack = Stack.of(layout, x, positions.order(layout.mask), seen, source_mask(state))
            torch.manual_seed(3)
            y = layout.real(layer.rows(layout.pack(x), stack, told(state, 0)))
        else:
            past = Past(torch.empty(3, 0, dtype=torch.int64)).grow(5, 1)
            torch.manual_seed(3)
            seen = torch.ones(5, 5, dtype=torch.bool).tril()
            y = layer(x, state, past, seen, positions.order(MASK), 0, None)[MASK]
        found.append(result(y, x, states, *layer.parameters(), *positions.parameters()))
    same(found)


@pytest.mark.parametrize("frozen", ["attention.query", "attention.key_value", "attention.output", "feedforward.inner",
                                    "feedforward.outer", "attention_residual.norm", "attention"])
def test_weights_that_are_frozen_learn_nothing_and_change_no_other_gradient(frozen):
    config = settings(positions="relative")
    layer, positions = moved(EncoderLayer(config), POSITIONS["relative"](config, False))
    layout, found = Packed(MASK), []
    for freeze in (False, True):
        layer.get_submodule(frozen).requires_grad_(not freeze)
        x = vectors(3, 5, WIDTH)
        stack = Stack.of(layout, x, positions.order(layout.mask), layout.mask[:, None, None])
        learning = [each for name, each in layer.named_parameters() if not name.startswith(f"{frozen}.")]
        learning += positions.parameters()
        found.append(result(layout.real(layer.rows(layout.pack(x), stack)), x, *learning))
    for whole, part in zip(*found, strict=True):
        assert torch.equal(whole, part)


@pytest.mark.parametrize("frozen", ["cross.query", "cross.key_value", "cross.output", "cross"])
def test_what_is_frozen_of_a_decoder_changes_no_other_gradient(frozen):
    (layer,) = moved(DecoderLayer(settings(), 6))
    nothing, found = torch.empty(0), []
    memory = Memory(nothing, SOURCE, nothing, nothing, nothing)
    layout, held = Packed(MASK), Packed(SOURCE)
    order, seen = POSITIONS["none"](settings(), True).order(layout.mask), torch.ones(16, 16, dtype=torch.bool).tril()
    for freeze in (False, True):
        layer.get_submodule(frozen).requires_grad_(not freeze)
        x, states = vectors(3, 5, WIDTH), vectors(3, 20, 6).detach()
        keys_values = layer.start(held.pack(states), held)
        state = State(memory, 0, {}, dict(zip(("0.keys", "0.values"), keys_values, strict=True)))
        stack = Stack.of(layout, x, order, seen, source_mask(state))
        learning = [each for name, each in layer.named_parameters() if not name.startswith(f"{frozen}.")]
        found.append(result(layout.real(layer.rows(layout.pack(x), stack, told(state, 0))), x, *learning))
    for whole, part in zip(*found, strict=True):
        assert torch.equal(whole, part)


def test_each_residual_drops_other_values_each_time(monkeypatch):
    drawn = []

    def bits(self, shape, like, noise):
        made = DRAWN(self, shape, like, noise)
        drawn.append(made)
        return made

    monkeypatch.setattr(Dropout, "bits", bits)
    config = TransformerSideConfig(kind="transformer", width=WIDTH, heads=3, feedforward=20, dropout=0.3)
    (layer,) = moved(EncoderLayer(config))
    layout, x = Packed(MASK), vectors(3, 5, WIDTH)
    for _ in range(2):
        stack = Stack.of(layout, x, POSITIONS["none"](config, False).order(layout.mask), layout.mask[:, None, None])
        layer.rows(layout.pack(x), stack)
    masks = [mask for mask in drawn if mask is not None]
    assert len(masks) == 4 and all(0 < (mask == 0).double().mean() < 1 for mask in masks)
    assert not any(torch.equal(one, other) for i, one in enumerate(masks) for other in masks[:i])


@pytest.mark.parametrize("name", ["transformer-pre", "transformer-rotary", "mixed-rnn-transformer"])
def test_a_model_trains_by_them_alone(name, monkeypatch):
    def refused(*inputs, **named):
        raise AssertionError("a module ran")

    monkeypatch.setattr("regard.model.transformer.Residual.forward", refused)
    model, batch = make_model(name).train(), make_batch()
    model.real(batch).sum().backward()
    assert all(each.grad is not None for name, each in model.named_parameters() if "output" not in name)
    with pytest.raises(AssertionError, match="a module ran"):
        model.real(batch, {})  # somebody asks for weights
    with pytest.raises(AssertionError, match="a module ran"):
        model.eval().real(batch)


def test_in_bfloat16_the_weights_of_attention_are_made_in_float32():
    (layer,) = moved(EncoderLayer(settings()))
    x, layout, found = vectors(3, 5, WIDTH), Packed(MASK), []
    for kind in (torch.float64, torch.bfloat16):
        layer, y = layer.to(torch.float32 if kind == torch.bfloat16 else kind), x.detach().to(kind)
        order = POSITIONS["none"](settings(), False).order(layout.mask)
        stack = Stack.of(layout, y, order, layout.mask[:, None, None])
        assert stack.hidden.dtype == (torch.float32 if kind == torch.bfloat16 else kind)
        found.append(layout.real(layer.rows(layout.pack(y), stack)))
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[1].double(), found[0], rtol=0, atol=0.1)
