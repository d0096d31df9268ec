"""The tokens of a batch while a Transformer trains on a processor: real ones alone, one after the other.

What is done at each position by itself then costs nothing for padding. Attention needs each sequence apart: `lay` lays
rows out for it, `take` takes them up again. Everywhere else, in search, in evaluation, on GPUs, tokens are held as they
come, (B, T, D).

B batch, T positions, D width, H heads, R rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

ROWS, POSITIONS = 256, 16
"""Of what rows come in multiples in bfloat16, for which oneDNN writes a program for each shape of a product that it
meets, 2 ms each (docs/log.md, 2026-11-29); and of what positions do in attention, and rows in float32: the numbers in
the longest vector of a processor. Softmax over rows of 16 takes a tenth of the time of rows of 14."""


class Packed:
    """Real tokens alone, (1, R, D), then at least one empty row. What stands in empty rows is not read by anybody, so
    their gradient is 0.

    Args:
        mask: bool (B, T), True where there is a real token.

    Attributes:
        mask: the same with more padding, T a multiple of `POSITIONS`: the positions of attention.
    """

    def __init__(self, mask: Tensor):
        self.size, self.mask = mask.shape, nn.functional.pad(mask, (0, -mask.shape[1] % POSITIONS))
        self.sequence, self.position = mask.nonzero().unbind(1)  # of each real token
        step = ROWS if torch.is_autocast_enabled(mask.device.type) else POSITIONS
        self.rows = (len(self.position) // step + 1) * step
        self.known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (1, R, D)."""
        return _collect(x.flatten(0, 1), *self.places(1, self.size[1]), self.rows)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, R, D) -> (B, T, D)."""
        return _spread(x[0], *self.places(1, self.size[1])).view(*self.size, -1)

    def real(self, x: Tensor) -> Tensor:
        """(1, R, D) -> (N, D), the real tokens alone, sentence after sentence."""
        return x[0, : len(self.position)]

    def heads(self, x: Tensor, heads: int, parts: int = 1) -> tuple[Tensor, ...]:
        """(1, R, parts x D) -> (B, H, T, D / H) of each part, T with more padding."""
        B, T = self.mask.shape
        found = _spread(x.view(self.rows * parts * heads, -1), *self.places(heads, T, parts))
        return found.view(parts, B, heads, T, -1).unbind()

    def lay(self, rows: Tensor, heads: int, parts: int = 1) -> Tensor:
        """(R, parts x D) -> (parts, B x H, T, D / H), as `heads` does, of which autograd is told nothing."""
        B, T = self.mask.shape
        pieces = self.places(heads, T, parts)[1]
        return rows.reshape(self.rows * parts * heads, -1).index_select(0, pieces).view(parts, B * heads, T, -1)

    def take(self, laid: Tensor, heads: int, parts: int = 1) -> Tensor:
        """(parts, B x H, T, D / H) -> (R, parts x D), zeros in empty rows: the gradient of `lay`, and it of this."""
        places = self.places(heads, self.mask.shape[1], parts)[0]
        return collected(laid.view(-1, laid.shape[-1]), places, self.rows * parts * heads).view(self.rows, -1)

    def each(self, numbers: Tensor) -> Tensor:
        """A number for each sequence, (B,), at all of its tokens: (R, 1)."""
        return nn.functional.pad(numbers[self.sequence], (0, self.rows - len(self.sequence)))[:, None]

    def places(self, heads: int, length: int, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Where in (parts, B, H, T) each piece of D / H numbers of a real token's row stands, int64 (real tokens x
        parts x H,); and which piece stands at each place, the first empty row's where there is no token."""
        if (heads, length, parts) not in self.known:
            part, head = (torch.arange(count, device=self.mask.device) for count in (parts, heads))
            sequence = part[:, None] * self.size[0] + self.sequence[:, None, None]  # (real tokens, parts, 1)
            places = ((sequence * heads + head) * length + self.position[:, None, None]).flatten()
            pieces = places.new_full((parts * self.size[0] * heads * length,), len(places))
            pieces[places] = torch.arange(len(places), device=places.device)
            self.known[heads, length, parts] = places, pieces
        return self.known[heads, length, parts]


def collected(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """The rows of x at some places, then zeros up to so many rows."""
    taken = x.new_empty(rows, x.shape[1])
    torch.index_select(x, 0, places, out=taken[: len(places)])
    taken[len(places) :] = 0
    return taken


class _Collect(torch.autograd.Function):
    """Takes rows from places and fills up with zeros; backward, gives each place what its row got."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, pieces: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places, pieces)
        return collected(x, places, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grads[0].contiguous(), *ctx.saved_tensors), None, None, None


class _Spread(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, pieces: Tensor) -> Tensor:
        ctx.save_for_backward(places, pieces)
        ctx.rows = len(x)
        return x.index_select(0, pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, pieces = ctx.saved_tensors
        return _collect(grads[0].contiguous(), places, pieces, ctx.rows), None, None


def _collect(x: Tensor, places: Tensor, pieces: Tensor, rows: int) -> Tensor:
    collected: Tensor = _Collect.apply(x, places, pieces, rows)  # type: ignore[no-untyped-call]
    return collected


def _spread(x: Tensor, places: Tensor, pieces: Tensor) -> Tensor:
    spread: Tensor = _Spread.apply(x, places, pieces)  # type: ignore[no-untyped-call]
    return spread


def whole(rows: Tensor) -> Tensor:
    """(N, …) with rows of zeros up to a multiple of `ROWS`, so that products have few shapes; they add nothing to sums
    of outer products with them."""
    return nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))


def few(rows: Tensor) -> Tensor:
    """(N, …), `whole` where products are made in bfloat16."""
    return whole(rows) if torch.is_autocast_enabled(rows.device.type) else rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of (…, T, D), on a processor by products of few shapes."""
    if x.device.type != "cpu" or x.shape[-2] == 1:
        return nn.functional.linear(x, weight, bias)
    made = nn.functional.linear(few(x.flatten(0, -2)), weight, bias)
    return made[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)


def room(like: Tensor, count: int, width: int) -> Tensor:
    """Room for so many rows, and zeros up to a multiple of `ROWS`: what `whole` gives, without a copy."""
    made = like.new_empty(-(-count // ROWS) * ROWS, width)
    made[count:] = 0
    return made


def step(t: int, B: int) -> slice:
    """Which of the rows (T x B, …) of all steps are those of step t."""
    return slice(t * B, (t + 1) * B)


def sentences(count: int) -> int:
    """So many sentences or up to an eighth more, of which there are few numbers: what a recurrent network multiplies in
    each step has a row for each."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def packs(mask: Tensor, training: bool) -> bool:
    """Whether the real tokens of a batch, bool (B, T), are packed: in training on a processor, where each sequence has
    one. A GPU would have to wait to know which rows are real."""
    return training and torch.is_grad_enabled() and mask.device.type == "cpu" and bool(mask.any(1).all())
