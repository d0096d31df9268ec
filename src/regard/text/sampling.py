"""BPE-dropout (Provilkov, Emelianenko and Voita 2020): training text in which each merge is left out by chance.

    p = 0     ▁straße                       of 100 draws of a vocabulary of 10,000:
    p = 0.1   ▁straße 77, ▁st ra ße 9, ▁stra ße 7, …
    p → 1     ▁ s t r a ß e

A model that meets many segmentations of a word learns what its pieces are made of. The drawing is ours, since what is
prepared must be the same wherever it is made, and the library's has no seed. (Nor is it the paper's: what it has left
out comes back as soon as its queue meets a merge that has become impossible.)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice, pairwise
from random import Random

import numpy as np
import numpy.typing as npt

from regard.text.tokenizer import SPECIALS, UNK, WORD_START, Tokenizer

POOL = 64
"""Segmentations of one word that are drawn, at most, for each part of the text that is worked on at a time."""

Ids = npt.NDArray[np.int64]
Pieces = tuple[int, ...]
Merge = tuple[int, int, int]
"""Its rank among all merges (0 is the best), where in the word it is, and the id that it makes."""


def parted(line: str) -> list[str]:
    """The words that bpe parts a line into, each with its ▁, as the library's Metaspace("▁", "always") does.

    A word begins at each space, at each ▁ of the text, and at the start; where there is text. Exactly so, or a line
    would have other tokens in training than in translation.
    """
    parts = line.replace(" ", WORD_START).removeprefix(WORD_START).split(WORD_START)
    return [WORD_START + part for part in parts] if line else []


class Segmenter:
    """Words to pieces, by the entries and merges of a bpe tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        assert tokenizer.kind == "bpe", tokenizer.kind
        entries, merges, _ = tokenizer.vocabulary
        self._ids = ids = {entry: id for id, entry in enumerate(entries) if id >= len(SPECIALS)}
        self._merges = {(ids[left], ids[right]): (rank, ids[left + right])
                        for rank, (left, right) in enumerate(merges)}

    def plain(self, word: str) -> Pieces:
        """The one segmentation that nothing is left out of."""
        return next(self.drawn(word, 0.0))

    def drawn(self, word: str, dropout: float) -> Iterator[Pieces]:
        """Segmentations of a word, without end. The word is the seed: its nth is the same everywhere.

        Args:
            word: with its ▁, as `parted` gives it.
            dropout: p, the probability with which a merge is left out.
        """
        chance, merges, start = Random(word).random, lru_cache(256)(self._possible), self._characters(word)
        while True:
            yield _merged(start, merges, chance, dropout)

    def _characters(self, word: str) -> Pieces:
        """The ids of a word's characters, neighbours that are unknown as one."""
        ids = [self._ids.get(character, UNK) for character in word]
        return tuple(id for before, id in pairwise([-1, *ids]) if id != UNK or before != UNK)

    def _possible(self, pieces: Pieces) -> list[Merge]:
        """The merges of neighbours, best first; of equals, the leftmost first."""
        known, pairs = self._merges, enumerate(pairwise(pieces))
        return sorted([(known[pair][0], place, known[pair][1]) for place, pair in pairs if pair in known])


def _merged(
    pieces: Pieces, merges: Callable[[Pieces], list[Merge]], chance: Callable[[], float], dropout: float
) -> Pieces:
    """Algorithm 1 of Provilkov et al. (2020): at each step leave out some of the merges, and make the best of the rest,
    until there is none. Whether a merge worse than that one is left out changes nothing, so it is not drawn."""
    while True:
        for _, place, id in merges(pieces):
            if chance() >= dropout:
                pieces = (*pieces[:place], id, *pieces[place + 2:])
                break
        else:
            return pieces


class Sampler:
    """Lines to ids, several times, each time with other segmentations of their words.

    A text has few words, many times each. So a word has a pool of segmentations, and each of its places in the text
    takes one after another from there, beginning anywhere: to draw one takes 6 µs, to take one 0.05.

    Args:
        tokenizer: of kind bpe.
        dropout: p, the probability with which a merge is left out.
        samples: of each line.
        seed: of where in the pools the places begin.
    """

    def __init__(self, tokenizer: Tokenizer, dropout: float, samples: int, seed: int = 0):
        self.segmenter, self.dropout, self.samples = Segmenter(tokenizer), dropout, samples
        self._random = np.random.default_rng(seed)

    def draw(self, lines: Sequence[str], longest: int) -> Iterator[tuple[Ids, Ids]]:
        """Each sample of some lines: int64 (tokens,), the ids of all of them, and int64 (lines,), the length of each.

        Args:
            lines: to segment.
            longest: a line of which a sample has more tokens than this has its plain segmentation there.
        """
        found = [parted(line) for line in lines]
        ends = np.cumsum([0, *map(len, found)])
        counts = Counter(chain.from_iterable(found))
        sizes = np.array([min(POOL, self.samples * count) for count in counts.values()], dtype=np.int64)
        numbers = {word: number for number, word in enumerate(counts)}
        words = np.fromiter((numbers[word] for word in chain.from_iterable(found)), np.int64, ends[-1])
        pools, size, first = self._pools(counts, sizes), sizes[words], (np.cumsum(sizes + 1) - sizes - 1)[words]
        begin = self._random.integers(2**32, size=len(words))
        for sample in range(self.samples):
            chosen = first + (begin + sample) % size
            too_long = pools.lengths_of(chosen, ends) > longest
            chosen = np.where(np.repeat(too_long, np.diff(ends)), first + size, chosen)
            yield pools.ids_of(chosen), pools.lengths_of(chosen, ends)

    def _pools(self, words: Iterable[str], sizes: Ids) -> "_Pools":
        """So many drawn segmentations of each word, and behind them the plain one."""
        found: list[Pieces] = []
        for word, size in zip(words, sizes.tolist(), strict=True):
            found += islice(self.segmenter.drawn(word, self.dropout), size)
            found.append(self.segmenter.plain(word))
        return _Pools(found)


class _Pools:
    """Segmentations by their numbers."""

    def __init__(self, found: Sequence[Pieces]):
        self.lengths = np.fromiter(map(len, found), np.int64, len(found))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids = np.fromiter(chain.from_iterable(found), np.int64, self.lengths.sum())

    def ids_of(self, chosen: Ids) -> Ids:
        """The ids of some, one after another."""
        lengths = self.lengths[chosen]
        shift = self.starts[chosen] - (np.cumsum(lengths) - lengths)
        ids: Ids = self.ids[np.repeat(shift, lengths) + np.arange(lengths.sum())]
        return ids

    def lengths_of(self, chosen: Ids, ends: Ids) -> Ids:
        """The length of each line: of what stands between two ends."""
        before = np.concatenate([[0], np.cumsum(self.lengths[chosen])])[ends]
        lengths: Ids = np.diff(before)
        return lengths
