"""Does a sentence's output depend on its batch? Each sentence is searched alone, in batches of 7 and of 64, twice with
other partners, and in batches by tokens as `regard translate` makes them; the tokens must be the same each time.

    python benchmarks/promise15.py RUN [RUN ...] --source FILE [--lines 1000] [--beams 5 1] [--json]

Prints, for each run and beam, how many outputs differ from those of the sentence alone, and by how much their scores
do at most, in nats. Exits with 1 if any output differs. Products of other shapes round otherwise, so scores differ in
their last digits; an output could differ where two hypotheses are that close, and then that is a finding too.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import regard
from regard.config import DecodeConfig
from regard.data.batches import Batch, by_length
from regard.decode.search import Demands, Hypothesis, Model, search
from regard.errors import RegardError
from regard.text.corpus import read_lines

Parting = Callable[[Sequence[int], int], Iterator[list[int]]]
"""Lengths of the sources and a beam to batches, each a list of places."""


def runs_of(size: int, seed: int) -> Parting:
    """Batches of so many sentences, in a random order."""
    def part(lengths: Sequence[int], beam: int) -> Iterator[list[int]]:
        order = random.Random(seed).sample(range(len(lengths)), len(lengths))
        return (order[first : first + size] for first in range(0, len(order), size))

    return part


PARTINGS: dict[str, Parting] = {
    "alone": runs_of(1, 1),
    "7": runs_of(7, 2),
    "64": runs_of(64, 3),
    "64, others": runs_of(64, 4),
    "by tokens": lambda lengths, beam: by_length(lengths, 4096 // beam),
}


def outputs(model: Model, sources: Sequence[Sequence[int]], settings: DecodeConfig,
            parting: Parting) -> list[Hypothesis]:
    """The best output of each source."""
    found: dict[int, Hypothesis] = {}
    for places in parting([len(source) + 1 for source in sources], settings.beam):
        batch = Batch.of([sources[place] for place in places])
        found |= {place: each[0] for place, each in zip(places, search(model, batch, settings, Demands()), strict=True)}
    return [found[place] for place in range(len(sources))]


def check(model: Model, sources: Sequence[Sequence[int]], settings: DecodeConfig) -> dict[str, dict[str, float]]:
    """For each parting but the first: outputs that differ from those of sentences alone, and the greatest difference
    of the scores of those that do not."""
    every = {name: outputs(model, sources, settings, parting) for name, parting in PARTINGS.items()}
    alone = every.pop("alone")
    found = {}
    for name, others in every.items():
        pairs = list(zip(alone, others, strict=True))
        same = [abs(one.score - other.score) for one, other in pairs if one.tokens == other.tokens]
        found[name] = {"different": len(pairs) - len(same), "score": max(same, default=0.0)}
    return found


def main() -> None:
    """Check runs, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a trained run")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="sentences, one a line")
    parser.add_argument("--lines", type=int, default=1000, help="of them, the first so many (default 1000)")
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 1], help="default: 5 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        lines = list(read_lines(options.source))[: options.lines]
        for run in options.runs:
            translator = regard.load(run, engine="torch")
            sources = translator.tokenizers.source.encode(lines)
            for beam in options.beams:
                settings = translator.config.decode.model_copy(update={"beam": beam})
                results[f"{run.name}, beam {beam}"] = found = check(translator.model, sources, settings)
                if not options.json:
                    words = (f"{name}: {each['different']} differ, scores by {each['score']:.1e}"
                             for name, each in found.items())
                    print(f"{run.name}, beam {beam}, {len(sources):,} sentences: {'; '.join(words)}", flush=True)
    except RegardError as error:
        raise SystemExit(str(error)) from None
    if options.json:
        print(json.dumps(results))
    sys.exit(any(each["different"] for found in results.values() for each in found.values()))


if __name__ == "__main__":
    main()
