"""What training does most, with gradients written by hand: autograd's own take twice the time on a processor, where
each step of a formula is a pass over memory. Each is held to its plain formula by tests/test_by_hand.py.

B batch, H heads, K heads of keys and values, T queries, S keys, d the width of a head.
"""

from typing import Any

import torch
from torch import Tensor


def attended(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    """(keep * softmax(scale Q Kᵀ + hidden)) V, float (B, H, T, d): `MultiHeadAttention.plain` in one piece.

    Args:
        query: float (B, H, T, d).
        keys: float (B, K, S, d).
        values: the same.
        hidden: float32 or wider, broadcastable to (B, H, T, S): what scores gain, very little where a key is hidden.
        keep: (B, H, T, S), the factor by which dropout takes each weight; None: there is none.
        scale: of the scores.
    """
    context: Tensor = _Attended.apply(query, keys, values, hidden, keep, scale)  # type: ignore[no-untyped-call]
    return context


class _Attended(torch.autograd.Function):
    """With P the weights, dO what comes back and P' = keep * P:

    dV = P'ᵀ dO,  dP = keep * (dO Vᵀ),  dS = P * (dP - Σ P dP),  dQ = scale dS K,  dK = scale dSᵀ Q
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, keep: Tensor | None, scale: float
    ) -> Tensor:
        (B, H, T, _), S = query.shape, keys.shape[2]
        ctx.shapes, ctx.scale = (B, H, T, S), scale
        k, v = (x.flatten(0, 1) for x in (keys, values))  # (B K, S, d)
        q = query.reshape(len(k), -1, k.shape[2])  # the queries of all heads that share a key, in a row
        scores = torch.bmm(q, k.transpose(1, 2)).view(ctx.shapes)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale).add_(hidden)
        weights = torch.softmax(weights, dim=-1, out=weights).to(scores.dtype)
        kept = weights if keep is None else weights * keep
        ctx.save_for_backward(q, k, v, weights, kept, keep, hidden)
        return torch.bmm(kept.view(len(k), -1, S), v).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept, keep, hidden = ctx.saved_tensors
        B, H, T, S = ctx.shapes
        rows = len(k), -1, S
        grad = grads[0].reshape(q.shape)
        by_values = torch.bmm(kept.view(rows).transpose(1, 2), grad)
        by_weights = torch.bmm(grad, v.transpose(1, 2)).view(ctx.shapes)
        if keep is not None:
            by_weights.mul_(keep)
        wide = hidden.dtype
        by_scores = torch._softmax_backward_data(by_weights.to(wide), weights.to(wide), -1, wide)
        by_hidden = by_scores.clone().sum_to_size(hidden.shape) if ctx.needs_input_grad[3] else None
        by_scores = by_scores.mul_(ctx.scale).to(weights.dtype).view(rows)
        by_query = torch.bmm(by_scores, k).view(B, H, T, -1)
        by_keys = torch.bmm(by_scores.transpose(1, 2), q)
        return by_query, *(x.view(B, -1, *x.shape[1:]) for x in (by_keys, by_values)), by_hidden, None, None


def added(x: Tensor, branch: Tensor, keep: Tensor) -> Tensor:
    """x + keep * branch, any shape, of which keep learns nothing."""
    total: Tensor = _Added.apply(x, branch, keep)  # type: ignore[no-untyped-call]
    return total


class _Added(torch.autograd.Function):
    """Where autograd would multiply `keep` by 1 once more on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return torch.addcmul(x, branch, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], grads[0] * ctx.saved_tensors[0], None
