"""The Transformer (Vaswani et al. 2017): its encoder and its decoder.

B batch, S source length, T target length, D width, H heads, K heads of keys and values. Names in taps: "encoder.i" and
"decoder.i" are self-attention in layer i, "cross.i" is the decoder's attention to the source. What later papers
changed in a part stands in its place: the activation, the norm, the positions.

The modules are the model, over (B, T, D). In training on a processor `rows` and `real` do the same over the real tokens
alone, by sublayers that are written out with their gradients (`regard.model.sublayers`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.config_model import TransformerSideConfig
from regard.data.batches import Batch
from regard.model.attention import MultiHeadAttention
from regard.model.layers import Dropout, Embedding, Layers, StochasticDepth, at_depth, linear, narrow
from regard.model.positions import POSITIONS, Order
from regard.model.rows import Packed, packs
from regard.model.state import Memory, Past, State, Taps, apart
from regard.model.sublayers import ACTIVATIONS, Stack, attend, feed_forward


class RMSNorm(nn.RMSNorm):
    """x / √(mean of x² + eps) * weight, made in the weight's type and given back in that of x (Zhang and Sennrich
    2019, eq. 4). eps is that of LayerNorm, not of the number type."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm, "rms": RMSNorm}


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, at each position alone (section 3.3)."""

    def __init__(self, config: TransformerSideConfig):
        super().__init__()
        self.inner = linear(config.width, config.feedforward * (2 if config.activation == "swiglu" else 1))
        self.outer = linear(config.feedforward, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = Dropout(config.feedforward_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        outer: Tensor = self.outer(self.dropout(self.activation.forward(self.inner(x))))
        return outer


class Residual(nn.Module):
    """What wraps each part of a layer: x + part(x), normalised after it (2017) or before it (pre-norm)."""

    def __init__(self, config: TransformerSideConfig):
        super().__init__()
        self.norm = NORMS[config.norm_kind](config.width)
        self.dropout = Dropout(config.dropout)
        self.depth = StochasticDepth(config.stochastic_depth)
        self.before = config.norm == "pre"

    def forward(self, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        branch = self.depth(part(self.norm(x) if self.before else x))
        y: Tensor = self.dropout.added(x, branch)
        return y if self.before else self.norm(y)


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: TransformerSideConfig):
        super().__init__()
        self.attention = attention_of(config)
        self.feedforward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def forward(self, x: Tensor, mask: Tensor, order: Order, name: str, taps: Taps | None) -> Tensor:
        """(B, S, D) -> (B, S, D); the mask is bool (B, S)."""

        def attention(x: Tensor) -> Tensor:
            keys, values = self.attention.project(x)
            query, keys = order.rotate(self.attention.ask(x)), order.rotate(keys)
            attended = self.attention(query, keys, values, mask[:, None, None, :], order.bias, taps is not None)
            return tapped(attended, name, taps)

        x = self.attention_residual(x, attention)
        y: Tensor = self.feedforward_residual(x, self.feedforward)
        return y

    def rows(self, x: Tensor, stack: Stack) -> Tensor:
        """The same of packed rows, (1, R, D)."""
        x = attend(x, stack, self.attention_residual, self.attention)
        return feed_forward(x, stack, self.feedforward_residual, self.feedforward)


class DecoderLayer(nn.Module):
    """Self-attention to the past, attention to the source, then feed-forward."""

    def __init__(self, config: TransformerSideConfig, memory_width: int):
        super().__init__()
        self.attention = attention_of(config)
        self.cross = attention_of(config, memory_width)
        self.feedforward = FeedForward(config)
        self.attention_residual = Residual(config)
        self.cross_residual = Residual(config)
        self.feedforward_residual = Residual(config)

    def start(self, states: Tensor, layout: Packed | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, each (N, K, S, D / H), of its states: (N, S, D), or as a layout packs them."""
        if layout is None:
            return self.cross.project(states)
        keys, values = layout.heads(self.cross.key_value(states), self.cross.kv_heads, 2)
        return keys, values

    def forward(
        self, x: Tensor, state: State, past: Past, mask: Tensor | None, order: Order, index: int, taps: Taps | None
    ) -> Tensor:
        """(N, K T, D) -> (N, K T, D); keys and values are put into `past`, and the mask is for these."""

        def attention(x: Tensor) -> Tensor:
            keys, values = self.attention.project(x)
            query, keys = order.rotate(self.attention.ask(x)), order.rotate(keys)
            keys, values = past.put(f"{index}.keys", keys), past.put(f"{index}.values", values)
            attended = self.attention(query, keys, values, mask, order.bias, taps is not None)
            return tapped(attended, f"decoder.{index}", taps)

        def cross(x: Tensor) -> Tensor:
            asked = self.cross.ask(x), *told(state, index), source_mask(state)
            return tapped(self.cross(*asked, want_weights=taps is not None), f"cross.{index}", taps)

        x = self.attention_residual(x, attention)
        x = self.cross_residual(x, cross)
        y: Tensor = self.feedforward_residual(x, self.feedforward)
        return y

    def rows(self, x: Tensor, stack: Stack, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """The same of packed rows, (1, R, D), from the first token on, given the source's keys and values."""
        x = attend(x, stack, self.attention_residual, self.attention)
        x = attend(x, stack, self.cross_residual, self.cross, keys_values)
        return feed_forward(x, stack, self.feedforward_residual, self.feedforward)


def attention_of(config: TransformerSideConfig, memory_width: int | None = None) -> MultiHeadAttention:
    """An attention as the settings say, to the same states or to a memory's."""
    return MultiHeadAttention(config.width, config.heads, config.attention_dropout, memory_width, config.kv_heads)


def told(state: State, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the source in a layer."""
    return state.shared[f"{index}.keys"], state.shared[f"{index}.values"]


def source_mask(state: State) -> Tensor:
    """Where attention to the source may look, bool (N, 1, 1, S): as many places as the keys have."""
    missing = state.shared["0.keys"].shape[2] - state.memory.mask.shape[1]
    return nn.functional.pad(state.memory.mask, (0, missing))[:, None, None, :]


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

    def __init__(self, config: TransformerSideConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.positions = POSITIONS[config.positions](config, False)
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[EncoderLayer](EncoderLayer(at_depth(config, index)) for index in range(config.layers))
        self.norm = NORMS[config.norm_kind](config.width) if config.norm == "pre" else nn.Identity()

    def forward(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S); the summary is the mean of the states."""
        x, held = narrow(self.positions(self.embedding(source))), None
        if packs(mask, self.training and taps is None):
            held = self.rows(x, Packed(mask))
            states = held[0].unpack(held[1])
        else:
            x, order = self.dropout(x), self.positions.order(mask)
            for index, layer in enumerate(self.layers):
                x = layer(x, mask, order, f"encoder.{index}", taps)
            states = self.norm(x)
        states = states.to(self.embedding.weight.dtype)
        real = mask[:, :, None].to(states.dtype)
        return Memory(states, mask, (states * real).sum(1) / real.sum(1), source, states, held)

    def rows(self, x: Tensor, layout: Packed) -> tuple[Packed, Tensor]:
        """The states of token vectors, (B, S, D), held as a layout says, (1, R, D), and the layout."""
        x = self.dropout(layout.pack(x))
        stack = Stack.of(layout, x, self.positions.order(layout.mask), layout.mask[:, None, None, :])
        for layer in self.layers:
            x = layer.rows(x, stack)
        return layout, self.norm(x)


class TransformerDecoder(nn.Module):
    """Target tokens so far -> features, all positions at once, each seeing only what came before it.

    Args:
        config: the model's settings.
        embedding: the target's token vectors.
        memory_width: size of the memory's states.
    """

    def __init__(self, config: TransformerSideConfig, embedding: Embedding, memory_width: int):
        super().__init__()
        self.embedding = embedding
        self.positions = POSITIONS[config.positions](config, True)
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[DecoderLayer](
            DecoderLayer(at_depth(config, index), memory_width) for index in range(config.layers))
        self.norm = NORMS[config.norm_kind](config.width) if config.norm == "pre" else nn.Identity()

    def start(self, memory: Memory) -> State:
        """The state before the first token: each layer's keys and values of the source, computed once."""
        shared: dict[str, Tensor] = {}
        layout, states = memory.held or (None, narrow(memory.states))
        if layout is None and packs(memory.mask, self.training):  # an encoder of another family
            layout = Packed(memory.mask)
            states = layout.pack(states)
        for index, layer in enumerate(self.layers):
            shared |= zip((f"{index}.keys", f"{index}.values"), layer.start(states, layout), strict=True)
        return State(memory, 0, {}, shared, Past(memory.source[:, :0]))

    def forward(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[Tensor, State]:
        """tokens int64 (B, T) -> features, float (B, T, D), and the state after them."""
        assert state.past is not None
        (rows, length), beam = tokens.shape, state.beam
        x = narrow(self.positions(self.embedding(tokens), state.length)).view(rows // beam, beam * length, -1)
        x = self.dropout(x)
        order, past = self.positions.order(tokens, state.length, beam), state.past.grow(length, beam)
        seen, bias = past.hidden(length, beam, order.bias)
        order = order._replace(bias=bias)
        for index, layer in enumerate(self.layers):
            x = layer(x, state, past, seen, order, index, taps)
        if taps is not None:
            for index in range(len(self.layers)):
                taps[f"decoder.{index}"] = past.seen(taps[f"decoder.{index}"], beam)
                taps[f"cross.{index}"] = apart(taps[f"cross.{index}"][..., : state.memory.mask.shape[1]], beam)
        return self.norm(x).view(rows, length, -1), state.advance(length, {}, past)

    def real(self, batch: Batch, state: State, taps: Taps | None = None) -> Tensor:
        """Features of the real target tokens alone, float (N, D), sentence after sentence, from the state before the
        first of them."""
        training = self.training and taps is None
        if not (packs(batch.target_mask, training) and packs(state.memory.mask, training)):
            return batch.real(self(batch.target_in, state, taps)[0])
        layout = Packed(batch.target_mask)
        x = self.dropout(layout.pack(narrow(self.positions(self.embedding(batch.target_in)))))
        length = layout.mask.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        stack = Stack.of(layout, x, self.positions.order(layout.mask), seen, source_mask(state))
        for index, layer in enumerate(self.layers):
            x = layer.rows(x, stack, told(state, index))
        return layout.real(self.norm(x))
