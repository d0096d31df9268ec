"""What an encoder hands to a decoder (`Memory`), and what a decoder carries from step to step (`State`).

Search reorders a `State` with `select` and needs to know nothing else about the model behind it.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

Taps = dict[str, Tensor]
"""Inner values given on request: a caller passes an empty dict down, and each attention writes its weights, (B, T, S)
or (B, H, T, S), under its own name ("cross.0", "encoder.0", "decoder.0"). When nobody asks (None), nothing is kept."""


@dataclass(frozen=True)
class Memory:
    """A source as its encoder remembers it. B batch, S source length, D the encoder's width.

    Attributes:
        states: float (B, S, D), one vector for each source token: what is compared.
        mask: bool (B, S), True where there is a real token.
        summary: float (B, D), one vector for the whole source.
        source: int64 (B, S), the tokens themselves.
        values: float (B, S, D), what attention sums up; the same tensor as `states` in all families but one (Gehring
            et al. 2017 add the token vectors).
    """

    states: Tensor
    mask: Tensor
    summary: Tensor
    source: Tensor
    values: Tensor

    def select(self, rows: Tensor) -> "Memory":
        """The memory of the given rows (int64, (N,)), repeated or left out as they say."""
        states = self.states[rows]
        values = states if self.values is self.states else self.values[rows]
        return Memory(states, self.mask[rows], self.summary[rows], self.source[rows], values)


@dataclass(frozen=True)
class State:
    """All that a decoder knows before its next token.

    Attributes:
        memory: what it may look at.
        length: target tokens it has read so far.
        cache: its tensors by name, the batch always the first dimension.
    """

    memory: Memory
    length: int = 0
    cache: dict[str, Tensor] = field(default_factory=dict)

    def select(self, rows: Tensor) -> "State":
        """The state of the given rows (int64, (N,)), repeated or left out as they say."""
        cache = {name: tensor[rows] for name, tensor in self.cache.items()}
        return State(self.memory.select(rows), self.length, cache)

    def advance(self, tokens: int, cache: dict[str, Tensor]) -> Self:
        """The state after so many more tokens, with these tensors in place of the old of the same name."""
        return replace(self, length=self.length + tokens, cache={**self.cache, **cache})
