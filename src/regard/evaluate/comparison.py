"""Several systems on one test set: what may be compared at all, and what differs by more than chance.

A system is a run, or a file of outputs, whoever made it. The first is the baseline: the others are tested against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from regard.errors import ConfigError, DataError
from regard.evaluate.evaluation import Rating, length_figures, rate, translate
from regard.evaluate.sentences import most_different
from regard.evaluate.significance import Draws, Significance, paired
from regard.evaluate.testset import TestSet
from regard.metrics import check_tokenize
from regard.text.corpus import read_lines
from regard.training.run import Run
from regard.translator import Translator

STANDARD = "13a"
"""How BLEU parts words where neither a run nor the user says it; sacreBLEU's default."""


@dataclass(frozen=True)
class Contestant:
    """A run or an output file, before anything is translated.

    Attributes:
        name: the path as it was given.
        run: the run; None for a file.
        lines: of the file, one for each source line; empty for a run.
    """

    name: str
    run: Run | None
    lines: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "Contestant":
        """Open a run's folder, or read a file of outputs.

        Raises:
            RunError: the folder is no run.
            DataError: there is neither, or the file is not UTF-8.
        """
        if path.is_dir():
            return cls(str(path), Run.open(path))
        if not path.exists():
            raise DataError(f"{path}: there is no such run or file. Expected a run's folder, or a file of outputs with "
                            "one line for each source line")
        return cls(str(path), None, read_lines(path))


class System(NamedTuple):
    """What is compared: a name, its outputs, line number and reason of each line it could not translate, and of a run
    the engine that translated and its precision."""

    name: str
    outputs: list[str]
    problems: dict[int, str]
    engine: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What one test set says about several systems.

    Attributes:
        systems: the first is the baseline.
        test: what they translated.
        unit: in what the length of a source is counted.
        ratings: of each system.
        significance: of each system, by metric.
        draws: how often and from which seed the tests drew.
    """

    systems: list[System]
    test: TestSet
    unit: str
    ratings: list[Rating]
    significance: list[dict[str, Significance]]
    draws: Draws

    def differing(self, wanted: int) -> list[int]:
        """Rows on which the systems are farthest apart by chrF, at most so many."""
        return most_different([rating.closeness for rating in self.ratings], wanted)

    def against(self, place: int) -> tuple[int, int, int]:
        """On how many lines a system is nearer to the reference than the baseline by chrF, as near, and farther."""
        pairs = list(zip(self.ratings[place].closeness, self.ratings[0].closeness, strict=True))
        nearer, farther = sum(own > base for own, base in pairs), sum(own < base for own, base in pairs)
        return nearer, len(pairs) - nearer - farther, farther

    def figures(self, sentences: int) -> dict[str, Any]:
        """Everything as JSON takes it, with the rows that differ most, at most so many."""
        return {
            "baseline": self.systems[0].name,
            "test": {"files": list(self.test.files), "lines": len(self.test), "sha256": self.test.sha256},
            "draws": self.draws._asdict(),
            "length_unit": self.unit,
            "systems": [self._system(place) for place in range(len(self.systems))],
            "sentences": [self._sentence(row) for row in self.differing(sentences)],
        }

    def _system(self, place: int) -> dict[str, Any]:
        """One system's figures."""
        system, rating, tests = self.systems[place], self.ratings[place], self.significance[place]
        lines = dict(zip(("nearer", "as_near", "farther"), self.against(place), strict=True))
        return {
            "name": system.name,
            "engine": system.engine,
            "precision": system.precision,
            "problems": {str(number): problem for number, problem in system.problems.items()},
            "scores": {score.name: {
                "value": score.value,
                "signature": score.signature,
                "mean": tests[score.name].mean,
                "interval_95": tests[score.name].interval,
                "difference": tests[score.name].difference,
                "p_bootstrap": tests[score.name].bootstrap,
                "p_randomisation": tests[score.name].randomisation,
            } for score in rating.scores},
            "lines_against_baseline": lines if place else None,
            "by_length": length_figures(rating.by_length),
        }

    def _sentence(self, row: int) -> dict[str, Any]:
        """One line of all systems."""
        return {
            "line": self.test.numbers[row],
            "source": self.test.sources[row],
            "references": self.test.references_of(row),
            "outputs": [{"name": system.name, "text": system.outputs[row], "chrF": rating.closeness[row]}
                        for system, rating in zip(self.systems, self.ratings, strict=True)],
        }


def common_ground(
    contestants: Sequence[Contestant], given: TestSet | None = None, tokenize: str | None = None
) -> tuple[TestSet, str]:
    """The test set and the tokenization of BLEU on which all can be compared.

    Args:
        contestants: two or more.
        given: the test set to use; None: that of the runs.
        tokenize: how BLEU parts words; None: as the runs' configs say, or 13a where there is no run.

    Raises:
        ConfigError: they cannot be compared: runs of unlike tokenization or with other test sets, output files with
            another number of lines; the message holds all reasons. Or there is nothing to compare.
        DataError: a test set cannot be read.
    """
    _check_names(contestants)
    if tokenize is not None:
        check_tokenize(tokenize)
    runs = [contestant for contestant in contestants if contestant.run is not None]
    test, reasons = (given, []) if given is not None else _shared_test(runs)
    if tokenize is None:
        reasons += _unlike_tokenize(runs)
    reasons += _unlike_lines(contestants, test)
    if reasons or test is None:
        listed = "".join(f"\n  {reason}" for reason in reasons)
        raise ConfigError(f"these cannot be compared:{listed}\nScores say something only about the same text, parted "
                          "into words the same way. Give all of them one test set with --source FILE --target FILE; "
                          "and one --tokenize, if all of them write text of one kind")
    return test, tokenize or (runs[0].run.config.data.bleu_tokenize if runs and runs[0].run else STANDARD)


def translated(
    name: str, translator: Translator, test: TestSet, beam: int | None = None,
    progress: Callable[[], object] | None = None,
) -> System:
    """A run's outputs for a test set.

    Args:
        name: of the run.
        translator: its model.
        test: what to translate.
        beam: hypotheses kept; None: as the run's config says.
        progress: called after each line.
    """
    found = translate(translator, test.sources, beam, progress)
    problems = {number: each.problem for number, each in enumerate(found, start=1) if each.problem is not None}
    assert translator.engine is not None
    return System(name, [each.text for each in found], problems, translator.engine.name, translator.engine.precision)


def compare(
    systems: Sequence[System], test: TestSet, lengths: Sequence[int], unit: str, *, tokenize: str = STANDARD,
    draws: Draws | None = None,
) -> Comparison:
    """Score all systems on a test set and test their differences from the first.

    Args:
        systems: the first is the baseline; each has an output for each line of the test set.
        test: what they translated.
        lengths: of each source.
        unit: in what these are counted, such as "words".
        tokenize: how BLEU parts words, see `regard.metrics.bleu`.
        draws: of the significance tests; None: the defaults of sacreBLEU.

    Raises:
        DataError: a system has not as many outputs as the test set has lines.
        ConfigError: no such tokenize, or draws that cannot be.
    """
    draws = draws or Draws()
    draws.check(len(test))
    ratings = [rate(system.outputs, test.references, lengths, tokenize) for system in systems]
    significance = paired([rating.counts for rating in ratings], draws)
    return Comparison(list(systems), test, unit, ratings, significance, draws)


def short_names(names: Sequence[str]) -> list[str]:
    """Paths as short as tells them apart: "runs/a/out" and "runs/b/out" become "a/out" and "b/out"."""
    parts = [Path(name).parts or (name,) for name in names]
    for kept in range(1, max(map(len, parts)) + 1):
        short = ["/".join(each[-kept:]) for each in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def _check_names(contestants: Sequence[Contestant]) -> None:
    """Refuse fewer than two, and the same one twice."""
    if len(contestants) < 2:
        raise ConfigError("regard compare: expected two or more runs or output files. For a single run there is "
                          "regard evaluate RUN")
    seen: dict[Path, str] = {}
    for contestant in contestants:
        path = Path(contestant.name).resolve()
        if path in seen:
            raise ConfigError(f"regard compare: {contestant.name} is given twice. Each system is compared once")
        seen[path] = contestant.name


def _shared_test(runs: Sequence[Contestant]) -> tuple[TestSet | None, list[str]]:
    """The test set of the runs, and what speaks against it."""
    if not runs:
        return None, ["there is no run among them that names a test set, and output files name none: give --source "
                      "and --target"]
    found = [(each.name, TestSet.of(each.run.config.data)) for each in runs if each.run]
    reasons = [f"{name}: its config has no [data] test" for name, test in found if test is None]
    named = [(name, test) for name, test in found if test is not None]
    for name, test in named[1:]:
        if unlike := _unlike(named[0][1], test):
            reasons.append(f"{name}: its test set is not that of {named[0][0]}: {unlike}")
    return named[0][1] if named else None, reasons


def _unlike(one: TestSet, other: TestSet) -> str | None:
    """In what a test set differs from another one; None: in nothing."""
    if other.sha256 == one.sha256:
        return None
    names = f"{' + '.join(other.files)} and {' + '.join(one.files)}"
    if len(other) != len(one):
        return f"{names} have {len(other):,} and {len(one):,} lines"
    for row in range(len(one)):
        for side, here, there in (("source", one.sources[row], other.sources[row]),
                                  ("reference", one.references_of(row), other.references_of(row))):
            if here != there:
                return f"{names} have another {side} first in line {other.numbers[row]:,}"
    return f"{names} have another number of references"


def _unlike_tokenize(runs: Sequence[Contestant]) -> list[str]:
    """The runs that score BLEU otherwise than the first."""
    ways = [(each.name, each.run.config.data.bleu_tokenize) for each in runs if each.run]
    return [f'{name}: its config says [data] bleu_tokenize = "{way}", and that of {ways[0][0]} "{ways[0][1]}"'
            for name, way in ways if way != ways[0][1]]


def _unlike_lines(contestants: Sequence[Contestant], test: TestSet | None) -> list[str]:
    """The output files that have not a line for each source line."""
    reasons = []
    for contestant in contestants:
        if contestant.run is None and test is not None:
            try:
                test.choose(contestant.lines, contestant.name)
            except DataError as error:
                reasons.append(str(error))
    return reasons
