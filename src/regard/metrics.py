"""How near outputs are to references: BLEU, chrF and TER by sacreBLEU, exact match, and the token error rate.

Every metric sees strings only, scores a whole corpus, answers in percent, and carries the signature that says how it
was computed: two scores may be compared when their signatures are equal. References are one string for each line, or
several such lists, where None stands for a reference that a line does not have.

    bleu(["A dog runs home."], ["A dog runs home."]).value    # 100.0

All of them have one shape: something is counted on each line, and a formula turns the sums of the counts into the
score. So the texts are read once, and the score of the whole, of any part, and of every resample of a significance test
follow from `Counts`.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from regard.errors import ConfigError, DataError

TOKENIZE = ("13a", "none", "intl", "char", "zh")
BETTER = {"BLEU": 1, "chrF": 1, "TER": -1, "exact match": 1, "token error rate": -1}
"""The metrics in their order, and which way each is better: 1 up, -1 down."""

References = Sequence[str] | Sequence[Sequence[str | None]]


class Score(NamedTuple):
    """One metric of one corpus.

    Attributes:
        name: what people call it, such as "BLEU".
        value: in percent; 0 to 100, but the error rates (TER, token error rate) can exceed 100.
        signature: how it was computed, in sacreBLEU's form.
    """

    name: str
    value: float
    signature: str


@dataclass(frozen=True, eq=False)
class Counts:
    """What a metric counts on each line; the score of any lines follows from the sums of their counts.

    Attributes:
        name: of the metric.
        signature: how it counts, in sacreBLEU's form.
        table: float64 (lines, counts).
        formula: the sums of some lines' counts → their score in percent.
    """

    name: str
    signature: str
    table: NDArray[np.float64]
    formula: Callable[[NDArray[np.float64]], float]

    def score(self, rows: Sequence[int] | None = None) -> Score:
        """The score of some lines; None: of all."""
        chosen = self.table if rows is None else self.table[list(rows)]
        return Score(self.name, float(self.formula(chosen.sum(0))), self.signature)


def count(outputs: Sequence[str], references: References, tokenize: str = "13a") -> dict[str, Counts]:
    """The counts of every metric by its name, in the order of BETTER; tokenize is that of `bleu`.

    Raises:
        DataError: there are no lines, not as many outputs as references, or a line without any reference.
        ConfigError: no such tokenize.
    """
    check_tokenize(tokenize)
    files = _files(outputs, references)
    found = [_bleu(outputs, files, tokenize), _chrf(outputs, files), _ter(outputs, files, tokenize),
             _exact_match(outputs, files), _token_errors(outputs, files, tokenize)]
    return {counts.name: counts for counts in found}


def bleu(outputs: Sequence[str], references: References, tokenize: str = "13a") -> Score:
    """BLEU of Papineni et al. (2002), as sacreBLEU (Post 2018) computes it.

    Args:
        outputs: one string a line, detokenized unless tokenize is "none".
        references: the right answers, as many; or several such lists.
        tokenize: 13a (the standard) | none (tokens are already parted by spaces) | intl | char | zh.

    Raises:
        DataError: there are no lines, not as many outputs as references, or a line without any reference.
        ConfigError: no such tokenize.
    """
    check_tokenize(tokenize)
    return _bleu(outputs, _files(outputs, references), tokenize).score()


def chrf(outputs: Sequence[str], references: References) -> Score:
    """chrF2 of Popović (2015): the F-score of character 1- to 6-grams, recall counted twice, by sacreBLEU.

    Raises:
        DataError: as for `bleu`.
    """
    return _chrf(outputs, _files(outputs, references)).score()


def ter(outputs: Sequence[str], references: References, tokenize: str = "13a") -> Score:
    """TER of Snover et al. (2006): edits and shifts of words per reference word, by sacreBLEU; lower is better.

    A word is what stands between spaces; with tokenize "zh", each Chinese character is one, and punctuation is parted.

    Raises:
        DataError: as for `bleu`.
        ConfigError: no such tokenize.
    """
    check_tokenize(tokenize)
    return _ter(outputs, _files(outputs, references), tokenize).score()


def exact_match(outputs: Sequence[str], references: References) -> Score:
    """The share of outputs that equal a reference of theirs, spaces at the ends aside.

    Raises:
        DataError: as for `bleu`.
    """
    return _exact_match(outputs, _files(outputs, references)).score()


def token_error_rate(outputs: Sequence[str], references: References, tokenize: str = "13a") -> Score:
    """Levenshtein edits per reference token, over tokens parted by spaces; lower is better.

    With tokenize "zh" and "char" each character that is not a space is a token: it is the character error rate then.

    All edits of the corpus are divided by all its reference tokens, so long lines weigh more than short ones. It is
    the phoneme error rate when the tokens are phonemes, the word error rate when they are words. Of several references
    the closest counts: that with the fewest edits, and the longest of those.

    Raises:
        DataError: as for `bleu`, or no token in any reference.
        ConfigError: no such tokenize.
    """
    check_tokenize(tokenize)
    files = _files(outputs, references)
    if not any(reference.split() for file in files for reference in file if reference is not None):
        raise DataError("token error rate: no reference holds a single token, so there is nothing to divide by. "
                        "Check that the reference file is the right one")
    return _token_errors(outputs, files, tokenize).score()


def check_tokenize(tokenize: str) -> None:
    """Refuse a tokenize that `bleu` does not know, before an hour of translating.

    Raises:
        ConfigError: no such tokenize; the message lists those there are.
    """
    if tokenize not in TOKENIZE:
        near = difflib.get_close_matches(tokenize, TOKENIZE, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f'tokenize = "{tokenize}" is not a tokenization of BLEU.{hint} Known: {", ".join(TOKENIZE)}')


_Files = Sequence[Sequence[str | None]]


def _files(outputs: Sequence[str], references: References) -> _Files:
    """The references as a list of files. A metric needs lines, and a reference for each."""
    one = not references or references[0] is None or isinstance(references[0], str)
    files: Any = [references] if one else references
    for file in files:
        if len(outputs) != len(file):
            raise DataError(f"{len(outputs):,} outputs and {len(file):,} references: a metric compares line n of "
                            "one with line n of the other, so there must be as many")
    if not outputs:
        raise DataError("no lines to score: outputs and references are empty")
    for number, line in enumerate(zip(*files, strict=True), start=1):
        if all(reference is None for reference in line):
            raise DataError(f"line {number:,} has no reference: each line needs at least one to be scored")
    return list(files)


def _bleu(outputs: Sequence[str], files: _Files, tokenize: str) -> Counts:
    from sacrebleu.metrics.bleu import BLEU

    # force: no warning that the text looks tokenized, where it is meant to be
    return _sacrebleu("BLEU", BLEU(tokenize=tokenize, force=tokenize == "none"), outputs, files)


def _chrf(outputs: Sequence[str], files: _Files) -> Counts:
    from sacrebleu.metrics.chrf import CHRF

    return _sacrebleu("chrF", CHRF(), outputs, files)


def _ter(outputs: Sequence[str], files: _Files, tokenize: str) -> Counts:
    from sacrebleu.metrics.ter import TER

    chinese = tokenize == "zh"
    return _sacrebleu("TER", TER(normalized=chinese, asian_support=chinese), outputs, files)


def _sacrebleu(name: str, metric: Any, outputs: Sequence[str], files: _Files) -> Counts:
    """The counts of one of sacreBLEU's metrics, by the two calls of which its corpus_score and its tests are made."""
    table = metric._extract_corpus_statistics(list(outputs), [list(file) for file in files])
    return Counts(name, str(metric.get_signature()), np.array(table, np.float64),
                  lambda sums: float(metric._compute_score_from_stats(sums.tolist()).score))


def _exact_match(outputs: Sequence[str], files: _Files) -> Counts:
    """Lines that are right, and lines."""
    table = [(any(reference is not None and output.strip() == reference.strip() for reference in line), 1)
             for output, line in zip(outputs, zip(*files, strict=True), strict=True)]
    return Counts("exact match", f"nrefs:{_number(files)}|case:mixed|tok:none", np.array(table, np.float64), _rate)


def _token_errors(outputs: Sequence[str], files: _Files, tokenize: str) -> Counts:
    """Edits, and tokens of the closest reference."""
    characters = tokenize in ("zh", "char")

    def tokens(text: str) -> list[str]:
        return list("".join(text.split())) if characters else text.split()

    table = [_closest(tokens(output), [tokens(reference) for reference in line if reference is not None])
             for output, line in zip(outputs, zip(*files, strict=True), strict=True)]
    signature = f"nrefs:{_number(files)}|case:mixed|tok:{'char' if characters else 'space'}"
    return Counts("token error rate", signature, np.array(table, np.float64), _rate)


def _closest(output: list[str], references: list[list[str]]) -> tuple[int, int]:
    """Edits that lead to the closest reference, and its length."""
    from rapidfuzz.distance import Levenshtein

    found = [(Levenshtein.distance(output, reference), len(reference)) for reference in references]
    return min(found, key=lambda each: (each[0], -each[1]))


def _rate(sums: NDArray[np.float64]) -> float:
    """The first sum over the second; without reference tokens, any output is wholly wrong (sacreBLEU's TER does so)."""
    part, whole = sums.tolist()
    return 100.0 * part / whole if whole else 100.0 * bool(part)


def _number(files: _Files) -> str:
    """How many references a line has, as sacreBLEU's signatures tell it; "var" where lines differ."""
    numbers = {sum(reference is not None for reference in line) for line in zip(*files, strict=True)}
    return str(numbers.pop()) if len(numbers) == 1 else "var"
