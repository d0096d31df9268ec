"""CTranslate2: greedy and beam search over a converted Transformer, by the same rules as our own.

It keeps the K likeliest open hypotheses, puts the ended ones among the first K children aside, ends when K have ended
or at the longest length, and ranks by log-probability / length ** α. With the end symbol counted into its lengths that
is what our search does, and in float32 the outputs are the same, but where two hypotheses are as good as equal. What
it would do otherwise is refused. Only <pad> and <s> take part in its beam, where ours rules them out: outputs that hold
them are left out, and if too few are left the sentence is searched again.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regard.config import Config
from regard.data.batches import by_length
from regard.decode.hypotheses import norm_of
from regard.decode.options import Options
from regard.decode.rules import NEVER
from regard.decode.search import Hypothesis, limits_of
from regard.engines.ct2_model import ctranslate2, names_of, positions_of
from regard.engines.engine import Found, Job
from regard.text.tokenizer import EOS, SPECIALS, Tokenizers

AHEAD = 3
"""Batches that wait or work, for each worker."""
BATCHES = {"float32": (1600, 1600), "bfloat16": (1600, 1600), "int8": (160, 600)}
"""Padded source tokens of the fastest batches of a beam and of greedy search, where batch_tokens allow as many."""
_SHARED = "it would share the probability of what is ruled out among the rest, and so search by other numbers"
UNABLE = {
    "sample": "its draws do not depend on seed and line alone",
    "groups": "it has no diverse beam search",
    "coverage_penalty": "it knows the attention of one head alone",
    "length_penalty_kind": "it ranks by the plain power alone",
    "prefix": "it leaves the prefix out of the score, and refuses most ends right behind it",
    "force": "it has no search with phrases that an output must hold",
    "ban": _SHARED, "no_repeat_ngram": _SHARED, "min_length": _SHARED, "min_ratio": _SHARED,
    "replace_unknown": "it knows the attention of one head alone",
    "token_scores": "it gives no entropies",
    "tree": "it does not tell what its beam drops",
}
"""What it cannot do as our own search does it, and why."""


class _Waiting(NamedTuple):
    """A batch that is being searched: the places of its jobs, what will hold the result of each, and whether it has the
    limit of length of each of them."""

    places: list[int]
    results: list[Any]
    own_limit: bool


class CT2:
    """The engine "ctranslate2", on the processor.

    Args:
        folder: where the converted model lies; or what converts it, when it is first needed.
        precision: "float32", "bfloat16" or "int8".
        tokenizers: of source and target.
        config: the run's.
        compute: what it computes in; None: in its precision.
    """

    name = "ctranslate2"

    def __init__(self, folder: Path | Callable[[], Path], precision: str, tokenizers: Tokenizers, config: Config,
                 compute: str | None = None):
        self.given, self.precision, self.compute = folder, precision, compute or precision
        self.longest = positions_of(config)
        self.places = min(filter(None, (self.longest, config.model.decoder.longest)), default=sys.maxsize)
        self.names = names_of(tokenizers.source), names_of(tokenizers.target)
        self.ids = {name: id for id, name in enumerate(self.names[1])}

    @cached_property
    def workers(self) -> int:
        """Batches that are worked on at once, each by one thread: as many as torch would use threads."""
        return torch.get_num_threads()

    @cached_property
    def translator(self) -> Any:
        """The package's own translator."""
        folder = self.given if isinstance(self.given, Path) else self.given()
        made = ctranslate2().Translator(str(folder), device="cpu", compute_type=self.compute,
                                        inter_threads=self.workers, intra_threads=1, max_queued_batches=-1)
        torch.set_num_threads(self.workers)  # it has set OpenMP's threads, which may be torch's too, to 1
        return made

    def open(self) -> None:
        assert self.translator

    def refusals(self, options: Options, asked: Set[str]) -> Iterator[str]:
        for name, why in UNABLE.items():
            value = getattr(options, name, None)
            changed = name in Options.model_fields and value != Options.model_fields[name].default
            if name in asked or (changed and not (name == "min_length" and options.min_length <= 1)):
                yield f"{name}{'' if name in asked else f' = {value}'}: {why}"
        if 2 * options.beam > len(self.ids) and options.beam > 1:
            yield (f"beam = {options.beam}: it needs a vocabulary of {2 * options.beam}, and this one has "
                   f"{len(self.ids)}")
        for name, needed in (("max_source_tokens", options.max_source_tokens + 1), ("max_length", options.max_length)):
            if self.longest is not None and needed > self.longest:
                yield f"{name} = {getattr(options, name)}: its table of positions ends at {self.longest}"

    def search(self, jobs: Sequence[Job], options: Options, ban: Mapping[str, list[int]]) -> Iterator[Found]:
        limits = [limits_of(options).between(len(job.source) + 1)[1] for job in jobs]
        budget = min(options.batch_tokens // options.beam, BATCHES[self.precision][options.beam == 1])
        most = min(options.batch_sentences or len(jobs), -(-len(jobs) // self.workers))
        waiting: deque[_Waiting] = deque()
        for places in by_length([len(job.source) + 1 for job in jobs], max(1, budget), max(1, most)):
            # One step beyond the longest limit, so that who has not ended at its own limit is seen not to have.
            steps = min(max(limits[place] for place in places) + 1, self.places)
            results = self._translate([jobs[place] for place in places], options, steps)
            waiting.append(_Waiting(places, results, own_limit=False))
            if len(waiting) >= AHEAD * self.workers:
                yield self._found(waiting, jobs, options, limits)
        while waiting:
            yield self._found(waiting, jobs, options, limits)

    def forced(self, sources: Sequence[list[int]], targets: Sequence[list[int]], budget: int) -> list[list[float]]:
        rows, bodies = ([[names[id] for id in ids] for ids in side]
                        for names, side in zip(self.names, (sources, targets), strict=True))
        scored = self.translator.score_batch(rows, bodies, max_batch_size=budget, batch_type="tokens",
                                             max_input_length=0) if rows else []
        return [one.log_probs for one in scored]

    def _translate(self, jobs: Sequence[Job], options: Options, longest: int, never: Sequence[int] = ()) -> list[Any]:
        """Begin to translate a batch: what will hold the result of each job."""
        names = self.names[0]
        waiting: list[Any] = self.translator.translate_batch(
            [[names[id] for id in job.source] for job in jobs], asynchronous=True, beam_size=options.beam,
            num_hypotheses=options.beam, length_penalty=options.length_penalty or UNNOTICED,
            max_decoding_length=longest, min_decoding_length=0, max_input_length=0,
            return_scores=options.scores or options.beam > 1, return_end_token=True,
            suppress_sequences=[[SPECIALS[id]] for id in never] or None)
        return waiting

    def _found(self, waiting: deque[_Waiting], jobs: Sequence[Job], options: Options,
               limits: Sequence[int]) -> Found:
        """The hypotheses of the batch that has waited longest, once they are there.

        A batch has one limit, and each sentence its own. If all K outputs keep within that, K had ended when it was
        reached, and the search was over; else the sentence waits again, with those that have the same limit.
        """
        places, results, own_limit = waiting.popleft()
        found: dict[int, list[Hypothesis]] = {}
        again: list[int] = []
        for place, each in zip(places, results, strict=True):
            result = each.result()
            outputs = result.hypotheses  # made anew each time that it is asked for
            if options.beam == 1 and not options.scores:  # to its limit, a longer greedy output is the same
                outputs = [tokens[: limits[place]] for tokens in outputs]
            within = own_limit or max(map(len, outputs), default=0) <= limits[place]
            lawful = self._lawful(outputs, result.scores, options) if within else None
            if lawful:
                found[place] = lawful
            elif own_limit:
                found[place] = self._without(jobs[place], options, limits[place])
            else:
                again.append(place)
        for longest, group in groupby(sorted(again, key=limits.__getitem__), key=limits.__getitem__):
            same = list(group)
            waiting.append(_Waiting(same, self._translate([jobs[place] for place in same], options, longest), True))
        return Found([*found], [*found.values()], None)

    def _lawful(self, outputs: Sequence[Sequence[str]], scores: Sequence[float],
                options: Options) -> list[Hypothesis] | None:
        """As many outputs as are looked at, without those that hold <pad> or <s>, which our search would not have; None
        if too few are left."""
        found: list[Hypothesis] = []
        for tokens, score in zip(outputs, scores or [math.nan] * len(outputs), strict=True):
            if len(found) < options.outputs and RULED_OUT.isdisjoint(tokens):
                found.append(self._hypothesis(tokens, score, options))
        return found if len(found) >= min(options.nbest, len(outputs)) else None

    def _hypothesis(self, tokens: Sequence[str], score: float, options: Options) -> Hypothesis:
        """Its score is log-probability / length ** α, the end symbol counted into the length."""
        norm = norm_of(len(tokens), options.length_penalty)
        return Hypothesis([self.ids[token] for token in tokens], score * norm, score, norm)

    def _without(self, job: Job, options: Options, longest: int) -> list[Hypothesis]:
        """Search one sentence without <pad> and <s>, and give its outputs the scores that they have where those keep
        their share of the probability."""
        result = self._translate([job], options.model_copy(update={"scores": True}), longest, NEVER)[0].result()
        found = [self._hypothesis(*each, options) for each in zip(result.hypotheses, result.scores, strict=True)]
        bodies = [one.tokens[:-1] if one.tokens[-1] == EOS else one.tokens for one in found]
        scored = []
        for one, values in zip(found, self.forced([job.source] * len(found), bodies, 0), strict=True):
            total = sum(values[: len(one.tokens)])
            scored.append(one._replace(log_probability=total, score=total / one.length_norm))
        return sorted(scored, key=lambda one: -one.score)


RULED_OUT = {SPECIALS[id] for id in NEVER}
UNNOTICED = 1e-30
"""A length penalty that changes no score; with 0, CTranslate2 would end its beam by another rule."""
