"""The gradients written by hand are those of the plain formulas."""

import pytest
import torch

from regard.model.attention import MultiHeadAttention
from regard.model.by_hand import added, attended

B, H, T, S, D = 3, 4, 5, 7, 2


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def plain(query, keys, values, hidden, keep, scale):
    each = H // keys.shape[1]
    keys, values = (x.repeat_interleave(each, 1) for x in (keys, values))
    weights = torch.softmax(query @ keys.transpose(-2, -1) * scale + hidden, -1)
    return (weights if keep is None else weights * keep) @ values


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("hidden", [(1,), (B, 1, 1, S), (T, S), (H, T, S)])
@pytest.mark.parametrize("drops", [False, True])
def test_attended_is_the_plain_formula_and_so_is_its_gradient(kv_heads, hidden, drops):
    torch.manual_seed(1)
    query, keys, values = normal(B, H, T, D), normal(B, kv_heads, S, D), normal(B, kv_heads, S, D)
    hidden, keep = normal(*hidden), (torch.rand(B, H, T, S) > 0.3).double() * 1.5 if drops else None
    results = []
    for formula in (attended, plain):
        context = formula(query, keys, values, hidden, keep, 0.3)
        grads = torch.autograd.grad((context * torch.arange(D)).sum(), (query, keys, values, hidden))
        results.append((context, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_added_is_a_sum_of_which_something_was_dropped():
    x, branch, keep = normal(4, 3), normal(4, 3), torch.rand(4, 3, dtype=torch.float64)
    torch.testing.assert_close(added(x, branch, keep), x + branch * keep, rtol=1e-15, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x, branch: added(x, branch, keep), (x, branch))


@pytest.mark.parametrize("mask", [None, torch.rand(B, 1, 1, S) > 0.3, torch.ones(T, S, dtype=torch.bool).tril(2)])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_by_hand_is_attention_step_by_step(mask, bias):
    torch.manual_seed(1)
    attention = MultiHeadAttention(H * D, H, 0.0, kv_heads=2).double()
    query, keys, values = normal(B, H, T, D), normal(B, 2, S, D), normal(B, 2, S, D)
    bias = normal(H, T, S) if bias else None
    inputs = [x for x in (query, keys, values, bias) if x is not None]
    by_hand, (context, _) = (way(query, keys, values, mask, bias) for way in (attention.by_hand, attention.plain))
    for ours, theirs in zip((by_hand, *torch.autograd.grad(by_hand.sum(), inputs)),
                            (context, *torch.autograd.grad(context.sum(), inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_the_weights_are_made_in_float32():
    torch.manual_seed(1)
    query, keys, values = (normal(B, H, 16, 32).detach() for _ in range(3))
    exact = plain(query, keys, values, torch.zeros(1), None, 0.2)
    rounded = [x.bfloat16() for x in (query, keys, values)]
    ours = attended(*rounded, torch.zeros(1), None, 0.2)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.03)
