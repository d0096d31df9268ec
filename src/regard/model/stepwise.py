"""The loop of a decoder that asks at each step, written out with its gradient: what a processor trains.

It computes what `RNNDecoder.step_by_step` says, to which tests/test_stepwise.py holds it. Steps joined by autograd are
dozens of nodes each, and what each of them says of a matrix, of the keys and of the values is a product and a sum by
itself. Here the factors of those sums are laid side by side, and each sum is one product when the loop is done. Every
part of a step tells how it is done, how it is gone back over, and what all steps say of what it was given.

B batch, T steps, S source length, D width of a state, E the memory's width, G width of a cell's gates, I width of what
enters a layer. Rows (T x B, …) of all steps are followed by rows of zeros, as `room` makes them. Products with a matrix
are made in its type; attention, of one query for each sentence, in float32 or wider, which takes half of the time.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.model.attention import Attention, Perceptron, Product, everywhere
from regard.model.cells import Kind, before, one_step, widened
from regard.model.layers import narrow
from regard.model.rows import room, step
from regard.model.state import Memory
from regard.products import mapped

aten = torch.ops.aten
Tensors = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]


class Layer(NamedTuple):
    """A layer of cells.

    Attributes:
        kind: of cell.
        said: what is known of the gates before the loop, (T x B or more, G): what the tokens say, or a bias.
        W: (G, I), meets what enters.
        U: (G, D), meets the last hidden state.
        b: (G,), added to U h; read where a gate treats it apart.
        factor: (T, B, I), what dropout makes of what enters.
        entered: (T x B, I), what is left of what entered.
        hidden: ((T + 1) x B, D), the hidden states, that before the first step too.
        known: what `Kind.back` has to know, step by step.
    """

    kind: Kind
    said: Tensor
    W: Tensor
    U: Tensor
    b: Tensor
    factor: Tensor
    entered: Tensor
    hidden: Tensor
    known: list[Tensor]

    @classmethod
    def of(cls, kind: Kind, factor: Tensor, said: Tensor, W: Tensor, U: Tensor, b: Tensor, hidden: Tensor) -> "Layer":
        """Before its first step, from its first hidden state, (B, D)."""
        T, B, width = factor.shape
        states = room(U, (T + 1) * B, U.shape[1])
        states[:B] = hidden
        return cls(kind, said, W, U, b, factor, room(W, T * B, width), states, [])

    def step(self, t: int, y: Tensor, state: Tensors) -> Tensors:
        """y, (B, I), enters: the state after step t, from that before it."""
        now, after = step(t, len(y)), step(t + 1, len(y))
        torch.mul(y, self.factor[t], out=self.entered[now])
        x = torch.addmm(self.said[now], self.entered[now], self.W.t())
        state, known = one_step(self.kind, self.U, self.b, x, self.hidden[now], *state)
        self.hidden[after] = state[0]
        self.known.extend(known)
        return state

    def rooms(self) -> Tensors:
        """For the gradients of what the inputs said of the gates, and of U h + b, each (T x B, G)."""
        T, B, _ = self.factor.shape
        asked = room(self.U, T * B, len(self.U))
        return room(self.U, T * B, len(self.U)) if self.kind.apart else asked, asked

    def back(self, t: int, state: Tensors, rooms: Tensors) -> tuple[Tensor, Tensors]:
        """From the gradient of the state after step t, that of y and of the state before."""
        (told, asked), now = rooms, step(t, len(state[0]))
        count = len(self.known) // len(self.factor)
        x, asked[now], direct = self.kind.back(tuple(self.known[t * count : (t + 1) * count]), *state)
        if self.kind.apart:
            told[now] = x
        return (told[now] @ self.W) * self.factor[t], before(asked[now] @ self.U, *direct)

    def grads(self, rooms: Tensors) -> Grads:
        """Those of said, W, U and b."""
        told, asked = rooms
        b = asked.sum(0) if self.kind.apart else None
        return told[: len(self.said)], told.t() @ self.entered, asked.t() @ self.hidden[: len(asked)], b


class Scores(Protocol):
    """What compares the query of a step with the keys."""

    def ask(self, t: int, query: Tensor) -> Tensor:
        """Scores, (B, S), of step t's query, (B, D), as they stand before the softmax, whose sum may be any."""

    def rooms(self) -> Tensors:
        """For what `back` writes."""

    def back(self, t: int, scores: Tensor, rooms: Tensors) -> Tensor:
        """From the gradient of step t's scores, that of its query."""

    def grads(self, rooms: Tensors) -> Tensors:
        """Those of its keys, and of its matrices."""


class Products(NamedTuple):
    """query Kᵀ, of keys K, (B, S, D); of the queries as well as their gradients, (T, B, D) and (T, B, S)."""

    keys: Tensor
    queries: Tensor

    @classmethod
    def of(cls, T: int, keys: Tensor) -> "Products":
        """Before the first step."""
        keys, = widened(keys)
        return cls(keys, keys.new_empty(T, len(keys), keys.shape[2]))

    def ask(self, t: int, query: Tensor) -> Tensor:
        """As `Scores` says, and so below."""
        self.queries[t] = query
        return torch.bmm(self.queries[t][:, None], self.keys.transpose(1, 2))[:, 0]

    def rooms(self) -> Tensors:
        (T, B, _), S = self.queries.shape, self.keys.shape[1]
        return (self.keys.new_empty(T, B, S),)

    def back(self, t: int, scores: Tensor, rooms: Tensors) -> Tensor:
        rooms[0][t] = scores
        return torch.bmm(scores[:, None], self.keys)[:, 0]

    def grads(self, rooms: Tensors) -> Tensors:
        return (torch.bmm(rooms[0].permute(1, 2, 0), self.queries.transpose(0, 1)),)


class Sums(NamedTuple):
    """v · tanh(P query + key), of keys twice as large, (B, S, D), of P, (D, Q), and v, (D,); and the queries, (T x B,
    Q). With h = σ(2 (P query + key)), tanh is 2 h - 1 and its derivative 4 h (1 - h): `regard.model.pairs`."""

    double: Tensor
    P: Tensor
    v: Tensor
    queries: Tensor

    @classmethod
    def of(cls, T: int, keys: Tensor, P: Tensor, v: Tensor) -> "Sums":
        """Before the first step."""
        keys, v = widened(keys, v)
        return cls(2 * keys, P, v, room(P, T * len(keys), P.shape[1]))

    def hidden(self, t: int) -> Tensor:
        """h of step t, (B, S, D)."""
        asked = (self.queries[step(t, len(self.double))] @ self.P.t()).to(self.v.dtype)
        return torch.sigmoid_(torch.add(self.double, asked[:, None], alpha=2))

    def ask(self, t: int, query: Tensor) -> Tensor:
        """As `Scores` says, and so below."""
        self.queries[step(t, len(query))] = query
        return self.hidden(t) @ (2 * self.v)

    def rooms(self) -> Tensors:
        """For the gradient of P query, (T x B, D), and for the sums of those of keys and of v, / 4 v and / 2."""
        return (self.P.new_zeros(len(self.queries), len(self.P)), torch.zeros_like(self.double),
                torch.zeros_like(self.v))

    def back(self, t: int, scores: Tensor, rooms: Tensors) -> Tensor:
        (asked, keys, v), now = rooms, step(t, len(scores))
        h = self.hidden(t)
        v += scores.flatten() @ h.flatten(0, 1)
        each = aten.sigmoid_backward.grad_input(scores[:, :, None].expand_as(h), h, grad_input=h)
        keys += each
        asked[now] = each.sum(1).mul_(4 * self.v)
        return asked[now] @ self.P

    def grads(self, rooms: Tensors) -> Tensors:
        asked, keys, v = rooms
        return keys.mul_(4 * self.v), asked.t() @ self.queries, v.mul_(2)


class Look(NamedTuple):
    """Attention: softmax(scores + hidden) V.

    Attributes:
        hidden: (B, 1 or T, S), what scores gain: very little where a key is hidden.
        values: V, (B, S, E).
        weights: (T, B, S), the softmax.
    """

    hidden: Tensor
    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, T: int, hidden: Tensor, values: Tensor) -> "Look":
        """Before the first step."""
        values, = widened(values)
        return cls(hidden.to(values.dtype), values, values.new_empty(T, *values.shape[:2]))

    def at(self, t: int, scores: Tensor) -> Tensor:
        """The context of step t, (B, E), from its scores."""
        torch.softmax(scores + self.hidden[:, min(t, self.hidden.shape[1] - 1)], dim=-1, out=self.weights[t])
        return torch.bmm(self.weights[t][:, None], self.values)[:, 0]

    def room(self) -> Tensor:
        """For the gradients of the contexts, (T, B, E)."""
        return self.values.new_empty(*self.weights.shape[:2], self.values.shape[2])

    def back(self, t: int, context: Tensor, weights: Tensor | None, room: Tensor) -> Tensor:
        """From the gradients of step t's context and, where there are any, of all weights: that of its scores."""
        room[t] = context
        by_weights = torch.bmm(room[t][:, None], self.values.transpose(1, 2))[:, 0]
        if weights is not None:
            by_weights += weights[t]
        return torch._softmax_backward_data(by_weights, self.weights[t], -1, by_weights.dtype)

    def grad(self, room: Tensor) -> Tensor:
        """That of the values."""
        return torch.bmm(self.weights.permute(1, 2, 0), room.transpose(0, 1))


class Read(NamedTuple):
    """tanh(W [context; hidden] + b) (Luong et al. 2015, eq. 5).

    Attributes:
        W: (D, E + D).
        b: (D,).
        met: (T x B, E + D), [context; hidden].
        made: (T, B, D).
    """

    W: Tensor
    b: Tensor
    met: Tensor
    made: Tensor

    @classmethod
    def of(cls, T: int, B: int, W: Tensor, b: Tensor) -> "Read":
        """Before the first step."""
        return cls(W, b, room(W, T * B, W.shape[1]), W.new_empty(T, B, len(W)))

    def read(self, t: int, context: Tensor, hidden: Tensor) -> Tensor:
        """What step t makes, (B, D)."""
        met = torch.cat([context, hidden], dim=1, out=self.met[step(t, len(hidden))])
        return torch.tanh(mapped(met, self.W, self.b), out=self.made[t])

    def room(self) -> Tensor:
        """For the gradients before the tanh, (T x B, D)."""
        T, B, D = self.made.shape
        return room(self.W, T * B, D)

    def back(self, t: int, made: Tensor, room: Tensor) -> Tensor:
        """From the gradient of what step t made, that of [context; hidden]."""
        now = step(t, len(made))
        room[now] = aten.tanh_backward(made, self.made[t])
        return room[now] @ self.W

    def grads(self, room: Tensor) -> Tensors:
        """Those of W and b."""
        return room.t() @ self.met, room.sum(0)


class Form(NamedTuple):
    """What a loop is, besides its tensors.

    Attributes:
        kind: of all its cells.
        residual: whether what enters a layer after the first is added to what leaves it.
        feeding: whether attention asks with what a step has made, and the next is told the answer (Luong et al. 2015,
            section 3.3); else with what the last step made, and the context enters (Bahdanau et al. 2015).
        scores: what compares.
    """

    kind: Kind
    residual: bool
    feeding: bool
    scores: type[Products] | type[Sums]


class _Loop(torch.autograd.Function):
    """A whole loop, as `loop` says; `learns` is whether a gradient may be asked for."""

    @staticmethod
    def forward(ctx: Any, form: Form, learns: bool, hidden: Tensor, factors: Sequence[Tensor],
                *inputs: Tensor) -> Grads:
        given: list[Any] = list(inputs)
        T, B, _ = factors[0].shape
        scores: Any = form.scores.of(T, *taken(given, 3 if form.scores is Sums else 1))
        look = Look.of(T, hidden, *taken(given, 1))
        fed = taken(given, 3) if form.feeding else []
        read = Read.of(T, B, *fed[1:]) if fed else None
        each = [taken(given, 4 + len(form.kind.parts)) for _ in factors]
        layers = [Layer.of(form.kind, factor, *own[:5]) for factor, own in zip(factors, each, strict=True)]
        states = [widened(*own[4:]) for own in each]
        U = layers[0].U
        tops, contexts = U.new_empty(T, B, U.shape[1]), U.new_empty(T, B, look.values.shape[2])

        def enter(t: int, y: Tensor) -> None:
            """Step t through all layers."""
            for index, layer in enumerate(layers):
                states[index] = layer.step(t, y, states[index])
                y = y + states[index][0] if form.residual and index else states[index][0]
                if not learns:
                    layer.known.clear()
            tops[t] = y

        y: Any = fed[0] if fed else None
        for t in range(T):
            if read is None:
                contexts[t] = look.at(t, scores.ask(t, states[-1][0]))  # c_t = attention(s_{t-1})
                enter(t, contexts[t])  # s_t = f(s_{t-1}, [y_{t-1}; c_t])
            else:
                enter(t, y)  # h_t = f(h_{t-1}, [y_{t-1}; h̃_{t-1}])
                contexts[t] = look.at(t, scores.ask(t, tops[t]))  # c_t = attention(h_t)
                y = read.read(t, contexts[t], tops[t])  # h̃_t = tanh(W [c_t; h_t])
        ctx.form, ctx.known = form, len(layers[0].known)
        ctx.save_for_backward(*scores, *look, *(read or ()), *chain(*((*own[1:-1], *own.known) for own in layers)))
        ctx.set_materialize_grads(False)
        last = ((own.hidden[step(T, B)], *state[1:]) for own, state in zip(layers, states, strict=True))
        return tops, contexts, look.weights, None if read is None else read.made, *chain(*last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        form, saved, layers = ctx.form, list(ctx.saved_tensors), []
        scores: Any = form.scores(*taken(saved, len(form.scores._fields)))
        look = Look(*taken(saved, 3))
        read = Read(*taken(saved, 4)) if form.feeding else None
        while saved:
            layers.append(Layer._make([form.kind, *taken(saved, 7), taken(saved, ctx.known)]))
        tops, contexts, weights, made, *last = grads
        nothing = look.values.new_zeros(len(look.values), layers[0].hidden.shape[1])
        states = [tuple(nothing if part is None else widened(part)[0] for part in taken(last, len(form.kind.parts)))
                  for _ in layers]
        of_layers, of_look, of_scores = [layer.rooms() for layer in layers], look.room(), scores.rooms()
        of_read = () if read is None else (read.room(),)

        def enter(t: int, y: Tensor) -> Tensor:
            """Step t back through all layers: from the gradient of what left the top one, that of what entered."""
            for index in reversed(range(len(layers))):
                after = (states[index][0] + y, *states[index][1:])
                entered, states[index] = layers[index].back(t, after, of_layers[index])
                y = entered + y if form.residual and index else entered
            return y

        y = nothing  # the gradient of what entered the step after this one
        for t in reversed(range(len(look.weights))):
            if read is None:
                context = plus(enter(t, plus(nothing, tops, t)), contexts, t)
                query = scores.back(t, look.back(t, context, weights, of_look), of_scores)
                states[-1] = (states[-1][0] + query, *states[-1][1:])
            else:
                both = read.back(t, plus(y, made, t), *of_read)
                context, top = both.tensor_split([look.values.shape[2]], dim=1)
                query = scores.back(t, look.back(t, plus(context, contexts, t), weights, of_look), of_scores)
                y = enter(t, plus(query + top, tops, t))
        fed = () if read is None else (y, *read.grads(*of_read))
        own = ((*layer.grads(rooms), *state) for layer, rooms, state in zip(layers, of_layers, states, strict=True))
        return None, None, None, None, *scores.grads(of_scores), look.grad(of_look), *fed, *chain(*own)


def taken(tensors: list[Any], count: int) -> list[Any]:
    """So many, taken from the front."""
    first, tensors[:count] = tensors[:count], []
    return first


def plus(x: Tensor, others: Tensor | None, t: int) -> Tensor:
    """A gradient, and what else there is of it, of all steps, (T, B, …)."""
    return x if others is None else x + others[t]


def runs(attention: Attention | None, x: Tensor, memory: Memory) -> bool:
    """Whether the loop over tokens x, (R, T, D), is written out: several steps on a processor, a row for each source,
    each with a token; scores of the two kinds, a window that learns nothing, no coverage."""
    return (attention is not None and isinstance(attention.score, Product | Perceptron) and attention.w_c is None
            and not attention.window.learns and x.device.type == "cpu" and x.shape[1] > 1
            and len(x) == len(memory.mask) and everywhere(memory.mask[:, None]))


def compared(attention: Attention, projected: Tensor) -> tuple[type[Products] | type[Sums], list[Tensor]]:
    """What compares in place of a module's scores, and what it is given, of keys that the module has projected."""
    score = attention.score
    if isinstance(score, Perceptron):
        return Sums, [projected, narrow(score.matrix()), score.v.weight[0]]
    assert isinstance(score, Product)
    return Products, [projected if score.scale == 1 else projected * score.scale]


def loop(form: Form, hidden: Tensor, factors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
    """All steps of a decoder.

    Args:
        form: what the loop is.
        hidden: what scores gain, (B, 1 or T, S).
        factors: what dropout makes of what enters each layer, (T, B, I).
        inputs: what the scores are given; the values; for feeding, what the step before fed, and W and b of `Read`; of
            each layer said, W, U and b of `Layer`, and the parts of its state. Matrices in the type of products.

    Returns:
        of all steps, (T, B, …), what left the top layer, contexts, weights, and what was fed, or None; then the parts
        of the state of each layer after the last.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return list(_Loop.apply(form, torch.is_grad_enabled(), hidden, factors, *inputs))  # type: ignore[no-untyped-call]
