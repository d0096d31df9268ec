"""The convolutional encoder and decoder (Gehring et al. 2017, "Convolutional Sequence to Sequence Learning").

B batch, S source length, T target length, D width, M width of the memory, k positions that a convolution sees. Names
in taps: "cross.i" is the attention of decoder layer i to the source, (B, T, S).
"""

import math

import torch
from torch import Tensor, nn

from regard.config_model import ConvSideConfig
from regard.model.attention import attend
from regard.model.layers import INIT, Dropout, Embedding, Layers, StochasticDepth, at_depth
from regard.model.positions import Learned
from regard.model.state import Memory, State, Taps

HALF = math.sqrt(0.5)
"""What a sum of two terms is scaled by, so that its variance is theirs (section 3.5)."""


class Normed(nn.Module):
    """W x + b whose weights are a length and a direction for each output: w = g v / |v| (Salimans and Kingma 2016,
    eq. 2), which begins as w = v.

    Args:
        inputs: size of x.
        outputs: size of W x + b.
        std: standard deviation of w at the start; None: √(1 / inputs), so that W x varies as x does (section 3.5).
    """

    def __init__(self, inputs: int, outputs: int, std: float | None = None):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(outputs, inputs) * (std or math.sqrt(1 / inputs)))
        self.length = nn.Parameter(self.direction.detach().norm(dim=1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs)."""
        weight = torch._weight_norm(self.direction, self.length[:, None], 0)  # the formula takes 10 times as long
        return nn.functional.linear(x, weight, self.bias)


class GatedConvolution(nn.Module):
    """v(W [x_i; …; x_{i+k-1}] + b), with gated linear units v([a; b]) = a σ(b) (Dauphin et al. 2016; section 3.2).

    The paper begins with N(0, √(4 p / n)), p the share that dropout keeps, so that the output varies as x does. Here,
    and in the queries, weights begin as small as everywhere in this package: attention then finds its places much
    sooner. Multi30k, 300 updates, nats a held-out token: 3 + 3 layers 3.15 (the paper: 4.03), 8 + 8 layers 3.37 (3.90).
    """

    def __init__(self, config: ConvSideConfig):
        super().__init__()
        self.kernel = config.kernel
        self.linear = Normed(self.kernel * config.width, 2 * config.width, INIT)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T + k - 1, D) -> (B, T, D)."""
        length = x.shape[1] - self.kernel + 1
        windows = torch.cat([x[:, place : place + length] for place in range(self.kernel)], dim=-1)  # (B, T, k D)
        return nn.functional.glu(self.linear(windows), dim=-1)


class EncoderLayer(nn.Module):
    """A gated convolution that sees (k - 1) // 2 positions to the left and k // 2 to the right."""

    def __init__(self, config: ConvSideConfig):
        super().__init__()
        self.convolution = GatedConvolution(config)
        self.sides = ((config.kernel - 1) // 2, config.kernel // 2)
        self.dropout = Dropout(config.dropout)
        self.depth = StochasticDepth(config.stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); padding is 0 in x, and is not in the result."""
        padded = nn.functional.pad(self.dropout(x), (0, 0, *self.sides))
        y: Tensor = (self.depth(self.convolution(padded)) + x) * HALF
        return y


class DecoderLayer(nn.Module):
    """A gated convolution over the past, then attention of its own: multi-step attention (section 3.3)."""

    def __init__(self, config: ConvSideConfig, memory_width: int):
        super().__init__()
        width = config.width
        same = memory_width == width
        self.convolution = GatedConvolution(config)
        self.query = Normed(width, width, INIT)
        self.to_memory = nn.Identity() if same else Normed(width, memory_width)
        self.from_memory = nn.Identity() if same else Normed(memory_width, width)
        self.dropout = Dropout(config.dropout)
        self.depth = StochasticDepth(config.stochastic_depth)

    def forward(self, x: Tensor, target: Tensor, past: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """One layer, (B, T, D) -> (B, T, D).

        Args:
            x: float (B, T, D), from the layer below.
            target: float (B, T, D), the vectors g of the tokens read.
            past: float (B, k - 1, D), this layer's inputs before x.
            state: holds the memory, and √m of its number of tokens.

        Returns:
            the layer's output; its last k - 1 inputs, for the next call; attention weights, (B, T, S).
        """
        memory, inputs = state.memory, torch.cat([past, self.dropout(x)], dim=1)
        hidden = self.convolution(inputs)
        query = self.to_memory((self.query(hidden) + target) * HALF)  # eq. 1: d = W h + b + g
        asked = query.view(len(memory.mask), -1, query.shape[-1])  # those of all rows of a source
        context, weights = attend(asked, memory.states, memory.values, "dot", memory.mask)  # eq. 1, 2
        # A mean of m vectors has 1/m of their variance: m √(1/m) brings it back (section 3.5).
        hidden = (hidden + self.from_memory(context * state.shared["root"]).view(hidden.shape)) * HALF
        return (self.depth(hidden) + x) * HALF, inputs[:, x.shape[1] :], weights.view(*x.shape[:2], -1)


class ConvEncoder(nn.Module):
    """Source tokens -> `Memory`, whose values are states and token vectors together: z + e (eq. 2).

    Args:
        config: the model's settings.
        embedding: the source's token vectors.
    """

    def __init__(self, config: ConvSideConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.positions = Learned(config.width, config.max_positions)
        self.dropout = Dropout(config.dropout)
        self.enter = Normed(config.width, config.width)
        self.layers = Layers[EncoderLayer](EncoderLayer(at_depth(config, index)) for index in range(config.layers))
        self.leave = Normed(config.width, config.width)

    def forward(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S). It has no attention, so nothing for the taps; the summary is the
        mean of the states."""
        tokens = self.dropout(self.positions(self.embedding(source)))
        real = mask[:, :, None].to(tokens.dtype)
        x = self.enter(tokens) * real
        for layer in self.layers:
            x = layer(x) * real
        states = self.leave(x)
        return Memory(states, mask, (states * real).sum(1) / real.sum(1), source, (states + tokens) * HALF)


class ConvDecoder(nn.Module):
    """Target tokens so far -> features, all positions at once, each seeing only what came before it.

    The paper divides the gradient of the encoder by the number of attentions that send one back. That would not be the
    gradient of the loss any more, and Adam takes no notice of a gradient's scale: it is left as it is.

    Args:
        config: the model's settings.
        embedding: the target's token vectors.
        memory_width: M, size of the memory's states.
    """

    def __init__(self, config: ConvSideConfig, embedding: Embedding, memory_width: int):
        super().__init__()
        self.embedding = embedding
        self.positions = Learned(config.width, config.max_positions)
        self.dropout = Dropout(config.dropout)
        self.enter = Normed(config.width, config.width)
        self.layers = Layers[DecoderLayer](
            DecoderLayer(at_depth(config, index), memory_width) for index in range(config.layers))
        self.leave = Normed(config.width, config.width)
        self.past = (config.kernel - 1, config.width)

    def start(self, memory: Memory) -> State:
        """The state before the first token: zeros as the past of each layer, and √m of each source's m tokens."""
        past = memory.states.new_zeros(len(memory.mask), *self.past)
        root = memory.mask.sum(1)[:, None, None].to(past.dtype).sqrt()
        return State(memory, 0, {f"{index}.past": past for index in range(len(self.layers))}, {"root": root})

    def forward(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[Tensor, State]:
        """tokens int64 (B, T) -> features, float (B, T, D), and the state after them."""
        target = self.dropout(self.positions(self.embedding(tokens), state.length))
        x = self.enter(target)
        cache: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            x, cache[f"{index}.past"], weights = layer(x, target, state.cache[f"{index}.past"], state)
            if taps is not None:
                taps[f"cross.{index}"] = weights
        features: Tensor = self.dropout(self.leave(x))
        return features, state.advance(tokens.shape[1], cache)
