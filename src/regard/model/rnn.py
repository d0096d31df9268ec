"""The RNN encoder-decoder: with its fixed vector (Cho et al. 2014, Sutskever et al. 2014) or with attention
(Bahdanau et al. 2015, Luong et al. 2015).

B batch, S source length, T target length, D width. The name in taps is "cross.0".
"""

import torch
from torch import Tensor, nn

from regard.config import RNNConfig
from regard.model.attention import Attention, fixed
from regard.model.layers import Dropout, Embedding, Layers
from regard.model.state import Memory, State, Taps

CELLS: dict[str, type[nn.RNN | nn.GRU | nn.LSTM]] = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class Cell(nn.Module):
    """One layer of a recurrent network, run over a whole sequence or over one token by the same call.

    Args:
        kind: "elman", "gru" or "lstm".
        inputs: size of an input.
        width: D, size of a state.
    """

    def __init__(self, kind: str, inputs: int, width: int):
        super().__init__()
        self.names = parts_of(kind)
        self.rnn = CELLS[kind](inputs, width, batch_first=True)

    def forward(self, x: Tensor, start: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Run over x, float (B, T, inputs), from the given state (zeros if None).

        Returns:
            the hidden state after each input, (B, T, D), and the last state by name ("hidden", "cell"), each (B, D).
        """
        first = None
        if start is not None:
            parts = [start[name].unsqueeze(0).contiguous() for name in self.names]
            first = (parts[0], parts[1]) if len(parts) == 2 else parts[0]
        states, last = self.rnn(x, first)
        ends = last if isinstance(last, tuple) else (last,)
        return states, {name: end.squeeze(0) for name, end in zip(self.names, ends, strict=True)}


def parts_of(kind: str) -> tuple[str, ...]:
    """The names of the tensors that a cell carries from step to step."""
    return ("hidden", "cell") if kind == "lstm" else ("hidden",)


def reverse(x: Tensor, mask: Tensor) -> Tensor:
    """x, (B, S) or (B, S, D), each row's real part from right to left, its padding left where it is.

    Reversing twice gives x back.
    """
    lengths = mask.sum(1, keepdim=True)
    index = torch.arange(x.shape[1], device=x.device)[None, :]
    index = torch.where(mask, lengths - 1 - index, index)
    return x.gather(1, index if x.dim() == 2 else index[:, :, None].expand_as(x))


class EncoderLayer(nn.Module):
    """One layer, left to right, or half of the width in each direction."""

    def __init__(self, config: RNNConfig):
        super().__init__()
        width = config.width // 2 if config.bidirectional else config.width
        self.forwards = Cell(config.cell, config.width, width)
        self.backwards = Cell(config.cell, config.width, width) if config.bidirectional else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        states: Tensor
        states, _ = self.forwards(x)
        if self.backwards is None:
            return states
        # Padding stands to the right, so a state never depends on it in either direction.
        backwards, _ = self.backwards(reverse(x, mask))
        return torch.cat([states, reverse(backwards, mask)], dim=-1)


class RNNEncoder(nn.Module):
    """Source tokens -> `Memory`; its summary is the fixed vector.

    Args:
        config: the model's settings.
        embedding: the source's token vectors.
    """

    def __init__(self, config: RNNConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.dropout = Dropout(config.dropout)
        self.layers = Layers[EncoderLayer](EncoderLayer(config) for _ in range(config.layers))
        self.summary = config.summary
        self.bidirectional = config.bidirectional

    def forward(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S). It has no attention, so nothing for the taps."""
        x = self.embedding(source)
        for layer in self.layers:
            x = layer(self.dropout(x), mask)
        return Memory(x, mask, self.summarise(x, mask))

    def summarise(self, states: Tensor, mask: Tensor) -> Tensor:
        """c = q(h_1 … h_S), float (B, D): the last states of both directions, the mean or the maximum."""
        if self.summary == "mean":
            return states.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True)
        if self.summary == "max":
            return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
        last = states[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        if not self.bidirectional:
            return last
        half = states.shape[-1] // 2
        return torch.cat([last[:, :half], states[:, 0, half:]], dim=-1)


class RNNDecoder(nn.Module):
    """Target tokens so far -> features.

    Where nothing but the previous token enters a cell (no attention, or attention after it), all of T runs in one call
    of the fused cell. With attention before the cell, each step needs the state of the one before: a loop over T.

    Args:
        config: the model's settings.
        embedding: the target's token vectors.
    """

    def __init__(self, config: RNNConfig, embedding: Embedding):
        super().__init__()
        width = config.width
        self.embedding = embedding
        self.dropout = Dropout(config.dropout)
        self.every_step = config.context == "every_step"
        self.place = config.attention
        inputs = 2 * width if self.every_step or self.place == "before" else width
        self.layers = Layers[Cell](
            Cell(config.cell, inputs if index == 0 else width, width) for index in range(config.layers)
        )
        self.parts = [f"{index}.{name}" for index in range(config.layers) for name in parts_of(config.cell)]
        self.bridge = nn.Linear(width, len(self.parts) * width)
        self.attention = None if self.place == "none" else Attention(config.score, width, width)
        meets_context = self.every_step or self.attention is not None
        self.readout = nn.Linear(2 * width, width) if meets_context else None

    def start(self, memory: Memory) -> State:
        """The state before the first token: tanh(W summary + b) for each part of each layer (Cho et al. 2014)."""
        first = torch.tanh(self.bridge(memory.summary)).chunk(len(self.parts), dim=-1)
        cache = dict(zip(self.parts, first, strict=True))
        if self.attention is not None:
            cache["projected"] = self.attention.score.project(memory.states)
        return State(memory, 0, cache)

    def forward(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[Tensor, State]:
        """tokens int64 (B, T) -> features, float (B, T, D), and the state after them."""
        x = self.embedding(tokens)
        if self.place == "before":
            return self.loop(x, state, taps)
        if self.every_step:
            x = torch.cat([x, fixed(x, state.memory)], dim=-1)
        hidden, state = self.run(x, state)
        if self.attention is None:
            context = fixed(hidden, state.memory)
        else:
            context, weights = self.attention(hidden, state.memory, state.cache["projected"])
            if taps is not None:
                taps["cross.0"] = weights
        return self.read(hidden, context), state

    def loop(self, x: Tensor, state: State, taps: Taps | None) -> tuple[Tensor, State]:
        """Attention before the cell (Bahdanau et al. 2015): the previous state asks, the context enters the cell."""
        assert self.attention is not None
        hidden, contexts, looked = [], [], []
        top = f"{len(self.layers) - 1}.hidden"
        for token in torch.split(x, 1, dim=1):
            query = state.cache[top].unsqueeze(1)
            context, weights = self.attention(query, state.memory, state.cache["projected"])
            step, state = self.run(torch.cat([token, context], dim=-1), state)
            hidden.append(step)
            contexts.append(context)
            looked.append(weights)
        if taps is not None:
            taps["cross.0"] = torch.cat(looked, dim=1)
        return self.read(torch.cat(hidden, dim=1), torch.cat(contexts, dim=1)), state

    def run(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The layers of cells over x, float (B, T, inputs): the top layer's states, (B, T, D), and the state after."""
        cache: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            first = {name: state.cache[f"{index}.{name}"] for name in layer.names}
            x, last = layer(self.dropout(x), first)
            cache |= {f"{index}.{name}": tensor for name, tensor in last.items()}
        return x, state.advance(x.shape[1], cache)

    def read(self, hidden: Tensor, context: Tensor) -> Tensor:
        """tanh(W [context; hidden]) (Luong et al. 2015, eq. 5) where a context is met, else the hidden state."""
        if self.readout is not None:
            hidden = torch.tanh(self.readout(torch.cat([context, hidden], dim=-1)))
        features: Tensor = self.dropout(hidden)
        return features
