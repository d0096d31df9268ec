"""Pages that show an evaluation or a comparison: one file with everything in it, which needs no network and no script.

    run_page          regard evaluate RUN --report
    comparison_page   regard compare RUN… --html FILE
"""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, NamedTuple

from regard import __version__
from regard.errors import MissingExtra
from regard.evaluate.charts import COLOURS, SHAPES, Chart, Series, chart
from regard.evaluate.comparison import Comparison, System, short_names
from regard.evaluate.evaluation import Bucket, Evaluation, token_lengths
from regard.evaluate.facts import command as typed
from regard.evaluate.facts import (
    differing_settings,
    duration,
    learning,
    learning_together,
    provenance,
    set_facts,
)
from regard.evaluate.sentences import best, language, marked, typical, worst
from regard.evaluate.testset import TestSet
from regard.look.trace import FIXED_VECTOR, Trace, visible
from regard.metrics import BETTER
from regard.training.run import Run
from regard.translator import Translator

LONGEST_LOOK = 45
"""Source tokens of the longest sentence whose attention is shown."""

_BEST, _WORST = 5, 10  # sentences of a run's page
_CUT = 45  # output tokens of an attention matrix; a model can repeat itself for long
MEANING = {
    "BLEU": "n-grams of words that are also in a reference",
    "chrF": "n-grams of characters in common",
    "TER": "edits and shifts of words, per reference word",
    "exact match": "lines that equal a reference",
    "token error rate": "edits per reference token",
}
_MARKS = "Underlined is what the fewest edits to the closest reference would change."


class Told(NamedTuple):
    """How the outputs were made, for the page to tell."""

    checkpoint: str
    beam: int
    tokenize: str
    engine: str
    command: str


class Output(NamedTuple):
    """One output of a sentence: whose, in which colour, and in right and wrong pieces."""

    name: str
    style: int | None
    text: str
    pieces: list[tuple[str, bool]]
    chrf: float


def require_jinja() -> None:
    """Fail before the translating, not after it.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise MissingExtra("jinja2", "demo", "The report")


def run_page(evaluation: Evaluation, test: TestSet, run: Run, translator: Translator, told: Told) -> str:
    """The page of one run.

    Args:
        evaluation: of the translator on the test set.
        test: what was translated.
        run: whose curves, config and provenance are shown.
        translator: its model, for the attention.
        told: how the outputs were made.

    Raises:
        MissingExtra: jinja2 is not installed.
        RunError: the run's metrics.jsonl is damaged.
    """
    found = {name: choose(evaluation.closeness, evaluation.outputs, wanted)
             for name, choose, wanted in (("best", best, _BEST), ("worst", worst, _WORST))}
    lengths = token_lengths(translator, test.sources)
    for number in evaluation.problems:
        lengths[number - 1] = 0  # what could not be translated cannot be looked at
    looks = _looks(translator, test, lengths, found, told.beam)
    parameters = sum(weights.numel() for weights in translator.model.parameters())
    kinds = dict.fromkeys([run.config.model.encoder.kind, run.config.model.decoder.kind])
    described = looks[0][1].model if looks else " to ".join(kinds)
    return _render(
        "run.html",
        title=run.folder.resolve().name,
        run=typed(run.folder),
        lead=f"{described}; {parameters:,} parameters.",
        evaluation=evaluation,
        test_lead=f"{test.summary}; translated in {duration(evaluation.seconds)} with beam {told.beam}",
        meaning=MEANING,
        problems=[(test.place(number - 1), problem) for number, problem in evaluation.problems.items()],
        by_length=_length_chart([("", evaluation.by_length)], headline([run]), "tokens"),
        learning=learning(run),
        best=_sentences(test, found["best"], [("output", None, evaluation.outputs, evaluation.closeness)]),
        worst=_sentences(test, found["worst"], [("output", None, evaluation.outputs, evaluation.closeness)]),
        marks=_MARKS,
        looks=[_matrix(trace, name) for name, trace in looks if trace.cross is not None],
        fixed=FIXED_VECTOR if looks and looks[0][1].cross is None else None,
        facts=[*provenance(run, told.checkpoint), ("parameters", f"{parameters:,}"), *set_facts(test),
               ("translated by", told.engine), ("scored", f"beam {told.beam}, BLEU's words by {told.tokenize}"),
               *([("attention", "of torch's own translation")] if looks and evaluation.engine != "torch" else []),
               ("again", told.command)],
        config=run.config_file.read_text(encoding="utf-8"),
    )


def comparison_page(
    comparison: Comparison, runs: Sequence[Run | None], traces: Mapping[int, Trace], sentences: int, checkpoint: str,
    command: str,
) -> str:
    """The page of a comparison.

    Args:
        comparison: what to show.
        runs: for each system its run; None for a file.
        traces: one sentence as the runs saw it, by the place of the system.
        sentences: how many of the lines that differ most to show.
        checkpoint: of the runs.
        command: that makes the page again.

    Raises:
        MissingExtra: jinja2 is not installed.
        RunError: a run's metrics.jsonl is damaged.
    """
    names = short_names([system.name for system in comparison.systems])
    named = {place: (names[place], run) for place, run in enumerate(runs) if run is not None}
    outputs = [(name, place, system.outputs, rating.closeness) for place, (name, system, rating)
               in enumerate(zip(names, comparison.systems, comparison.ratings, strict=True))]
    first = headline([run for _, run in named.values()])
    lengths = list(zip(names, (rating.by_length for rating in comparison.ratings), strict=True))
    charts = [_length_chart(lengths, metric, comparison.unit) for metric in sorted(BETTER, key=first.__ne__)]
    return _render(
        "compare.html",
        title=f"{names[0]} against {', '.join(names[1:])}",
        lead=f"{comparison.test.summary}.",
        names=names,
        ratings=comparison.ratings,
        significance=comparison.significance,
        bests=_bests(comparison),
        reading=reading(comparison, names[0]),
        signatures=_signatures(comparison),
        against=[(place, comparison.against(place)) for place in range(1, len(names))],
        by_length=[each for each in charts if each is not None],
        tables=_tables(comparison),
        unit=comparison.unit,
        marks=_MARKS,
        sentences=_sentences(comparison.test, comparison.differing(sentences), outputs),
        learning=learning_together(named),
        looks=[{**_matrix(trace, names[place]), "style": place} for place, trace in traces.items()
               if trace.cross is not None],
        unseen=[(place, names[place]) for place, trace in traces.items() if trace.cross is None],
        fixed_vector=FIXED_VECTOR,
        settings=differing_settings([run for _, run in named.values()]),
        runs=[(place, name) for place, (name, _) in named.items()],
        facts=[*set_facts(comparison.test), ("again", command)],
        provenance=[(place, name, [*provenance(run, checkpoint), _translated_by(comparison.systems[place])])
                    for place, (name, run) in named.items()],
    )


def _translated_by(system: System) -> tuple[str, str]:
    """The fact which engine translated."""
    return "translated by", f"{system.engine}, {system.precision}"


def reading(comparison: Comparison, baseline: str) -> str:
    """How to read the significance tests, in words, here and on the terminal."""
    draws = comparison.draws
    several = ", not corrected for their number" if len(comparison.systems) > 2 else ""
    return (f"± is half of the 95% confidence interval, from {draws.resamples:,} bootstrap resamples. Below it stands "
            f"the difference from the baseline, {baseline}, and p, how likely one at least as large would be if both "
            f"were alike: by paired bootstrap with {draws.resamples:,} resamples, and by approximate randomisation "
            f"with {draws.trials:,} trials, both by sacreBLEU with seed {draws.seed}. * marks p < 0.05{several}.")


def _render(template: str, **values: Any) -> str:
    """A template of pages/ with values, every text of which is escaped."""
    require_jinja()
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("regard.evaluate") / "pages"
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in ("base.html", "parts.html", template)}
    environment = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.globals.update(visible=visible, language=language, shapes=SHAPES, colours=COLOURS, better=BETTER)
    made = (f"{date.today().isoformat()}, Regard {__version__}, sacreBLEU {version('sacrebleu')}, torch "
            f"{version('torch')}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
            f"{os.cpu_count()} processor cores")
    return environment.get_template(template).render(made=made, **values)


def headline(runs: Sequence[Run]) -> str:
    """The metric whose chart comes first: BLEU, unless all runs were chosen by their token error rate."""
    metrics = {run.config.train.metric for run in runs}
    return "token error rate" if metrics == {"token_error_rate"} else "BLEU"


def _length_chart(systems: Sequence[tuple[str, Sequence[Bucket]]], metric: str, unit: str) -> Chart | None:
    """One metric over source length, a line for each system."""
    buckets = systems[0][1]
    categories = [(_short(bucket), f"{bucket.lines:,}") for bucket in buckets]
    series = [
        Series(name or metric, [(float(place), score.value) for place, bucket in enumerate(of)
                                for score in bucket.scores if score.name == metric], style)
        for style, (name, of) in enumerate(systems)
    ]
    each = ", one line for each system" if len(systems) > 1 else ""
    return chart(series, f"length of the source in {unit}, and how many lines there are",
                 f"{metric}, percent; {'higher' if BETTER[metric] > 0 else 'lower'} is better",
                 f"Line chart: {metric} over the length of the source in {unit}{each}. A table follows.",
                 categories=categories, from_zero=True)


def _short(bucket: Bucket) -> str:
    """A bucket's name as short as an axis needs it."""
    if bucket.longest is None:
        return f"{bucket.shortest}+"
    return f"{bucket.shortest}–{bucket.longest}" if bucket.shortest else f"≤ {bucket.longest}"


def _sentences(
    test: TestSet, rows: Sequence[int], systems: Sequence[tuple[str, int | None, Sequence[str], Sequence[float]]]
) -> list[dict[str, Any]]:
    """Lines of a test set with every system's output; a system is a name, a style, its outputs and their chrF."""
    return [
        {
            "place": test.place(row),
            "source": test.sources[row],
            "references": test.references_of(row),
            "outputs": [Output(name, style, outputs[row], marked(outputs[row], test.references_of(row)), closeness[row])
                        for name, style, outputs, closeness in systems],
        }
        for row in rows
    ]


def _looks(
    translator: Translator, test: TestSet, lengths: Sequence[int], found: Mapping[str, Sequence[int | None]], beam: int
) -> list[tuple[str, Trace]]:
    """The best, a typical and the worst sentence, as the model saw them, of those with a length that can be shown."""
    candidates = {"One of the best": found["best"], "One of median length": [typical(lengths, LONGEST_LOOK)],
                  "One of the worst": found["worst"]}
    chosen: dict[int, str] = {}
    for name, rows in candidates.items():
        row = next((row for row in rows if row is not None and 0 < lengths[row] <= LONGEST_LOOK), None)
        if row is not None:
            chosen.setdefault(row, name)
    return [(f"{name}: {test.place(row)}", translator.look(test.sources[row], beam=beam))
            for row, name in chosen.items()]


def _matrix(trace: Trace, name: str) -> dict[str, Any]:
    """The mean attention of a trace, in percent."""
    weights = trace.matrix()[:_CUT].tolist()
    return {
        "name": name,
        "title": f"Attention, {name}",
        "caption": trace.caption(),
        "cut": f"The first {_CUT} of {len(trace.target)} output tokens." if len(trace.target) > _CUT else "",
        "source": [visible(token) for token in trace.source],
        "rows": [{"token": visible(token), "weights": [round(100 * weight) for weight in row]}
                 for token, row in zip(trace.target, weights, strict=False)],
    }


def _bests(comparison: Comparison) -> list[set[str]]:
    """For each system the metrics in which none is better."""
    values = [{score.name: BETTER[score.name] * score.value for score in rating.scores}
              for rating in comparison.ratings]
    return [{name for name, value in own.items() if value == max(other[name] for other in values)} for own in values]


def _signatures(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """For each metric the signatures of its score and of both tests."""
    signed = comparison.draws.signature
    return [(score.name, [score.signature, signed(score.signature, "bs"), signed(score.signature, "ar")])
            for score in comparison.ratings[0].scores]


def _tables(comparison: Comparison) -> list[dict[str, Any]]:
    """For each metric its values by length, a row for each bucket, a column for each system."""
    return [
        {"name": metric, "rows": [
            {"name": buckets[0].name, "lines": buckets[0].lines,
             "cells": [next((score.value for score in bucket.scores if score.name == metric), None)
                       for bucket in buckets]}
            for buckets in zip(*(rating.by_length for rating in comparison.ratings), strict=True)]}
        for metric in BETTER
    ]
