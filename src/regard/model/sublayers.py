"""A Transformer's sublayers over packed rows, with gradients written by hand: what training on a processor runs.

Each computes what the modules of `regard.model.transformer` say, norm(x + part(x)) or x + part(norm(x)), and
tests/test_sublayers.py holds it to them. Autograd makes three times as many calls for the same, and calls, not
arithmetic, were a fifth of an update of a small model; it also passes over attention's scores twelve times where five
do (docs/log.md, 2026-11-29).

R rows, D width, F inner width, B batch, H heads, K heads of keys and values, T queries, S keys, d = D / H.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from numpy.random import SFC64
from torch import Tensor
from torch.nn import functional

from regard.model.attention import hiding
from regard.model.layers import Dropout, new_noise
from regard.model.positions import Order
from regard.model.rows import Packed

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


class Attend(NamedTuple):
    """Multi-head attention (`regard.model.attention.MultiHeadAttention`), of rows to themselves or to a source.

    With P the weights, dO what comes back and P' = keep * P:

    dV = P'ᵀ dO,  dP = keep * (dO Vᵀ),  dS = P * (dP - Σ P dP),  dQ = dS K,  dK = dSᵀ Q

    Its inputs are weight and bias of the queries; of keys and values, side by side, or where the source's are there
    already these, (B, K, S, d) each; of the output; and what scores gain.
    """

    layout: Packed
    order: Order
    heads: int
    kv_heads: int
    own: bool
    dropout: Dropout
    noise: SFC64

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """softmax(Q Kᵀ + hidden) V W + b, 1 / √d taken into Q's weights."""
        kind, scale = x.dtype, self.scale(x)
        weight, bias, told, more, out, out_bias, hidden = inputs
        weight, bias = weight * scale, bias * scale
        if self.own:  # queries, keys and values are one product
            weight, bias = torch.cat([weight, told]), torch.cat([bias, more])
        weight, out = weight.to(kind), out.to(kind)
        rows = torch.addmm(bias.to(kind), x, weight.t())
        q, k, v = self.lay(rows) if self.own else (*self.layout.lay(rows, self.heads), *(
            each.flatten(0, 1) for each in (told, more)))
        if self.own:
            q, k = self.turned(q, self.order.rotate), self.turned(k, self.order.rotate)
        q = q.view(len(k), -1, q.shape[2])  # the queries of all heads that share a key, in a row
        scores = torch.bmm(q, k.transpose(1, 2)).to(hidden.dtype)
        weights = scores.view(-1, self.heads, self.layout.mask.shape[1], k.shape[1]).add_(hidden)
        weights = torch.softmax(weights, dim=-1, out=weights).view_as(scores)
        kept = weights.to(kind)
        keep = self.dropout.mask(kept.shape, kept, self.noise) if self.dropout.drops else None
        kept = kept if keep is None else kept * keep
        context = self.layout.take(torch.bmm(kept, v), self.heads)
        saved = [q, k, v, weights, kept, keep, context, weight, out, hidden]
        return torch.addmm(out_bias.to(kind), context, out.t()), saved

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Grads]:
        """The other way."""
        q, k, v, weights, kept, keep, context, weight, out, hidden = saved
        by_context = self.layout.lay(grad @ out, self.heads)[0].view_as(q)
        laid = q.new_empty(3, *k.shape) if self.own and self.heads == self.kv_heads else (None, None, None)
        by_values = torch.bmm(kept.transpose(1, 2), by_context, out=laid[2])
        by_weights = torch.bmm(by_context, v.transpose(1, 2))
        if keep is not None:
            by_weights.mul_(keep)
        wide = weights.dtype
        by_scores = torch._softmax_backward_data(by_weights.to(wide), weights, -1, wide)
        by_hidden = None
        if wanted[6]:
            by_hidden = by_scores.view(-1, self.heads, self.layout.mask.shape[1], k.shape[1]).sum_to_size(hidden.shape)
        by_scores = by_scores.to(q.dtype)
        by_query = torch.bmm(by_scores, k, out=laid[0])
        by_keys = torch.bmm(by_scores.transpose(1, 2), q, out=laid[1])
        by_rows = self.take(by_query, by_keys, by_values, laid) if self.own else self.layout.take(by_query, self.heads)
        by_weight, by_bias = product_grads(by_rows, x, any(wanted[: 4 if self.own else 2]))
        by_told: Grads = tuple(each.view(-1, self.kv_heads, *each.shape[1:]) for each in (by_keys, by_values))
        if by_weight is not None and by_bias is not None:
            D = weight.shape[1]
            if self.own:
                by_told = by_weight[D:], by_bias[D:]
            by_weight, by_bias = by_weight[:D].mul_(self.scale(x)), by_bias[:D].mul_(self.scale(x))
        elif self.own:
            by_told = None, None
        by_output = product_grads(grad, context, any(wanted[4:6]))
        return by_rows, weight, (by_weight, by_bias, *by_told, *by_output, by_hidden)

    def lay(self, rows: Tensor) -> Any:
        """(R, D + 2 K d) -> queries, (B x H, T, d), keys and values, (B x K, T, d)."""
        if self.heads == self.kv_heads:
            return self.layout.lay(rows, self.heads, 3)
        D = rows.shape[1] * self.heads // (self.heads + 2 * self.kv_heads)
        return *self.layout.lay(rows[:, :D], self.heads), *self.layout.lay(rows[:, D:], self.kv_heads, 2)

    def take(self, query: Tensor, keys: Tensor, values: Tensor, laid: Any) -> Tensor:
        """The other way round, of gradients, which may be parts of one tensor already, (3, B x H, T, d)."""
        query, keys = self.turned(query.view(-1, *keys.shape[1:]), self.order.back), self.turned(keys, self.order.back)
        if self.heads == self.kv_heads:
            laid[0].copy_(query), laid[1].copy_(keys)  # which takes nothing where they are these
            return self.layout.take(laid, self.heads, 3)
        both = self.layout.take(torch.stack([keys, values]), self.kv_heads, 2)
        return torch.cat([self.layout.take(query, self.heads), both], dim=1)

    def turned(self, x: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        """Queries or keys, (B x H, T, d), turned by their places."""
        B, (_, T, d) = self.layout.size[0], x.shape
        return how(x.view(B, -1, T, d)).view_as(x)

    def scale(self, x: Tensor) -> float:
        """1 / √d."""
        return 1 / math.sqrt(x.shape[1] // self.heads)


class FeedForward(NamedTuple):
    """act(x W + b) V + c, some of its inner values dropped; its inputs are W, b, V and c."""

    activation: "Activation"
    dropout: Dropout
    noise: SFC64

    def forward(self, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Saved]:
        """As it says."""
        inner, bias, outer, outer_bias = (each.to(x.dtype) for each in inputs)
        before = torch.addmm(bias, x, inner.t())
        values = self.activation.forward(before)
        keep = self.dropout.mask(values.shape, values, self.noise) if self.dropout.drops else None
        kept = values if keep is None else values * keep
        return torch.addmm(outer_bias, kept, outer.t()), [before, keep, kept, inner, outer]

    def backward(self, grad: Tensor, x: Tensor, saved: Saved, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Grads]:
        """The other way."""
        before, keep, kept, inner, outer = saved
        by_values = grad @ outer
        if keep is not None:
            by_values.mul_(keep)
        by_before = self.activation.backward(by_values, before)
        return by_before, inner, (*product_grads(by_before, x, any(wanted[:2])),
                                  *product_grads(grad, kept, any(wanted[2:])))


class Activation(NamedTuple):
    """A function of the inner values, which it may write over where its gradient can be told from what it gave; and its
    gradient, from that of what it gave and from the inner values as they are then."""

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


def product_grads(grad: Tensor, x: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias of a linear map, (E, D) and (E,), from the gradient of what it gave, (R, E), and from what it
    was given, (R, D)."""
    return (grad.t() @ x, grad.sum(0)) if wanted else (None, None)


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
        keep = residual.dropout.mask(branch.shape, branch, stack.noise) if residual.dropout.drops else None
        if residual.depth.leaves_out:
            share = stack.layout.each(residual.depth.shares(len(stack.layout.mask), branch))
            keep = share.expand_as(branch) if keep is None else keep.mul_(share)
        y = rows + branch if keep is None else torch.addcmul(rows, branch, keep)
        if not before:
            y, saved = normed(y, gain, shift, eps)
        ctx.save_for_backward(seen, keep, gain, shift, *saved, *own)
        return y[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        seen, keep, gain, shift, *saved = ctx.saved_tensors
        grad, norm, own = grads[0][0], saved[:3], saved[3:]
        if not ctx.before:
            grad, by_gain, by_shift = norm_grads(grad, norm, gain, shift)
        by_branch = grad if keep is None else grad * keep
        by_product, matrix, by_inputs = ctx.part.backward(by_branch, seen, own, ctx.needs_input_grad[6:])
        if ctx.before:
            by_x, by_gain, by_shift = norm_grads(by_product @ matrix, norm, gain, shift)
            by_x += grad
        else:
            by_x = torch.addmm(grad, by_product, matrix)
        return by_x[None], None, None, None, by_gain, by_shift, *by_inputs


def sublayer(x: Tensor, stack: Stack, residual: Any, part: Part, *inputs: Tensor) -> Tensor:
    """(1, R, D) -> (1, R, D): the residual of a layer (`regard.model.transformer.Residual`) around a part."""
    norm = residual.norm
    y: Tensor = _Sublayer.apply(  # type: ignore[no-untyped-call]
        x, part, residual, stack, norm.weight, getattr(norm, "bias", None), *inputs)
    return y


def attend(x: Tensor, stack: Stack, residual: Any, attention: Any, told: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(1, R, D) -> (1, R, D): attention and its residual; to the source, where its keys and values are told."""
    part = Attend(stack.layout, stack.order, attention.heads, attention.kv_heads, told is None, attention.dropout,
                  stack.noise)
    query, key_value, output = attention.query, attention.key_value, attention.output
    hidden = stack.hidden if told is None else stack.across
    assert hidden is not None
    return sublayer(x, stack, residual, part, query.weight, query.bias, *(told or (key_value.weight, key_value.bias)),
                    output.weight, output.bias, hidden)


def feed_forward(x: Tensor, stack: Stack, residual: Any, feedforward: Any) -> Tensor:
    """(1, R, D) -> (1, R, D): the feed-forward layer and its residual."""
    inner, outer = feedforward.inner, feedforward.outer
    part = FeedForward(feedforward.activation, feedforward.dropout, stack.noise)
    return sublayer(x, stack, residual, part, inner.weight, inner.bias, outer.weight, outer.bias)
