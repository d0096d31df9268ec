"""Attention against plain loops from the papers' equations, and against torch's own."""

import math

import pytest
import torch
from torch import nn

from regard.errors import ConfigError
from regard.model.attention import SCORES, Additive, Attention, MultiHeadAttention, attend, fixed, weigh
from regard.model.state import Memory

BATCH, QUERIES, KEYS, WIDTH = 2, 3, 5, 4


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def equation(name, score, query, key):
    """One number from one query and one key, as the paper writes it."""
    if name == "dot":
        return sum(q * k for q, k in zip(query, key, strict=True))
    if name == "scaled_dot":
        return equation("dot", score, query, key) / math.sqrt(len(query))
    if name == "general":
        return query @ (score.weight.weight @ key)
    if name == "concat":
        return score.v.weight[0] @ torch.tanh(score.weight.weight @ torch.cat([query, key]) + score.weight.bias)
    return score.v.weight[0] @ torch.tanh(score.query.weight @ query + score.key.weight @ key)


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


@pytest.mark.parametrize("name", SCORES)
def test_gradients_of_scores(name):
    attention = Attention(name, WIDTH, WIDTH).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    query, states = (normal(BATCH, size, WIDTH).requires_grad_() for size in (QUERIES, KEYS))

    def run(query, states, *weights):
        parameters = {name: each for (name, _), each in zip(attention.named_parameters(), weights, strict=True)}
        return torch.func.functional_call(attention, parameters, (query, Memory(states, mask, states[:, 0])))

    assert torch.autograd.gradcheck(run, (query, states, *attention.parameters()))


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


def test_the_fixed_vector_answers_every_query_alike():
    memory = Memory(normal(BATCH, KEYS, WIDTH), torch.ones(BATCH, KEYS, dtype=torch.bool), normal(BATCH, WIDTH))
    assert torch.equal(fixed(normal(BATCH, QUERIES, WIDTH), memory), memory.summary[:, None].repeat(1, QUERIES, 1))


def test_a_projection_made_before_serves_as_well():
    memory = Memory(normal(BATCH, KEYS, WIDTH), torch.ones(BATCH, KEYS, dtype=torch.bool), normal(BATCH, WIDTH))
    query = normal(BATCH, QUERIES, WIDTH)
    for name in SCORES:
        attention = Attention(name, WIDTH, WIDTH).double()
        for plain, ready in zip(attention(query, memory),
                                attention(query, memory, attention.score.project(memory.states)), strict=True):
            torch.testing.assert_close(plain, ready, rtol=0, atol=0)


def multi_head(heads=2, dropout=0.0):
    ours = MultiHeadAttention(WIDTH, heads, dropout).double()
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
    found, weights = ours(query, *ours.project(states), mask[:, None, None, :], want_weights=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-10)


def test_gradients_of_multi_head_attention():
    attention, mask = multi_head(), torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(1)
    query, states = (normal(BATCH, size, WIDTH).requires_grad_() for size in (QUERIES, KEYS))

    def run(query, states, *weights):
        for parameter, each in zip(attention.parameters(), weights, strict=True):
            assert parameter is each
        return attention(query, *attention.project(states), mask, want_weights=True)

    assert torch.autograd.gradcheck(run, (query, states, *attention.parameters()))


def test_dropout_falls_on_the_weights_in_training_alone_and_what_is_shown_is_without_it():
    attention = multi_head(dropout=0.5)
    x = normal(BATCH, KEYS, WIDTH)
    expected, weights = attention.eval()(x, *attention.project(x), None, want_weights=True)
    dropped, shown = attention.train()(x, *attention.project(x), None, want_weights=True)
    assert not torch.allclose(dropped, expected) and torch.equal(shown, weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused kernel runs on a GPU only")
def test_the_fused_kernel_is_the_plain_path():
    attention = multi_head().cuda()
    x, mask = normal(BATCH, KEYS, WIDTH).cuda(), torch.ones(KEYS, KEYS, dtype=torch.bool).tril().cuda()
    keys_and_values = attention.project(x)
    fused, weights = attention(x, *keys_and_values, mask)
    plain, _ = attention(x, *keys_and_values, mask, want_weights=True)
    assert weights is None
    torch.testing.assert_close(fused, plain)
