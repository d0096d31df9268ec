"""Ids in batches. `Batch` is made here, and nothing else makes a mask or shifts a target.

The order of training is a pure function of (seed, epoch, position): `Order` can be asked for any update of any epoch
without going through those before it, so a run that goes on after an interruption reads no row twice and skips none.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.text.tokenizer import BOS, EOS, PAD

Ids = Sequence[int] | NDArray[np.integer]


class Rows(Protocol):
    """What a corpus must offer to be put in order: its lengths, and its ids by row.

    It has `len` pairs, and of each so many `samples`, unlike segmentations: row k * len + i is pair i in sample k.
    `parts` are the pairs of each of its corpora and how often an epoch holds them, on average; none: each pair once.
    `alignment` gives the links of a row, (L, 2), source token and target token; None where the corpus has none at all.
    """

    @property
    def samples(self) -> int: ...
    @property
    def parts(self) -> Sequence[tuple[int, float]]: ...
    @property
    def source_lengths(self) -> NDArray[np.integer]: ...
    @property
    def target_lengths(self) -> NDArray[np.integer]: ...
    def __len__(self) -> int: ...
    def source(self, row: int, /) -> Ids: ...
    def target(self, row: int, /) -> Ids: ...
    def alignment(self, row: int, /) -> NDArray[np.int64] | None: ...


@dataclass(frozen=True)
class Batch:
    """Some pairs, padded to the longest of them.

    Attributes:
        source: int64 (B, S), each row ended by </s>, then padding.
        source_mask: bool (B, S), True where there is a real token.
        target_in: int64 (B, T), what the decoder reads: <s>, then the target.
        target_out: int64 (B, T), what it should say there: the target, then </s>.
        target_mask: bool (B, T), True where there is a real token.
        tokens: real target tokens, </s> included.
        alignment: int64 (L, 3), row, target token and source token of each link between them, in order of rows; None:
            the corpus has no links.
    """

    source: Tensor
    source_mask: Tensor
    target_in: Tensor
    target_out: Tensor
    target_mask: Tensor
    tokens: int
    alignment: Tensor | None = None

    @classmethod
    def of(
        cls, sources: Sequence[Ids], targets: Sequence[Ids] | None = None,
        links: Sequence[NDArray[np.int64] | None] = ()
    ) -> "Batch":
        """Pad ids (without special tokens) to a batch; without targets, those are empty. Links are those of each row,
        int64 (L, 2), source token and target token."""
        if targets is None:
            targets = [[]] * len(sources)
        source, source_mask = pad(sources, end=EOS)
        target_out, target_mask = pad(targets, end=EOS)
        target_in, _ = pad(targets, begin=BOS)
        return cls(source, source_mask, target_in, target_out, target_mask, int(target_mask.sum()), in_rows(links))

    def __len__(self) -> int:
        return len(self.source)

    def real(self, x: Tensor) -> Tensor:
        """What x, (B, T, …), holds at the real target tokens alone: (N, …), sentence after sentence. How many they are
        is known, so that nobody waits for a GPU to count them."""
        places = torch.nonzero_static(self.target_mask.flatten(), size=self.tokens).squeeze(1)
        return x.flatten(0, 1).index_select(0, places)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self if self.source.device == device else self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in memory from which a GPU copies while the processor goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Any]) -> "Batch":
        return replace(self, **{name: change(each) for name, each in vars(self).items() if isinstance(each, Tensor)})


def in_rows(links: Sequence[NDArray[np.int64] | None]) -> Tensor | None:
    """The links of each row, (L, 2), source and target, in one tensor: int64 (L, 3), row, target and source."""
    found = [each for each in links if each is not None]
    if not found:
        return None
    rows = np.repeat(np.arange(len(found)), [len(each) for each in found])
    return torch.from_numpy(np.column_stack([rows, np.concatenate(found)[:, ::-1]]))


def pad(rows: Sequence[Ids], begin: int | None = None, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of ids -> int64 (B, longest) filled up with <pad>, and its mask, True where there is a real token.

    Args:
        rows: ids, each of any length, also 0.
        begin: an id put before each row.
        end: an id put behind each row.
    """
    first = 0 if begin is None else 1
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    whole = lengths + first + (0 if end is None else 1)
    column = np.arange(whole.max(initial=0))[None, :]
    ids = np.full((len(rows), column.shape[1]), PAD, dtype=np.int64)
    ids[(column >= first) & (column < first + lengths[:, None])] = np.concatenate(
        [np.asarray(row, dtype=np.int64) for row in rows]
    )
    if begin is not None:
        ids[:, 0] = begin
    if end is not None:
        ids[np.arange(len(rows)), whole - 1] = end
    return torch.from_numpy(ids), torch.from_numpy(column < whole[:, None])


def cut(lengths: NDArray[np.integer], budget: int) -> list[tuple[int, int]]:
    """Cut rows into runs (start, end) whose count times longest length is at most the budget; never an empty run.

    Args:
        lengths: of the rows in their order, best sorted.
        budget: padded tokens of one run; a row that is longer than that alone stands alone.
    """
    runs, start = [], 0
    while start < len(lengths):
        most = max(1, budget // max(1, int(lengths[start])))  # were all of them as short as the first
        longest = np.maximum.accumulate(lengths[start : start + most])
        fits = longest * np.arange(1, len(longest) + 1) <= budget
        size = len(fits) if fits.all() else max(1, int(fits.argmin()))
        runs.append((start, start + size))
        start += size
    return runs


def drawn(parts: Sequence[tuple[int, float]], seed: int, epoch: int) -> NDArray[np.uint32]:
    """The rows of an epoch of weighted corpora, in their own order, those that are seen several times as often in it.

    The weight's whole part is for each row. Of its rest each row collects so much an epoch, from a start of its own
    that the seed draws, and is seen once more when that passes 1: in any run of epochs no two rows of a corpus differ
    by more than one.

    Args:
        parts: rows and weight of each corpus.
        seed: of the order.
        epoch: from 0.
    """
    found, first, whole = [np.empty(0, dtype=np.uint32)], 0, 2**32
    for part, (pairs, weight) in enumerate(parts, 1):
        rows = np.arange(first, first + pairs, dtype=np.uint32)
        found += [rows] * int(weight)
        if share := round(weight % 1 * whole):
            starts = np.random.default_rng([seed, 0, part]).integers(whole, size=pairs, dtype=np.uint32)
            collected = starts + np.uint32(epoch * share % whole)  # 2^32 are 1, and what is over it falls away
            found.append(rows[collected >= whole - share])
        first += pairs
    epoch_rows = np.concatenate(found)
    # Weights that leave an epoch empty, as 0.1 does of three pairs, leave it one pair, not always the same.
    return epoch_rows if len(epoch_rows) else np.array([epoch % first], dtype=np.uint32)


class Order:
    """The order of training: length-bucketed batches of about `batch_tokens` padded tokens, shuffled anew each epoch.

    Each epoch reads the next sample of its corpus, and after the last the first again.

    Args:
        corpus: the rows.
        batch_tokens: padded target tokens (and no more padded source tokens) of one update.
        seed: of the order.
        pieces: batches that one update is parted into; they do not change which rows it has.
    """

    def __init__(self, corpus: Rows, batch_tokens: int, seed: int, pieces: int = 1):
        self.corpus, self.seed, self.budget, self.pieces = corpus, seed, batch_tokens, pieces
        self._epoch = lru_cache(maxsize=2)(self._plan)

    def updates(self, epoch: int) -> int:
        """How many updates an epoch has."""
        return len(self._epoch(epoch))

    def rows(self, epoch: int, position: int) -> list[NDArray[np.uint32]]:
        """The rows of one update, in pieces; an update of fewer rows has a piece for each."""
        rows = self._epoch(epoch)[position]
        return np.array_split(rows, min(self.pieces, len(rows)))

    def tokens(self, epoch: int, position: int) -> int:
        """Real target tokens of one update, </s> included."""
        rows = self._epoch(epoch)[position]
        return int(self.corpus.target_lengths[rows].sum()) + len(rows)

    def sums(self, epoch: int) -> tuple[int, int, int]:
        """The rows of an epoch, and real tokens of all their sources and of all their targets, </s> included."""
        rows, corpus = np.concatenate(self._epoch(epoch)), self.corpus
        source, target = (int(lengths[rows].sum()) for lengths in (corpus.source_lengths, corpus.target_lengths))
        return len(rows), source + len(rows), target + len(rows)

    def update(self, epoch: int, position: int, part: slice = slice(None)) -> list[Batch]:
        """The batches of one update, or some of them: a pure function of (seed, epoch, position)."""
        return [self._batch(rows.tolist()) for rows in self.rows(epoch, position)[part]]

    def _batch(self, rows: list[int]) -> Batch:
        corpus = self.corpus
        return Batch.of([corpus.source(row) for row in rows], [corpus.target(row) for row in rows],
                        [corpus.alignment(row) for row in rows])

    def _plan(self, epoch: int) -> list[NDArray[np.uint32]]:
        parts, random, pairs = self.corpus.parts, np.random.default_rng([self.seed, epoch]), len(self.corpus)
        first = epoch % self.corpus.samples * pairs
        seen = first + drawn(parts, self.seed, epoch) if parts else slice(first, first + pairs)
        # One more each for the end symbol. Sorted by the longer side, ties by target, source and chance.
        source, target = (lengths[seen] + 1 for lengths in (self.corpus.source_lengths, self.corpus.target_lengths))
        longer, chance = np.maximum(source, target), random.integers(2**16, size=len(source))
        keys = (np.minimum(key, 2**16 - 1).astype(np.uint16) for key in (chance, source, target, longer))
        order = np.lexsort(tuple(keys)).astype(np.uint32)  # keys of 16 bits: nine times as fast as longer ones
        runs = cut(longer[order], self.budget)
        order = seen[order] if isinstance(seen, np.ndarray) else first + order
        return [order[start:end] for start, end in (runs[index] for index in random.permutation(len(runs)))]


def by_length(lengths: Sequence[int], budget: int, most: int | None = None) -> Iterator[list[int]]:
    """Indices of inputs in batches, longest first, each of at most `budget` padded tokens and `most` rows."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    for start, end in cut(np.asarray(lengths, dtype=np.int64)[order], budget):
        step = most or end - start
        for first in range(start, end, step):
            yield order[first : min(first + step, end)].tolist()
