"""Attention, from the fixed vector to every position at once. Read downwards, this file is its history.

A decoder asks (query), the encoder's states answer (keys are compared, values are given). Letters in shapes:
B batch, T queries (target positions), S keys (source positions), D width, H heads. A mask is True where a key may be
looked at.

1. The context is *fixed*: `fixed` (Sutskever et al. 2014, Cho et al. 2014).
2. It is *recomputed at each step*: the scores, `attend` and `Attention` (Bahdanau et al. 2015, Luong et al. 2015).
3. *Every position asks at once*: `MultiHeadAttention` (Vaswani et al. 2017).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.errors import ConfigError
from regard.model import rows
from regard.model.layers import INIT, Dropout, linear
from regard.model.pairs import along
from regard.model.state import Memory
from regard.shapes import fit

# --- 1. fixed: one vector answers every question -------------------------------------------------------------------


def fixed(query: Tensor, memory: Memory) -> Tensor:
    """The same context for each query, (B, T, D): the source's summary, whatever is asked (Cho et al. 2014)."""
    outputs = len(query) // len(memory.summary)  # of each source: one in training, the beam's in search
    return memory.summary.repeat_interleave(outputs, 0)[:, None, :].expand(-1, query.shape[1], -1)


# --- 2. recomputed: each step asks anew ----------------------------------------------------------------------------


class Score(nn.Module):
    """How a query is compared with a key. All scores share this shape: score(query, keys) -> (…, T, S), unnormalised.

    What depends on the keys alone is in `project`, so that a decoder computes it once for each source.

    Args:
        query_width: size of a query; None: any.
        key_width: size of a key; None: any.
    """

    def __init__(self, query_width: int | None = None, key_width: int | None = None):
        super().__init__()
        self.query_width, self.key_width = query_width, key_width

    def project(self, keys: Tensor) -> Tensor:
        """The part that depends on keys, (…, S, D), alone."""
        return keys

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        """Scores, (…, T, S), of query, (…, T, D), against projected keys."""
        raise NotImplementedError

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Scores, (…, T, S), of query, (…, T, D), against keys, (…, S, D)."""
        for name, x, width in (("query", query, self.query_width), ("keys", keys, self.key_width)):
            if width not in (None, x.shape[-1]):
                raise ConfigError(f"this {type(self).__name__} score was made for {name} of width {width}, and {name} "
                                  f"has shape {tuple(x.shape)}: make the score for width {x.shape[-1]}")
        return self.compare(query, self.project(keys))


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, of the few queries of a sentence. A processor that multiplies matrices in bfloat16 makes these in float32
    or wider: of single queries that takes half of the time, and no program for each number of queries and keys."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return x @ y
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast("cpu", enabled=False):
        return x.to(wide) @ y.to(wide)


class Product(Score):
    """Any score that is a product: scale · query · projected key."""

    scale = 1.0

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        return product(query if self.scale == 1 else query * self.scale, projected.transpose(-2, -1))


class Dot(Product):
    """query · key (Luong et al. 2015, eq. 8, "dot")."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        if query_width != key_width:
            raise ConfigError(f'a dot score needs query and key of one width, and they are {query_width} and '
                              f'{key_width}: use score = "general" or "additive", or equal widths')


class ScaledDot(Dot):
    """query · key / √D (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.scale = 1 / math.sqrt(query_width)


class General(Product):
    """query · W key (Luong et al. 2015, eq. 8, "general")."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.weight = nn.Linear(key_width, query_width, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        return rows.linear(keys, self.weight.weight)


class Perceptron(Score):
    """Any score that a layer of tanh makes: v · tanh(P query + projected key)."""

    v: nn.Linear

    def matrix(self) -> Tensor:
        """P."""
        raise NotImplementedError

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        return along(self.v.weight[0], rows.linear(query, self.matrix()), projected)


class Additive(Perceptron):
    """v · tanh(W query + U key) (Bahdanau et al. 2015, appendix A.1.2)."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.query = nn.Linear(query_width, query_width, bias=False)
        self.key = nn.Linear(key_width, query_width, bias=False)
        self.v = nn.Linear(query_width, 1, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        return rows.linear(keys, self.key.weight)

    def matrix(self) -> Tensor:
        weight: Tensor = self.query.weight
        return weight


class Concat(Perceptron):
    """v · tanh(W [query; key]) (Luong et al. 2015, eq. 8, "concat"): one matrix over both, with its bias."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.weight = nn.Linear(query_width + key_width, query_width)
        self.v = nn.Linear(query_width, 1, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        return rows.linear(keys, self.weight.weight[:, self.query_width :], self.weight.bias)

    def matrix(self) -> Tensor:
        return self.weight.weight[:, : self.query_width]


class Gaussian(Score):
    """-‖query - key‖² / 2h², h the bandwidth. Its softmax is the estimator of Nadaraya (1964) and Watson (1964).

    Not in SCORES: models choose there among scores made from two widths, and this one is made from a bandwidth.

    Args:
        bandwidth: h, above 0, in the unit of the keys.
        learn: whether h is a parameter. What is learned is log h, so that h stays above 0.
    """

    def __init__(self, bandwidth: float, learn: bool = False):
        super().__init__()
        if not 0 < bandwidth < math.inf:
            raise ConfigError(f"Gaussian(bandwidth={bandwidth}): a finite number above 0 was expected")
        self.given = bandwidth
        self.log_bandwidth = nn.Parameter(torch.tensor(math.log(bandwidth))) if learn else None

    @property
    def bandwidth(self) -> Tensor | float:
        """h, as it is now."""
        return self.given if self.log_bandwidth is None else self.log_bandwidth.exp()

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        if query.shape[-1] != projected.shape[-1]:
            raise ConfigError(f"a Gaussian score needs query and keys of one width, and they are {query.shape[-1]} and "
                              f"{projected.shape[-1]}")
        apart = (query.unsqueeze(-2) - projected.unsqueeze(-3)) / self.bandwidth  # (…, T, S, D)
        return apart.square().sum(-1) / -2


SCORES: dict[str, type[Score]] = {
    "dot": Dot,
    "scaled_dot": ScaledDot,
    "general": General,
    "concat": Concat,
    "additive": Additive,
}


def weigh(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys that the mask allows; a query that may look at nothing gets zeros, not NaN.

    Args:
        scores: float (…, T, S).
        mask: bool, broadcastable to it, True where a key may be looked at; None: everywhere.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if mask is None:
        return torch.softmax(scores, dim=-1, dtype=dtype).to(scores.dtype)
    weights = torch.softmax(scores + hiding(mask, dtype), dim=-1).to(scores.dtype)
    return weights if everywhere(mask) else weights * mask.any(-1, keepdim=True)


def hiding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: 0 where it is True, else the least number there is."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def everywhere(mask: Tensor | None) -> bool:
    """Whether each query is known to have a key that it may look at; a GPU is not asked, which would take time."""
    return mask is None or (not mask.is_cuda and bool(mask.any(-1).all()))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    score: str | Callable[[Tensor, Tensor], Tensor] = "scaled_dot",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention alone, on any tensors: compare, normalise, take the weighted sum.

    Args:
        query: float (…, T, D).
        keys: float (…, S, D).
        values: float (…, S, E).
        score: "dot" or "scaled_dot", or any callable (query, keys) -> (…, T, S), such as `Additive(D, D)`.
        mask: bool, broadcastable to (…, T, S); True where a key may be looked at. With scores (B, T, S) a mask of two
            dimensions is (B, S), the keys that are there; one of (T, S) is written mask[None].

    Returns:
        context, float (…, T, E), and weights, float (…, T, S). A row of weights sums to 1, or is 0 where the mask
        allows nothing.

    Raises:
        ConfigError: shapes that do not fit, a mask that is not bool, a name of a score with parameters.
    """
    mask = fit(query, keys, values, mask)
    if isinstance(score, str):
        if score not in ("dot", "scaled_dot"):
            raise ConfigError(f'attend(score="{score}"): by name there are "dot" and "scaled_dot"; a score with '
                              "parameters is given as a module, such as regard.model.attention.Additive(64, 64)")
        score = SCORES[score](query.shape[-1], keys.shape[-1])
    scores = score(query, keys)
    weights = weigh(scores, mask)
    context = weights @ values
    if scores.shape[-2:] != (query.shape[-2], keys.shape[-2]):
        raise ConfigError(f"attend: the score gave {tuple(scores.shape)}, and (…, T, S) = (…, {query.shape[-2]}, "
                          f"{keys.shape[-2]}) was expected")
    return context, weights


class Window(nn.Module):
    """Which part of the source is looked at: here all of it (global). The local windows of Luong et al. (2015), section
    3.2, are the places s within D of a centre p_t.

    Args:
        width: size of a query.
        radius: D, in source tokens.
    """

    learns = False
    """Whether where to look depends on the query, by weights of its own."""

    def __init__(self, width: int, radius: int):
        super().__init__()
        self.radius = radius

    def forward(self, query: Tensor, mask: Tensor, position: int, beam: int = 1) -> tuple[Tensor, Tensor | float]:
        """Where to look, bool (B, T, S) or (B, 1, S), and a factor of each weight, float of the same shape or a number.

        Args:
            query: float (B, T, width).
            mask: bool (B, S), True where there is a real token.
            position: t of the first query.
            beam: how many outputs the queries belong to, one after the other, all from the same position on.
        """
        return mask[:, None, :], 1.0


class Monotonic(Window):
    """local-m: p_t = t; past the source's end, its last token."""

    def forward(self, query: Tensor, mask: Tensor, position: int, beam: int = 1) -> tuple[Tensor, Tensor | float]:
        steps = torch.arange(position, position + query.shape[1] // beam, device=mask.device).repeat(beam)
        centre = torch.minimum(steps, mask.sum(1, keepdim=True) - 1)  # (B, T)
        distance = torch.arange(mask.shape[1], device=mask.device) - centre[:, :, None]
        return mask[:, None, :] & (distance.abs() <= self.radius), 1.0


class Predictive(Window):
    """local-p: p_t = S σ(v · tanh(W query)) (eq. 9), each weight times exp(-(s - p_t)² / 2σ²), σ = D / 2 (eq. 10).

    S is each row's own length. The softmax is taken before that factor, so that a row of weights sums to less than 1.
    """

    learns = True

    def __init__(self, width: int, radius: int):
        super().__init__(width, radius)
        self.inner = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, 1, bias=False)

    def forward(self, query: Tensor, mask: Tensor, position: int, beam: int = 1) -> tuple[Tensor, Tensor | float]:
        centre = mask.sum(1)[:, None, None] * torch.sigmoid(self.v(torch.tanh(self.inner(query))))  # (B, T, 1)
        distance = torch.arange(mask.shape[1], device=mask.device) - centre
        near = mask[:, None, :] & (distance.abs() <= self.radius)
        return near, torch.exp(distance.square() / (-2 * (self.radius / 2) ** 2))


WINDOWS: dict[str, type[Window]] = {"global": Window, "local_m": Monotonic, "local_p": Predictive}


class Attention(nn.Module):
    """Attention of one head between a decoder and a `Memory`: any score, through any window, with or without coverage.

    With coverage (Tu et al. 2016, See et al. 2017) a query is told how much each place has been looked at before. For
    every score alike, w_c c_i is added to the projected key of place i; in "additive" and "concat" that is eq. 11 of
    See et al., v · tanh(W_h h_i + W_s s_t + w_c c_i) ("concat" with its b).

    Args:
        score: a name in `SCORES`.
        query_width: size of the decoder's states.
        key_width: size of the memory's states.
        window: a name in `WINDOWS`.
        radius: source tokens on each side of a local window's centre.
        coverage: whether there is w_c.
    """

    def __init__(self, score: str, query_width: int, key_width: int, window: str = "global", radius: int = 10,
                 coverage: bool = False):
        super().__init__()
        self.score = SCORES[score](query_width, key_width)
        self.window = WINDOWS[window](query_width, radius)
        self.w_c = nn.Parameter(torch.randn(query_width) * INIT) if coverage else None

    def forward(
        self, query: Tensor, memory: Memory, projected: Tensor | None = None, position: int = 0,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context, (R, T, D), and weights, (R, T, S).

        Args:
            query: float (R, T, D); R = B, or K outputs of each source, R = B × K.
            memory: what is looked at.
            projected: `score.project(memory.states)`, where the caller has it already.
            position: t of the first query.
            coverage: c, float (R, S), the sum of all earlier weights; None: zeros, before the first target token.
        """
        keys = self.score.project(memory.states) if projected is None else projected
        (B, S), (R, T, _) = memory.mask.shape, query.shape
        K = R // B
        if self.w_c is None:
            context, weights = self.look(query.reshape(B, K * T, -1), keys, memory, position, K)
            return context.view(R, T, -1), weights.view(R, T, S)
        c, found = query.new_zeros(R, S) if coverage is None else coverage, []
        for t, asked in enumerate(query.unbind(1), start=position):
            told = keys[:, None] + (c[:, :, None] * self.w_c).view(B, K, S, -1)
            found.append(self.look(asked.view(B, K, -1), told, memory, t, K))
            c = c + found[-1][1].view(R, S)
        context, weights = (torch.stack(each, dim=2).view(R, T, -1) for each in zip(*found, strict=True))
        return context, weights

    def look(self, query: Tensor, keys: Tensor, memory: Memory, position: int, beam: int) -> tuple[Tensor, Tensor]:
        """The three stages: score, softmax, weighted sum. Keys are (B, S, D), or those of each query, (B, T, S, D)."""
        near, factor = self.window(query, memory.mask, position, beam)
        compare = self.score.compare
        scores = compare(query, keys) if keys.dim() == 3 else compare(query[:, :, None], keys).squeeze(2)
        weights = weigh(scores, near) * factor
        return product(weights, memory.values), weights


# --- 3. every position asks at once --------------------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in H subspaces at once, Vaswani et al. (2017), section 3.2.2.

    Args:
        width: D.
        heads: H; each head has D / H of the width.
        dropout: share of the weights dropped in training.
        memory_width: size of the states that keys and values are made of; None: D.
        kv_heads: K, how many heads keys and values have; each serves H / K queries (Ainslie et al. 2023). None: H.
    """

    def __init__(self, width: int, heads: int, dropout: float, memory_width: int | None = None,
                 kv_heads: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.query = linear(width, width)
        self.key_value = linear(memory_width or width, 2 * width // heads * self.kv_heads)
        self.output = linear(width, width)
        self.dropout = Dropout(dropout)

    def ask(self, x: Tensor) -> Tensor:
        """Queries, (B, H, T, D / H), of x, (B, T, D)."""
        query: Tensor = self.query(x)
        return query.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, K, S, D / H), of states, (B, S, D)."""
        both = self.key_value(states).view(*states.shape[:2], 2 * self.kv_heads, -1)
        keys, values = both.transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None = None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Context, (B, T, D), and on request the weights, (B, H, T, S), without dropout.

        Args:
            query: float (B, H, T, D / H), from `ask`.
            keys: float (B, K, S, D / H), from `project`.
            values: the same.
            mask: bool, broadcastable to (B, H, T, S); None: everything may be looked at.
            bias: float (H, T, S) or (B, H, T, S), added to the scores; None: nothing is.
            want_weights: whether to return the weights.
        """
        if (query.is_cuda or not torch.is_grad_enabled()) and not want_weights:
            context, weights = self.fused(query, keys, values, mask, bias), None
        else:  # on a CPU the fused kernel's backward takes ten times the time of these products
            held = whole_rows(keys, values, mask, bias) if query.shape[2] > 1 else (keys, values, mask, bias)
            context, found = self.plain(query, *held)
            weights = found[..., : keys.shape[2]] if want_weights else None
        return self.output(context.transpose(1, 2).flatten(2)), weights

    def plain(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Contexts of the heads, (B, H, T, D / H), and weights, step by step: scores, softmax, weighted sum."""
        B, H, T, _ = query.shape
        shared = (B, self.kv_heads, H // self.kv_heads * T, -1)  # the queries of all heads that share a key, in a row
        scores = ((query / math.sqrt(query.shape[-1])).reshape(shared) @ keys.transpose(-2, -1)).view(B, H, T, -1)
        weights = weigh(scores if bias is None else scores + bias, mask)
        context = self.dropout(weights).view(shared) @ values
        return context.view(query.shape), weights

    def fused(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The same contexts in one kernel, which never holds the weights."""
        dropout = self.dropout.threshold / 256 if self.training else 0.0
        if bias is not None:
            bias = bias.expand(len(query), -1, -1, -1)  # a kernel for CPUs asks for all four dimensions
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, mask, dropout, enable_gqa=self.kv_heads != self.heads)


def whole_rows(
    keys: Tensor, values: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same with so many keys that the scores' rows are whole vectors; the mask hides those that are added."""
    added, pad = -keys.shape[2] % rows.POSITIONS, nn.functional.pad
    if not added:
        return keys, values, mask, bias
    hidden = pad(keys.new_ones(keys.shape[2], dtype=torch.bool) if mask is None else mask, (0, added))
    keys, values = (pad(x, (0, 0, 0, added)) for x in (keys, values))
    return keys, values, hidden, None if bias is None else pad(bias, (0, added))
