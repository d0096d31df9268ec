"""A Transformer's sublayers over packed rows, with gradients written by hand: what training on a processor runs.

Each computes what the modules of `regard.model.transformer` say, norm(x + part(x)) or x + part(norm(x)), and
tests/test_sublayers.py holds it to them. Modules, and autograd's nodes between torch's operations, were a quarter to a
third of what calls cost in an update (benchmarks/calls.py), and autograd passes over attention's scores twelve times
where five do (docs/log.md, 2026-11-29).

R rows, D width, F inner width, B batch, H heads, K heads of keys and values, T queries, S keys, d = D / H.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from numpy.random import SFC64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from regard.model.attention import hiding
from regard.model.layers import Dropout, drop, new_noise
from regard.model.positions import Order
from regard.model.rows import Packed
from regard.products import mapped

aten = torch.ops.aten
Saved = list[Any]
"""Tensors, and None for those that there are not."""
Grads = tuple[Tensor | None, ...]


class Stack(NamedTuple):
    """What all sublayers of a stack share in one pass over a batch.

    Attributes:
        layout: of the rows.
        order: what self-attention is told of it.
        hidden: float32 or wider, broadcastable to (B, H, T, T), what scores of self-attention gain: a bias, and very
            little where a key is hidden.
        across: the same of attention to the source, (B, 1, 1, S); None in an encoder.
        noise: what dropout draws from.
    """

    layout: Packed
    order: Order
    hidden: Tensor
    across: Tensor | None
    noise: SFC64

    @classmethod
    def of(cls, layout: Packed, x: Tensor, order: Order, mask: Tensor, across: Tensor | None = None) -> "Stack":
        """What sublayers over rows x share.

        Args:
            layout: of the rows.
            x: any of them.
            order: what self-attention is told of it.
            mask: where self-attention may look, bool, broadcastable to (B, H, T, T).
            across: where attention to the source may look, bool (B, 1, 1, S).
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        hidden = hiding(mask, dtype)
        return cls(layout, order, hidden if order.bias is None else hidden + order.bias,
                   None if across is None else hiding(across, dtype), new_noise())


# --- parts: what stands between the two ends of a residual -----------------------------------------------------------


class Part(Protocol):
    """A sublayer without its residual."""

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """Rows (R, D) -> rows (R, D), and what the way back needs."""

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Grads]:
        """From the gradient of the rows that it gave.

        Returns:
            the gradient of what the first product gave, (R, E), and that product's matrix, (E, D): their product is the
            gradient of x; then the gradients of the inputs, at least of those that are wanted.
        """


class Last(NamedTuple):
    """The linear map that a part ends with. Dropout before it and after it leaves the scaling of what stays to this
    map's weights, which are fewer than the values.

    Attributes:
        before: what the values that come are yet to be multiplied with.
        after: the same of the values that it gives.
    """

    before: float
    after: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (R, F) -> rows (R, D), and the matrix, (D, F), that they were multiplied with."""
        weight = times(weight, self.before * self.after).to(x.dtype)
        return mapped(x, weight, times(bias, self.after).to(x.dtype)), weight

    def grads(self, grad: Tensor, x: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias."""
        return product_grads(grad, x, wanted, self.before * self.after, self.after)


def times(x: Tensor, factor: float) -> Tensor:
    """x * factor, without a pass over it where that is x."""
    return x if factor == 1 else x * factor


class Heads(NamedTuple):
    """Scaled dot-product attention of heads that are laid out, 1 / √d taken into the queries: P' V, P' = keep * P,
    P = softmax(Q Kᵀ + hidden). keep is 0 or 1; that it should be 0 or 1 / (1 - p) is left to `Last`. With dO what comes
    back:

    dV = P'ᵀ dO,  dP = keep * (dO Vᵀ),  dS = P * (dP - Σ P dP),  dQ = dS K,  dK = dSᵀ Q
    """

    layout: Packed
    heads: int
    kv_heads: int
    dropout: Dropout
    noise: SFC64

    def forward(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Saved]:
        """Queries, (B x H, T, d), keys and values, (B x K, S, d) -> contexts in rows, (R, D)."""
        q = q.view(len(k), -1, q.shape[2])  # the queries of all heads that share a key, in a row
        scores = torch.bmm(q, k.transpose(1, 2)).to(hidden.dtype)
        weights = self.apart(scores).add_(hidden)
        weights = torch.softmax(weights, dim=-1, out=weights).view_as(scores)
        kept = weights.to(q.dtype, copy=self.dropout.drops)
        keep = self.dropout.bits(kept.shape, kept, self.noise)
        kept = drop(kept, keep)
        return self.layout.take(torch.bmm(kept, v), self.heads), [q, k, v, weights, kept, keep, hidden]

    def backward(
        self, grad: Tensor, saved: Saved, wanted: bool, room: Saved | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """From the gradient of the contexts, those of queries, keys and values, written into a room for each where
        there is one, and of `hidden`, if it is wanted."""
        q, k, v, weights, kept, keep, hidden = saved
        for_query, for_keys, for_values = room or (None, None, None)
        by_context = self.layout.lay(grad, self.heads)[0].view_as(q)
        by_values = torch.bmm(kept.transpose(1, 2), by_context, out=for_values)
        by_weights = drop(torch.bmm(by_context, v.transpose(1, 2)), keep)
        wide = hidden.dtype
        by_scores = torch._softmax_backward_data(by_weights.to(wide), weights, -1, wide)
        by_hidden = self.apart(by_scores).sum_to_size(hidden.shape) if wanted else None
        by_scores = by_scores.to(q.dtype)
        by_query = torch.bmm(by_scores, k, out=for_query)
        by_keys = torch.bmm(by_scores.transpose(1, 2), q, out=for_keys)
        return by_query.view(-1, self.layout.mask.shape[1], q.shape[2]), by_keys, by_values, by_hidden

    def apart(self, scores: Tensor) -> Tensor:
        """(B x K, H / K x T, S) -> (B, H, T, S)."""
        return scores.view(-1, self.heads, self.layout.mask.shape[1], scores.shape[2])


class Own(NamedTuple):
    """Self-attention. Its inputs are weight and bias of the queries, of keys and values, side by side, and of the
    output; and what scores gain."""

    core: Heads
    last: Last
    order: Order

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """Queries, keys and values are one product."""
        (query, bias), (told, told_bias, out, out_bias, hidden) = scaled(x, self.core.heads, *inputs[:2]), inputs[2:]
        weight, bias = torch.cat([query, told]).to(x.dtype), torch.cat([bias, told_bias])
        q, k, v = self.lay(mapped(x, weight, bias.to(x.dtype)))
        q, k = self.turned(q, self.order.rotate), self.turned(k, self.order.rotate)
        context, saved = self.core.forward(q, k, v, hidden)
        branch, out = self.last.forward(context, out, out_bias)
        return branch, [context, weight, out, *saved]

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Grads]:
        """The other way."""
        context, weight, out, *saved = saved
        laid = x.new_empty(3, *saved[1].shape) if self.core.heads == self.core.kv_heads else None
        by_query, by_keys, by_values, by_hidden = self.core.backward(
            grad @ out, saved, wanted[6], None if laid is None else list(laid))
        by_query, by_keys = self.turned(by_query, self.order.back), self.turned(by_keys, self.order.back)
        by_rows = self.take(by_query, by_keys, by_values, laid)
        by_weight, by_bias = product_grads(by_rows, x, any(wanted[:4]))
        by_inputs: Grads = (None,) * 4
        if by_weight is not None and by_bias is not None:
            D = x.shape[1]
            by_inputs = (*scaled(x, self.core.heads, by_weight[:D], by_bias[:D]), by_weight[D:], by_bias[D:])
        return by_rows, weight, (*by_inputs, *self.last.grads(grad, context, any(wanted[4:6])), by_hidden)

    def lay(self, rows: Tensor) -> Any:
        """(R, D + 2 K d) -> queries, (B x H, T, d), keys and values, (B x K, T, d)."""
        layout, heads, kv_heads = self.core[:3]
        if heads == kv_heads:
            return layout.lay(rows, heads, 3)
        D = rows.shape[1] * heads // (heads + 2 * kv_heads)
        return *layout.lay(rows[:, :D], heads), *layout.lay(rows[:, D:], kv_heads, 2)

    def take(self, query: Tensor, keys: Tensor, values: Tensor, laid: Tensor | None) -> Tensor:
        """The other way round, of gradients, which may be parts of one tensor already."""
        layout, heads, kv_heads = self.core[:3]
        if laid is not None:
            laid[0].copy_(query)  # which takes nothing where it is this
            laid[1].copy_(keys)
            return layout.take(laid, heads, 3)
        return torch.cat([layout.take(query, heads), layout.take(torch.stack([keys, values]), kv_heads, 2)], dim=1)

    def turned(self, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        """Queries or keys, (B x H, T, d), turned by their places."""
        B, (_, T, d) = self.core.layout.size[0], x.shape
        return how(x.view(B, -1, T, d)).view_as(x)


class Across(NamedTuple):
    """Attention to a source. Its inputs are weight and bias of the queries; keys and values, (B, K, S, d) each; weight
    and bias of the output; and what scores gain."""

    core: Heads
    last: Last

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """Only queries are made of the rows."""
        (weight, bias), (keys, values, out, out_bias, hidden) = scaled(x, self.core.heads, *inputs[:2]), inputs[2:]
        weight = weight.to(x.dtype)
        (q,) = self.core.layout.lay(mapped(x, weight, bias.to(x.dtype)), self.core.heads)
        context, saved = self.core.forward(q, keys.flatten(0, 1), values.flatten(0, 1), hidden)
        branch, out = self.last.forward(context, out, out_bias)
        return branch, [context, weight, out, *saved]

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Grads]:
        """The other way."""
        context, weight, out, *saved = saved
        by_query, by_keys, by_values, _ = self.core.backward(grad @ out, saved, False)
        by_rows = self.core.layout.take(by_query, self.core.heads)
        by_weight, by_bias = product_grads(by_rows, x, any(wanted[:2]))
        if by_weight is not None and by_bias is not None:
            by_weight, by_bias = scaled(x, self.core.heads, by_weight, by_bias)
        by_told = (each.view(-1, self.core.kv_heads, *each.shape[1:]) for each in (by_keys, by_values))
        return by_rows, weight, (by_weight, by_bias, *by_told, *self.last.grads(grad, context, any(wanted[4:6])), None)


def scaled(x: Tensor, heads: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the queries of rows (R, D), or their gradients, times 1 / √d."""
    scale = 1 / math.sqrt(x.shape[1] // heads)
    return weight * scale, bias * scale


class FeedForward(NamedTuple):
    """act(x W + b) V + c, some of its inner values dropped; its inputs are W, b, V and c."""

    activation: "Activation"
    dropout: Dropout
    last: Last
    noise: SFC64

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """As it says."""
        inner, bias = (each.to(x.dtype) for each in inputs[:2])
        before = mapped(x, inner, bias)
        values = self.activation.forward(before)
        keep = self.dropout.bits(values.shape, values, self.noise)
        drop(values, keep)
        branch, outer = self.last.forward(values, *inputs[2:])
        # An activation that writes over what it is given can tell what was dropped from what there is now.
        return branch, [before, None if values is before else keep, values, inner, outer]

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Grads]:
        """The other way."""
        before, keep, values, inner, outer = saved
        by_before = self.activation.backward(drop(grad @ outer, keep), before)
        return by_before, inner, (*product_grads(by_before, x, any(wanted[:2])),
                                  *self.last.grads(grad, values, any(wanted[2:])))


class Activation(NamedTuple):
    """A function of the inner values, which it may write over where its gradient can be told from what it gave and is 0
    where that is; and its gradient, from that of what it gave and from the inner values as they are then."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the halves [a; b] of x: a gate, and what it lets through (Shazeer 2020, eq. 6)."""
    gate, values = x.chunk(2, dim=-1)
    return functional.silu(gate) * values


def swiglu_back(grad: Tensor, x: Tensor) -> Tensor:
    """Its gradient."""
    gate, values = x.chunk(2, dim=-1)
    return torch.cat([aten.silu_backward(grad * values, gate), grad * functional.silu(gate)], dim=-1)


ACTIVATIONS = {
    "relu": Activation(torch.relu_, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "gelu": Activation(functional.gelu, aten.gelu_backward),
    "swiglu": Activation(swiglu, swiglu_back),
}


def product_grads(
    grad: Tensor, x: Tensor, wanted: bool, weight_factor: float = 1, bias_factor: float = 1
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias of a linear map, (E, D) and (E,), from the gradient of what it gave, (R, E), and from what it
    was given, (R, D); the factors are what weight and bias were multiplied with."""
    return (times(grad.t() @ x, weight_factor), times(grad.sum(0), bias_factor)) if wanted else (None, None)


# --- the residual and its norm ---------------------------------------------------------------------------------------


def normed(x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> tuple[Tensor, Saved]:
    """Layer norm of rows, or root mean square where there is no shift (`regard.model.transformer.NORMS`)."""
    if shift is not None:
        y, mean, scale = torch.native_layer_norm(x, x.shape[1:], gain, shift, eps)
        return y, [x, mean, scale]
    wide = x.to(gain.dtype)
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    return (wide * scale * gain).to(x.dtype), [x, None, scale]


def norm_grads(grad: Tensor, saved: Saved, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of x, gain and shift."""
    x, mean, scale = saved
    if shift is not None:
        by_x, by_gain, by_shift = aten.native_layer_norm_backward(
            grad, x, x.shape[1:], mean, scale, gain, shift, [True, True, True])
        return by_x, by_gain, by_shift
    even, wide = x.to(gain.dtype) * scale, grad.to(gain.dtype)
    by_even = wide * gain
    by_x = (by_even - even * (by_even * even).mean(1, keepdim=True)) * scale
    return by_x.to(x.dtype), (wide * even).sum(0), None


class _Sublayer(torch.autograd.Function):
    """A residual, its norm and its part, in one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, residual: Any, stack: Stack, gain: Tensor, shift: Tensor | None,
                *inputs: Tensor) -> Tensor:
        rows, before, eps = x[0], residual.before, residual.norm.eps
        ctx.part, ctx.before = part, before
        seen, saved = normed(rows, gain, shift, eps) if before else (rows, [])
        branch, own = part.forward(seen, *inputs)
        keep = residual.dropout.bits(branch.shape, branch, stack.noise)
        share = None
        if residual.depth.leaves_out:
            share = stack.layout.each(residual.depth.shares(len(stack.layout.mask), branch))
        y = left(branch, keep, share).add_(rows)
        if not before:
            y, saved = normed(y, gain, shift, eps)
        ctx.save_for_backward(seen, keep, share, gain, shift, *saved, *own)
        return y[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        seen, keep, share, gain, shift, *saved = ctx.saved_tensors
        grad, norm, own = grads[0][0], saved[:3], saved[3:]
        if not ctx.before:
            grad, by_gain, by_shift = norm_grads(grad, norm, gain, shift)
        by_branch = grad if keep is None and share is None else left(grad.clone(), keep, share)
        by_product, matrix, by_inputs = ctx.part.backward(by_branch, seen, own, ctx.needs_input_grad[6:])
        if ctx.before:
            by_x, by_gain, by_shift = norm_grads(by_product @ matrix, norm, gain, shift)
            by_x += grad
        else:
            by_x = grad.addmm_(by_product, matrix)
        return by_x[None], None, None, None, by_gain, by_shift, *by_inputs


def left(branch: Tensor, keep: Tensor | None, share: Tensor | None) -> Tensor:
    """What dropout and stochastic depth leave of a branch, or of its gradient, in place."""
    branch = drop(branch, keep)
    return branch if share is None else branch.mul_(share)


def sublayer(x: Tensor, stack: Stack, residual: Any, part: Part, *inputs: Tensor) -> Tensor:
    """(1, R, D) -> (1, R, D): the residual of a layer (`regard.model.transformer.Residual`) around a part."""
    norm = residual.norm
    y: Tensor = _Sublayer.apply(  # type: ignore[no-untyped-call]
        x, part, residual, stack, norm.weight, getattr(norm, "bias", None), *inputs)
    return y


def attend(x: Tensor, stack: Stack, residual: Any, attention: Any, told: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(1, R, D) -> (1, R, D): attention and its residual; to the source, where its keys and values are told."""
    query, key_value, output = attention.query, attention.key_value, attention.output
    core = Heads(stack.layout, attention.heads, attention.kv_heads, attention.dropout, stack.noise)
    last = Last(attention.dropout.scale, residual.dropout.scale)
    if told is None:
        return sublayer(x, stack, residual, Own(core, last, stack.order), query.weight, query.bias, key_value.weight,
                        key_value.bias, output.weight, output.bias, stack.hidden)
    assert stack.across is not None
    return sublayer(x, stack, residual, Across(core, last), query.weight, query.bias, *told, output.weight, output.bias,
                    stack.across)


def feed_forward(x: Tensor, stack: Stack, residual: Any, feedforward: Any) -> Tensor:
    """(1, R, D) -> (1, R, D): the feed-forward layer and its residual."""
    inner, outer = feedforward.inner, feedforward.outer
    last = Last(feedforward.dropout.scale, residual.dropout.scale)
    part = FeedForward(feedforward.activation, feedforward.dropout, last, stack.noise)
    return sublayer(x, stack, residual, part, inner.weight, inner.bias, outer.weight, outer.bias)
