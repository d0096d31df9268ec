"""The Transformer (Vaswani et al. 2017): its encoder and its decoder.

B batch, S source length, T target length, D width, H heads. Names in taps: "encoder.i" and "decoder.i" are
self-attention in layer i, "cross.i" is the decoder's attention to the source.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.config import TransformerConfig
from regard.model.attention import MultiHeadAttention
from regard.model.layers import Dropout, Embedding, Layers, linear
from regard.model.positions import Sinusoidal
from regard.model.state import Memory, State, Taps

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": nn.functional.gelu}


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, at each position alone (section 3.3)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.inner = linear(config.width, config.feedforward)
        self.outer = linear(config.feedforward, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.feedforward_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        outer: Tensor = self.outer(self.dropout(self.activation(self.inner(x))))
        return outer


class Residual(nn.Module):
    """What wraps each part of a layer: x + part(x), normalised after it (2017) or before it (pre-norm)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.before = config.norm == "pre"

    def forward(self, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        y: Tensor = x + self.dropout(part(self.norm(x))) if self.before else self.norm(x + self.dropout(part(x)))
        return y


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.heads, config.attention_dropout)
        self.feedforward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def forward(self, x: Tensor, mask: Tensor, name: str, taps: Taps | None) -> Tensor:
        """(B, S, D) -> (B, S, D); mask bool (B, 1, 1, S)."""

        def attention(x: Tensor) -> Tensor:
            return tapped(self.attention(x, *self.attention.project(x), mask, taps is not None), name, taps)

        x = self.attention_residual(x, attention)
        y: Tensor = self.feedforward_residual(x, self.feedforward)
        return y


class DecoderLayer(nn.Module):
    """Self-attention to the past, attention to the source, then feed-forward."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.heads, config.attention_dropout)
        self.cross = MultiHeadAttention(config.width, config.heads, config.attention_dropout)
        self.feedforward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.cross_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def forward(
        self, x: Tensor, state: State, past: Tensor | None, index: int, taps: Taps | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, D) -> (B, T, D), and the keys and values of this layer's past for the next step."""
        cache: dict[str, Tensor] = {}

        def attention(x: Tensor) -> Tensor:
            for kind, new in zip(("keys", "values"), self.attention.project(x), strict=True):
                old = state.cache.get(f"{index}.{kind}")
                cache[f"{index}.{kind}"] = new if old is None else torch.cat([old, new], dim=2)
            keys, values = cache[f"{index}.keys"], cache[f"{index}.values"]
            return tapped(self.attention(x, keys, values, past, taps is not None), f"decoder.{index}", taps)

        def cross(x: Tensor) -> Tensor:
            keys, values = state.cache[f"{index}.memory_keys"], state.cache[f"{index}.memory_values"]
            mask = state.memory.mask[:, None, None, :]
            return tapped(self.cross(x, keys, values, mask, taps is not None), f"cross.{index}", taps)

        x = self.attention_residual(x, attention)
        x = self.cross_residual(x, cross)
        return self.feedforward_residual(x, self.feedforward), cache


def tapped(attended: tuple[Tensor, Tensor | None], name: str, taps: Taps | None) -> Tensor:
    """The context alone, the weights given to the taps where somebody asked."""
    context, weights = attended
    if taps is not None and weights is not None:
        taps[name] = weights
    return context


class TransformerEncoder(nn.Module):
    """Source tokens -> `Memory`.

    Args:
        config: the model's settings.
        embedding: the source's token vectors.
    """

    def __init__(self, config: TransformerConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.positions = Sinusoidal(config.width)
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[EncoderLayer](EncoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def forward(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S); the summary is the mean of the states."""
        x = self.dropout(self.positions(self.embedding(source)))
        for index, layer in enumerate(self.layers):
            x = layer(x, mask[:, None, None, :], f"encoder.{index}", taps)
        states = self.norm(x)
        real = mask[:, :, None].to(states.dtype)
        return Memory(states, mask, (states * real).sum(1) / real.sum(1))


class TransformerDecoder(nn.Module):
    """Target tokens so far -> features, all positions at once, each seeing only what came before it.

    Args:
        config: the model's settings.
        embedding: the target's token vectors.
    """

    def __init__(self, config: TransformerConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.positions = Sinusoidal(config.width)
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[DecoderLayer](DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def start(self, memory: Memory) -> State:
        """The state before the first token: each layer's keys and values of the source, computed once."""
        cache: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            keys, values = layer.cross.project(memory.states)
            cache |= {f"{index}.memory_keys": keys, f"{index}.memory_values": values}
        return State(memory, 0, cache)

    def forward(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[Tensor, State]:
        """tokens int64 (B, T) -> features, float (B, T, D), and the state after them."""
        length = tokens.shape[1]
        x = self.dropout(self.positions(self.embedding(tokens), state.length))
        past = None  # one token may see everything that is held; several must not see each other's future
        if length > 1:
            held = torch.ones(length, state.length + length, dtype=torch.bool, device=tokens.device)
            past = held.tril(diagonal=state.length)
        cache: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            x, new = layer(x, state, past, index, taps)
            cache |= new
        return self.norm(x), state.advance(length, cache)
