"""Recurrent cells, written out with their gradients: Elman's, the GRU and the LSTM.

torch's own LSTM goes through oneDNN, which keeps an object for each new length and size of a batch: amid what training
frees they grew its memory to twice what it needs (docs/log.md, 2026-11-30).

B batch, T length, D width of a state, G width of a cell's gates (1, 3 or 4 D). Products are made in the type of their
factors; what is done to each number by itself, and an LSTM's cell, in float32 or wider.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regard.model.layers import narrow
from regard.model.rows import few, room, step

Tensors = tuple[Tensor, ...]
sigmoid_back, tanh_back = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward

MANY = 1 << 13
"""Numbers from which on it pays to make tanh x of 2 σ(2x) - 1: σ takes a processor a third of the time, a call 3 us."""


def tanh(x: Tensor) -> Tensor:
    """tanh x."""
    return torch.tanh(x) if x.numel() < MANY else torch.sigmoid_(2 * x).mul_(2).sub_(1)


class Kind(NamedTuple):
    """A kind of cell.

    Attributes:
        module: torch's module, which holds the weights; on a GPU it runs too.
        parts: names of what is carried from step to step, the hidden state first; each (B, D).
        apart: whether a gate treats U h + b and what the input says of it, x, unlike; else they are summed first.
        step: (x, asked, *state) -> the state after the step, and what `back` has to know. asked, (B, G), is U h + b,
            and x what the input says; where not apart, asked is x + U h + b, and x is not read. It may write to asked.
        back: (known, *gradients of the state after) -> gradients of x and of asked, and of each part of the state
            before, as far as they do not come through asked; None: nothing does.
    """

    module: type[nn.RNN | nn.GRU | nn.LSTM]
    parts: tuple[str, ...]
    apart: bool
    step: Callable[..., tuple[Tensors, Tensors]]
    back: Callable[..., tuple[Tensor, Tensor, tuple[Tensor | None, *Tensors]]]


def elman(x: Tensor, asked: Tensor, hidden: Tensor) -> tuple[Tensors, Tensors]:
    """h' = tanh(x + U h + b) (Elman 1990)."""
    after = tanh(asked)
    return (after,), (after,)


def elman_back(known: Tensors, after: Tensor) -> tuple[Tensor, Tensor, tuple[None]]:
    """The gradients of `elman`, as `Kind.back` says."""
    asked = tanh_back(after, known[0])
    return asked, asked, (None,)


def gru(x: Tensor, asked: Tensor, hidden: Tensor) -> tuple[Tensors, Tensors]:
    """r, z = σ(x + U h + b); n = tanh(x + r ⊙ (U h + b)); h' = (1 - z) ⊙ n + z ⊙ h (Cho et al. 2014)."""
    two = 2 * hidden.shape[1]
    gates, last = torch.sigmoid_(asked[:, :two].add_(x[:, :two])), asked[:, two:]
    r, z = gates.chunk(2, dim=1)
    new = tanh(torch.addcmul(x[:, two:], r, last))
    return (torch.lerp(new, hidden, z),), (gates, new, last, hidden)


def gru_back(known: Tensors, after: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor]]:
    """The gradients of `gru`, as `Kind.back` says."""
    gates, new, last, hidden = known
    r, z = gates.chunk(2, dim=1)
    kept = after * z
    to_new = tanh_back(after - kept, new)
    to_gates = sigmoid_back(torch.cat([to_new * last, after * (hidden - new)], dim=1), gates)
    return torch.cat([to_gates, to_new], dim=1), torch.cat([to_gates, to_new * r], dim=1), (kept,)


def lstm(x: Tensor, asked: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensors, Tensors]:
    """i, f, o = σ(x + U h + b); g = tanh(x + U h + b); c' = f ⊙ c + i ⊙ g; h' = o ⊙ tanh(c') (Gers et al. 2000)."""
    third = asked.chunk(4, dim=1)[2].mul_(2)
    i, f, _, o = torch.sigmoid_(asked).chunk(4, dim=1)
    g = (2 * third).sub_(1)  # tanh x = 2 σ(2x) - 1
    after = torch.addcmul(i * g, f, cell)
    bent = tanh(after)
    return (o * bent, after), (asked, g, cell, bent)


def lstm_back(known: Tensors, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, tuple[None, Tensor]]:
    """The gradients of `lstm`, as `Kind.back` says."""
    gates, g, cell_before, bent = known
    i, f, _, o = gates.chunk(4, dim=1)
    cell = cell + tanh_back(hidden * o, bent)
    asked = torch.empty_like(gates)
    pairs = (cell, g), (cell, cell_before), (4 * cell, i), (hidden, bent)
    for part, (left, right) in zip(asked.chunk(4, dim=1), pairs, strict=True):
        torch.mul(left, right, out=part)
    sigmoid_back.grad_input(asked, gates, grad_input=asked)
    return asked, asked, (None, cell * f)


KINDS = {
    "elman": Kind(nn.RNN, ("hidden",), False, elman, elman_back),
    "gru": Kind(nn.GRU, ("hidden",), True, gru, gru_back),
    "lstm": Kind(nn.LSTM, ("hidden", "cell"), False, lstm, lstm_back),
}


class Cell(nn.Module):
    """One layer of a recurrent network.

    Args:
        kind: "elman", "gru" or "lstm".
        inputs: size of an input.
        width: D, size of a state.
    """

    def __init__(self, kind: str, inputs: int, width: int):
        super().__init__()
        self.kind = KINDS[kind]
        self.rnn = self.kind.module(inputs, width, batch_first=True)

    def forward(self, x: Tensor, start: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run over x, float (B, T, inputs), from the given state (zeros if None).

        Returns:
            the hidden state after each input, (B, T, D), and the last state by name ("hidden", "cell"), each (B, D).
        """
        if start is None:
            start = dict.fromkeys(self.kind.parts, x.new_zeros(len(x), self.rnn.hidden_size))
        if x.is_cuda:
            return self.fused(x, start)
        if x.shape[1] == 1:  # as in a step of search
            after = self.steps()(self.gates(x[:, 0]), start)
            return after["hidden"].unsqueeze(1), after
        gates = self.gates(few(x.transpose(0, 1).flatten(0, 1)))
        states, *last = _Run.apply(  # type: ignore[no-untyped-call]
            self.kind, torch.is_grad_enabled(), x.shape[1], narrow(self.part("weight_hh")), self.part("bias_hh"), gates,
            *(start[name] for name in self.kind.parts))
        return states.transpose(0, 1), dict(zip(self.kind.parts, last, strict=True))

    def fused(self, x: Tensor, start: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same by torch's kernel for the device."""
        first = tuple(start[name].unsqueeze(0).contiguous() for name in self.kind.parts)
        states, last = self.rnn(x, first if len(first) > 1 else first[0])
        ends = last if isinstance(last, tuple) else (last,)
        return states, {name: end.squeeze(0) for name, end in zip(self.kind.parts, ends, strict=True)}

    def gates(self, x: Tensor) -> Tensor:
        """What x, float (…, inputs) or the first values of it, says of the gates, float (…, G), with all biases but
        those that the gates of a GRU have apart."""
        W, width = self.part("weight_ih"), x.shape[-1]
        return nn.functional.linear(x, W if width == W.shape[1] else W[:, :width], self.bias())

    def bias(self) -> Tensor:
        """(G,), all biases but those that the gates of a GRU have apart."""
        b = self.part("bias_ih")
        return b if self.kind.apart else b + self.part("bias_hh")

    def for_loop(self, said: Tensor, width: int = 0) -> tuple[Tensor, ...]:
        """What `regard.model.stepwise` runs, said, W, U and b of its `Layer`: what is known of the gates before, of so
        many values of the input, and what meets the others."""
        return (narrow(said), narrow(self.part("weight_ih")[:, width:]), narrow(self.part("weight_hh")),
                narrow(self.part("bias_hh")))

    def steps(self) -> Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]]:
        """What makes one step after another: (what its input says of the gates, (B, G), and the state before it) -> the
        state after it."""
        W, b = self.part("weight_hh"), self.part("bias_hh")
        U = narrow(W).detach()

        def step(gates: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
            parts = [state[name] for name in self.kind.parts]
            if torch.is_grad_enabled():
                after = _Step.apply(self.kind, W, U, b, gates, *parts)  # type: ignore[no-untyped-call]
            else:
                after = told(U, *one_step(self.kind, U, b, gates, parts[0].to(U.dtype), *widened(*parts))[0])
            return dict(zip(self.kind.parts, after, strict=True))

        return step

    def part(self, name: str) -> Tensor:
        """A matrix or bias of torch's module: "ih" meets the input, "hh" the last state; (G, …)."""
        weights: Tensor = getattr(self.rnn, f"{name}_l0")
        return weights


def one_step(kind: Kind, U: Tensor, b: Tensor, x: Tensor, hidden: Tensor, *state: Tensor) -> tuple[Tensors, Tensors]:
    """A step of a cell: U, (G, D), b, (G,), x, (B, G), what the input says of the gates; the hidden state in the type
    of U; and all parts of the state in float32 or wider."""
    asked = torch.addmm((b if kind.apart else x).to(U.dtype), hidden, U.t()).to(state[0].dtype)
    return kind.step(x.to(asked.dtype) if kind.apart else x, asked, *state)


def widened(*state: Tensor) -> Tensors:
    """A state in float32 or wider."""
    return tuple(part.to(torch.float64 if part.dtype == torch.float64 else torch.float32) for part in state)


def told(U: Tensor, hidden: Tensor, *others: Tensor) -> Tensors:
    """A state as it is handed on: the hidden part, which products meet, in the type of U."""
    return hidden.to(U.dtype), *others


class _Step(torch.autograd.Function):
    """One step of a cell: its matrix W, the same in the type of products, U, both (G, D), b, (G,), what the input says
    of the gates, (B, G), and the state. The gradients of W in a loop are summed in its own type."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, W: Tensor, U: Tensor, b: Tensor, x: Tensor, *state: Tensor) -> Tensors:
        hidden = state[0].to(U.dtype)
        after, known = one_step(kind, U, b, x, hidden, *widened(*state))
        ctx.save_for_backward(U, hidden, *known)
        ctx.kind, ctx.types = kind, [part.dtype for part in (W, b, x, *state)]
        return told(U, *after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        U, hidden, *known = ctx.saved_tensors
        x, asked, direct = ctx.kind.back(tuple(known), *widened(*grads))
        asked = asked.to(U.dtype)
        b, x = (asked.sum(0), x) if ctx.kind.apart else (None, asked)
        W, *others = in_types(ctx.types, asked.t() @ hidden, b, x, *before(asked @ U, *direct))
        return None, W, None, *others


class _Run(torch.autograd.Function):
    """A cell over T steps: U, (G, D), b, (G,), and what each input says of the gates, in rows, (T x B or more, G)."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, learns: bool, T: int, U: Tensor, b: Tensor, x: Tensor,
                *first: Tensor) -> Tensors:
        B, D = first[0].shape
        hidden, state = room(U, (T + 1) * B, D), widened(*first)
        known: list[Tensor] = []
        hidden[:B] = state[0]
        for t in range(T):
            state, each = one_step(kind, U, b, x[step(t, B)], hidden[step(t, B)], *state)
            hidden[step(t + 1, B)] = state[0]
            known += each if learns else ()
        ctx.save_for_backward(U, hidden, *known)
        ctx.kind, ctx.types, ctx.rows = kind, [part.dtype for part in (b, x, *first)], len(x)
        return hidden[B : (T + 1) * B].view(T, B, D), *told(U, *state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        U, hidden, *known = ctx.saved_tensors
        kind, state, (T, B, _) = ctx.kind, widened(*grads[1:]), grads[0].shape
        count = len(known) // T
        asked = room(U, T * B, len(U))
        x = room(U, T * B, len(U)) if kind.apart else asked
        for t in reversed(range(T)):
            of_step = tuple(known[t * count : (t + 1) * count])
            to_x, asked[step(t, B)], direct = kind.back(of_step, state[0] + grads[0][t], *state[1:])
            if kind.apart:
                x[step(t, B)] = to_x
            state = before(asked[step(t, B)] @ U, *direct)
        b, of_U = asked.sum(0) if kind.apart else None, asked.t() @ hidden[: len(asked)]
        return None, None, None, of_U, *in_types(ctx.types, b, x[: ctx.rows], *state)


def before(through: Tensor, direct: Tensor | None, *others: Tensor) -> Tensors:
    """Gradients of the state before a step: that of its hidden part comes through asked, and maybe directly too."""
    through = widened(through)[0]
    return (through if direct is None else direct + through, *others)


def in_types(types: Sequence[torch.dtype], *grads: Tensor | None) -> Iterator[Tensor | None]:
    """Gradients in the types of what they belong to."""
    return (each if each is None else each.to(type_) for each, type_ in zip(grads, types, strict=True))
