"""Packed rows hold the real tokens of a batch, and nothing of what padding held."""

import pytest
import torch

from regard.model.rows import POSITIONS, ROWS, Packed, linear, packs, room, sentences, whole

MASK = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) + 1


def test_packing_keeps_real_tokens_alone_and_unpacking_puts_them_back():
    layout, x = Packed(MASK), numbered(3, 5, 4)
    rows = layout.pack(x)
    assert rows.shape == (1, POSITIONS, 4)
    assert torch.equal(rows[0, :11], x[MASK]) and not rows[0, 11:].any()
    assert torch.equal(layout.unpack(rows)[MASK], x[MASK])


def test_there_is_always_an_empty_row():
    def rows(step):
        return [Packed(torch.ones(1, tokens, dtype=torch.bool)).rows for tokens in (1, step - 1, step)]

    assert rows(POSITIONS) == [POSITIONS, POSITIONS, 2 * POSITIONS]
    with torch.autocast("cpu", torch.bfloat16):
        assert rows(ROWS) == [ROWS, ROWS, 2 * ROWS]


def padded(x, heads, parts=1):
    """(B, T, parts x D) -> (B, H, T, D / H) of each part."""
    return x.view(*x.shape[:2], parts * heads, -1).transpose(1, 2).chunk(parts, dim=1)


def test_heads_are_those_of_padded_sequences():
    layout, x = Packed(MASK), numbered(3, 5, 6)
    (heads,) = layout.heads(layout.pack(x), 2)
    assert layout.mask.shape == (3, POSITIONS) and heads.shape == (3, 2, POSITIONS, 3)
    real = MASK[:, None].expand(3, 2, 5)
    assert torch.equal(heads[:, :, :5][real], padded(x, 2)[0][real])


def test_parts_that_stand_side_by_side_are_told_apart():
    layout, x = Packed(MASK), numbered(3, 5, 12)
    keys, values = layout.heads(layout.pack(x), 2, 2)
    assert keys.is_contiguous() and values.is_contiguous()
    for found, half in ((keys, x[..., :6]), (values, x[..., 6:])):
        assert torch.equal(found, layout.heads(layout.pack(half.contiguous()), 2)[0])
    for found, expected in zip((keys, values), padded(x, 2, 2), strict=True):
        real = MASK[:, None].expand(3, 2, 5)
        assert torch.equal(found[:, :, :5][real], expected[real])


def test_gradients_go_to_the_tokens_they_came_from():
    layout, x = Packed(MASK), numbered(3, 5, 6).requires_grad_()
    (heads,) = layout.heads(layout.pack(x), 3)
    for found in (layout.unpack(layout.pack(x))[MASK], heads[:, :, :5].transpose(1, 2)[MASK]):
        weights = torch.randn_like(found)
        (grad,) = torch.autograd.grad((found * weights).sum(), x)
        assert torch.equal(grad[MASK], weights.flatten(1)) and not grad[~MASK].any()


def test_what_a_sequence_is_given_stands_at_each_of_its_tokens():
    layout, numbers = Packed(MASK), torch.tensor([2.0, 3.0, 5.0])
    assert layout.each(numbers)[:11, 0].tolist() == [2.0] * 5 + [3.0] * 2 + [5.0] * 4


def test_rows_are_packed_in_training_where_each_sequence_has_a_token():
    assert packs(MASK, True) and not packs(MASK, False)
    assert not packs(MASK & torch.tensor([[True], [False], [True]]), True)
    with torch.no_grad():
        assert not packs(MASK, True)


def test_laying_out_and_taking_up_are_each_the_gradient_of_the_other():
    layout, rows = Packed(MASK), torch.randn(1, 16, 12, dtype=torch.float64, requires_grad=True)
    laid = torch.stack(layout.heads(rows, 2, 2)).flatten(1, 2)
    assert torch.equal(layout.lay(rows[0], 2, 2), laid)
    weights = torch.randn_like(laid)
    (grad,) = torch.autograd.grad((laid * weights).sum(), rows)
    assert torch.equal(layout.take(weights, 2, 2)[:11], grad[0, :11])
    assert not layout.take(weights, 2, 2)[11:].any()


def test_real_tokens_are_given_sentence_after_sentence():
    layout, x = Packed(MASK), numbered(3, 5, 4)
    assert torch.equal(layout.real(layout.pack(x)), x[MASK])


def test_numbers_of_sentences_are_few_and_little_is_added():
    counts = range(1, 2000)
    assert all(count <= sentences(count) <= 1.125 * count for count in counts)
    assert [sentences(count) for count in range(1, 17)] == [*range(1, 17)]
    assert len({sentences(count) for count in counts}) < 75


@pytest.mark.parametrize("bias", [True, False], ids=["with its bias", "without"])
def test_a_linear_map_of_few_shapes_is_the_linear_map(bias, monkeypatch):
    x, weight = torch.randn(3, 5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    bias, met = torch.randn(6, requires_grad=True) if bias else None, []
    learned = [x, weight] if bias is None else [x, weight, bias]
    original = torch.nn.functional.linear
    right = original(x, weight, bias)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: met.append(len(given[0])) or original(*given))
    for narrow, tolerance in ((False, 1e-6), (True, 0.05)):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            found = linear(x, weight, bias)
            linear(x[:, :1], weight, bias)  # a step of a loop, whose rows are few already
        torch.testing.assert_close(found.float(), right, rtol=tolerance, atol=tolerance)
        upstream = torch.ones_like(right)
        for each, expected in zip(torch.autograd.grad(found, learned, upstream.to(found.dtype)),
                                  torch.autograd.grad(right, learned, upstream, retain_graph=True), strict=True):
            torch.testing.assert_close(each, expected, rtol=tolerance, atol=tolerance)
    assert met == [15, 3, ROWS, 3]


@pytest.mark.parametrize("count", [1, ROWS, ROWS + 1])
def test_a_room_is_as_large_as_rows_made_whole_and_ends_in_zeros(count):
    like = torch.empty(0, dtype=torch.bfloat16)
    made = room(like, count, 3)
    assert made.shape == whole(torch.ones(count, 3)).shape and made.dtype == like.dtype
    assert not made[count:].any()
