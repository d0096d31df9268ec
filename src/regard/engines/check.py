"""Two engines on the same sentences: how far apart they are, and how far they may be.

The first is torch, and right by definition. Both say how likely they find the same outputs, token by token, and both
search. In float32 every token's log-probability must agree, and the outputs too, but where two hypotheses were as good
as equal: the search of the first was then at a tie, in the scores of its outputs or at what it dropped.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from regard.config import Config
from regard.decode.hypotheses import norm_of
from regard.decode.options import Options
from regard.decode.search import Hypothesis, Node
from regard.engines.engine import Engine, Job
from regard.errors import DataError
from regard.text.corpus import read_pairs
from regard.text.tokenizer import EOS, SPECIALS, Tokenizers


class Tolerance(NamedTuple):
    """How far a token's log-probability may be off, nats: the worst, and the mean; and whether outputs must agree."""

    worst: float
    mean: float
    outputs: bool


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, True),
    "bfloat16": Tolerance(0.5, 0.02, False),
    "int8": Tolerance(2.0, 0.05, False),
}


@dataclass(frozen=True)
class Agreement:
    """How far apart two engines are.

    Attributes:
        precision: of the second.
        sentences: that were searched.
        tokens: whose log-probability was compared, </s> included.
        worst: greatest difference of one token's log-probability, nats.
        mean: mean difference, nats.
        same: outputs of the same tokens.
        ties: outputs that differ where the search of the first was at a tie.
        unlike: places of the other sentences.
    """

    precision: str
    sentences: int
    tokens: int
    worst: float
    mean: float
    same: int
    ties: int
    unlike: list[int]

    def reasons(self) -> Iterator[str]:
        """Why they do not agree as they should; nothing if they do."""
        allowed = TOLERANCES[self.precision]
        for name, found, most in (("worst", self.worst, allowed.worst), ("mean", self.mean, allowed.mean)):
            if not found <= most:  # a NaN is over everything
                yield (f"{name} difference of a token's log-probability {found:.2g} nats, over the {most:g} that "
                       f"{self.precision} may have")
        if allowed.outputs and self.unlike:
            yield (f"{len(self.unlike):,} of {self.sentences:,} outputs differ for no tie; the first is that of "
                   f"sentence {self.unlike[0] + 1:,} of the sample")

    def __str__(self) -> str:
        """Such as "100 sentences: 99 outputs the same, 1 at a tie; a token's log-probability differs by …"."""
        ties = f", {self.ties} at a tie" if self.ties else ""
        others = f", {len(self.unlike)} unlike" if self.unlike else ""
        return (f"{self.sentences:,} sentences: {self.same:,} outputs the same{ties}{others}; a token's "
                f"log-probability differs by {self.worst:.1e} nats at most, {self.mean:.1e} in the mean of "
                f"{self.tokens:,}")


def compare(first: Engine, second: Engine, sources: Sequence[list[int]], config: Config) -> Agreement:
    """Translate sources, ids without special tokens and none empty, through both engines with a beam of 5, or greedily
    where the vocabulary is too small for that."""
    options = Options.model_validate(config.decode.model_dump() | SEARCH)
    if list(second.refusals(options, set())):
        options = options.model_copy(update={"beam": 1})
    expected, found = (_outputs(engine, sources, options) for engine in (first, second))
    bodies = [[id for id in each[0].tokens if id != EOS] for each in expected]
    right, own = (engine.forced(sources, bodies, options.batch_tokens) for engine in (first, second))
    apart = [abs(a - b) for one, other in zip(right, own, strict=True) for a, b in zip(one, other, strict=True)]
    differ = [place for place, (one, other) in enumerate(zip(expected, found, strict=True))
              if one[0].tokens != other[0].tokens]
    tied = [place for place in differ
            if _tie(first, sources[place], options, expected[place][0], found[place][0].tokens)]
    return Agreement(
        second.precision, len(sources), len(apart), max(apart, default=0.0, key=lambda x: math.inf if x != x else x),
        math.fsum(apart) / max(1, len(apart)), len(sources) - len(differ), len(tied),
        [place for place in differ if place not in tied])


def sample_of(config: Config, tokenizers: Tokenizers, most: int, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Sources to compare on: the texts given, else the run's test or validation set, else made-up ids.

    Raises:
        DataError: texts were given, and none of them can be translated.
    """
    for lines in ([texts] if texts is not None else _own(config)):
        ids = tokenizers.source.encode(lines[: 2 * most])
        if chosen := [each for each in ids if 0 < len(each) <= config.decode.max_source_tokens][:most]:
            return chosen
    if texts is not None:
        raise DataError("the sample holds no line that can be translated: give a file of sources, one a line")
    draw = random.Random(1)
    longest = min(20, config.decode.max_source_tokens)
    return [[draw.randrange(len(SPECIALS), max(len(SPECIALS) + 1, tokenizers.source.size))
             for _ in range(draw.randint(1, longest))] for _ in range(most)]


def _own(config: Config) -> Iterator[list[str]]:
    """The sources of the run's test and validation sets, as far as they can be read."""
    for corpus in (config.data.test, config.data.valid):
        if corpus is not None:
            try:
                yield read_pairs(corpus, config.data.root).sources
            except DataError:
                continue


SEARCH = {"beam": 5, "sample": False, "groups": 1, "coverage_penalty": 0.0, "length_penalty_kind": "power",
          "no_repeat_ngram": 0, "min_length": 0, "min_ratio": 0.0, "replace_unknown": False}
"""A search that all engines do alike; its limits and length penalty are those of [decode]."""


def _outputs(engine: Engine, sources: Sequence[list[int]], options: Options) -> list[list[Hypothesis]]:
    """The outputs of each source, best first."""
    found: list[list[Hypothesis]] = [[] for _ in sources]
    jobs = [Job(number, source, [], []) for number, source in enumerate(sources, start=1)]
    for places, hypotheses, _ in engine.search(jobs, options, {}):
        for place, each in zip(places, hypotheses, strict=True):
            found[place] = each
    return found


def _tie(first: Engine, source: list[int], options: Options, best: Hypothesis, other: list[int]) -> bool:
    """Whether the first engine finds another output as good as its best, or was at a tie when it dropped something."""
    near = TOLERANCES["float32"].worst * len(best.tokens)
    values, = first.forced([source], [[id for id in other if id != EOS]], options.batch_tokens)
    if abs(sum(values[: len(other)]) / norm_of(len(other), options.length_penalty) - best.score) <= near:
        return True
    traced = options.model_copy(update={"tree": True})
    found = next(iter(first.search([Job(1, source, [], [])], traced, {})))
    assert found.trees is not None
    steps = groupby(found.trees[0], key=lambda node: node.step)
    return any(_close(list(nodes), options.beam, near) for _, nodes in steps)


def _close(nodes: list[Node], beam: int, near: float) -> bool:
    """Whether children on both sides of a cut of one step are nearly as likely: at the K-th child, after which an end
    is no output, and at the last that stays open."""
    totals = sorted((node.log_probability for node in nodes), reverse=True)
    open_, rest = ([node.log_probability for node in nodes if node.fate == fate and node.token != EOS]
                   for fate in ("open", "pruned"))
    cuts = [totals[beam - 1] - totals[beam]] if len(totals) > beam else []
    cuts += [min(open_) - max(rest)] if open_ and rest else []
    return any(cut <= near for cut in cuts)
