"""The RNN encoder-decoder: with its fixed vector (Cho et al. 2014, Sutskever et al. 2014) or with attention
(Bahdanau et al. 2015, Luong et al. 2015).

B batch, S source length, T target length, D width, E the memory's width.
The name in taps is "cross.0". In a decoder's `State.cache`, "i.hidden" and "i.cell", float (B, D), are the state of
layer i; "coverage", (B, S), the sum of all weights so far; "fed", (B, D), what the last attention made. In `shared`,
"projected", (B, S, D), are the keys as the score compares them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.config_model import RNNDecoderConfig, RNNEncoderConfig
from regard.model import stepwise
from regard.model.attention import Attention, fixed, hiding
from regard.model.cells import KINDS, Cell
from regard.model.layers import Dropout, Embedding, Layers, narrow
from regard.model.rows import few, linear
from regard.model.state import Memory, State, Taps


def reverse(x: Tensor, mask: Tensor) -> Tensor:
    """x, (B, S) or (B, S, D), each row's real part from right to left, its padding left where it is.

    Reversing twice gives x back.
    """
    lengths = mask.sum(1, keepdim=True)
    index = torch.arange(x.shape[1], device=x.device)[None, :]
    index = torch.where(mask, lengths - 1 - index, index)
    return x.gather(1, index if x.dim() == 2 else index[:, :, None].expand_as(x))


class SequenceDropout(Dropout):
    """Dropout of what enters each layer and leaves the last, float (B, T, D): other values at each position, or
    (variational) the same ones at every position of a sequence.

    Variational dropout is that of Gal and Ghahramani (2016), but for their mask on the recurrent matrices: what a cell
    hands to its own next step is never dropped.

    Args:
        probability: share of values set to 0 in training.
        variational: whether all positions of a sequence share one mask.
    """

    def __init__(self, probability: float, variational: bool):
        super().__init__(probability)
        self.variational = variational

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of x, (B, T, D)."""
        return x * self.factors(x, x.shape[-1]) if self.drops else x

    def factors(self, x: Tensor, width: int) -> Tensor:
        """What to multiply inputs of a width with, float (B, T, width), B and T those of x: ones outside training."""
        B, T = x.shape[:2]
        if not self.drops:
            return x.new_ones(1).expand(B, T, width)
        return self.mask((B, 1 if self.variational else T, width), x).expand(-1, T, -1)


class EncoderLayer(nn.Module):
    """One layer, left to right, or half of the width in each direction."""

    def __init__(self, config: RNNEncoderConfig):
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
        config: the encoder's settings.
        embedding: the source's token vectors.
    """

    def __init__(self, config: RNNEncoderConfig, embedding: Embedding):
        super().__init__()
        self.embedding = embedding
        self.dropout = SequenceDropout(config.dropout, config.variational_dropout)
        self.layers = Layers[EncoderLayer](EncoderLayer(config) for _ in range(config.layers))
        self.summary, self.bidirectional, self.residual = config.summary, config.bidirectional, config.residual
        self.projection = nn.Linear(config.width, config.width, bias=False) if self.summary == "project" else None

    def forward(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S). It has no attention, so nothing for the taps."""
        x = self.embedding(source)
        for index, layer in enumerate(self.layers):
            y = layer(self.dropout(x), mask)
            x = x + y if self.residual and index else y  # residual as in Wu et al. (2016), section 3.1
        return Memory(x, mask, self.summarise(x, mask), source, x)

    def summarise(self, states: Tensor, mask: Tensor) -> Tensor:
        """c = q(h_1 … h_S), float (B, D): the mean, the maximum, or h_S, the last states of both directions.

        "project" is tanh(V h_S) (Cho et al. 2014).
        """
        if self.summary == "mean":
            return states.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True)
        if self.summary == "max":
            return states.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
        last = states[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        if self.bidirectional:
            half = states.shape[-1] // 2
            last = torch.cat([last[:, :half], states[:, 0, half:]], dim=-1)
        return last if self.projection is None else torch.tanh(self.projection(last))


class Found(NamedTuple):
    """What a decoder has made of T positions."""

    hidden: Tensor  # (B, T, D), what leaves the top layer
    context: Tensor  # (B, T, E)
    weights: Tensor | None  # (B, T, S); None without attention
    output: Tensor  # (B, T, D), what `read` makes of hidden and context


class RNNDecoder(nn.Module):
    """Target tokens so far -> features.

    What enters the first cell at a step, y being the previous token and c the context:

        context = "initial"        y            Sutskever et al. (2014); and all with attention = "after", Luong et al.
        context = "every_step"     [y; c]       Cho et al. (2014), who read c in the output layer too
        context = "input_only"     c            no token at all: features depend on the position alone
        attention = "before"       [y; c_t]     Bahdanau et al. (2015)
        input_feeding = true       [y; h̃_{t-1}] Luong et al. (2015), section 3.3

    Where nothing that enters was made by the step before (the first three), all of T runs in one call of the
    cell: `at_once`. The other two are a loop: `step_by_step`, or, where a processor makes several steps, most of them
    `written_out`.

    Args:
        config: the decoder's settings.
        embedding: the target's token vectors.
        memory_width: E, size of the memory's states.
    """

    def __init__(self, config: RNNDecoderConfig, embedding: Embedding, memory_width: int):
        super().__init__()
        width = config.width
        self.embedding = embedding
        self.dropout = SequenceDropout(config.dropout, config.variational_dropout)
        self.context, self.residual, self.feeding = config.context, config.residual, config.input_feeding
        self.before = config.attention == "before"
        meets_context = config.context != "initial" or self.before
        beside = memory_width if meets_context else width if self.feeding else 0
        inputs = beside + (0 if config.context == "input_only" else width)
        self.layers = Layers[Cell](
            Cell(config.cell, inputs if index == 0 else width, width) for index in range(config.layers)
        )
        self.parts = [f"{index}.{name}" for index in range(config.layers) for name in KINDS[config.cell].parts]
        self.bridge = nn.Linear(memory_width, len(self.parts) * width)
        self.attention = None if config.attention == "none" else Attention(
            config.score, width, memory_width, config.window, config.window_radius, config.coverage)
        reads_context = config.context == "every_step" or self.attention is not None
        self.readout = nn.Linear(memory_width + width, width) if reads_context else None
        self.gate = nn.Linear(memory_width + 2 * width, 1) if config.copy else None

    def start(self, memory: Memory) -> State:
        """The state before the first token: tanh(W summary + b) for each part of each layer (Cho et al. 2014)."""
        first = torch.tanh(self.bridge(memory.summary)).chunk(len(self.parts), dim=-1)
        cache, shared = dict(zip(self.parts, first, strict=True)), {}
        if self.attention is not None:
            shared["projected"] = self.attention.score.project(memory.states)
            if self.attention.w_c is not None:
                cache["coverage"] = torch.zeros_like(memory.states[:, :, 0])
        if self.feeding:
            cache["fed"] = torch.zeros_like(first[0])
        return State(memory, 0, cache, shared)

    def forward(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[Tensor, State]:
        """tokens int64 (B, T) -> features, float (B, T, D), and the state after them.

        With copying, features are (B, T, D + 1 + S): the logit of the gate p_gen = σ(w · [context; hidden; token] + b)
        (See et al. 2017, eq. 8) and the weights, scaled to sum to 1, follow: what `regard.model.pointer` reads.
        """
        x, cache = self.embedding(tokens), dict(state.cache)
        how = self.at_once
        if self.before or self.feeding:
            how = self.written_out if stepwise.runs(self.attention, x, state.memory) else self.step_by_step
        found = how(x, state, cache)
        features = self.dropout(found.output)
        if taps is not None and found.weights is not None:
            taps["cross.0"] = found.weights
        if self.gate is not None and found.weights is not None:
            gate = self.gate(torch.cat([found.context, found.hidden, x], dim=-1))
            shares = found.weights / found.weights.sum(-1, keepdim=True)  # those of a local_p window sum to less than 1
            features = torch.cat([features, gate, shares], dim=-1)
        return features, state.advance(tokens.shape[1], cache)

    def at_once(self, x: Tensor, state: State, cache: dict[str, Tensor]) -> Found:
        """All T tokens, float (B, T, D), through each layer in turn; then, where there is attention, all T look."""
        if self.context != "initial":
            c = fixed(x, state.memory)
            x = c if self.context == "input_only" else torch.cat([x, c], dim=-1)
        for index, layer in enumerate(self.layers):
            y, last = layer(self.dropout(x), {name: cache[f"{index}.{name}"] for name in layer.kind.parts})
            x = x + y if self.residual and index else y
            cache.update({f"{index}.{name}": tensor for name, tensor in last.items()})
        weights: Tensor | None = None
        if self.attention is None:
            context = fixed(x, state.memory)
        else:
            context, weights = self.look(x, state, cache, 0)
        return Found(x, context, weights, self.read(x, context))

    def step_by_step(self, x: Tensor, state: State, cache: dict[str, Tensor]) -> Found:
        """One token after another, (B, T, D), each step asking with, or entering, what the one before it made."""
        first, *others = self.layers
        width, top = x.shape[-1], f"{len(others)}.hidden"
        factor = self.dropout.factors(x, first.rnn.input_size)
        factors = [factor[..., width:], *(self.dropout.factors(x, width) for _ in others)]
        tokens = first.gates(x * factor[..., :width]).unbind(1)  # T times (B, G), made in one product
        weight = first.part("weight_ih")[:, width:].T  # what enters beside the token meets it in each step
        steps = [layer.steps() for layer in self.layers]

        def enter(t: int, beside: Tensor) -> Tensor:
            """Step t through all layers, (B, 1, inputs) -> (B, 1, D)."""
            y = beside.squeeze(1)
            for index, layer in enumerate(self.layers):
                dropped = y * factors[index][:, t]
                gates = layer.gates(dropped) if index else torch.addmm(tokens[t], dropped, weight)
                after = steps[index](gates, {name: cache[f"{index}.{name}"] for name in layer.kind.parts})
                cache.update({f"{index}.{name}": tensor for name, tensor in after.items()})
                y = y + after["hidden"] if self.residual and index else after["hidden"]
            return y.unsqueeze(1)

        found: list[tuple[Tensor, ...]] = []
        for t in range(x.shape[1]):
            if self.before:
                context, weights = self.look(cache[top].unsqueeze(1), state, cache, t)  # c_t = attention(s_{t-1})
                hidden = enter(t, context)  # s_t = f(s_{t-1}, [y_{t-1}; c_t])
                found.append((hidden, context, weights))
            else:
                hidden = enter(t, cache["fed"].unsqueeze(1))  # h_t = f(h_{t-1}, [y_{t-1}; h̃_{t-1}])
                context, weights = self.look(hidden, state, cache, t)  # c_t = attention(h_t)
                output = self.read(hidden, context)  # h̃_t = tanh(W [c_t; h_t])
                cache["fed"] = output.squeeze(1)
                found.append((hidden, context, weights, output))
        hidden, context, weights, *outputs = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
        return Found(hidden, context, weights, outputs[0] if outputs else self.read(hidden, context))

    def written_out(self, x: Tensor, state: State, cache: dict[str, Tensor]) -> Found:
        """What `step_by_step` makes, in one function with its gradient: `regard.model.stepwise`."""
        assert self.attention is not None
        (first, *_), memory, (B, T, width) = self.layers, state.memory, x.shape
        factor, *factors = (self.dropout.factors(x, layer.rnn.input_size).transpose(0, 1) for layer in self.layers)
        said = first.gates(few((x.transpose(0, 1) * factor[..., :width]).flatten(0, 1)))
        scores, inputs = stepwise.compared(self.attention, state.shared["projected"])
        inputs.append(memory.values)
        if self.feeding and self.readout is not None:
            inputs += [cache["fed"], narrow(self.readout.weight), narrow(self.readout.bias)]
        for index, layer in enumerate(self.layers):
            inputs += layer.for_loop(layer.bias().expand(T * B, -1)) if index else layer.for_loop(said, width)
            inputs += [cache[f"{index}.{name}"] for name in layer.kind.parts]
        near, _ = self.attention.window(x, memory.mask, state.length)
        hidden, context, weights, made, *last = stepwise.loop(
            stepwise.Form(first.kind, self.residual, self.feeding, scores), hiding(near, torch.float32),
            [factor[..., width:], *factors], inputs)
        cache.update(zip(self.parts, last, strict=True))
        if made is not None:
            cache["fed"], made = made[-1], made.transpose(0, 1)
        hidden, context, weights = (each.transpose(0, 1) for each in (hidden, context, weights))
        return Found(hidden, context, weights, self.read(hidden, context) if made is None else made)

    def look(self, query: Tensor, state: State, cache: dict[str, Tensor], t: int) -> tuple[Tensor, Tensor]:
        """Context, (B, T, E), and weights, (B, T, S), of queries, (B, T, D), the first of them t after the state."""
        assert self.attention is not None
        coverage = cache.get("coverage")
        context, weights = self.attention(query, state.memory, state.shared["projected"], state.length + t, coverage)
        if coverage is not None:
            cache["coverage"] = coverage + weights.sum(1)
        return context, weights

    def read(self, hidden: Tensor, context: Tensor) -> Tensor:
        """tanh(W [context; hidden]) (Luong et al. 2015, eq. 5) where a context is read, else the hidden state."""
        if self.readout is None:
            return hidden
        return torch.tanh(linear(torch.cat([context, hidden], dim=-1), self.readout.weight, self.readout.bias))
