"""Hypotheses: open ones as rows of tensors (`Paths`), ended ones as they are given out (`Hypothesis`), and what they
are ranked by.

R open hypotheses, each a row; S source length; t tokens of each so far; C forced phrases.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regard.text.tokenizer import BOS

UNSEEN = 1e-10
"""The least coverage of a source token, so that its logarithm is a number."""


class Hypothesis(NamedTuple):
    """One output. Its score is log_probability / length_norm + coverage.

    Attributes:
        tokens: its ids, without <s>, with </s> where it ended by itself.
        log_probability: of those tokens given the source, nats.
        score: what it is ranked by.
        length_norm: what its log-probability is divided by; length counts </s>.
        coverage: the coverage penalty, not above 0.
        log_probabilities: of each token, on request.
        entropies: of what the model expected in place of each token, nats, on request.
    """

    tokens: list[int]
    log_probability: float
    score: float
    length_norm: float = 1.0
    coverage: float = 0.0
    log_probabilities: list[float] | None = None
    entropies: list[float] | None = None


Fate = Literal["open", "ended", "pruned"]


class Node(NamedTuple):
    """One continuation that a beam search looked at: a node of its tree.

    Attributes:
        parent: the node that it continues, as its place in the list; -1 is the start.
        token: its last token.
        log_probability: of all its tokens, nats.
        step: how many tokens it has.
        fate: "open" if it was kept, "ended" if it is an output, "pruned" if it fell out at this step.
    """

    parent: int
    token: int
    log_probability: float
    step: int
    fate: Fate


def norm_of(length: float, length_penalty: float, kind: str = "power") -> float:
    """What a log-probability is divided by: |Y|^α ("power"), or (5 + |Y|)^α / 6^α ("gnmt", Wu et al. 2016, eq. 14)."""
    return NORMS[kind](float(max(1, length)), length_penalty)


def ranked(log_probability: float, length: int, length_penalty: float, kind: str = "power") -> float:
    """The score that hypotheses are ranked by, but for coverage: log-probability / norm."""
    return log_probability / norm_of(length, length_penalty, kind)


NORMS: dict[str, Callable[[float, float], float]] = {
    "power": lambda length, penalty: length**penalty, "gnmt": lambda length, penalty: ((5 + length) / 6) ** penalty}


@dataclass(frozen=True)
class Paths:
    """R open hypotheses.

    Attributes:
        unit: int64 (R,), which beam each belongs to; a sentence has one, or one for each sample or group.
        tokens: int64 (R, 1 + t), <s> first.
        totals: float64 (R,), their log-probability, nats; -inf marks a row that holds none.
        seen: float (R, S), the attention that each source token had so far, where the score counts it; 1 at padding.
        notes: float (R, t, 2), log-probability and entropy of each token, where asked.
        met: int64 (R, C), tokens of each forced phrase that stand there.
        node: int64 (R,), their place in the tree, where asked.
    """

    unit: Tensor
    tokens: Tensor
    totals: Tensor
    seen: Tensor | None = None
    notes: Tensor | None = None
    met: Tensor | None = None
    node: Tensor | None = None

    @classmethod
    def start(cls, units: int, width: int, device: torch.device) -> "Paths":
        """Rows that hold <s> alone. All rows of a beam begin alike, so only the first may have children."""
        unit = torch.arange(units, device=device).repeat_interleave(width)
        totals = torch.full((units, width), -torch.inf, dtype=torch.float64, device=device)
        totals[:, 0] = 0.0
        return cls(unit, torch.full((len(unit), 1), BOS, device=device), totals.flatten())

    @property
    def length(self) -> int:
        """t, tokens of each, <s> not counted."""
        return self.tokens.shape[1] - 1

    def select(self, rows: Tensor) -> "Paths":
        """The given rows (int64), repeated or left out as they say."""
        chosen: dict[str, Any] = {
            name: each if each is None else each.index_select(0, rows) for name, each in vars(self).items()}
        return Paths(**chosen)

    def extend(self, parents: Tensor, tokens: Tensor, totals: Tensor, **others: Any) -> "Paths":
        """Children: parents int64 (R',), rows of these paths; tokens int64 (R',); totals float64 (R',)."""
        kids = self.select(parents)
        return replace(kids, tokens=torch.cat([kids.tokens, tokens[:, None]], dim=1), totals=totals, **others)

    def hypotheses(self, length_penalty: float, kind: str, coverage_penalty: float) -> Iterator[Hypothesis]:
        """All rows as ended ones. The coverage penalty is β Σ_s log min(Σ_t a_ts, 1) (Wu et al. 2016, eq. 14)."""
        norm = norm_of(self.length, length_penalty, kind)
        coverage = torch.zeros_like(self.totals)
        if self.seen is not None:
            coverage = coverage_penalty * self.seen.double().clamp(UNSEEN, 1.0).log().sum(1)
        notes = None if self.notes is None else self.notes.transpose(1, 2).tolist()
        rows = zip(self.tokens[:, 1:].tolist(), self.totals.tolist(), coverage.tolist(), strict=True)
        for row, (tokens, total, covered) in enumerate(rows):
            noted = notes[row] if notes else (None, None)
            yield Hypothesis(tokens, total, total / norm + covered, norm, covered, *noted)


@dataclass(frozen=True)
class Children:
    """What may come of R open hypotheses at a step: M children of each of U beams, best first.

    Attributes:
        paths: the hypotheses.
        parents: int64 (U, M), rows of the paths.
        tokens: int64 (U, M), the last token of each child.
        totals: float64 (U, M), their log-probability, nats; -inf marks a child that may not be.
        others: what takes the place of fields of the paths in the children, (U, M, …): "notes", "met", "node".
    """

    paths: Paths
    parents: Tensor
    tokens: Tensor
    totals: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def unit(self) -> Tensor:
        """int64 (U,), which beams they are."""
        return self.paths.unit.view(len(self.tokens), -1)[:, 0]

    def take(self, chosen: Tensor) -> Paths:
        """The given children, int64 (R',), places counted through all (U, M), as paths."""
        others = {name: each.flatten(0, 1).index_select(0, chosen) for name, each in self.others.items()}
        return self.paths.extend(*(each.take(chosen) for each in (self.parents, self.tokens, self.totals)), **others)
