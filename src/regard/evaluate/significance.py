"""Whether two systems differ by more than chance: sacreBLEU's own paired tests, over every metric of ours.

Both tests ask how often a difference at least as large as the one seen would come about if the systems were alike:
paired bootstrap resampling (Koehn 2004) draws the test set again and again from its own lines; approximate
randomisation (Riezler and Maxwell 2005) swaps the two outputs of random lines. A small p speaks for a real difference.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from regard.errors import ConfigError
from regard.metrics import Counts

RESAMPLES, TRIALS, SEED = 1000, 10_000, 12_345
"""The defaults of sacreBLEU: bootstrap resamples, trials of approximate randomisation, and the seed of both."""

MOST_MEMORY = 4e9
"""Bytes that the tests may take; sacreBLEU holds all resamples at once."""

_TIE = 1e-7
_WIDEST = 18  # counts of one line: of chrF, 3 for each of 6 orders


class Significance(NamedTuple):
    """One metric of one system, and how sure its difference from the baseline is.

    Attributes:
        mean: of the metric over the bootstrap resamples.
        interval: half the width of its 95% confidence interval.
        difference: the system's score less the baseline's; None for the baseline.
        bootstrap: p-value of paired bootstrap resampling; None for the baseline.
        randomisation: p-value of approximate randomisation; None for the baseline.
    """

    mean: float
    interval: float
    difference: float | None
    bootstrap: float | None
    randomisation: float | None


class Draws(NamedTuple):
    """How often and from which seed the tests draw."""

    resamples: int = RESAMPLES
    trials: int = TRIALS
    seed: int = SEED

    def check(self, lines: int) -> None:
        """Refuse what sacreBLEU cannot draw, before an hour of translating.

        Raises:
            ConfigError: a number below 1, or more than the memory can hold for a test set of so many lines.
        """
        for name, value in self._asdict().items():
            if value < 1:
                raise ConfigError(f"{name} = {value}: expected 1 or more")
        needed = {"resamples": _WIDEST * 4 + 8, "trials": 10}  # bytes for each line
        for name, size in needed.items():
            most = int(MOST_MEMORY / (size * lines))
            if getattr(self, name) > most:
                raise ConfigError(f"{name} = {getattr(self, name):,} on {lines:,} lines would take "
                                  f"{getattr(self, name) * size * lines / 1e9:.1f} GB. At most {most:,} fit into the "
                                  f"{MOST_MEMORY / 1e9:.0f} GB that are allowed: give --{name} {most}, or a smaller "
                                  "test set")

    def signature(self, signature: str, test: str) -> str:
        """A metric's signature with the test's, as sacreBLEU writes it; test is "bs" or "ar"."""
        references, _, rest = signature.partition("|")
        return f"{references}|{test}:{self.resamples if test == 'bs' else self.trials}|seed:{self.seed}|{rest}"


def paired(systems: Sequence[Mapping[str, Counts]], draws: Draws) -> list[dict[str, Significance]]:
    """Test every system against the first, by every metric.

    Two things sacreBLEU leaves open are settled here. Systems whose counts are equal on every line have p = 1: no draw
    can tell them apart. And a randomised difference that equals the one seen counts as at least as large, as Riezler
    and Maxwell have it; sacreBLEU counts only larger ones, which calls a difference in a single line certain. Where
    neither occurs the p-values are sacreBLEU's to the last digit.

    Args:
        systems: for each system its counts by metric, of the same lines; the first is the baseline.
        draws: how often and from which seed to draw.

    Returns:
        for each system its results by metric.

    Raises:
        ConfigError: see `Draws.check`.
    """
    names = list(systems[0])
    draws.check(len(systems[0][names[0]].table))
    bootstrap = _run("bs", systems, draws.resamples, draws.seed)
    randomisation = _run("ar", systems, draws.trials, draws.seed)
    return [{name: _significance(name, systems[0], system, bootstrap[name][place], randomisation[name][place])
             for name in names} for place, system in enumerate(systems)]


def _significance(
    name: str, baseline: Mapping[str, Counts], system: Mapping[str, Counts], bootstrap: Any, randomisation: Any
) -> Significance:
    """One metric of one system, from sacreBLEU's results."""
    mean, interval = float(bootstrap.mean), float(bootstrap.ci)
    if system is baseline:
        return Significance(mean, interval, None, None, None)
    difference = system[name].score().value - baseline[name].score().value
    alike = np.array_equal(system[name].table, baseline[name].table)
    return Significance(mean, interval, difference, 1.0 if alike else float(bootstrap.p_value),
                        1.0 if difference == 0 else float(randomisation.p_value))


def _run(test: str, systems: Sequence[Mapping[str, Counts]], draws: int, seed: int) -> Any:
    """sacreBLEU's test: metric → for each system its result."""
    from sacrebleu.significance import PairedTest

    tie = _TIE if test == "ar" else 0.0
    metrics: Any = {name: _Metric(name, [system[name] for system in systems], tie) for name in systems[0]}
    with _seed(seed):
        named: Any = [(str(place), _Outputs(system)) for place, system in enumerate(systems)]
        return PairedTest(named, metrics, references=None, test_type=test, n_samples=draws)()[1]


@contextmanager
def _seed(seed: int) -> Iterator[None]:
    """Set the seed where sacreBLEU reads it, its environment variable, and put back what was there."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        del os.environ["SACREBLEU_SEED"]
        if before is not None:
            os.environ["SACREBLEU_SEED"] = before


class _Outputs:
    """What stands for a system's outputs: PairedTest asks how many there are, and hands them to the metrics."""

    def __init__(self, counts: Mapping[str, Counts]):
        self.counts = counts

    def __len__(self) -> int:
        return len(next(iter(self.counts.values())).table)


class _Value(NamedTuple):
    """A score as PairedTest reads it."""

    name: str
    score: float


class _Metric:
    """A metric as PairedTest calls it (sacrebleu.metrics.base.Metric), on counts that are there already.

    Args:
        name: of the metric.
        systems: its counts of every system.
        tie: by which share the scores of the systems themselves, but of no resample, are made smaller, so that an equal
            difference counts as at least as large.
    """

    def __init__(self, name: str, systems: Sequence[Counts], tie: float):
        self.name, self.systems, self.tie = name, systems, tie

    def _extract_corpus_statistics(self, hypotheses: _Outputs, references: None) -> Any:
        return hypotheses.counts[self.name].table

    def _aggregate_and_compute(self, stats: Any) -> _Value:
        whole = any(stats is counts.table for counts in self.systems)
        score = self.systems[0].formula(np.asarray(stats).sum(0))
        return _Value(self.name, score * (1 - self.tie) if whole else score)

    def _compute_score_from_stats(self, stats: Any) -> _Value:
        return _Value(self.name, self.systems[0].formula(stats))

    def get_signature(self) -> dict[str, Any]:
        """PairedTest adds its own to it; `Draws.signature` writes it."""
        return _Notes()


class _Notes(dict[str, Any]):
    """A signature that PairedTest writes to; nobody reads it."""

    def update(self, key: str, value: Any) -> None:  # type: ignore[override]
        self[key] = value
