"""Attention against plain loops from the papers' equations, and against torch's own."""

import math

import pytest
import torch
from torch import nn

from regard.errors import ConfigError
from regard.model.attention import SCORES, WINDOWS, Additive, Attention, MultiHeadAttention, attend, fixed, weigh
from regard.model.state import Memory

BATCH, QUERIES, KEYS, WIDTH = 2, 3, 5, 4


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def equation(name, score, query, key, told=0.0):
    """One number from one query and one key, as the paper writes it; told is w_c c, what coverage adds to W key."""
    if name == "dot":
        return sum(q * k for q, k in zip(query, key + told, strict=True))
    if name == "scaled_dot":
        return equation("dot", score, query, key, told) / math.sqrt(len(query))
    if name == "general":
        return query @ (score.weight.weight @ key + told)
    if name == "concat":
        return score.v.weight[0] @ torch.tanh(score.weight.weight @ torch.cat([query, key]) + told + score.weight.bias)
    return score.v.weight[0] @ torch.tanh(score.query.weight @ query + score.key.weight @ key + told)


def looked(attention, settings, query, states, t, coverage):
    """Weights of one query, the t-th, over a source without padding: window, softmax, Luong's eq. 9 and 10, w_c c."""
    score, S, D = settings["score"], len(states), settings.get("radius")
    centre, factor = None, 1.0
    if settings["window"] == "local_m":
        centre = min(t, S - 1)
    elif settings["window"] == "local_p":
        window = attention.window
        centre = S * torch.sigmoid(window.v.weight[0] @ torch.tanh(window.inner.weight @ query))
    near = [s for s in range(S) if centre is None or -D <= s - centre <= D]
    told = [coverage[s] * attention.w_c if settings["coverage"] else 0.0 for s in near]
    scores = [equation(score, attention.score, query, states[s], more) for s, more in zip(near, told, strict=True)]
    weights = torch.zeros(S, dtype=torch.float64)
    for s, value in zip(near, scores, strict=True):
        if settings["window"] == "local_p":
            factor = torch.exp(-((s - centre) ** 2) / (2 * (D / 2) ** 2))
        weights[s] = factor * value.exp() / sum(each.exp() for each in scores)
    return weights


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("key_width", [WIDTH, 6])
def test_scores_are_their_equations(name, key_width):
    if name.endswith("dot") and key_width != WIDTH:
        with pytest.raises(ConfigError, match="a dot score needs query and key of one width, and they are 4 and 6"):
            SCORES[name](WIDTH, key_width)
        return
    score = SCORES[name](WIDTH, key_width).double()
    query, keys = normal(BATCH, QUERIES, WIDTH), normal(BATCH, KEYS, key_width)
    found = score(query, keys)
    assert found.shape == (BATCH, QUERIES, KEYS)
    for b in range(BATCH):
        for t in range(QUERIES):
            for s in range(KEYS):
                expected = equation(name, score, query[b, t], keys[b, s])
                torch.testing.assert_close(found[b, t, s], expected, rtol=1e-12, atol=1e-12)


FORMS = pytest.mark.parametrize("form", [
    {"window": window, "radius": radius, "coverage": coverage}
    for window, radius in (("global", 10), ("local_m", 1), ("local_m", 2), ("local_p", 1), ("local_p", 2))
    for coverage in (False, True)
], ids=lambda form: f"{form['window']} {form['radius']}{' coverage' * form['coverage']}")


def an_attention(name, form, key_width=WIDTH):
    attention = Attention(name, WIDTH, key_width, **form).double()
    with torch.no_grad():
        for weights in attention.parameters():
            weights.normal_()
    return attention


@FORMS
@pytest.mark.parametrize("name", SCORES)
def test_attention_is_the_papers_loop_at_once_and_step_by_step(name, form):
    """Windows and coverage in Luong's and See's equations; keys are made of states, and what is summed up is values."""
    attention = an_attention(name, form)
    mask = torch.arange(KEYS) < torch.tensor([[KEYS], [3]])
    memory = Memory(normal(2, KEYS, WIDTH), mask, normal(2, WIDTH), mask.long(), normal(2, KEYS, 3))
    query, position = 2 * normal(2, 4, WIDTH), 1
    begun = torch.rand(2, KEYS, dtype=torch.float64).masked_fill(~mask, 0.0)
    expected = torch.zeros(2, 4, KEYS, dtype=torch.float64)
    for row, S in enumerate(mask.sum(1).tolist()):
        for t in range(4):
            coverage = begun[row] + expected[row, :t].sum(0)
            expected[row, t, :S] = looked(attention, form | {"score": name}, query[row, t], memory.states[row, :S],
                                          position + t, coverage)
    assert (expected.sum(-1) > 0).all() and (form["window"] == "global" or (expected[0] == 0).any())
    context, weights = attention(query, memory, None, position, begun if form["coverage"] else None)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(context, expected @ memory.values, rtol=1e-12, atol=1e-12)
    for t in range(4):
        coverage = begun + weights[:, :t].sum(1) if form["coverage"] else None
        step, alone = attention(query[:, t : t + 1], memory, None, position + t, coverage)
        torch.testing.assert_close(alone, weights[:, t : t + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(step, context[:, t : t + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0, 4, 900])
@pytest.mark.parametrize("window", ["local_m", "local_p"])
def test_a_window_is_never_empty(window, t):
    """Not past the source's end, and not where a predicted place is at either end of it."""
    mask = torch.arange(KEYS) < torch.tensor([[1], [KEYS]])
    for direction in (-1e4, 1e4):
        module = WINDOWS[window](WIDTH, 1).double()
        if window == "local_p":
            torch.nn.init.constant_(module.v.weight, direction)
        near, _ = module(normal(2, 3, WIDTH), mask, t)
        assert near.any(-1).all() and not (near & ~mask[:, None]).any()


def test_coverage_begins_with_zeros():
    attention, memory, query = an_attention("concat", {"coverage": True}), a_memory(), normal(BATCH, QUERIES, WIDTH)
    zeros = torch.zeros(BATCH, KEYS, dtype=torch.float64)
    for left, right in zip(attention(query, memory), attention(query, memory, coverage=zeros), strict=True):
        assert torch.equal(left, right)


@FORMS
@pytest.mark.parametrize("name", SCORES)
def test_gradients_of_attention(name, form):
    attention = an_attention(name, form)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    query, states = (normal(BATCH, size, WIDTH).requires_grad_() for size in (QUERIES, KEYS))

    def run(query, states, *weights):
        parameters = {name: each for (name, _), each in zip(attention.named_parameters(), weights, strict=True)}
        memory = Memory(states, mask, states[:, 0], mask.long(), states)
        return torch.func.functional_call(attention, parameters, (query, memory))

    assert torch.autograd.gradcheck(run, (query, states, *attention.parameters()), fast_mode=True)


def test_attend_is_softmax_and_sum_for_each_form_of_mask():
    query, keys, values = normal(BATCH, QUERIES, WIDTH), normal(BATCH, KEYS, WIDTH), normal(BATCH, KEYS, 7)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    expected = torch.softmax((query @ keys.mT / 2).masked_fill(~mask[:, None], -torch.inf), dim=-1)
    for form in (mask, mask[:, None, :], mask[:, None, :].expand(-1, QUERIES, -1)):
        context, weights = attend(query, keys, values, mask=form)
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(context, expected @ values)
    for score in ("dot", lambda query, keys: query @ keys.mT):
        torch.testing.assert_close(attend(query, keys, values, score)[1], torch.softmax(query @ keys.mT, dim=-1))
    assert attend(query, keys, values, Additive(WIDTH, WIDTH).double())[0].shape == (BATCH, QUERIES, 7)
    assert attend(query[0], keys[0], values[0])[1].shape == (QUERIES, KEYS)


def test_attend_refuses_a_score_that_needs_parameters():
    with pytest.raises(ConfigError, match='by name there are "dot" and "scaled_dot"; a score with parameters is given'):
        attend(normal(1, 2, 4), normal(1, 3, 4), normal(1, 3, 4), score="general")


def test_a_query_that_may_look_at_nothing_gets_zeros():
    scores = normal(2, 3).requires_grad_()
    weights = weigh(scores, torch.tensor([[True, True, False], [False] * 3]))
    assert weights[1].tolist() == [0, 0, 0] and weights[0, 2] == 0 and weights[0].sum().item() == pytest.approx(1)
    weights.square().sum().backward()
    assert scores.grad.isfinite().all()


def a_memory():
    states = normal(BATCH, KEYS, WIDTH)
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    return Memory(states, mask, normal(BATCH, WIDTH), mask.long(), states)


def test_the_fixed_vector_answers_every_query_alike():
    memory = a_memory()
    assert torch.equal(fixed(normal(BATCH, QUERIES, WIDTH), memory), memory.summary[:, None].repeat(1, QUERIES, 1))


def test_a_projection_made_before_serves_as_well():
    memory = a_memory()
    query = normal(BATCH, QUERIES, WIDTH)
    for name in SCORES:
        attention = Attention(name, WIDTH, WIDTH).double()
        for plain, ready in zip(attention(query, memory),
                                attention(query, memory, attention.score.project(memory.states)), strict=True):
            torch.testing.assert_close(plain, ready, rtol=0, atol=0)


def multi_head(heads=2, dropout=0.0, kv_heads=None):
    ours = MultiHeadAttention(WIDTH, heads, dropout, kv_heads=kv_heads).double()
    with torch.no_grad():
        for weights in ours.parameters():
            weights += 0.3 * torch.randn_like(weights)
    return ours


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_multi_head_attention_is_torchs(heads):
    ours, theirs = multi_head(heads), nn.MultiheadAttention(WIDTH, heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    query, states = normal(BATCH, QUERIES, WIDTH), normal(BATCH, KEYS, WIDTH)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected, expected_weights = theirs(query, states, states, key_padding_mask=~mask, average_attn_weights=False)
    found, weights = ours(ours.ask(query), *ours.project(states), mask[:, None, None, :], want_weights=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_full_heads_whose_keys_and_values_repeat(kv_heads):
    grouped, full = multi_head(4, kv_heads=kv_heads), multi_head(4)
    with torch.no_grad():
        full.query.load_state_dict(grouped.query.state_dict())
        full.output.load_state_dict(grouped.output.state_dict())
        for own, repeated in ((grouped.key_value.weight, full.key_value.weight),
                              (grouped.key_value.bias, full.key_value.bias)):
            heads = own.view(2, kv_heads, 1, -1)  # keys and values, heads, width of a head, what comes in
            repeated.copy_(heads.repeat_interleave(4 // kv_heads, dim=1).view_as(repeated))
    x, states = normal(BATCH, QUERIES, WIDTH), normal(BATCH, KEYS, WIDTH)
    mask, bias = torch.rand(BATCH, 1, QUERIES, KEYS) > 0.3, normal(4, QUERIES, KEYS)
    assert grouped.project(states)[0].shape == (BATCH, kv_heads, KEYS, 1)
    for found, expected in zip(
            *(each(each.ask(x), *each.project(states), mask, bias, want_weights=True) for each in (grouped, full)),
            strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_bias_is_added_to_the_scores():
    attention, bias = multi_head(), normal(2, QUERIES, KEYS)
    x, states = normal(BATCH, QUERIES, WIDTH), normal(BATCH, KEYS, WIDTH)
    query, keys, values = attention.ask(x), *attention.project(states)
    scores = torch.stack([query[:, h] @ keys[:, h].mT / math.sqrt(2) + bias[h] for h in range(2)], dim=1)
    weights = attention(query, keys, values, None, bias, want_weights=True)[1]
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gradients_of_multi_head_attention(kv_heads):
    attention, mask = multi_head(kv_heads=kv_heads), torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(1)
    query, states = (normal(BATCH, size, WIDTH).requires_grad_() for size in (QUERIES, KEYS))
    bias = normal(2, QUERIES, KEYS).requires_grad_()

    def run(query, states, bias, *weights):
        for parameter, each in zip(attention.parameters(), weights, strict=True):
            assert parameter is each
        return attention(attention.ask(query), *attention.project(states), mask, bias, want_weights=True)

    assert torch.autograd.gradcheck(run, (query, states, bias, *attention.parameters()))


def test_dropout_falls_on_the_weights_in_training_alone_and_what_is_shown_is_without_it():
    attention = multi_head(dropout=0.5)
    x = normal(BATCH, KEYS, WIDTH)
    expected, weights = attention.eval()(attention.ask(x), *attention.project(x), None, want_weights=True)
    dropped, shown = attention.train()(attention.ask(x), *attention.project(x), None, want_weights=True)
    assert not torch.allclose(dropped, expected) and torch.equal(shown, weights)


def some_heads(device, kv_heads, masked, biased):
    """An attention, and what it is given."""
    attention, x = multi_head(4, kv_heads=kv_heads).to(device), normal(BATCH, KEYS, WIDTH).to(device)
    mask = torch.ones(KEYS, KEYS, dtype=torch.bool).tril() if masked == "past" else (
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None] if masked == "padding" else None)
    bias = normal(4, KEYS, KEYS).to(device) if biased else None
    return attention, (attention.ask(x), *attention.project(x), None if mask is None else mask.to(device), bias)


FORMS = [pytest.mark.parametrize("kv_heads", [4, 2, 1]), pytest.mark.parametrize("biased", [False, True]),
         pytest.mark.parametrize("masked", ["all", "past", "padding"])]


def each_form(test):
    for form in FORMS:
        test = form(test)
    return test


@each_form
def test_the_fused_kernel_is_the_plain_path(kv_heads, masked, biased):
    attention, given = some_heads("cpu", kv_heads, masked, biased)
    fused, (plain, _) = attention.fused(*given), attention.plain(*given)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    weights = list(attention.parameters())[:4]
    for one, other in zip(*(torch.autograd.grad(each.square().sum(), weights, retain_graph=True)
                            for each in (fused, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@each_form
@pytest.mark.skipif(not torch.cuda.is_available(), reason="attention takes the fused kernel on a GPU only")
def test_a_gpu_takes_the_fused_kernel_and_it_is_the_plain_path(kv_heads, masked, biased):
    attention, given = some_heads("cuda", kv_heads, masked, biased)
    (fused, weights), (plain, shown) = attention(*given), attention(*given, want_weights=True)
    assert weights is None and shown is not None
    torch.testing.assert_close(fused, plain)
