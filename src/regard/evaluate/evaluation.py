"""How good a translator is on a test set: every metric on all of it, and on its short and its long lines apart.

One number hides what attention is about. A model with a fixed vector and one with attention can be near each other on
short lines and far apart on long ones, so every evaluation comes by source length too (Cho et al. 2014b, figure 4;
Bahdanau et al. 2015, figure 2).
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from regard.errors import DataError
from regard.metrics import Counts, References, Score, check_tokenize, count
from regard.translator import Translation, Translator

LONGEST = (5, 10, 15, 20, 30, 40, 60, 80, 120, 160, 240)
"""The longest source, in tokens, of each bucket but the last, which has no end. Fixed, so that runs can be compared."""


class Bucket(NamedTuple):
    """The lines of which the source is of one range of lengths.

    Attributes:
        shortest: tokens of the shortest source that belongs here.
        longest: tokens of the longest source that belongs here; None: there is no longest.
        lines: how many lines there are.
        scores: the same metrics as for the whole; empty if no reference here holds a token.
    """

    shortest: int
    longest: int | None
    lines: int
    scores: list[Score]

    @property
    def name(self) -> str:
        """Such as "up to 5", "6–10" or "241 and more"."""
        if self.longest is None:
            return f"{self.shortest} and more"
        return f"{self.shortest}–{self.longest}" if self.shortest else f"up to {self.longest}"


@dataclass(frozen=True)
class Rating:
    """What a test set says about outputs.

    Attributes:
        scores: BLEU, chrF, TER, exact match, token error rate, in this order.
        by_length: the same by source length, shortest first; lengths that do not occur are left out.
        closeness: chrF of each line by itself, to tell good from bad ones.
        counts: what each metric counted on each line, by its name.
    """

    scores: list[Score]
    by_length: list[Bucket]
    closeness: list[float]
    counts: dict[str, Counts]


@dataclass(frozen=True)
class Evaluation:
    """What a test set says about a translator.

    Attributes:
        lines: how many lines were translated and scored.
        scores: BLEU, chrF, TER, exact match, token error rate, in this order.
        by_length: the same by source length, shortest first; lengths that do not occur are left out.
        problems: line number, counted from 1, and why it could not be translated; such a line is scored as empty.
        seconds: how long translating took, by the clock.
        outputs: the translations, in order.
        closeness: chrF of each line by itself.
        engine: that translated.
        precision: of its weights and products.
    """

    lines: int
    scores: list[Score]
    by_length: list[Bucket]
    problems: dict[int, str]
    seconds: float
    outputs: list[str]
    closeness: list[float]
    engine: str
    precision: str

    def figures(self) -> dict[str, Any]:
        """Everything but the outputs, as JSON takes it: scores by name, each a value in percent and its signature."""
        return {
            "engine": self.engine,
            "precision": self.precision,
            "lines": self.lines,
            "seconds": round(self.seconds, 3),
            "problems": {str(number): problem for number, problem in self.problems.items()},
            "scores": {score.name: {"value": score.value, "signature": score.signature} for score in self.scores},
            "by_length": length_figures(self.by_length),
        }


def evaluate(
    translator: Translator,
    sources: Sequence[str],
    references: References,
    *,
    tokenize: str | None = None,
    beam: int | None = None,
    progress: Callable[[], object] | None = None,
) -> Evaluation:
    """Translate a test set and score the output with every metric, as a whole and by source length.

    Args:
        translator: what is judged.
        sources: the test set, one text a line.
        references: the right answers, as many; or several such lists, with None where a line has none in a list.
        tokenize: how BLEU parts words, see `regard.metrics.bleu`; None: as the run's config says.
        beam: hypotheses kept; None: as the run's config says.
        progress: called after each line that is translated.

    Raises:
        DataError: there are no lines, not as many references as sources, or no token in any reference.
        ConfigError: no such tokenize, or a beam that cannot be.
    """
    tokenize = tokenize or translator.config.data.bleu_tokenize
    check_tokenize(tokenize)
    check_references(sources, references)
    started = time.perf_counter()
    translations = translate(translator, sources, beam, progress)
    seconds = time.perf_counter() - started
    outputs = [translation.text for translation in translations]
    assert translator.engine is not None
    rating = rate(outputs, references, token_lengths(translator, sources), tokenize)
    return Evaluation(
        lines=len(sources),
        scores=rating.scores,
        by_length=rating.by_length,
        problems={number: t.problem for number, t in enumerate(translations, start=1) if t.problem is not None},
        seconds=seconds,
        outputs=outputs,
        closeness=rating.closeness,
        engine=translator.engine.name,
        precision=translator.engine.precision,
    )


def translate(
    translator: Translator, sources: Sequence[str], beam: int | None, progress: Callable[[], object] | None
) -> list[Translation]:
    """Translate all lines, and call `progress` after each."""
    translations = []
    for translation in translator.stream(sources, beam=beam):
        translations.append(translation)
        if progress is not None:
            progress()
    return translations


def rate(outputs: Sequence[str], references: References, lengths: Sequence[int], tokenize: str) -> Rating:
    """Score outputs with every metric, as a whole, by source length and line by line.

    Args:
        outputs: one text a line.
        references: as for `evaluate`.
        lengths: of each source, in whatever unit; see LONGEST.
        tokenize: how BLEU parts words, see `regard.metrics.bleu`.

    Raises:
        DataError: there are no lines, or not as many references as outputs.
        ConfigError: no such tokenize.
    """
    counts = count(outputs, references, tokenize)
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(bisect_left(LONGEST, length), []).append(row)
    return Rating(
        scores=[each.score() for each in counts.values()],
        by_length=[_bucket(number, members, counts) for number, members in sorted(rows.items())],
        closeness=[counts["chrF"].score([row]).value for row in range(len(outputs))],
        counts=counts,
    )


def token_lengths(translator: Translator, sources: Sequence[str]) -> list[int]:
    """Of each source, in the translator's tokens."""
    return [len(ids) for ids in translator.tokenizers.source.encode(sources)]


def length_figures(buckets: Sequence[Bucket]) -> list[dict[str, Any]]:
    """Buckets as JSON takes them."""
    return [{**bucket._asdict(), "scores": {score.name: score.value for score in bucket.scores}} for bucket in buckets]


def check_references(sources: Sequence[str], references: References) -> None:
    """Refuse references that cannot score these sources, before an hour of translating.

    Raises:
        DataError: not as many references as sources, or no token in any reference.
    """
    files: Any = [references] if not references or isinstance(references[0], str) else references
    for file in files:
        if len(sources) != len(file):
            raise DataError(f"{len(sources):,} source lines and {len(file):,} references: line n of one must "
                            "translate line n of the other, so there must be as many")
    if not any(reference and reference.split() for file in files for reference in file):
        raise DataError("the test set holds no reference text, so there is nothing to compare with")


def _bucket(number: int, rows: Sequence[int], counts: dict[str, Counts]) -> Bucket:
    """The bucket of a place in LONGEST, which holds some rows; no error rate exists without reference tokens."""
    tokens = counts["token error rate"].table[list(rows), 1].sum()
    return Bucket(
        shortest=LONGEST[number - 1] + 1 if number else 0,
        longest=LONGEST[number] if number < len(LONGEST) else None,
        lines=len(rows),
        scores=[each.score(rows) for each in counts.values()] if tokens else [],
    )
