"""How a model that reads all positions at once is told their order.

B batch, T positions, S keys, D width, H heads. Attention alone does not know what stands where. Order can enter in
three places, one hook of `Positions` for each:

1. *the token vectors*, before the first layer: `embed` (Sinusoidal, Learned);
2. *queries and keys* of self-attention, which are turned by their place: `rotate` (Rotary);
3. *the scores* of self-attention, to which something is added for each distance: `bias` (Relative, Alibi).

A source has no order that a target could count along, so that attention from one to the other has none of this.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.config_model import TransformerSideConfig
from regard.errors import DataError
from regard.model.layers import INIT


class Order(NamedTuple):
    """What the self-attentions of all layers are told, made once for a stack: hooks 2 and 3 at their place."""

    rotate: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    bias: Tensor | None


class Positions(nn.Module):
    """No positions at all, and the shape that all kinds share: `start` is how many positions came before these."""

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """`embed`, for those who add token vectors and positions alone."""
        return self.embed(x, start)

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Token vectors, float (B, T, D), with what their places start, start + 1, …, start + T - 1 add."""
        return x

    def rotate(self, heads: Tensor, start: int = 0, beam: int = 1, back: bool = False) -> Tensor:
        """Queries or keys, float (B, H, T, D / H), of the same places, turned by them; or those of K outputs one after
        the other, (B, H, K T, D / H), all of these places. Turned back, the gradient of what was turned is that of what
        there was before."""
        return heads

    def bias(self, places: Tensor, start: int = 0) -> Tensor | None:
        """What the scores of T queries, for whose places a tensor (B, T) stands, against all S = start + T keys gain:
        (H, T, S), or None."""
        return None

    def order(self, places: Tensor, start: int = 0, beam: int = 1) -> Order:
        """What self-attention over T places, for which a tensor (B, T) stands, is told."""
        turn = partial(self.rotate, start=start, beam=beam)
        return Order(turn, partial(turn, back=True), self.bias(places, start))


# --- 1. in the token vectors ---------------------------------------------------------------------------------------


class Waves(Positions):
    """What sinusoidal and rotary positions share: sin and cos of p / 10000^(2i/D), side by side for each i; D is even.

    There is no longest position: the table grows.
    """

    table: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("table", self._rows(256), persistent=False)

    def waves(self, start: int, end: int, like: Tensor) -> Tensor:
        """Rows start to end - 1, (T, D), in the type of another tensor."""
        table = self.table  # another thread may put a shorter one there
        if end > len(table):
            with torch.inference_mode(False):  # a search may have come this far, and training may need it next
                self.table = table = self._rows(2 * end).to(table)
        return table[start:end].to(like.dtype)

    def _rows(self, end: int) -> Tensor:
        position = torch.arange(end, dtype=torch.float64)[:, None]
        rate = torch.exp(torch.arange(0, self.width, 2, dtype=torch.float64) * (-math.log(10000.0) / self.width))
        table = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)  # (T, D/2, 2)
        return table.flatten(1).float()


class Sinusoidal(Waves):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(the same) (Vaswani et al. 2017, section 3.5)."""

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        return x + self.waves(start, start + x.shape[1], x)


class Learned(Positions):
    """A vector of its own for each place (Gehring et al. 2017, section 3.1).

    Raises:
        DataError: from `embed`, a sequence with more places than `longest`, which is how many there are.
    """

    def __init__(self, width: int, longest: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(longest, width) * INIT)

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[1]
        if end > len(self.table):
            raise DataError(f"a sequence has {end} tokens, </s> included, and this model has learned "
                            f"max_positions = {len(self.table)} places: give it shorter sequences, or train a model "
                            f"with max_positions = {end} or more")
        return x + self.table[start:end]


# --- 2. in queries and keys ----------------------------------------------------------------------------------------


class Rotary(Waves):
    """Each pair of values (a, b) of a head is turned by an angle that grows with the place p (Su et al. 2021, eq. 15).

    (a cos pθ - b sin pθ, a sin pθ + b cos pθ), θ = 10000^(-2i/D) for pair i, D here the width of a head. A query at p
    and a key at q then meet at the angle (p - q)θ: their score knows the distance alone. Pair i is made of the values
    i and i + D/2, not 2i and 2i + 1 as in the paper: the same but for the order of the weights' rows, and faster.
    """

    def rotate(self, heads: Tensor, start: int = 0, beam: int = 1, back: bool = False) -> Tensor:
        (B, H, _, D), T = heads.shape, heads.shape[2] // beam
        each, waves = heads.view(B, H, beam, T, D), self.waves(start, start + T, heads)
        sin, cos, (a, b) = waves[:, 0::2], waves[:, 1::2], each.chunk(2, dim=-1)
        sin = -sin if back else sin
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(2, 3)


# --- 3. in the scores ----------------------------------------------------------------------------------------------


def distances(places: Tensor, start: int) -> Tensor:
    """Place of the key minus place of the query, int64 (T, S), for places (B, T) after `start` others."""
    numbers = torch.arange(start + places.shape[1], device=places.device)
    return numbers - numbers[start:, None]


class Relative(Positions):
    """A learned number for each head and each bucket of distances, added to the scores (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each; the others widen by a constant factor up to the greatest distance,
    and the last holds all beyond. Where a query looks at keys on both sides, as in an encoder, each side has half of
    the buckets. One table serves all layers of a stack. Unlike T5, the rest of the score stays divided by √D.
    """

    def __init__(self, heads: int, both_sides: bool, buckets: int = 32, greatest: int = 128):
        super().__init__()
        self.table = nn.Parameter(torch.randn(buckets, heads) * INIT)
        self.both_sides, self.greatest = both_sides, greatest

    def bucket(self, distance: Tensor) -> Tensor:
        """Which row of the table a distance (key minus query) has, int64, of any shape."""
        buckets = len(self.table) // 2 if self.both_sides else len(self.table)
        side = buckets * (distance > 0) if self.both_sides else 0
        away, exact = distance.abs() if self.both_sides else (-distance).clamp(min=0), buckets // 2
        # log2 is exact where a power of two is a bucket's first distance; log is not
        share = torch.log2(away.clamp(min=1) / exact) / math.log2(self.greatest / exact)
        far = (exact + share * (buckets - exact)).long().clamp(max=buckets - 1)
        return side + torch.where(away < exact, away, far)

    def bias(self, places: Tensor, start: int = 0) -> Tensor:
        rows = self.bucket(distances(places, start))
        return nn.functional.embedding(rows, self.table).permute(2, 0, 1)


class Alibi(Positions):
    """Scores fall with the distance, in each head at its own slope: -slope |p - q| (Press et al. 2022, section 3).

    In an encoder both sides fall alike.
    """

    slopes: Tensor

    def __init__(self, heads: int):
        super().__init__()
        self.register_buffer("slopes", torch.tensor(slopes(heads)), persistent=False)

    def bias(self, places: Tensor, start: int = 0) -> Tensor:
        return -self.slopes[:, None, None] * distances(places, start).abs()


def slopes(heads: int) -> list[float]:
    """2^(-8h/H), h = 1 … H. Where H is no power of two: all of the power below, then every other of the power above."""
    power = 1 << (heads.bit_length() - 1)
    if power == heads:
        return [2 ** (-8 * head / heads) for head in range(1, heads + 1)]
    return slopes(power) + slopes(2 * power)[::2][: heads - power]


POSITIONS: dict[str, Callable[[TransformerSideConfig, bool], Positions]] = {
    "none": lambda config, decoder: Positions(),
    "sinusoidal": lambda config, decoder: Sinusoidal(config.width),
    "learned": lambda config, decoder: Learned(config.width, config.max_positions),
    "relative": lambda config, decoder: Relative(config.heads, both_sides=not decoder),
    "rotary": lambda config, decoder: Rotary(config.width // config.heads),
    "alibi": lambda config, decoder: Alibi(config.heads),
}
"""The kinds by name; each is told the settings of its side, and whether that is the decoder."""
