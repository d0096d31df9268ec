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
from regard.model.layers import Dropout, linear
from regard.model.state import Memory

# --- 1. fixed: one vector answers every question -------------------------------------------------------------------


def fixed(query: Tensor, memory: Memory) -> Tensor:
    """The same context for each query, (B, T, D): the source's summary, whatever is asked (Cho et al. 2014)."""
    return memory.summary[:, None, :].expand(-1, query.shape[1], -1)


# --- 2. recomputed: each step asks anew ----------------------------------------------------------------------------


class Score(nn.Module):
    """How a query is compared with a key. All scores share this shape: score(query, keys) -> (…, T, S), unnormalised.

    What depends on the keys alone is in `project`, so that a decoder computes it once for each source.

    Args:
        query_width: size of a query.
        key_width: size of a key.
    """

    def __init__(self, query_width: int, key_width: int):
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
        return self.compare(query, self.project(keys))


class Dot(Score):
    """query · key (Luong et al. 2015, eq. 8, "dot")."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        if query_width != key_width:
            raise ConfigError(f'a dot score needs query and key of one width, and they are {query_width} and '
                              f'{key_width}: use score = "general" or "additive", or equal widths')

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        return query @ projected.transpose(-2, -1)


class ScaledDot(Dot):
    """query · key / √D (Vaswani et al. 2017, eq. 1)."""

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        return super().compare(query / math.sqrt(query.shape[-1]), projected)


class General(Score):
    """query · W key (Luong et al. 2015, eq. 8, "general")."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.weight = nn.Linear(key_width, query_width, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        projected: Tensor = self.weight(keys)
        return projected

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        return query @ projected.transpose(-2, -1)


class Additive(Score):
    """v · tanh(W query + U key) (Bahdanau et al. 2015, appendix A.1.2)."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.query = nn.Linear(query_width, query_width, bias=False)
        self.key = nn.Linear(key_width, query_width, bias=False)
        self.v = nn.Linear(query_width, 1, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        projected: Tensor = self.key(keys)
        return projected

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        hidden = torch.tanh(self.query(query).unsqueeze(-2) + projected.unsqueeze(-3))  # (…, T, S, D)
        return torch.squeeze(self.v(hidden), -1)


class Concat(Score):
    """v · tanh(W [query; key]) (Luong et al. 2015, eq. 8, "concat"): one matrix over both, with its bias."""

    def __init__(self, query_width: int, key_width: int):
        super().__init__(query_width, key_width)
        self.weight = nn.Linear(query_width + key_width, query_width)
        self.v = nn.Linear(query_width, 1, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        return nn.functional.linear(keys, self.weight.weight[:, self.query_width :], self.weight.bias)

    def compare(self, query: Tensor, projected: Tensor) -> Tensor:
        asked = nn.functional.linear(query, self.weight.weight[:, : self.query_width])
        hidden = torch.tanh(asked.unsqueeze(-2) + projected.unsqueeze(-3))  # (…, T, S, D)
        return torch.squeeze(self.v(hidden), -1)


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
    if mask is None:
        return torch.softmax(scores, dim=-1)
    weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weights.masked_fill(~mask, 0.0)


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
        mask: bool, broadcastable to (…, T, S), or (B, S) with keys (B, S, D); True where a key may be looked at.

    Returns:
        context, float (…, T, E), and weights, float (…, T, S), each row of which sums to 1.
    """
    if isinstance(score, str):
        if score not in ("dot", "scaled_dot"):
            raise ConfigError(f'attend(score="{score}"): by name there are "dot" and "scaled_dot"; a score with '
                              "parameters is given as a module, such as regard.model.attention.Additive(64, 64)")
        score = SCORES[score](query.shape[-1], keys.shape[-1])
    if mask is not None and mask.dim() == 2 and keys.dim() == 3:
        mask = mask[:, None, :]
    scores = score(query, keys)
    weights = weigh(scores, mask)
    context = weights @ values
    return context, weights


class Attention(nn.Module):
    """Attention of one head between a decoder and a `Memory`, with any of the scores.

    Args:
        score: a name in `SCORES`.
        query_width: size of the decoder's states.
        key_width: size of the memory's states.
    """

    def __init__(self, score: str, query_width: int, key_width: int):
        super().__init__()
        self.score = SCORES[score](query_width, key_width)

    def forward(self, query: Tensor, memory: Memory, projected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Context, (B, T, D), and weights, (B, T, S).

        Args:
            query: float (B, T, D).
            memory: what is looked at.
            projected: `score.project(memory.states)`, where the caller has it already.
        """
        if projected is None:
            return attend(query, memory.states, memory.states, self.score, memory.mask)
        return attend(query, projected, memory.states, self.score.compare, memory.mask)


# --- 3. every position asks at once --------------------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in H subspaces at once, Vaswani et al. (2017), section 3.2.2.

    Args:
        width: D.
        heads: H; each head has D / H of the width.
        dropout: share of the weights dropped in training.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width)
        self.output = linear(width, width)
        self.dropout = Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D / H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, H, S, D / H), of states, (B, S, D)."""
        keys, values = self.key_value(states).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Context, (B, T, D), and on request the weights, (B, H, T, S), as they are without dropout.

        Args:
            x: float (B, T, D), what asks.
            keys: float (B, H, S, D / H), from `project`.
            values: the same.
            mask: bool, broadcastable to (B, H, T, S); None: everything may be looked at.
            want_weights: whether to return the weights.
        """
        query = self.split(self.query(x))
        if x.is_cuda and not want_weights:
            dropout = self.dropout.threshold / 256 if self.training else 0.0
            context = nn.functional.scaled_dot_product_attention(query, keys, values, mask, dropout)
            weights = None
        else:  # on a CPU the fused kernel's backward takes twice the time of these three lines
            scores = (query / math.sqrt(query.shape[-1])) @ keys.transpose(-2, -1)
            weights = weigh(scores, mask)
            context = self.dropout(weights) @ values
        return self.output(context.transpose(1, 2).flatten(2)), weights
