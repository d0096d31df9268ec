"""Packed rows hold the real tokens of a batch, and nothing of what padding held."""

import torch

from regard.model.rows import POSITIONS, ROWS, Packed, Padded, layout_of

MASK = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) + 1


def test_packing_keeps_real_tokens_alone_and_unpacking_puts_them_back():
    layout, x = Packed(MASK), numbered(3, 5, 4)
    rows = layout.pack(x)
    assert rows.shape == (1, ROWS, 4)
    assert torch.equal(rows[0, :11], x[MASK]) and not rows[0, 11:].any()
    assert torch.equal(layout.unpack(rows)[MASK], x[MASK])


def test_there_is_always_an_empty_row():
    assert [Packed(torch.ones(1, tokens, dtype=torch.bool)).rows for tokens in (1, ROWS - 1, ROWS)] == [
        ROWS, ROWS, 2 * ROWS]


def test_heads_are_those_of_the_padded_layout_and_come_back_from_it():
    layout, x = Packed(MASK), numbered(3, 5, 6)
    (heads,), (padded,) = layout.heads(layout.pack(x), 2), Padded(MASK).heads(x, 2)
    assert layout.mask.shape == (3, POSITIONS) and heads.shape == (3, 2, POSITIONS, 3)
    real = MASK[:, None].expand(3, 2, 5)
    assert torch.equal(heads[:, :, :5][real], padded[real])
    assert torch.equal(layout.merge(heads), layout.pack(x))


def test_parts_that_stand_side_by_side_are_told_apart():
    layout, x = Packed(MASK), numbered(3, 5, 12)
    keys, values = layout.heads(layout.pack(x), 2, 2)
    assert keys.is_contiguous() and values.is_contiguous()
    for found, half in ((keys, x[..., :6]), (values, x[..., 6:])):
        assert torch.equal(found, layout.heads(layout.pack(half.contiguous()), 2)[0])
    for found, expected in zip((keys, values), Padded(MASK).heads(x, 2, 2), strict=True):
        real = MASK[:, None].expand(3, 2, 5)
        assert torch.equal(found[:, :, :5][real], expected[real])


def test_gradients_go_to_the_tokens_they_came_from():
    layout, x = Packed(MASK), numbered(3, 5, 6).requires_grad_()
    rows = layout.pack(x)
    weights = torch.randn_like(rows)
    weights[:, 11:] = 0  # nobody reads empty rows
    (grad,) = torch.autograd.grad((layout.merge(*layout.heads(rows, 3)) * weights).sum(), x)
    assert torch.equal(grad[MASK], weights[0, :11]) and not grad[~MASK].any()


def test_what_a_sequence_is_given_stands_at_each_of_its_tokens():
    layout, numbers = Packed(MASK), torch.tensor([2.0, 3.0, 5.0])
    assert layout.sequences(torch.empty(1, ROWS, 4)) == 3
    assert layout.each(numbers)[0, :11, 0].tolist() == [2.0] * 5 + [3.0] * 2 + [5.0] * 4
    assert Padded(MASK).each(numbers).flatten().tolist() == [2.0, 3.0, 5.0]


def test_rows_are_packed_in_training_in_bfloat16_alone():
    assert isinstance(layout_of(MASK, True), Padded)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(layout_of(MASK, True), Packed)
        assert isinstance(layout_of(MASK, False), Padded)
        with torch.no_grad():
            assert isinstance(layout_of(MASK, True), Padded)
