"""A Transformer's sublayers over packed rows, with gradients written by hand: what training on a processor runs.

Each computes what `regard.model.transformer` says, norm(x + part(x)) or x + part(norm(x)), and tests/test_sublayers.py
holds it to that. Autograd makes three times as many calls for the same, and calls, not arithmetic, were a fifth of an
update of a small model (docs/log.md, 2026-11-29).

R rows, D width, F inner width, B batch, H heads, N = B x H, T queries, S keys, d = D / H.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from numpy.random import SFC64
from torch import Tensor

from regard.config_model import TransformerSideConfig
from regard.model.layers import Dropout
from regard.model.rows import Packed

Saved = list[Any]
"""Tensors, and None for those that there are not."""


def covers(config: TransformerSideConfig) -> bool:
    """Whether the sublayers of such a stack are written out here; the modules of all others are run one by one."""
    return (config.activation == "relu" and config.norm_kind == "layer" and config.kv_heads in (None, config.heads)
            and not config.stochastic_depth and config.positions not in ("rotary", "relative"))


class Stack(NamedTuple):
    """What all sublayers of a stack share in one pass over a batch.

    Attributes:
        layout: of the rows.
        hidden: float32 or wider, broadcastable to (B, H, T, T), what scores of self-attention gain: very little where a
            key is hidden.
        across: the same of attention to the source, (B, 1, 1, S); None in an encoder.
        noise: what dropout draws from.
    """

    layout: Packed
    hidden: Tensor
    across: Tensor | None
    noise: SFC64


class Part(Protocol):
    """What stands between a residual's two ends."""

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """Rows (R, D) -> rows (R, D), and what the way back needs."""

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[
            Tensor, Tensor, tuple[Tensor | None, ...]]:
        """The gradient of what the first product gave and the matrix of that product, (R, E) and (E, D), whose own
        product is the gradient of x; and the gradients of the inputs, of those that are wanted at least."""


class Attend(NamedTuple):
    """Multi-head attention (`regard.model.attention.MultiHeadAttention`), of rows to themselves or to a source.

    Its inputs are weight and bias of the queries, then of keys and values (side by side), or where the source's are
    there already these, (B, H, S, d) each; then weight and bias of the output.
    """

    layout: Packed
    heads: int
    own: bool
    hidden: Tensor
    dropout: Dropout
    noise: SFC64

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """softmax(Q Kᵀ + hidden) V W + b, 1 / √d taken into Q's weights."""
        kind, scale = x.dtype, self.scale(x)
        weight, bias, told, more, out, out_bias = inputs
        weight, bias = weight * scale, bias * scale
        if self.own:  # queries, keys and values are one product
            weight, bias = torch.cat([weight, told]), torch.cat([bias, more])
        weight, out = weight.to(kind), out.to(kind)
        laid = self.layout.lay(torch.addmm(bias.to(kind), x, weight.t()), self.heads, 3 if self.own else 1)
        q, k, v = laid if self.own else (laid[0], told.flatten(0, 1), more.flatten(0, 1))
        (N, T, _), S = q.shape, k.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2)).to(torch.promote_types(kind, torch.float32)).view(-1, self.heads, T, S)
        weights = torch.softmax(scores.add_(self.hidden), dim=-1, out=scores).view(N, T, S)
        kept = weights.to(kind)
        keep = self.dropout.mask(kept.shape, kept, self.noise) if self.dropout.drops else None
        kept = kept if keep is None else kept * keep
        context = self.layout.take(torch.bmm(kept, v), self.heads)
        return torch.addmm(out_bias.to(kind), context, out.t()), [q, k, v, weights, kept, keep, context, weight, out]

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[
            Tensor, Tensor, tuple[Tensor | None, ...]]:
        """As `regard.model.by_hand` has it."""
        q, k, v, weights, kept, keep, context, weight, out = saved
        by_context = self.layout.lay(grad @ out, self.heads)[0]
        laid = q.new_empty(3 if self.own else 1, *q.shape)
        by_query, by_keys, by_values = laid if self.own else (laid[0], torch.empty_like(k), torch.empty_like(v))
        torch.bmm(kept.transpose(1, 2), by_context, out=by_values)
        by_weights = torch.bmm(by_context, v.transpose(1, 2))
        if keep is not None:
            by_weights.mul_(keep)
        wide = weights.dtype
        by_scores = torch._softmax_backward_data(by_weights.to(wide), weights, -1, wide).to(q.dtype)
        torch.bmm(by_scores, k, out=by_query)
        torch.bmm(by_scores.transpose(1, 2), q, out=by_keys)
        by_rows = self.layout.take(laid, self.heads, len(laid))
        by_weight, by_bias = product_grads(by_rows, x, any(wanted[:4]) if self.own else any(wanted[:2]))
        by_told: tuple[Tensor | None, ...] = (by_weight, by_bias)
        if by_weight is not None and by_bias is not None:
            D = weight.shape[1]
            by_told, by_weight, by_bias = (by_weight[D:], by_bias[D:]), by_weight[:D], by_bias[:D]
            by_weight, by_bias = by_weight.mul_(self.scale(x)), by_bias.mul_(self.scale(x))
        if not self.own:
            by_told = tuple(each.view(-1, self.heads, *each.shape[1:]) for each in (by_keys, by_values))
        return by_rows, weight, (by_weight, by_bias, *by_told, *product_grads(grad, context, any(wanted[4:])))

    def scale(self, x: Tensor) -> float:
        """1 / √d."""
        return 1 / math.sqrt(x.shape[1] // self.heads)


class FeedForward(NamedTuple):
    """relu(x W + b) V + c, some of its inner values dropped; its inputs are W, b, V and c."""

    dropout: Dropout
    noise: SFC64

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """As it says."""
        inner, bias, outer, outer_bias = (each.to(x.dtype) for each in inputs)
        values = torch.addmm(bias, x, inner.t()).relu_()
        if self.dropout.drops:
            values.mul_(self.dropout.mask(values.shape, values, self.noise))
        return torch.addmm(outer_bias, values, outer.t()), [values, inner, outer]

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[
            Tensor, Tensor, tuple[Tensor | None, ...]]:
        """What was dropped, or was below 0, is 0 now: it learns nothing."""
        values, inner, outer = saved
        by_values = torch.ops.aten.threshold_backward(grad @ outer, values, 0)
        if self.dropout.drops:
            by_values.mul_(self.dropout.scale)
        return by_values, inner, (*product_grads(by_values, x, any(wanted[:2])),
                                  *product_grads(grad, values, any(wanted[2:])))


def product_grads(grad: Tensor, x: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias of a linear map, (E, D) and (E,), from the gradient of what it gave, (R, E), and from what it
    was given, (R, D)."""
    return (grad.t() @ x, grad.sum(0)) if wanted else (None, None)


class _Sublayer(torch.autograd.Function):
    """A residual, its norm and its part, in one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: Part, before: bool, eps: float, dropout: Dropout, noise: SFC64, gain: Tensor,
        shift: Tensor, *inputs: Tensor
    ) -> Tensor:
        rows = x[0]
        ctx.part, ctx.before = part, before
        if before:
            normed, (seen, *stats) = rows, torch.native_layer_norm(rows, rows.shape[1:], gain, shift, eps)
            branch, saved = part.forward(seen, *inputs)
        else:
            branch, saved = part.forward(seen := rows, *inputs)
        keep = dropout.mask(branch.shape, branch, noise) if dropout.drops else None
        y = rows + branch if keep is None else torch.addcmul(rows, branch, keep)
        if not before:
            normed, (y, *stats) = y, torch.native_layer_norm(y, y.shape[1:], gain, shift, eps)
        ctx.save_for_backward(seen, keep, normed, *stats, gain, shift, *saved)
        return y[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, keep, normed, mean, scale, gain, shift, *saved = ctx.saved_tensors
        part, grad, wanted = ctx.part, grads[0][0], ctx.needs_input_grad[8:]

        def through_norm(grad: Tensor) -> Any:
            return torch.ops.aten.native_layer_norm_backward(
                grad, normed, normed.shape[1:], mean, scale, gain, shift, [True, True, True])

        if not ctx.before:
            grad, by_gain, by_shift = through_norm(grad)
        by_branch = grad if keep is None else grad * keep
        by_product, matrix, by_inputs = part.backward(by_branch, seen, saved, wanted)
        if ctx.before:
            by_x, by_gain, by_shift = through_norm(by_product @ matrix)
            by_x += grad
        else:
            by_x = torch.addmm(grad, by_product, matrix)
        return by_x[None], None, None, None, None, None, by_gain, by_shift, *by_inputs


def sublayer(x: Tensor, residual: Any, part: Part, noise: SFC64, *inputs: Tensor) -> Tensor:
    """(1, R, D) -> (1, R, D): the residual of a layer (`regard.model.transformer.Residual`) around a part."""
    norm = residual.norm
    y: Tensor = _Sublayer.apply(  # type: ignore[no-untyped-call]
        x, part, residual.before, norm.eps, residual.dropout, noise, norm.weight, norm.bias, *inputs)
    return y


def attend(x: Tensor, stack: Stack, attention: Any, residual: Any, told: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(1, R, D) -> (1, R, D): attention and its residual; to the source, where its keys and values are told."""
    hidden = stack.hidden if told is None else stack.across
    assert hidden is not None
    part = Attend(stack.layout, attention.heads, told is None, hidden, attention.dropout, stack.noise)
    key_value, output = attention.key_value, attention.output
    return sublayer(x, residual, part, stack.noise, attention.query.weight, attention.query.bias,
                    *(told or (key_value.weight, key_value.bias)), output.weight, output.bias)


def feed_forward(x: Tensor, stack: Stack, feedforward: Any, residual: Any) -> Tensor:
    """(1, R, D) -> (1, R, D): the feed-forward layer and its residual."""
    inner, outer = feedforward.inner, feedforward.outer
    return sublayer(x, residual, FeedForward(feedforward.dropout, stack.noise), stack.noise,
                    inner.weight, inner.bias, outer.weight, outer.bias)
