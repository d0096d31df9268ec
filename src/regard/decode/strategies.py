"""Which children of the open hypotheses a search looks at, best first: the only thing in which strategies differ.

Each strategy takes log-probabilities of the next token, float (R, V), and the paths; it gives parents (rows of the
paths) and tokens, int64, and the children's log-probabilities, float64, (U, M) each. The search keeps the first K of
each beam. A child that may not be has the log-probability -inf, and the search leaves it out.

U beams, K hypotheses of each, R = U × K rows, M children of each beam, V vocabulary, G groups, C forced phrases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.decode.constraints import Constraints
from regard.decode.hypotheses import Paths

Strategy = Callable[[Tensor, Paths], tuple[Tensor, Tensor, Tensor]]
BLOCK = 64


def greedy(log_p: Tensor, paths: Paths) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token alone. K = M = 1."""
    totals, tokens = top(log_p, 1, paths.totals)
    return torch.arange(len(log_p), device=log_p.device)[:, None], tokens, totals


@dataclass(frozen=True)
class Sampling:
    """A token drawn from the model's distribution: sharpened or flattened by a temperature, then cut to the `top_k`
    likeliest tokens (Fan et al. 2018), then to the likeliest that together hold `top_p` (Holtzman et al. 2020).

    Attributes:
        chances: float64 (U, longest), the random number of each beam and step, from 0 up to 1. K = M = 1.
        temperature: log-probabilities are divided by it.
        top_k: tokens kept; None: all.
        top_p: probability kept; None: all.
    """

    chances: Tensor
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @staticmethod
    def chances_of(seed: int, lines: Sequence[int], samples: int, longest: Sequence[int]) -> Tensor:
        """Random numbers that depend on seed, line, sample and step, and on nothing else: not on neighbours."""
        chances = np.zeros((len(lines), samples, max(longest)))
        for row, (line, most) in enumerate(zip(lines, longest, strict=True)):
            for sample in range(samples):
                chances[row, sample, :most] = np.random.default_rng([seed, line, sample]).random(most)
        return torch.from_numpy(chances).flatten(0, 1)

    def distribution(self, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """What is drawn from, float64 (R, M), and its tokens, int64 (R, M)."""
        if self.top_k is not None:
            values, tokens = top(log_p, min(self.top_k, log_p.shape[1]))
        elif self.top_p is not None:
            values, tokens = log_p.sort(descending=True)
        else:
            values, tokens = log_p, torch.arange(log_p.shape[1], device=log_p.device).expand_as(log_p)
        p = (values.double() / self.temperature).softmax(-1)
        if self.top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)  # what the likelier ones hold already
        return p, tokens

    def __call__(self, log_p: Tensor, paths: Paths) -> tuple[Tensor, Tensor, Tensor]:
        p, tokens = self.distribution(log_p)
        heaped = p.cumsum(-1)
        chance = self.chances[paths.unit, paths.length][:, None] * heaped[:, -1:]
        place = torch.searchsorted(heaped, chance, right=True).clamp(max=p.shape[1] - 1)
        drawn = tokens.gather(1, place)
        totals = paths.totals[:, None] + log_p.gather(1, drawn)
        return torch.arange(len(log_p), device=log_p.device)[:, None], drawn, totals


@dataclass(frozen=True)
class Beam:
    """The 2K likeliest children: at most K of them end, so K go on."""

    width: int

    def __call__(self, log_p: Tensor, paths: Paths) -> tuple[Tensor, Tensor, Tensor]:
        K, V = self.width, log_p.shape[1]
        totals, index = top(log_p, min(2 * K, K * V), paths.totals, K)
        first = torch.arange(0, len(log_p), K, device=log_p.device)[:, None]
        return first + index // V, index % V, totals


@dataclass(frozen=True)
class DiverseBeam:
    """Diverse beam search (Vijayakumar et al. 2018): G beams of a sentence choose one after the other at each step, by
    log-probability less `diversity` for each time that earlier groups took the same token at this step (Hamming)."""

    width: int
    groups: int
    diversity: float

    def __call__(self, log_p: Tensor, paths: Paths) -> tuple[Tensor, Tensor, Tensor]:
        K, V, beam = self.width, log_p.shape[1], Beam(self.width)
        rows = torch.arange(len(log_p), device=log_p.device).view(-1, self.groups, K)  # (N, G, K)
        taken = log_p.new_zeros(len(rows), V)
        found = []
        for group in rows.unbind(1):  # (N, K)
            own = group.flatten()
            penalised = log_p[own] - self.diversity * taken.repeat_interleave(K, 0)
            parents, tokens, _ = beam(penalised, paths.select(own))  # (N, M)
            parents = own[parents]
            totals = paths.totals[parents] + log_p[parents, tokens]
            found.append((parents, tokens, totals))
            taken.scatter_add_(1, tokens[:, :K], (totals > -torch.inf)[:, :K].to(taken.dtype))
        parents, tokens, totals = (torch.stack(each, 1).flatten(0, 1) for each in zip(*found, strict=True))
        return parents, tokens, totals  # (N * G, M)


@dataclass(frozen=True)
class ConstrainedBeam:
    """Dynamic beam allocation (Post and Vilar 2018): beside the 2K likeliest children, all that lead a forced phrase on
    and the likeliest child of each hypothesis are looked at. Those that hold as many tokens of phrases are a bank, and
    the banks that are not empty share the beam evenly, the fullest first."""

    width: int
    constraints: Constraints

    def __call__(self, log_p: Tensor, paths: Paths) -> tuple[Tensor, Tensor, Tensor]:
        assert paths.met is not None
        parents, tokens, _ = Beam(self.width)(log_p, paths)
        ahead = self.constraints.next_tokens(paths.unit, paths.met)  # (R, C)
        others = torch.cat([ahead, top(log_p, 1)[1]], 1)  # (R, C + 1)
        own = torch.arange(len(log_p), device=log_p.device)[:, None].expand_as(others)
        parents = torch.cat([parents, own.reshape(len(parents), -1)], 1)  # (U, M)
        tokens = torch.cat([tokens, others.view(len(tokens), -1)], 1)
        totals = paths.totals[parents] + log_p[parents, tokens.clamp(min=0)]
        twice = (parents[:, :, None] == parents[:, None]) & (tokens[:, :, None] == tokens[:, None])
        totals = totals.masked_fill((tokens < 0) | twice.tril(-1).any(2), -torch.inf)
        best = totals.argsort(dim=1, descending=True, stable=True)
        parents, tokens, totals = (each.gather(1, best) for each in (parents, tokens, totals))
        bank = self.constraints.advance(paths.unit[parents], paths.met[parents], tokens).sum(-1)  # (U, M)
        bank = bank.masked_fill(totals == -torch.inf, -1)
        place = (bank[:, :, None] == bank[:, None]).tril(-1).sum(2)  # better ones of the same bank
        turn = place * (bank.amax() + 2) - bank  # the best of each bank, fullest first; then the second of each …
        order = turn.masked_fill(bank < 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        order = order[:, : max(2 * self.width, 1)]
        return parents.gather(1, order), tokens.gather(1, order).clamp(min=0), totals.gather(1, order)


def top(x: Tensor, k: int, added: Tensor | None = None, group: int = 1) -> tuple[Tensor, Tensor]:
    """The k greatest values of x, (R, V), in each group of G rows, and their places there, greatest first: (R / G, k).

    None of them stands outside the k blocks that have the greatest maxima, so only those are ordered, which takes a
    processor a fraction of the time of `topk` on long rows. Among equal values, any may be taken.

    Args:
        added: float64 (R,), added to all values of each row.
        group: G; a place counts through the rows of a group, v of the first row, V + v of the second.
    """
    (R, V), device = x.shape, x.device
    blocks, U = V // BLOCK, len(x) // group
    added = x.new_zeros(R) if added is None else added
    if device.type != "cpu" or blocks * group < 4 * k:
        found = (x + added[:, None]).view(U, group * V).topk(k)
        return found.values, found.indices
    cut, by_row = blocks * BLOCK, added.view(U, group)
    maxima = x[:, :cut].view(R, blocks, BLOCK).amax(2) + added[:, None]
    chosen = maxima.view(U, group * blocks).topk(k).indices  # (U, k)
    rows = chosen // blocks
    index = ((rows * (V - cut) + chosen * BLOCK)[:, :, None] + torch.arange(BLOCK)).view(U, -1)
    values = (x.view(U, -1).gather(1, index).view(U, k, BLOCK) + by_row.gather(1, rows)[:, :, None]).view(U, -1)
    if cut < V:  # what no block holds
        last = torch.arange(group)[:, None] * V + torch.arange(cut, V)
        index = torch.cat([index, last.view(1, -1).expand(U, -1)], dim=1)
        values = torch.cat([values, (x[:, cut:] + added[:, None]).view(U, -1)], dim=1)
    values, places = values.topk(k)
    return values, index.gather(1, places)
