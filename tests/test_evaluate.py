"""Evaluation against the metrics themselves, with a translator whose output is known."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from regard import metrics
from regard.errors import ConfigError, DataError
from regard.evaluate import LONGEST, Bucket, evaluate
from regard.translator import Translation


@dataclass
class Known:
    """A translator that gives prepared outputs; None stands for a line that it cannot translate."""

    outputs: list[str | None]
    beams: list[int | None] = field(default_factory=list)

    engine = SimpleNamespace(name="torch", precision="float32")
    config = SimpleNamespace(data=SimpleNamespace(bleu_tokenize="none"))
    tokenizers = SimpleNamespace(source=SimpleNamespace(encode=lambda lines: [line.split() for line in lines]))

    def stream(self, lines, beam=None):
        self.beams.append(beam)
        for _, output in zip(lines, self.outputs, strict=True):
            problem = "too long" if output is None else None
            yield Translation(output or "", 0.0, 0.0, [], [], problem)


SOURCES = ["a b", "a b c", "a b c d e f", "x " * 300]
REFERENCES = ["A B", "A B C", "A B C D E F", "X Y"]
OUTPUTS = ["A B", "A B D", "A B C D E", None]


def test_scores_are_those_of_the_metrics():
    result = evaluate(Known(OUTPUTS), SOURCES, REFERENCES)
    texts = ["A B", "A B D", "A B C D E", ""]
    assert result.outputs == texts
    assert result.scores == [
        metrics.bleu(texts, REFERENCES, "none"),
        metrics.chrf(texts, REFERENCES),
        metrics.ter(texts, REFERENCES),
        metrics.exact_match(texts, REFERENCES),
        metrics.token_error_rate(texts, REFERENCES),
    ]
    assert result.scores[3].value == 25 and result.scores[4].value == pytest.approx(100 * 4 / 13)


def test_buckets_are_by_source_tokens_and_hold_every_line_once():
    result = evaluate(Known(OUTPUTS), SOURCES, REFERENCES)
    assert [(b.shortest, b.longest, b.lines) for b in result.by_length] == [(0, 5, 2), (6, 10, 1), (241, None, 1)]
    first, second, last = ({score.name: score.value for score in bucket.scores} for bucket in result.by_length)
    assert first["token error rate"] == pytest.approx(20) and second["token error rate"] == pytest.approx(100 / 6)
    assert last["token error rate"] == 100 and last["exact match"] == 0


@pytest.mark.parametrize("edge", LONGEST)
def test_the_longest_of_a_bucket_belongs_to_it(edge):
    sources = ["a " * edge, "a " * (edge + 1)]
    lower, upper = evaluate(Known(["A", "A"]), sources, ["A", "A"]).by_length
    assert lower.longest == edge and upper.shortest == edge + 1


def test_a_bucket_without_reference_tokens_has_no_scores():
    result = evaluate(Known(["A", "B"]), ["a", "b " * 8], ["A", " "])
    assert result.by_length[1].lines == 1 and result.by_length[1].scores == []


def test_problems_are_reported_by_line_number():
    assert evaluate(Known(OUTPUTS), SOURCES, REFERENCES).problems == {4: "too long"}


def test_beam_is_handed_on_and_progress_is_called_for_each_line():
    translator, called = Known(OUTPUTS), []
    evaluate(translator, SOURCES, REFERENCES, beam=7, progress=lambda: called.append(1))
    assert translator.beams == [7] and len(called) == 4


def test_tokenize_overrules_the_config():
    signature = evaluate(Known(OUTPUTS), SOURCES, REFERENCES, tokenize="char").scores[0].signature
    assert "tok:char" in signature
    assert "tok:none" in evaluate(Known(OUTPUTS), SOURCES, REFERENCES).scores[0].signature


def test_figures_are_plain_and_complete():
    figures = evaluate(Known(OUTPUTS), SOURCES, REFERENCES).figures()
    assert figures["lines"] == 4 and figures["problems"] == {"4": "too long"}
    assert figures["engine"] == "torch" and figures["precision"] == "float32"
    assert figures["scores"]["exact match"] == {"value": 25.0, "signature": "nrefs:1|case:mixed|tok:none"}
    assert figures["by_length"][0]["scores"]["exact match"] == 50.0


def test_differing_counts_are_refused_before_translating():
    translator = Known([])
    with pytest.raises(DataError, match="4 source lines and 1 references"):
        evaluate(translator, SOURCES, ["A"])
    assert translator.beams == []


def test_no_lines_and_no_reference_text_are_refused():
    for sources, references in (([], []), (["a"], [""])):
        with pytest.raises(DataError, match="holds no reference text"):
            evaluate(Known([]), sources, references)


def test_unknown_tokenize_is_refused_before_translating():
    translator = Known(OUTPUTS)
    with pytest.raises(ConfigError, match='tokenize = "14a" is not a tokenization of BLEU'):
        evaluate(translator, SOURCES, REFERENCES, tokenize="14a")
    assert translator.beams == []


def test_several_references_and_the_closeness_of_each_line():
    others = ["a", "A B D", None, "Z"]
    result = evaluate(Known(OUTPUTS), SOURCES, [REFERENCES, others])
    texts = ["A B", "A B D", "A B C D E", ""]
    assert result.scores[3].value == 50 and result.scores[3].signature == "nrefs:var|case:mixed|tok:none"
    assert result.scores[0] == metrics.bleu(texts, [REFERENCES, others], "none")
    assert result.closeness == [metrics.chrf([text], [[a], [b]]).value
                                for text, a, b in zip(texts, REFERENCES, others, strict=True)]
    with pytest.raises(DataError, match="4 source lines and 3 references"):
        evaluate(Known([]), SOURCES, [REFERENCES, others[:3]])
    with pytest.raises(DataError, match="holds no reference text"):
        evaluate(Known([]), ["a"], [[None], [" "]])


def test_buckets_have_names():
    names = [Bucket(*limits, 1, []).name for limits in ((0, 5), (6, 10), (241, None))]
    assert names == ["up to 5", "6–10", "241 and more"]
