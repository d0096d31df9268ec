"""Metrics against sacreBLEU itself, counts by hand, and every user error with its message."""

import pytest
import sacrebleu

from regard.errors import ConfigError, DataError
from regard.metrics import BETTER, TOKENIZE, Score, bleu, chrf, count, exact_match, ter, token_error_rate

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


# --- several references


OTHERS = ["Ein Hund läuft über die Wiese.", "Zwei Frauen, die laut lachen.", "Ein Mann, der schläft."]


def test_of_several_references_sacrebleu_takes_its_own_way():
    for ours, theirs in ((bleu, sacrebleu.corpus_bleu), (chrf, sacrebleu.corpus_chrf), (ter, sacrebleu.corpus_ter)):
        score = ours(OUTPUTS, [REFERENCES, OTHERS])
        assert score.value == theirs(OUTPUTS, [REFERENCES, OTHERS]).score
        assert score.signature.startswith("nrefs:2|")


def test_exact_match_takes_any_reference():
    assert exact_match(OUTPUTS, [REFERENCES, OTHERS]) == Score(
        "exact match", pytest.approx(100 / 3), "nrefs:2|case:mixed|tok:none"
    )


def test_token_error_rate_takes_the_closest_reference_and_of_equals_the_longest():
    outputs, references = ["a b c", "d"], [["a x y", "e"], ["a b x y", "f g"]]
    score = token_error_rate(outputs, references)
    assert score.value == pytest.approx(100 * (2 + 1) / (4 + 1))  # two edits of both: the longer; d to e is one edit
    assert score.signature == "nrefs:2|case:mixed|tok:space"


def test_a_line_may_lack_some_references_but_not_all():
    some = [REFERENCES, [None, OTHERS[1], None]]
    assert bleu(OUTPUTS, some).value == sacrebleu.corpus_bleu(OUTPUTS, some).score
    assert exact_match(OUTPUTS, some).signature.startswith("nrefs:var|")
    assert token_error_rate(OUTPUTS, [[None, *REFERENCES[1:]], [REFERENCES[0], None, None]]) == token_error_rate(
        OUTPUTS, REFERENCES)
    with pytest.raises(DataError, match="line 2 has no reference"):
        bleu(OUTPUTS, [[REFERENCES[0], None, None], [None, None, REFERENCES[2]]])


def test_a_second_file_of_other_length_is_refused():
    with pytest.raises(DataError, match="3 outputs and 2 references"):
        chrf(OUTPUTS, [REFERENCES, REFERENCES[:2]])


# --- Chinese


def test_chinese_is_scored_by_characters():
    outputs, references = ["我喜欢猫。"], ["我不喜欢狗。"]
    assert token_error_rate(outputs, references).value == 100
    score = token_error_rate(outputs, references, "zh")
    assert score.value == pytest.approx(100 * 2 / 6) and score.signature.endswith("tok:char")
    assert ter(outputs, references).value == 100
    score = ter(outputs, references, "zh")
    assert score.value == sacrebleu.corpus_ter(outputs, [references], normalized=True, asian_support=True).score < 50
    assert "asian:yes" in score.signature
    assert token_error_rate(["a b c"], ["ab x"], "char").value == pytest.approx(100 / 3)  # spaces are no characters


@pytest.mark.parametrize("metric", [ter, token_error_rate])
def test_every_metric_knows_the_same_tokenizations(metric):
    with pytest.raises(ConfigError, match='tokenize = "14a" is not a tokenization'):
        metric(OUTPUTS, REFERENCES, "14a")


# --- counts


@pytest.mark.parametrize("tokenize", TOKENIZE)
def test_counts_give_the_score_of_all_and_of_any_lines(tokenize):
    counts = count(OUTPUTS, [REFERENCES, OTHERS], tokenize)
    assert list(counts) == list(BETTER)
    for rows in (None, [0], [2, 0]):
        chosen = range(3) if rows is None else rows
        outputs, references = [OUTPUTS[row] for row in chosen], [[file[row] for row in chosen]
                                                                 for file in (REFERENCES, OTHERS)]
        assert [each.score(rows) for each in counts.values()] == [
            bleu(outputs, references, tokenize), chrf(outputs, references), ter(outputs, references, tokenize),
            exact_match(outputs, references), token_error_rate(outputs, references, tokenize)]


def test_lines_without_reference_tokens_are_wholly_wrong_or_right():
    counts = count(["a", ""], ["", ""])["token error rate"]
    assert [counts.score([row]).value for row in (0, 1)] == [100, 0]
