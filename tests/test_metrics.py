"""Metrics against sacreBLEU itself, counts by hand, and every user error with its message."""

import pytest
import sacrebleu

from regard.errors import ConfigError, DataError
from regard.metrics import Score, bleu, chrf, exact_match, ter, token_error_rate

OUTPUTS = ["Ein Hund läuft über die Wiese.", "Zwei Frauen, die lachen.", "Ein Mann"]
REFERENCES = ["Ein Hund rennt über die Wiese.", "Zwei Frauen lachen.", "Ein alter Mann schläft."]


@pytest.mark.parametrize("tokenize", ["13a", "none", "intl", "char", "zh"])
def test_bleu_is_sacrebleu(tokenize):
    score = bleu(OUTPUTS, REFERENCES, tokenize=tokenize)
    assert score.value == sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES], tokenize=tokenize).score
    assert 0 < score.value < 100
    assert f"tok:{tokenize}|" in score.signature and "version:" in score.signature


def test_chrf_and_ter_are_sacrebleu():
    assert chrf(OUTPUTS, REFERENCES).value == sacrebleu.corpus_chrf(OUTPUTS, [REFERENCES]).score
    assert ter(OUTPUTS, REFERENCES).value == sacrebleu.corpus_ter(OUTPUTS, [REFERENCES]).score
    assert "nc:6" in chrf(OUTPUTS, REFERENCES).signature
    assert "tok:tercom" in ter(OUTPUTS, REFERENCES).signature


def test_perfect_output():
    values = [metric(REFERENCES, REFERENCES).value for metric in (bleu, chrf, ter, exact_match, token_error_rate)]
    assert values == pytest.approx([100, 100, 0, 100, 0])


def test_exact_match_is_percent_and_ignores_spaces_at_the_ends():
    assert exact_match(["a b ", "c", "D"], ["a b", "x", "d"]) == Score(
        "exact match", pytest.approx(100 / 3), "nrefs:1|case:mixed|tok:none"
    )


def test_token_error_rate_divides_all_edits_by_all_reference_tokens():
    outputs = ["K AE T", "D AO", ""]
    references = ["K AE T", "D AO G Z", "IH"]
    assert token_error_rate(outputs, references).value == pytest.approx(100 * 3 / 8)


def test_token_error_rate_counts_tokens_not_characters():
    assert token_error_rate(["abcdef"], ["uvwxyz b"]).value == pytest.approx(100)


def test_token_error_rate_can_exceed_100():
    assert token_error_rate(["a b c d"], ["x"]).value == pytest.approx(400)


@pytest.mark.parametrize("metric", [bleu, chrf, ter, exact_match, token_error_rate])
def test_differing_counts_are_refused(metric):
    with pytest.raises(DataError, match="1 outputs and 2 references"):
        metric(["a"], ["a", "b"])


@pytest.mark.parametrize("metric", [bleu, chrf, ter, exact_match, token_error_rate])
def test_no_lines_are_refused(metric):
    with pytest.raises(DataError, match="no lines to score"):
        metric([], [])


def test_references_without_tokens_are_refused():
    with pytest.raises(DataError, match="no reference holds a single token"):
        token_error_rate(["a"], [" "])


def test_unknown_tokenize_names_a_near_one():
    with pytest.raises(ConfigError, match=r'"13b" is not a tokenization of BLEU\. Did you mean "13a"'):
        bleu(OUTPUTS, REFERENCES, tokenize="13b")


def test_tokenized_text_is_scored_without_a_warning(caplog):
    lines = ["a b c d ."] * 200
    assert bleu(lines, lines, tokenize="none").value == pytest.approx(100)
    assert not caplog.records
