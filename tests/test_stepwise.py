"""The loop that is written out computes what `step_by_step` does, which test_rnn.py holds to the papers; so do its
gradients."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import model_config
from regard.model import stepwise
from regard.model.cells import KINDS
from regard.model.layers import Embedding
from regard.model.rnn import RNNDecoder
from regard.model.state import Memory

WIDTH, MEMORY_WIDTH = 8, 6
BEFORE = {"attention": "before", "score": "additive"}
FEEDING = {"attention": "after", "score": "general", "input_feeding": True}
DEEP = {"layers": 3, "residual": True}
FORMS = {
    "before": BEFORE,
    "before concat": BEFORE | {"score": "concat"},
    "before dot deep": BEFORE | DEEP | {"score": "dot"},
    "before local-m copy": BEFORE | {"window": "local_m", "window_radius": 1, "copy": True},
    "feeding": FEEDING,
    "feeding deep": FEEDING | DEEP,
    "feeding scaled dot": FEEDING | {"score": "scaled_dot", "layers": 2},
    "feeding additive dropped": FEEDING | {"score": "additive", "dropout": 0.4},
    "feeding local-m copy dropped": FEEDING | DEEP | {"window": "local_m", "window_radius": 1, "copy": True,
                                                      "dropout": 0.4, "variational_dropout": True},
}
ALL_FORMS = pytest.mark.parametrize("form", FORMS)


def a_decoder(cell, form):
    """A decoder away from how weights begin, and a memory of three sources that learns too."""
    torch.manual_seed(1)
    settings = model_config("fixed-elman", cell=cell, **FORMS[form])
    memory_width = WIDTH if "dot" in settings.score else MEMORY_WIDTH
    decoder = RNNDecoder(settings, Embedding(9, WIDTH), memory_width).double().train()
    for weights in decoder.parameters():
        torch.nn.init.normal_(weights, std=0.4)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    states, summary, values = (
        torch.randn(*size, memory_width, dtype=torch.float64, requires_grad=True) for size in ((3, 7), (3,), (3, 7)))
    source = torch.randint(3, 9, (3, 7)).masked_fill(~mask, 0)
    return decoder, Memory(states, mask, summary, source, values)


def all_of_it(decoder, memory, tokens, state=None):
    """Features, attention and the state after the tokens."""
    torch.manual_seed(2)  # for dropout
    taps = {}
    features, state = decoder(tokens, decoder.start(memory) if state is None else state, taps)
    return [features, taps["cross.0"], *state.cache.values()], state


def gradients(found, decoder, memory, retain=False):
    """Those of everything that learns, of a sum in which each number found has its own weight."""
    torch.manual_seed(3)
    total = sum((each * torch.randn(each.shape, dtype=each.dtype)).sum() for each in found)
    return torch.autograd.grad(total, [*decoder.parameters(), memory.states, memory.summary, memory.values],
                               allow_unused=True, materialize_grads=True, retain_graph=retain)


def same(found, expected):
    assert len(found) == len(expected)
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each, right, rtol=1e-10, atol=1e-10)


@pytest.fixture
def joined(monkeypatch):
    """Calls a function with steps that autograd joins."""
    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(stepwise, "runs", lambda *_: False)
            patch.setattr(stepwise, "loop", None)
            return function(*arguments)

    return call


@pytest.fixture
def counted(monkeypatch):
    """How many loops were written out."""
    calls, loop = [], stepwise.loop
    monkeypatch.setattr(stepwise, "loop", lambda *arguments: calls.append(1) or loop(*arguments))
    return calls


@pytest.mark.parametrize("cell", KINDS)
@ALL_FORMS
def test_a_loop_is_its_steps_and_so_are_its_gradients(form, cell, joined, counted):
    decoder, memory = a_decoder(cell, form)
    tokens = torch.randint(9, (3, 5))
    found, _ = all_of_it(decoder, memory, tokens)
    expected, _ = joined(all_of_it, decoder, memory, tokens)
    assert len(counted) == 1
    same(found, expected)
    same(gradients(found, decoder, memory, retain=True), gradients(expected, decoder, memory, retain=True))
    # Features alone, when nobody asks for the others.
    same(gradients(found[:1], decoder, memory), gradients(expected[:1], decoder, memory))


@ALL_FORMS
def test_a_loop_goes_on_from_a_state(form, joined, counted):
    decoder, memory = a_decoder("lstm", form)
    first, second = torch.randint(9, (3, 2)), torch.randint(9, (3, 4))

    def both():
        one, state = all_of_it(decoder, memory, first)
        two, _ = all_of_it(decoder, memory, second, state)
        return [*one[:2], *two]

    found, expected = both(), joined(both)
    assert len(counted) == 2
    same(found, expected)
    same(gradients(found, decoder, memory), gradients(expected, decoder, memory))


@ALL_FORMS
def test_without_gradients_a_loop_says_the_same(form, counted):
    decoder, memory = a_decoder("gru", form)
    tokens = torch.randint(9, (3, 5))
    expected, _ = all_of_it(decoder, memory, tokens)
    with torch.no_grad():
        found, _ = all_of_it(decoder, memory, tokens)
    assert len(counted) == 2 and not any(each.requires_grad for each in found)
    same(found, expected)


def narrowed(decoder, memory, tokens, narrow):
    """Features and gradients in float32, or with products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        torch.manual_seed(2)
        features, _ = decoder(tokens, decoder.start(memory))
    torch.manual_seed(3)
    (features.float() * torch.randn(features.shape)).sum().backward()
    found = [features.detach().float(), *(weights.grad.clone() for weights in decoder.parameters())]
    decoder.zero_grad()
    return found


@ALL_FORMS
def test_in_bfloat16_a_loop_is_about_as_exact_as_its_steps(form, joined):
    decoder, memory = a_decoder("lstm", form)
    decoder.float()
    memory = replace(memory, **{name: getattr(memory, name).detach().float()
                                for name in ("states", "summary", "values")})
    tokens = torch.randint(9, (3, 20))
    exact = narrowed(decoder, memory, tokens, narrow=False)
    errors = [sum(float((each - right).norm() / right.norm()) for each, right in zip(found, exact, strict=True)
                  if right.norm() > 1e-3)
              for found in (narrowed(decoder, memory, tokens, True), joined(narrowed, decoder, memory, tokens, True))]
    assert 0 < errors[0] < 1.25 * errors[1], errors


@ALL_FORMS
def test_what_a_loop_keeps_may_be_laid_elsewhere(form):
    """As hooks do that keep it on another device: nothing is read from beside it."""
    decoder, memory = a_decoder("lstm", form)
    tokens = torch.randint(9, (3, 5))
    expected = gradients(all_of_it(decoder, memory, tokens)[0], decoder, memory)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        found, _ = all_of_it(decoder, memory, tokens)
    same(gradients(found, decoder, memory), expected)


def test_a_loop_lets_go_of_what_it_kept():
    decoder, memory = a_decoder("lstm", "feeding")
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        found, state = all_of_it(decoder, memory, torch.randint(9, (3, 5)))
        assert sum(issubclass(type(each), Tensor) for each in gc.get_objects()) > before
        del found, state
        assert sum(issubclass(type(each), Tensor) for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_second_derivatives_of_a_loop_are_refused():
    decoder, memory = a_decoder("lstm", "feeding")
    loss = all_of_it(decoder, memory, torch.randint(9, (3, 5)))[0][0].square().sum()
    gradient, = torch.autograd.grad(loss, memory.values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("changes", [{"coverage": True}, {"window": "local_p"}], ids=["coverage", "local-p"])
def test_what_is_not_written_out_goes_step_by_step(changes, counted):
    settings = model_config("fixed-elman", **FEEDING | changes)
    decoder = RNNDecoder(settings, Embedding(9, WIDTH), MEMORY_WIDTH).double()
    _, memory = a_decoder("elman", "feeding")
    all_of_it(decoder, memory, torch.randint(9, (3, 5)))
    assert not counted


@pytest.mark.parametrize("form", ["before", "feeding"])
def test_a_step_of_search_and_an_empty_source_go_step_by_step(form, counted):
    decoder, memory = a_decoder("elman", form)
    tokens = torch.randint(9, (3, 4))
    _, state = all_of_it(decoder, memory, tokens[:, :1])
    state = state.select(torch.tensor([[0, 0], [1, 1], [2, 2]]))
    decoder(tokens.repeat_interleave(2, 0), state)  # a beam of two
    empty = replace(memory, mask=memory.mask & torch.tensor([[True], [True], [False]]))
    found, _ = all_of_it(decoder, empty, tokens)
    assert not counted and not found[1][2].any()


def test_in_bfloat16_single_queries_attend_in_float32(counted, monkeypatch):
    decoder, memory = a_decoder("lstm", "feeding")
    decoder.float()
    memory = replace(memory, **{name: getattr(memory, name).detach().float()
                                for name in ("states", "summary", "values")})
    kinds, product = [], torch.bmm

    def watched(*given, **named):
        made = product(*given, **named)
        kinds.append(made.dtype)
        return made

    monkeypatch.setattr(torch, "bmm", watched)
    narrowed(decoder, memory, torch.randint(9, (3, 20)), narrow=True)
    assert counted and len(kinds) > 40 and set(kinds) == {torch.float32}
