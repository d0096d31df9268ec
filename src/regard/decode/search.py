"""The loop that all strategies share. It sees the decoder contract and nothing of any model: tokens and a state go in,
features and the next state come out, and a state can be reordered.

N sentences, U beams (a sentence has one, or one for each sample or group), K hypotheses of each, R = U × K rows, M
children of each beam, S source length, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from regard.config import DecodeConfig
from regard.data.batches import Batch, Ids
from regard.decode import strategies
from regard.decode.constraints import Constraints
from regard.decode.ensemble import attention_of
from regard.decode.hypotheses import Children, Fate, Hypothesis, Node, Paths, norm_of, ranked
from regard.decode.rules import NEVER, Limits, Rules
from regard.errors import ConfigError
from regard.model.state import State, Taps
from regard.text.tokenizer import EOS

__all__ = ["NEVER", "Demands", "Hypothesis", "Limits", "Model", "Node", "beam_search", "forced", "greedy", "ranked",
           "search"]


LINGER = 8
"""Sentences that are done leave the batch once they are one in so many: each leaving copies what the others keep."""


class Model(Protocol):
    """What search asks of a model."""

    def __call__(self, batch: Batch, taps: Taps | None = None, /) -> Any: ...
    def start(self, batch: Batch) -> State: ...
    def log_probabilities(self, features: Any, source: Tensor) -> Tensor: ...
    @property
    def decoder(self) -> "Decoder": ...


class Decoder(Protocol):
    """What search asks of a decoder: one step. Taps are given only where attention is asked for."""

    def __call__(self, tokens: Tensor, state: Any, taps: Taps | None = ..., /) -> tuple[Any, State]: ...


@dataclass(frozen=True)
class Demands:
    """What is asked of one batch beside the settings. What is empty is not asked for.

    Attributes:
        outputs: wanted of each sentence; how many samples are drawn, and how many of a beam's must be the best ones.
        lines: a number for each sentence, which with the seed decides what is drawn.
        prefixes: what each sentence's outputs begin with.
        force: phrases that each sentence's outputs must hold.
        ban: phrases that no output may hold.
        token_scores: note log-probability and entropy of each token.
        early_end: end a beam before K outputs are found, once no open hypothesis can become one of the `outputs` best.
        limits: of length; None: as the settings say.
    """

    outputs: int = 1
    lines: Sequence[int] = ()
    prefixes: Sequence[Ids] = ()
    force: Sequence[Sequence[Ids]] = ()
    ban: Sequence[Ids] = ()
    token_scores: bool = False
    early_end: bool = True
    limits: Limits | None = None


class Plan(NamedTuple):
    """How a search goes: the strategy, K, the beams of a sentence, and how many of them leave together."""

    strategy: strategies.Strategy
    width: int
    beams: int = 1
    together: int = 1


@torch.inference_mode()
def search(model: Model, batch: Batch, settings: DecodeConfig, demands: Demands | None = None,
           trees: list[list[Node]] | None = None) -> list[list[Hypothesis]]:
    """The outputs of each source: of a beam, best first and at most as many as it is wide; of sampling, as drawn.

    A beam keeps its K likeliest open hypotheses; those that end are put aside. It is done when K have ended, or when no
    open one can come among the best (`Demands.early_end`), or at the longest length, where open ones count as they are.
    A sentence whose rules leave no output has none.

    Args:
        model: in eval mode.
        batch: its sources; targets are not looked at.
        settings: how to search; with `sample`, its beam and groups are not used.
        demands: what is asked beside.
        trees: where given, gets the nodes of each sentence's tree. Not with sampling.

    Raises:
        ConfigError: a coverage penalty for a model that does not look at the source.
    """
    demands = demands or Demands()
    N, device = len(batch), batch.source.device
    limits = demands.limits or limits_of(settings)
    shortest, longest = limits.of(batch.source_mask)
    beams = demands.outputs if settings.sample else settings.groups
    sentence = torch.arange(N, device=device).repeat_interleave(beams)  # (U,)
    constraints = Constraints(demands.force, sentence) if any(map(len, demands.force)) else None
    plan = plan_of(settings, demands, constraints, longest, trees is not None)
    rules = Rules(shortest, prefixes_of(demands.prefixes, batch), demands.ban,
                  settings.no_repeat_ngram, constraints, sentence)
    ended = Ended(settings, demands, plan, rules, longest[sentence], trees)
    paths = Paths.start(len(sentence), plan.width, device)
    rows = sentence[paths.unit]
    paths = replace(
        paths, met=constraints.start(paths) if constraints else None,
        seen=(~batch.source_mask[rows]).double() if settings.coverage_penalty else None,
        notes=torch.empty(len(rows), 0, 2, device=device) if demands.token_scores else None,
        node=torch.full_like(rows, -1) if trees is not None else None)
    state = model.start(batch)
    while len(paths.unit):
        paths, state = step(model, paths, state, rules, plan, ended)
    found = [list(chain.from_iterable(ended.found[n * beams : (n + 1) * beams])) for n in range(N)]
    return found if settings.sample else [sorted(each, key=lambda one: -one.score)[: settings.beam] for each in found]


def step(model: Model, paths: Paths, state: State, rules: Rules, plan: Plan, ended: "Ended") -> tuple[Paths, State]:
    """Read the last token of each path, look at the children, put ended ones aside, and go on with the open ones."""
    log_p, entropy, paths, state = read(model, paths, state)  # (R, V), (R,)
    rules.apply(log_p, paths)
    kids = Children(paths, *plan.strategy(log_p, paths))
    if paths.notes is not None and entropy is not None:
        note = torch.stack([log_p[kids.parents, kids.tokens], entropy[kids.parents]], dim=-1)
        kids.others["notes"] = torch.cat([paths.notes[kids.parents], note[:, :, None]], dim=2)
    if paths.met is not None and rules.constraints is not None:
        kids.others["met"] = rules.constraints.advance(paths.unit[kids.parents], paths.met[kids.parents], kids.tokens)
    after, rows = ended.settle(kids)
    alike, together = each_of(state, paths), plan.width * plan.together
    if together == alike == 1 and len(rows) == len(log_p):
        return after, state  # each row goes on as it is
    return after, state.select((rows // alike).view(-1, together))


def each_of(state: State, paths: Paths) -> int:
    """How many paths one row of the state stands for: before the first token, all of its source; then 1."""
    return len(paths.unit) // (len(state.memory.mask) * state.beam)


def read(model: Model, paths: Paths, state: State) -> tuple[Tensor, Tensor | None, Paths, State]:
    """Log-probabilities of what follows each path, float (R, V); where asked for, the entropy of that distribution,
    float (R,), and paths that have seen more of the source."""
    taps = Taps()
    alike = each_of(state, paths)
    last = paths.tokens[::alike, -1:]
    features, state = model.decoder(last, state) if paths.seen is None else model.decoder(last, state, taps)
    log_p = model.log_probabilities(features, state.memory.source)[:, -1].float()
    log_p = log_p if alike == 1 else log_p.repeat_interleave(alike, 0)
    if paths.seen is not None:
        attention = attention_of(taps)
        if attention is None:
            raise ConfigError("coverage_penalty: this model has no attention to the source, so nothing is covered. "
                              "Leave it out")
        paths = replace(paths, seen=paths.seen + attention[:, -1].repeat_interleave(alike, 0))
    entropy = None if paths.notes is None else torch.special.entr(log_p.exp()).sum(-1)
    return log_p, entropy, paths, state


class Ended:
    """The hypotheses that have ended, and which beams are done.

    Args:
        settings: how they are scored.
        demands: how many are wanted, and whether a beam may end early.
        plan: of the search.
        rules: an open hypothesis that does not hold what is forced is no output at the longest length either.
        longest: int64 (U,), the longest output of each beam.
        trees: gets the nodes of each sentence, where asked.
    """

    def __init__(self, settings: DecodeConfig, demands: Demands, plan: Plan, rules: Rules, longest: Tensor,
                 trees: list[list[Node]] | None):
        self.scoring = settings.length_penalty, settings.length_penalty_kind, settings.coverage_penalty
        self.plan, self.rules, self.longest, self.wanted = plan, rules, longest, demands.outputs
        self.found: list[list[Hypothesis]] = [[] for _ in range(len(longest))]
        # A beam is done when no total of an open hypothesis is above its bar. One can come to no more than its total /
        # the norm of the longest output, since tokens and coverage only lower it, and what that cannot bring among the
        # best is of no use. Not with groups, where each looks at the others.
        self.early = demands.early_end and plan.width > 1 and plan.together == 1
        self.bars = torch.full_like(longest, -torch.inf, dtype=torch.float64)
        self.norms = [norm_of(most, *self.scoring[:2]) for most in longest.tolist()]
        self.nearest = int(longest.min())  # before it, no output is as long as it may be
        self.trees = trees
        if trees is not None:
            trees += [[] for _ in range(len(longest) // plan.beams)]

    def settle(self, kids: Children) -> tuple[Paths, Tensor]:
        """Part the children: the paths that go on, and the rows of their parents, int64 (R',)."""
        (U, M), K, length = kids.tokens.shape, self.plan.width, kids.paths.length + 1
        first = torch.arange(0, U * M, M, device=kids.tokens.device)[:, None]
        dead, is_end = kids.totals == -torch.inf, kids.tokens == EOS
        closed = dead | is_end
        kept = closed.byte().argsort(dim=1, stable=True)[:, :K] + first  # (U, K), the first K that go on
        totals = kids.totals.masked_fill(closed, -torch.inf).take(kept)
        outputs = (is_end & ~dead)[:, :K].nonzero()
        self.put(kids, outputs := outputs[:, 0] * M + outputs[:, 1])
        if length >= self.nearest:
            whole, totals = self.whole(kids, kept, totals)
            self.put(kids, whole)
            outputs = torch.cat([outputs, whole])
        if self.trees is not None:
            self.note(kids, set(outputs.tolist()), set(kept[totals > -torch.inf].tolist()))
        done = totals.amax(1) <= self.bars
        totals.masked_fill_(done[:, None], -torch.inf)
        leaves = done.view(-1, self.plan.together).all(1)
        if int(leaves.sum()) * LINGER >= len(leaves):
            stays = (~leaves).repeat_interleave(self.plan.together)
            kept, totals, self.bars = kept[stays], totals[stays], self.bars[stays]
            self.nearest = min(self.longest[kids.unit[stays]].tolist(), default=0)
        return replace(kids.take(kept := kept.flatten()), totals=totals.flatten()), kids.parents.take(kept)

    def whole(self, kids: Children, kept: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Of the children that would go on, those that are outputs as they are, at the longest length; and the totals
        of all, those of such beams -inf. Both (U, K)."""
        unit = kids.unit
        last = self.longest[unit] <= kids.paths.length + 1
        free = torch.tensor([len(self.found[each]) < self.plan.width for each in unit.tolist()], device=unit.device)
        whole = (totals > -torch.inf) & (last & free)[:, None]
        if self.rules.constraints is not None:
            whole &= self.rules.constraints.complete(kids.take(kept.flatten())).view_as(whole)
        return kept[whole], totals.masked_fill(last[:, None], -torch.inf)

    def put(self, kids: Children, chosen: Tensor) -> None:
        """Keep the given children as outputs."""
        if not len(chosen):
            return
        outputs, K, bars = kids.take(chosen), self.plan.width, {}
        places = chosen // kids.tokens.shape[1]
        each = zip(places.tolist(), outputs.unit.tolist(), outputs.hypotheses(*self.scoring), strict=True)
        for place, unit, one in each:
            found = self.found[unit]
            found.append(one)
            if len(found) >= K:
                bars[place] = torch.inf
            elif self.early and len(found) >= self.wanted:
                bars[place] = sorted(other.score for other in found)[-self.wanted] * self.norms[unit]
        if bars:
            self.bars[list(bars)] = self.bars.new_tensor(list(bars.values()))

    def note(self, kids: Children, ended: set[int], kept: set[int]) -> None:
        """Write the children into their sentences' trees, and give each its place there."""
        assert self.trees is not None and kids.paths.node is not None
        parents, *others = (each.flatten() for each in (kids.parents, kids.tokens, kids.totals))
        places = kids.paths.node[parents].tolist()
        columns = zip(kids.paths.unit[parents].tolist(), places, *(each.tolist() for each in others), strict=True)
        for row, (unit, parent, token, total) in enumerate(columns):
            if total > -torch.inf:
                tree = self.trees[unit // self.plan.beams]
                places[row] = len(tree)
                fate: Fate = "ended" if row in ended else "open" if row in kept else "pruned"
                tree.append(Node(parent, token, total, kids.paths.length + 1, fate))
        kids.others["node"] = kids.tokens.new_tensor(places).view_as(kids.tokens)


def plan_of(settings: DecodeConfig, demands: Demands, constraints: Constraints | None, longest: Tensor,
            tree: bool) -> Plan:
    """The strategy that the settings ask for."""
    K = settings.beam // settings.groups
    if settings.sample:
        assert constraints is None and not tree
        steps = longest.tolist()
        chances = strategies.Sampling.chances_of(
            settings.seed, demands.lines or range(len(steps)), demands.outputs, steps).to(longest.device)
        drawn = strategies.Sampling(chances, settings.temperature, settings.top_k, settings.top_p)
        return Plan(drawn, 1, demands.outputs)
    if constraints is not None:
        assert settings.groups == 1
        return Plan(strategies.ConstrainedBeam(K, constraints), K)
    if settings.groups > 1:
        return Plan(strategies.DiverseBeam(K, settings.groups, settings.diversity), K, settings.groups, settings.groups)
    return Plan(strategies.Beam(K), K) if K > 1 or tree else Plan(strategies.greedy, 1)


def limits_of(settings: DecodeConfig) -> Limits:
    """The limits of length that the settings ask for."""
    return Limits(settings.max_length, settings.max_ratio, settings.max_extra, settings.min_length, settings.min_ratio)


def prefixes_of(prefixes: Sequence[Ids], batch: Batch) -> Tensor:
    """Prefixes of each sentence -> int64 (N, P), -1 behind them."""
    rows = torch.full((len(batch), max(map(len, prefixes), default=0)), -1)
    for row, prefix in enumerate(prefixes):
        rows[row, : len(prefix)] = torch.as_tensor(prefix)
    return rows.to(batch.source.device)


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


def greedy(model: Model, batch: Batch, limits: Limits | None = None, length_penalty: float = 1.0) -> list[Hypothesis]:
    """The likeliest token at each step, until </s> or the limit. Sentences that have ended leave the batch.

    Args:
        model: in eval mode.
        batch: its sources; targets are not looked at.
        limits: of length.
        length_penalty: for the score only; it does not change the tokens.
    """
    settings = DecodeConfig(beam=1, length_penalty=length_penalty)
    return [found for found, in search(model, batch, settings, Demands(limits=limits or Limits()))]


def beam_search(
    model: Model, batch: Batch, beam: int = 5, length_penalty: float = 1.0, limits: Limits | None = None
) -> list[list[Hypothesis]]:
    """The best few outputs of each source, best first, at most `beam` of them; with 1 they are those of `greedy`.

    Args:
        model: in eval mode.
        batch: its sources; targets are not looked at.
        beam: K, hypotheses kept open.
        length_penalty: rank by log-probability / length ** this; 0 ranks by probability.
        limits: of length.
    """
    settings = DecodeConfig(beam=beam, length_penalty=length_penalty)
    return search(model, batch, settings, Demands(outputs=beam, limits=limits or Limits()))
