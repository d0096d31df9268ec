"""Greedy and beam search. They see the decoder contract and nothing of any model: tokens and a state go in, features
and the next state come out, and a state can be reordered.

N sentences, K hypotheses of each (the beam), V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from regard.data.batches import Batch
from regard.model.state import State, Taps
from regard.text.tokenizer import BOS, EOS, PAD

NEVER = (PAD, BOS)
"""Tokens that no output may hold."""


class Model(Protocol):
    """What search asks of a model."""

    def __call__(self, batch: Batch, taps: Taps | None = None, /) -> Tensor: ...
    def start(self, batch: Batch) -> State: ...
    def log_probabilities(self, features: Tensor, source: Tensor) -> Tensor: ...
    @property
    def decoder(self) -> "Decoder": ...


class Decoder(Protocol):
    """What search asks of a decoder: one step."""

    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]: ...


class Hypothesis(NamedTuple):
    """One output.

    Attributes:
        tokens: its ids, without <s>, with </s> where it ended by itself.
        log_probability: of those tokens given the source, nats.
        score: what it is ranked by, log_probability / length ** length_penalty; length counts </s>.
    """

    tokens: list[int]
    log_probability: float
    score: float


@dataclass(frozen=True)
class Limits:
    """How long an output may become: `most` tokens, and no more than 2 × source + 10, </s> included in all three."""

    most: int = 256

    def of(self, source_mask: Tensor) -> Tensor:
        """int64 (N,), the longest output of each source, mask bool (N, S)."""
        return (2 * source_mask.sum(1) + 10).clamp(max=self.most)


def log_softmax_step(model: Model, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """One step: log-probabilities, float (rows, V), of what follows tokens, int64 (rows,), and the state after them."""
    features, state = model.decoder(tokens[:, None], state)
    log_p = model.log_probabilities(features, state.memory.source)[:, -1].float()
    log_p[:, list(NEVER)] = -torch.inf
    return log_p, state


@torch.no_grad()
def forced(model: Model, batch: Batch, taps: Taps | None = None) -> Tensor:
    """The log-probability of each target token given the source and the true tokens before it.

    Args:
        model: in eval mode.
        batch: sources and targets.
        taps: where given, gets the attention of every position.

    Returns:
        float (B, T), nats, 0 at padding.
    """
    log_p = model.log_probabilities(model(batch, taps), batch.source)
    right = log_p.gather(-1, batch.target_out[:, :, None]).squeeze(-1)
    return right.masked_fill(~batch.target_mask, 0.0).float()


@torch.no_grad()
def greedy(model: Model, batch: Batch, limits: Limits | None = None, length_penalty: float = 1.0) -> list[Hypothesis]:
    """The likeliest token at each step, until </s> or the limit. Sentences that have ended leave the batch.

    Args:
        model: in eval mode.
        batch: its sources; targets are not looked at.
        limits: of length.
        length_penalty: for the score only; it does not change the tokens.
    """
    longest = (limits or Limits()).of(batch.source_mask)
    state = model.start(batch)
    rows = torch.arange(len(batch), device=batch.source.device)
    last = torch.full_like(rows, BOS)
    outputs: list[list[int]] = [[] for _ in range(len(batch))]
    totals = [0.0] * len(batch)
    while len(rows):
        log_p, state = log_softmax_step(model, last, state)
        best, last = log_p.max(dim=-1)
        for row, token, value in zip(rows.tolist(), last.tolist(), best.tolist(), strict=True):
            outputs[row].append(token)
            totals[row] += value
        open_rows = ((last != EOS) & (state.length < longest[rows])).nonzero().squeeze(1)
        if len(open_rows) < len(rows):
            rows, last, state = rows[open_rows], last[open_rows], state.select(open_rows)
    return [Hypothesis(tokens, total, ranked(total, len(tokens), length_penalty))
            for tokens, total in zip(outputs, totals, strict=True)]


def ranked(log_probability: float, length: int, length_penalty: float) -> float:
    """The score that hypotheses are ranked by: log-probability / length ** length_penalty."""
    return log_probability / float(max(1, length) ** length_penalty)


@torch.no_grad()
def beam_search(
    model: Model, batch: Batch, beam: int = 5, length_penalty: float = 1.0, limits: Limits | None = None
) -> list[list[Hypothesis]]:
    """The best few outputs of each source, best first, at most `beam` of them.

    At each step each sentence keeps its K likeliest open hypotheses; those that end are put aside. A sentence is done
    when K have ended, or at its longest length, where open ones count as they are.

    Args:
        model: in eval mode.
        batch: its sources; targets are not looked at.
        beam: K, hypotheses kept open; with 1 the tokens are those of `greedy`.
        length_penalty: rank by log-probability / length ** this; 0 ranks by probability.
        limits: of length.
    """
    search = _Beam(model, batch, beam, length_penalty, (limits or Limits()).of(batch.source_mask))
    while search.sentences:
        search.step()
    return search.results()


class _Beam:
    """The state of one beam search: K rows of decoder state for each sentence that is not done."""

    def __init__(self, model: Model, batch: Batch, beam: int, length_penalty: float, longest: Tensor):
        self.model, self.beam, self.length_penalty = model, beam, length_penalty
        self.longest = longest.tolist()
        self.device = batch.source.device
        self.sentences = list(range(len(batch)))
        self.ended: list[list[Hypothesis]] = [[] for _ in self.sentences]
        rows = torch.arange(len(batch), device=self.device).repeat_interleave(beam)
        self.state = model.start(batch).select(rows)
        self.tokens = torch.full((len(rows), 1), BOS, device=self.device)
        # All K rows of a sentence begin alike, so only the first may have children in the first step.
        self.totals = torch.full((len(batch), beam), -torch.inf, device=self.device)
        self.totals[:, 0] = 0.0

    def step(self) -> None:
        """Read one token in every row, choose the children, put ended ones aside, drop sentences that are done."""
        beam = self.beam
        log_p, state = log_softmax_step(self.model, self.tokens[:, -1], self.state)
        size = log_p.shape[-1]
        totals = (self.totals[:, :, None] + log_p.view(-1, beam, size)).flatten(1)  # (N, K * V)
        best, index = totals.topk(min(2 * beam, totals.shape[1]), dim=-1)  # at most K of 2K can be </s>
        parents, tokens = index // size, index % size
        self._put_aside(best, parents, tokens)
        best = best.masked_fill(tokens == EOS, -torch.inf)
        self.totals, order = best.topk(beam, dim=-1)
        rows = torch.arange(len(best), device=self.device)[:, None] * beam + parents.gather(1, order)
        self.tokens = torch.cat([self.tokens[rows.flatten()], tokens.gather(1, order).view(-1, 1)], dim=1)
        self._go_on(state, rows)

    def results(self) -> list[list[Hypothesis]]:
        """The hypotheses of each sentence, best first."""
        return [sorted(ended, key=lambda one: -one.score)[: self.beam] for ended in self.ended]

    def _put_aside(self, best: Tensor, parents: Tensor, tokens: Tensor) -> None:
        """Keep what ended in </s> among the K best children of each sentence."""
        ends = (tokens == EOS) & (best > -torch.inf)
        ends[:, self.beam :] = False
        for place, rank in ends.nonzero().tolist():
            row = place * self.beam + int(parents[place, rank])
            self._keep(place, [*self.tokens[row, 1:].tolist(), EOS], float(best[place, rank]))

    def _keep(self, place: int, tokens: list[int], total: float) -> None:
        score = ranked(total, len(tokens), self.length_penalty)
        self.ended[self.sentences[place]].append(Hypothesis(tokens, total, score))

    def _go_on(self, state: State, rows: Tensor) -> None:
        """Drop the sentences that are done, and reorder the state to the children of the others."""
        length = self.tokens.shape[1] - 1
        open_places = []
        for place, sentence in enumerate(self.sentences):
            if length >= self.longest[sentence]:
                self._keep_open(place)
            elif len(self.ended[sentence]) < self.beam and self.totals[place, 0] > -torch.inf:
                open_places.append(place)
        self.sentences = [self.sentences[place] for place in open_places]
        if open_places:
            kept = torch.tensor(open_places, device=self.device)
            self.totals = self.totals[kept]
            self.tokens = self.tokens.view(-1, self.beam, length + 1)[kept].flatten(0, 1)
            self.state = state.select(rows[kept].flatten())

    def _keep_open(self, place: int) -> None:
        """At the longest length, count the open hypotheses as they are, unless enough have ended by themselves."""
        if len(self.ended[self.sentences[place]]) >= self.beam:
            return
        for rank, total in enumerate(self.totals[place].tolist()):
            if total > -torch.inf:
                self._keep(place, self.tokens[place * self.beam + rank, 1:].tolist(), total)
