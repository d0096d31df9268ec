"""What an engine is: token ids in, hypotheses out; and torch, which serves every model and every search."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from regard.data.batches import Batch, by_length
from regard.decode.ensemble import Ensemble
from regard.decode.options import Options
from regard.decode.search import Demands, Hypothesis, Node, forced, search
from regard.engines.threads import side_by_side
from regard.heap import keep_freed
from regard.model.seq2seq import Seq2Seq

NAMES = ("auto", "torch", "ctranslate2")
PRECISIONS = ("float32", "bfloat16", "int8")
FEW, MANY = 16, 256
"""Sentences that are not parted to be translated side by side; and those of a batch, above which greedy search on a
processor gains no speed."""


class Job(NamedTuple):
    """One text in tokens: its number from 1, what its outputs begin with, and phrases that they hold."""

    number: int
    source: list[int]
    prefix: list[int]
    force: list[list[int]]


class Found(NamedTuple):
    """What came of some jobs: their places in the list that was given, the hypotheses of each, of a beam best first,
    and the beam's tree of each, where asked."""

    places: list[int]
    hypotheses: list[list[Hypothesis]]
    trees: list[list[Node]] | None


class Engine(Protocol):
    """What a translator asks of an engine."""

    name: str
    precision: str

    def refusals(self, options: Options, asked: Set[str]) -> Iterator[str]:
        """Why it cannot do what a call asks; nothing if it can.

        Args:
            options: how to search.
            asked: names of what was asked beside them: "prefix", "force".
        """

    def open(self) -> None:
        """Make it ready; what is made ready once stays so. Raises RegardError when that cannot be."""

    def search(self, jobs: Sequence[Job], options: Options, ban: Mapping[str, list[int]]) -> Iterator[Found]:
        """Outputs of all jobs, some at a time, in any order."""

    def forced(self, sources: Sequence[list[int]], targets: Sequence[list[int]], budget: int) -> list[list[float]]:
        """The log-probability of each token of each target, and of the </s> behind it, nats.

        Args:
            sources: ids without special tokens.
            targets: the same.
            budget: padded tokens of one batch.
        """


class Torch:
    """Our own search over any model, or several as one.

    Args:
        model: with its weights, on its device; or what makes it, when it is first needed.
        precision: "float32" or "bfloat16", of all weights and products; scores are summed in float64.
    """

    name = "torch"

    def __init__(self, model: Seq2Seq | Ensemble | Callable[[], Seq2Seq | Ensemble], precision: str = "float32"):
        self.given, self.precision = model, precision

    @cached_property
    def model(self) -> Seq2Seq | Ensemble:
        """In eval mode; what is made here is not for learning."""
        model = self.given if isinstance(self.given, Seq2Seq | Ensemble) else self.given().requires_grad_(False)
        return model.eval() if self.precision == "float32" else model.eval().to(getattr(torch, self.precision))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def refusals(self, options: Options, asked: Set[str]) -> Iterator[str]:
        yield from ()

    def open(self) -> None:
        assert self.model
        if self.device.type == "cpu":
            keep_freed(1 << 25, arenas=torch.get_num_threads())  # with more, memory grows for some windows

    def search(self, jobs: Sequence[Job], options: Options, ban: Mapping[str, list[int]]) -> Iterator[Found]:
        def found(places: list[int]) -> Found:
            numbers, sources, prefixes, force = zip(*(jobs[place] for place in places), strict=True)
            demands = Demands(options.outputs, numbers, prefixes, force, list(ban.values()), options.token_scores)
            trees: list[list[Node]] | None = [] if options.tree else None
            batch = Batch.of(sources).to(self.device)
            return Found(places, search(self.model, batch, options, demands, trees), trees)

        workers, many = (torch.get_num_threads(), MANY) if self.device.type == "cpu" else (1, len(jobs))
        most = min(options.batch_sentences or many, max(FEW, -(-len(jobs) // workers)))
        budget = max(1, options.batch_tokens // (options.nbest if options.sample else options.beam))
        batches = by_length([len(job.source) + 1 for job in jobs], budget, most)
        yield from side_by_side(found, list(batches), workers)

    def forced(self, sources: Sequence[list[int]], targets: Sequence[list[int]], budget: int) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in sources]
        lengths = [max(len(source), len(target)) + 1 for source, target in zip(sources, targets, strict=True)]
        for rows in by_length(lengths, budget):
            batch = Batch.of([sources[row] for row in rows], [targets[row] for row in rows]).to(self.device)
            for row, values in zip(rows, forced(self.model, batch).tolist(), strict=True):
                found[row] = values[: len(targets[row]) + 1]
        return found
