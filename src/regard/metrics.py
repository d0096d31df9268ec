"""How near outputs are to references: BLEU, chrF and TER by sacreBLEU, exact match, and the token error rate.

Every metric sees strings only, scores a whole corpus, answers in percent, and carries the signature that says how it
was computed: two scores may be compared when their signatures are equal.

    bleu(["A dog runs home."], ["A dog runs home."]).value    # 100.0
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from regard.errors import ConfigError, DataError

TOKENIZE = ("13a", "none", "intl", "char", "zh")


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


def bleu(outputs: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Score:
    """BLEU of Papineni et al. (2002), as sacreBLEU (Post 2018) computes it.

    Args:
        outputs: one string a line, detokenized unless tokenize is "none".
        references: the right answers, as many.
        tokenize: 13a (the standard) | none (tokens are already parted by spaces) | intl | char | zh.

    Raises:
        DataError: there are no lines, or not as many outputs as references.
        ConfigError: no such tokenize.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check_lines(outputs, references)
    check_tokenize(tokenize)
    metric = BLEU(tokenize=tokenize, force=tokenize == "none")  # force: do not warn that the text looks tokenized
    value = metric.corpus_score(list(outputs), [list(references)]).score
    return Score("BLEU", float(value), str(metric.get_signature()))


def chrf(outputs: Sequence[str], references: Sequence[str]) -> Score:
    """chrF2 of Popović (2015): the F-score of character 1- to 6-grams, recall counted twice, by sacreBLEU.

    Raises:
        DataError: there are no lines, or not as many outputs as references.
    """
    from sacrebleu.metrics.chrf import CHRF

    _check_lines(outputs, references)
    metric = CHRF()
    value = metric.corpus_score(list(outputs), [list(references)]).score
    return Score("chrF", float(value), str(metric.get_signature()))


def ter(outputs: Sequence[str], references: Sequence[str]) -> Score:
    """TER of Snover et al. (2006): edits and shifts of words per reference word, by sacreBLEU; lower is better.

    Raises:
        DataError: there are no lines, or not as many outputs as references.
    """
    from sacrebleu.metrics.ter import TER

    _check_lines(outputs, references)
    metric = TER()
    value = metric.corpus_score(list(outputs), [list(references)]).score
    return Score("TER", float(value), str(metric.get_signature()))


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> Score:
    """The share of outputs that equal their reference, spaces at the ends aside.

    Raises:
        DataError: there are no lines, or not as many outputs as references.
    """
    _check_lines(outputs, references)
    equal = sum(output.strip() == reference.strip() for output, reference in zip(outputs, references, strict=True))
    return Score("exact match", 100 * equal / len(outputs), "nrefs:1|case:mixed|tok:none")


def token_error_rate(outputs: Sequence[str], references: Sequence[str]) -> Score:
    """Levenshtein edits per reference token, over tokens parted by spaces; lower is better.

    All edits of the corpus are divided by all its reference tokens, so long lines weigh more than short ones. It is
    the phoneme error rate when the tokens are phonemes, the word error rate when they are words.

    Raises:
        DataError: there are no lines, not as many outputs as references, or no token in any reference.
    """
    from rapidfuzz.distance import Levenshtein

    _check_lines(outputs, references)
    pairs = [(output.split(), reference.split()) for output, reference in zip(outputs, references, strict=True)]
    tokens = sum(len(reference) for _, reference in pairs)
    if not tokens:
        raise DataError("token error rate: no reference holds a single token, so there is nothing to divide by. "
                        "Check that the reference file is the right one")
    edits = sum(Levenshtein.distance(output, reference) for output, reference in pairs)
    return Score("token error rate", 100 * edits / tokens, "nrefs:1|case:mixed|tok:space")


def check_tokenize(tokenize: str) -> None:
    """Refuse a tokenize that `bleu` does not know, before an hour of translating.

    Raises:
        ConfigError: no such tokenize; the message lists those there are.
    """
    if tokenize not in TOKENIZE:
        near = difflib.get_close_matches(tokenize, TOKENIZE, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f'tokenize = "{tokenize}" is not a tokenization of BLEU.{hint} Known: {", ".join(TOKENIZE)}')


def _check_lines(outputs: Sequence[str], references: Sequence[str]) -> None:
    """A metric needs lines, and one reference for each."""
    if len(outputs) != len(references):
        raise DataError(f"{len(outputs):,} outputs and {len(references):,} references: a metric compares line n of "
                        "one with line n of the other, so there must be as many")
    if not outputs:
        raise DataError("no lines to score: outputs and references are empty")
