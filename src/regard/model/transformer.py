"""The Transformer (Vaswani et al. 2017): its encoder and its decoder.

B batch, S source length, T target length, D width, H heads, K heads of keys and values. Names in taps: "encoder.i" and
"decoder.i" are self-attention in layer i, "cross.i" is the decoder's attention to the source. What later papers
changed in a part stands in its place: the activation, the norm, the positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.config_model import TransformerSideConfig
from regard.model.attention import MultiHeadAttention, everywhere, hiding
from regard.model.layers import Dropout, Embedding, Layers, StochasticDepth, at_depth, linear, new_noise
from regard.model.positions import POSITIONS, Order
from regard.model.rows import PADDED, Layout, Packed, layout_of
from regard.model.state import Memory, Past, State, Taps, apart
from regard.model.sublayers import Stack, attend, covers, feed_forward


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the halves [a; b] of x: a gate, and what it lets through (Shazeer 2020, eq. 6)."""
    gate, values = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * values


class RMSNorm(nn.RMSNorm):
    """x / √(mean of x² + eps) * weight, made in the weight's type and given back in that of x (Zhang and Sennrich
    2019, eq. 4). eps is that of LayerNorm, not of the number type."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": nn.functional.gelu, "swiglu": swiglu}
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
        outer: Tensor = self.outer(self.dropout(self.activation(self.inner(x))))
        return outer


class Residual(nn.Module):
    """What wraps each part of a layer: x + part(x), normalised after it (2017) or before it (pre-norm)."""

    def __init__(self, config: TransformerSideConfig):
        super().__init__()
        self.norm = NORMS[config.norm_kind](config.width)
        self.dropout = Dropout(config.dropout)
        self.depth = StochasticDepth(config.stochastic_depth)
        self.before = config.norm == "pre"

    def forward(self, x: Tensor, part: Callable[[Tensor], Tensor], layout: Layout) -> Tensor:
        """(B, T, D) -> (B, T, D), or both as a layout holds them."""
        branch = self.depth(part(self.norm(x) if self.before else x), layout)
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

    def forward(
        self, x: Tensor, layout: Layout, order: Order, name: str, taps: Taps | None, stack: Stack | None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D), or both as a layout holds them."""
        if stack is not None:
            x = attend(x, stack, self.attention, self.attention_residual)
            return feed_forward(x, stack, self.feedforward, self.feedforward_residual)
        mask = layout.mask[:, None, None, :]

        def attention(x: Tensor) -> Tensor:
            keys, values = self.attention.project(x, layout)
            query, keys = order.rotate(self.attention.ask(x, layout)), order.rotate(keys)
            return tapped(self.attention(query, keys, values, mask, order.bias, taps is not None, layout), name, taps)

        x = self.attention_residual(x, attention, layout)
        y: Tensor = self.feedforward_residual(x, self.feedforward, layout)
        return y


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

    def start(self, states: Tensor, layout: Layout = PADDED) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, each (N, K, S, D / H), of its states as their layout holds them."""
        return self.cross.project(states, layout)

    def forward(
        self, x: Tensor, layout: Layout, state: State, past: Past, mask: Tensor | None, order: Order, index: int,
        taps: Taps | None, stack: Stack | None
    ) -> Tensor:
        """(N, K T, D) -> (N, K T, D), or both as a layout holds them; keys and values are put into `past`, and the mask
        is for these."""
        told = state.shared[f"{index}.keys"], state.shared[f"{index}.values"]
        if stack is not None:
            x = attend(x, stack, self.attention, self.attention_residual)
            x = attend(x, stack, self.cross, self.cross_residual, told)
            return feed_forward(x, stack, self.feedforward, self.feedforward_residual)

        def attention(x: Tensor) -> Tensor:
            keys, values = self.attention.project(x, layout)
            query, keys = order.rotate(self.attention.ask(x, layout)), order.rotate(keys)
            keys, values = past.put(f"{index}.keys", keys), past.put(f"{index}.values", values)
            attended = self.attention(query, keys, values, mask, order.bias, taps is not None, layout)
            return tapped(attended, f"decoder.{index}", taps)

        def cross(x: Tensor) -> Tensor:
            mask = source_mask(state)
            attended = self.cross(self.cross.ask(x, layout), *told, mask, None, taps is not None, layout)
            return tapped(attended, f"cross.{index}", taps)

        x = self.attention_residual(x, attention, layout)
        x = self.cross_residual(x, cross, layout)
        y: Tensor = self.feedforward_residual(x, self.feedforward, layout)
        return y


def attention_of(config: TransformerSideConfig, memory_width: int | None = None) -> MultiHeadAttention:
    """An attention as the settings say, to the same states or to a memory's."""
    return MultiHeadAttention(config.width, config.heads, config.attention_dropout, memory_width, config.kv_heads)


def source_mask(state: State) -> Tensor:
    """Where attention to the source may look, bool (N, 1, 1, S): as many places as the keys have."""
    missing = state.shared["0.keys"].shape[2] - state.memory.mask.shape[1]
    return nn.functional.pad(state.memory.mask, (0, missing))[:, None, None, :]


def stack_of(
    by_hand: bool, x: Tensor, layout: Layout, mask: Tensor | None, bias: Tensor | None,
    across: Tensor | None = None
) -> Stack | None:
    """What sublayers share where they are written out (`regard.model.sublayers`); None: their modules run.

    Args:
        by_hand: whether sublayers of this kind are.
        x: tokens, as the layout holds them.
        layout: packed, where sublayers are written out.
        mask: where self-attention may look, bool, broadcastable to (B, H, T, T).
        bias: what its scores gain, float (H, T, T).
        across: where attention to the source may look, bool (B, 1, 1, S).
    """
    if not (by_hand and isinstance(layout, Packed) and everywhere(mask) and everywhere(across)):
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    hidden = x.new_zeros(1, dtype=dtype) if mask is None else hiding(mask, dtype)
    return Stack(layout, hidden if bias is None else hidden + bias,
                 None if across is None else hiding(across, dtype), new_noise())


def narrow(x: Tensor) -> Tensor:
    """What layers compute with: bfloat16 where products are made in it, so that nothing is cast back and forth."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
        self.by_hand, self.embedding = covers(config), embedding
        self.positions = POSITIONS[config.positions](config, False)
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[EncoderLayer](EncoderLayer(at_depth(config, index)) for index in range(config.layers))
        self.norm = NORMS[config.norm_kind](config.width) if config.norm == "pre" else nn.Identity()

    def forward(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S); the summary is the mean of the states."""
        layout = layout_of(mask, self.training and taps is None, self.by_hand)
        x = self.dropout(layout.pack(narrow(self.positions(self.embedding(source)))))
        order = self.positions.order(layout.mask)
        stack = stack_of(self.by_hand, x, layout, layout.mask[:, None, None], order.bias)
        for index, layer in enumerate(self.layers):
            x = layer(x, layout, order, f"encoder.{index}", taps, stack)
        x = self.norm(x)
        states = layout.unpack(x).to(self.embedding.weight.dtype)
        real = mask[:, :, None].to(states.dtype)
        return Memory(states, mask, (states * real).sum(1) / real.sum(1), source, states, (layout, x))


class TransformerDecoder(nn.Module):
    """Target tokens so far -> features, all positions at once, each seeing only what came before it.

    Args:
        config: the model's settings.
        embedding: the target's token vectors.
        memory_width: size of the memory's states.
    """

    def __init__(self, config: TransformerSideConfig, embedding: Embedding, memory_width: int):
        super().__init__()
        self.by_hand, self.embedding = covers(config), embedding
        self.positions = POSITIONS[config.positions](config, True)
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[DecoderLayer](
            DecoderLayer(at_depth(config, index), memory_width) for index in range(config.layers))
        self.norm = NORMS[config.norm_kind](config.width) if config.norm == "pre" else nn.Identity()

    def start(self, memory: Memory) -> State:
        """The state before the first token: each layer's keys and values of the source, computed once."""
        shared: dict[str, Tensor] = {}
        layout, states = memory.held or self.hold(memory)
        for index, layer in enumerate(self.layers):
            shared |= zip((f"{index}.keys", f"{index}.values"), layer.start(states, layout), strict=True)
        return State(memory, 0, {}, shared, Past(memory.source[:, :0]))

    def hold(self, memory: Memory) -> tuple[Layout, Tensor]:
        """The states of an encoder that does not hold them as this decoder does."""
        layout = layout_of(memory.mask, self.training, self.by_hand)
        return layout, layout.pack(narrow(memory.states))

    def forward(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[Tensor, State]:
        """tokens int64 (B, T) -> features, float (B, T, D), and the state after them."""
        x, past = self.read(tokens, state, taps, PADDED)
        return x.view(*tokens.shape, -1), state.advance(tokens.shape[1], {}, past)

    def real(self, tokens: Tensor, mask: Tensor, state: State, taps: Taps | None = None) -> Tensor:
        """Features of real tokens alone, float (N, D), sentence after sentence; mask is bool (B, T), and the state is
        that before the first token."""
        layout = layout_of(mask, self.training and taps is None, self.by_hand)
        return layout.real(self.read(tokens, state, taps, layout)[0])

    def read(self, tokens: Tensor, state: State, taps: Taps | None, layout: Layout) -> tuple[Tensor, Past]:
        """Features as a layout holds them, and the past with these tokens; where sublayers are written out, without."""
        assert state.past is not None
        (rows, length), beam = tokens.shape, state.beam
        x = narrow(self.positions(self.embedding(tokens), state.length)).view(rows // beam, beam * length, -1)
        x = self.dropout(layout.pack(x))
        places = layout.mask if isinstance(layout, Packed) else tokens
        order, past = self.positions.order(places, state.length, beam), state.past.grow(places.shape[1], beam)
        seen, bias = past.hidden(places.shape[1], beam, order.bias)
        order = order._replace(bias=bias)
        stack = stack_of(self.by_hand, x, layout, seen, bias, source_mask(state))
        for index, layer in enumerate(self.layers):
            x = layer(x, layout, state, past, seen, order, index, taps, stack)
        if taps is not None:
            for index in range(len(self.layers)):
                taps[f"decoder.{index}"] = past.seen(taps[f"decoder.{index}"], beam)
                taps[f"cross.{index}"] = apart(taps[f"cross.{index}"][..., : state.memory.mask.shape[1]], beam)
        return self.norm(x), past
