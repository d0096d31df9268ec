"""Additive scores, v · tanh(a + b) of each query a and key b, without the tensor of (B, T, S, D) that they go through.

For 4,096 tokens of 256 that would be 60 MB, several times over. On a processor, some pairs at a time stay in its cache,
where float32 costs no more than bfloat16, and are made anew for their gradient, which takes less than to fetch them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 20
"""Numbers of pairs that are done at one time, 4 MB; what has no more is done at once (docs/log.md, 2026-11-30)."""


def along(v: Tensor, asked: Tensor, told: Tensor) -> Tensor:
    """v · tanh(a + b), (…, T, S), of each pair of a, (…, T, D), and b, (…, S, D)."""
    before = torch.broadcast_shapes(asked.shape[:-2], told.shape[:-2])  # type: ignore[no-untyped-call]
    if asked.is_cuda or before.numel() * asked.shape[-2] * told.shape[-2] * len(v) <= PIECE:
        return hidden(asked, told) @ (2 * v) - v.sum()
    kind = torch.promote_types(torch.promote_types(asked.dtype, told.dtype), torch.float32)
    a, b = (x.to(kind).expand(*before, -1, -1).reshape(-1, *x.shape[-2:]) for x in (asked, told))
    with torch.autocast(a.device.type, enabled=False):
        scores: Tensor = _Along.apply(v.to(kind), a, b)  # type: ignore[no-untyped-call]
    return scores.view(*before, *scores.shape[1:]).to(asked.dtype)


def hidden(a: Tensor, b: Tensor) -> Tensor:
    """h = σ(2 (a + b)), (…, T, S, D), of each pair: tanh(a + b) is 2 h - 1, and its derivative 4 h (1 - h). σ takes a
    processor a third of the time of tanh."""
    return torch.sigmoid_((a.unsqueeze(-2) + b.unsqueeze(-3)).mul_(2))


class _Along(torch.autograd.Function):
    """v · tanh(a + b), (N, T, S), of v, (D,), a, (N, T, D), and b, (N, S, D)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(v, a, b)
        scores = a.new_empty(*a.shape[:2], b.shape[1])
        for rows, queries in pieces(a, b):
            scores[rows, queries] = hidden(a[rows, queries], b[rows]) @ (2 * v)
        return scores.sub_(v.sum())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, a, b = ctx.saved_tensors
        grad_v, grad_a, grad_b = torch.zeros_like(v), torch.empty_like(a), torch.zeros_like(b)
        for rows, queries in pieces(a, b):
            h, some = hidden(a[rows, queries], b[rows]), grads[0][rows, queries]
            grad_v += 2 * (some.flatten() @ h.flatten(0, 2))
            each = torch.ops.aten.sigmoid_backward(some.unsqueeze(-1).expand_as(h), h)
            grad_a[rows, queries] = each.sum(2)
            grad_b[rows] += each.sum(1)
        return grad_v - grads[0].sum(), grad_a.mul_(4 * v), grad_b.mul_(4 * v)


def pieces(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which rows and which of their queries are done at one time."""
    (N, T, D), S = a.shape, b.shape[1]
    queries = min(T, max(1, PIECE // (S * D)))
    rows = max(1, PIECE // (queries * S * D))
    for first in range(0, N, rows):
        for start in range(0, T, queries):
            yield slice(first, first + rows), slice(start, start + queries)
