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
from regard.metrics import Score, bleu, check_tokenize, chrf, exact_match, ter, token_error_rate
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
    """

    lines: int
    scores: list[Score]
    by_length: list[Bucket]
    problems: dict[int, str]
    seconds: float
    outputs: list[str]

    def figures(self) -> dict[str, Any]:
        """Everything but the outputs, as JSON takes it: scores by name, each a value in percent and its signature."""
        return {
            "lines": self.lines,
            "seconds": round(self.seconds, 3),
            "problems": {str(number): problem for number, problem in self.problems.items()},
            "scores": {score.name: {"value": score.value, "signature": score.signature} for score in self.scores},
            "by_length": [
                {**bucket._asdict(), "scores": {score.name: score.value for score in bucket.scores}}
                for bucket in self.by_length
            ],
        }


def evaluate(
    translator: Translator,
    sources: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str | None = None,
    beam: int | None = None,
    progress: Callable[[], object] | None = None,
) -> Evaluation:
    """Translate a test set and score the output with every metric, as a whole and by source length.

    Args:
        translator: what is judged.
        sources: the test set, one text a line.
        references: the right answers, as many.
        tokenize: how BLEU parts words, see `regard.metrics.bleu`; None: as the run's config says.
        beam: hypotheses kept; None: as the run's config says.
        progress: called after each line that is translated.

    Raises:
        DataError: there are no lines, not as many references as sources, or no token in any reference.
        ConfigError: no such tokenize, or a beam that cannot be.
    """
    tokenize = tokenize or translator.config.data.bleu_tokenize
    check_tokenize(tokenize)
    if len(sources) != len(references):
        raise DataError(f"{len(sources):,} source lines and {len(references):,} references: line n of one must "
                        "translate line n of the other, so there must be as many")
    if not any(reference.split() for reference in references):
        raise DataError("the test set holds no reference text, so there is nothing to compare with")
    started = time.perf_counter()
    translations = []
    for translation in translator.stream(sources, beam=beam):
        translations.append(translation)
        if progress is not None:
            progress()
    seconds = time.perf_counter() - started
    outputs = [translation.text for translation in translations]
    lengths = [len(ids) for ids in translator.tokenizers.source.encode(sources)]
    return Evaluation(
        lines=len(sources),
        scores=_scores(outputs, references, tokenize),
        by_length=_by_length(outputs, references, lengths, tokenize),
        problems=_problems(translations),
        seconds=seconds,
        outputs=outputs,
    )


def _scores(outputs: Sequence[str], references: Sequence[str], tokenize: str) -> list[Score]:
    """Every metric on these lines; none where no reference holds a token, since no error rate exists there."""
    if not any(reference.split() for reference in references):
        return []
    return [
        bleu(outputs, references, tokenize),
        chrf(outputs, references),
        ter(outputs, references),
        exact_match(outputs, references),
        token_error_rate(outputs, references),
    ]


def _by_length(
    outputs: Sequence[str], references: Sequence[str], lengths: Sequence[int], tokenize: str
) -> list[Bucket]:
    """The buckets that hold lines, shortest first."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(bisect_left(LONGEST, length), []).append(row)
    return [
        Bucket(
            shortest=LONGEST[number - 1] + 1 if number else 0,
            longest=LONGEST[number] if number < len(LONGEST) else None,
            lines=len(members),
            scores=_scores([outputs[row] for row in members], [references[row] for row in members], tokenize),
        )
        for number, members in sorted(rows.items())
    ]


def _problems(translations: Sequence[Translation]) -> dict[int, str]:
    """Line number, from 1, and reason, of the lines that could not be translated."""
    return {number: t.problem for number, t in enumerate(translations, start=1) if t.problem is not None}
