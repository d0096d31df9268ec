"""What an encoder hands to a decoder (`Memory`), and what a decoder carries from step to step (`State`).

Search reorders a `State` with `select` and needs to know nothing else about the model behind it.

N sources, each with K rows (a beam's hypotheses), one after the other: R = N × K. What depends on a source alone is
held once, and its rows ask as if their tokens were positions of one sequence: (R, T, D) seen as (N, K T, D).
"""

from collections import UserDict
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from regard.model.rows import Packed

ROOM = 8
"""Tokens of each row that the blocks of a `Past` have room for when they are made."""


class Taps(UserDict[str, Tensor]):
    """Inner values given on request: a caller passes an empty one down, and each attention writes its weights, (B, T,
    S) or (B, H, T, S), under its own name ("cross.0", "encoder.0", "decoder.0"). When nobody asks (None), nothing is
    kept. No dict, for of a dict a layer whose weights are shared out (FSDP2) gets a copy, and what it writes is lost.
    """


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
        held: the states as an encoder packed them, (1, R, D), and how, for a decoder that packs too; None: it did not.
    """

    states: Tensor
    mask: Tensor
    summary: Tensor
    source: Tensor
    values: Tensor
    held: tuple[Packed, Tensor] | None = None

    def select(self, rows: Tensor) -> "Memory":
        """The memory of the given rows (int64, (N,)), repeated or left out as they say."""
        names = ["states", "mask", "summary", "source"] + ["values"] * (self.values is not self.states)
        chosen = {name: getattr(self, name).index_select(0, rows) for name in names}
        return Memory(**({"values": chosen["states"]} | chosen))


@dataclass(frozen=True)
class Past:
    """Keys and values of the tokens read, each held once for all rows that go on from it.

    Tokens stand in slots of their source, and each row knows its own: no key moves when search moves, repeats or drops
    rows. When room ends or a source leaves, slots that no row knows any more are given up.

    Attributes:
        places: int64 (R, t), the slot of each token of a row.
        used: C, slots taken in each source.
        blocks: by name, float (N, H, C or more, D / H).
        written: slots of the blocks that hold something, maybe of a state that went on from this one.
    """

    places: Tensor
    used: int = 0
    blocks: dict[str, Tensor] = field(default_factory=dict)
    written: list[int] = field(default_factory=lambda: [0])

    def grow(self, tokens: int, beam: int) -> "Past":
        """With slots for so many more tokens of all rows, in the order (K T)."""
        sources = torch.arange(len(self.places) // beam, device=self.places.device)
        end, room = self.used + beam * tokens, min((block.shape[2] for block in self.blocks.values()), default=0)
        if self.blocks and not torch.is_grad_enabled() and (end > room or self.written != [self.used]):
            return self.pack(self.places, sources, beam * tokens * ROOM).grow(tokens, beam)
        self.written[0] = end
        new = torch.arange(self.used, end, device=sources.device).view(beam, tokens).repeat(len(sources), 1)
        return Past(torch.cat([self.places, new], dim=1), end, dict(self.blocks), self.written)

    def put(self, name: str, new: Tensor) -> Tensor:
        """Those of all slots, (N, H, C, D / H), once the last of them hold what is new, (N, H, K T, D / H)."""
        start = self.used - new.shape[2]
        if start and not torch.is_grad_enabled():
            self.blocks[name][:, :, start : self.used] = new
        else:
            self.blocks[name] = torch.cat([self.blocks[name][:, :, :start], new], dim=2) if start else new
        return self.blocks[name][:, :, : self.used]

    def pack(self, places: Tensor, sources: Tensor, room: int) -> "Past":
        """The slots that rows hold whose places are (R', t), of sources int64 (N',); and room for so many more."""
        own = places.view(len(sources), places.numel() // max(1, len(sources)))  # (N', K' t)
        held = torch.zeros(len(sources), self.used, dtype=torch.bool, device=own.device).scatter(1, own, True)
        most = int(held.sum(1).max()) if held.numel() else 0
        slots = held.byte().argsort(dim=1, descending=True, stable=True)[:, :most]  # in their order
        blocks = {}
        for name, block in self.blocks.items():
            vectors = block.transpose(1, 2).flatten(2)  # (N, C, D)
            rows = (sources[:, None] * vectors.shape[1] + slots).flatten()
            kept = vectors.new_empty(len(sources), most + room, *block.shape[1::2])
            kept[:, :most] = vectors.flatten(0, 1).index_select(0, rows).view(kept[:, :most].shape)
            blocks[name] = kept.transpose(1, 2)
        return Past((held.cumsum(1) - 1).gather(1, own).view_as(places), most, blocks, [most])

    def hidden(self, tokens: int, beam: int, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the last T tokens of each row may look at.

        Returns:
            a mask, bool (T, t), None for everywhere; and what scores gain: the given bias, float (H, T, t), or where
            slots are not the tokens of each row in their order, float (N, H or 1, K T, C), -inf at those of others.
        """
        R, t = self.places.shape
        order = torch.ones(tokens, t, dtype=torch.bool, device=self.places.device).tril(diagonal=t - tokens)
        if self.used == t:
            return None if tokens == 1 else order, bias
        zeros = next(iter(self.blocks.values())).new_zeros(1, tokens, t)
        own = (zeros if bias is None else bias).masked_fill(~order, -torch.inf).expand(R, -1, -1, -1)
        empty = own.new_full((*own.shape[:3], self.used), -torch.inf)
        gained = empty.scatter(3, self.places[:, None, None].expand_as(own), own)
        return None, gained.view(R // beam, beam, *gained.shape[1:]).transpose(1, 2).flatten(2, 3)

    def seen(self, weights: Tensor, beam: int) -> Tensor:
        """Attention weights, (N, H, K T, C), of each row, (R, H, T, t)."""
        each = apart(weights, beam)
        return each.gather(3, self.places[:, None, None].expand(*each.shape[:3], -1))


def apart(weights: Tensor, beam: int) -> Tensor:
    """(N, H, K T, S) -> (R, H, T, S)."""
    N, H, queries, S = weights.shape
    return weights.view(N, H, beam, queries // beam, S).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class State:
    """All that a decoder knows before its next token.

    Attributes:
        memory: what it may look at, of each source once.
        length: target tokens it has read so far.
        cache: its tensors by name, (R, …).
        shared: those that depend on the source alone, (N, …).
        past: keys and values of the tokens read; None in families that have none.
        beam: K.
    """

    memory: Memory
    length: int = 0
    cache: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    past: Past | None = None
    beam: int = 1

    def select(self, rows: Tensor) -> "State":
        """The state of the given rows, repeated or left out: int64 (R',), or (N', K'), K' each of one source."""
        sources, beam = (rows[:, 0], rows.shape[1]) if rows.dim() == 2 else (rows, 1)
        sources, rows = sources // self.beam, rows.flatten()
        memory, shared, past = self.memory, self.shared, self.past
        stay = torch.equal(sources, torch.arange(len(memory.mask), device=rows.device))
        if not stay:
            memory, shared = memory.select(sources), {name: x.index_select(0, sources) for name, x in shared.items()}
        if past is not None:
            places = past.places.index_select(0, rows)
            past = replace(past, places=places) if stay else past.pack(places, sources, ROOM * beam)
        cache = {name: tensor.index_select(0, rows) for name, tensor in self.cache.items()}
        return State(memory, self.length, cache, shared, past, beam)

    def advance(self, tokens: int, cache: dict[str, Tensor], past: Past | None = None) -> Self:
        """The state after so many more tokens, with these tensors in place of the old of the same name."""
        return replace(self, length=self.length + tokens, cache={**self.cache, **cache}, past=past)
