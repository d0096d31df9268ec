"""Text in, text out, on a small trained run."""

import math
import pickle
import shutil
from itertools import islice, repeat

import pytest
import torch

import regard
from conftest import make_config, write_reversal
from regard.errors import CheckpointError, ConfigError, DataError, RunError
from regard.training.loop import train
from regard.translator import WINDOWS, Translation, Translator

LINES = ["a b c", "d", "", "b b a d c", "a " * 50, "z", "c a"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A Transformer that half knows how to reverse, and an RNN with a fixed vector that knows nothing."""
    folder = tmp_path_factory.mktemp("translator")
    write_reversal(folder)
    return {name: train(make_config(folder, name, steps=60, validate_every=30, average=2), folder / name, quiet=True)
            for name in ("transformer-pre", "fixed-elman")}


@pytest.fixture(scope="module")
def translator(runs):
    return regard.load(runs["transformer-pre"].folder)


def approx(translations):
    """Translations with the numbers that a comparison must hold to 1e-5."""
    return [(one.text, one.tokens, one.problem, pytest.approx(one.score, abs=1e-5), approx(one.alternatives))
            for one in translations]


def exact(translations):
    return [(one.text, one.tokens, one.problem, one.score, exact(one.alternatives)) for one in translations]


def test_one_text_and_many(translator):
    one = translator.translate("a b c")
    assert isinstance(one, Translation) and one.text == " ".join(one.tokens) and one.problem is None
    many = translator.translate(LINES)
    assert exact(many[:1]) == approx([one]) and len(many) == len(LINES)
    assert translator.translate([]) == []


def test_lines_in_are_lines_out_in_order_also_those_that_cannot_be_translated(translator):
    found = list(translator.stream(LINES))
    assert found[2] == Translation("")
    problem = "50 tokens, over the 20 that [decode] max_source_tokens allows; part the text"
    assert found[4] == Translation("", problem=problem)
    alone = [translator.translate(line) for line in LINES]
    assert exact(found) == approx(alone)


@pytest.mark.parametrize("options", [{"batch_tokens": 1}, {"batch_sentences": 1}, {"batch_sentences": 2}, {}])
def test_batches_change_nothing(translator, options):
    found = translator.translate(LINES, beam=3, nbest=3, **options)
    assert exact(found) == approx(translator.translate(LINES, beam=3, nbest=3, batch_tokens=10**6))


def test_options_of_one_call_and_the_configs_defaults(translator):
    assert approx([translator.translate("a b")]) == exact([translator.translate("a b", beam=2, length_penalty=1.0)])
    best = translator.translate("a b", beam=4, nbest=3, length_penalty=0.0)
    outputs = [best, *best.alternatives]
    assert len(outputs) == 3 and len({one.text for one in outputs}) == 3
    assert [one.score for one in outputs] == sorted((one.score for one in outputs), reverse=True)
    assert all(one.score == one.log_probability and not one.alternatives for one in best.alternatives)
    halved = translator.translate("a b", beam=1, length_penalty=0.5)
    assert halved.score == pytest.approx(halved.log_probability / math.sqrt(len(halved.tokens) + 1))


@pytest.mark.parametrize("options, message", [
    ({"beam": 0}, "beam = 0: expected 1 or more"), ({"nbest": 0}, "nbest = 0: expected 1 or more"),
    ({"batch_tokens": 0}, "batch_tokens = 0: expected"), ({"batch_sentences": -1}, "batch_sentences = -1: expected"),
    ({"length_penalty": -0.1}, "length_penalty = -0.1: expected 0 or more"),
    ({"nbest": 3, "beam": 2}, "nbest = 3 with beam = 2: a search that keeps 2 hypotheses cannot give more outputs"),
])
def test_options_that_cannot_be(translator, options, message):
    with pytest.raises(ConfigError) as error:
        translator.translate("a", **options)
    assert message in str(error.value)


def test_stream_reads_no_further_than_it_must(translator):
    read = []
    endless = (read.append(line) or line for line in repeat("a b"))
    assert len(list(islice(translator.stream(endless, beam=1), 5))) == 5
    assert len(read) == WINDOWS[0]


def test_score_is_the_log_probability_of_the_output(translator):
    for line in ("a b c", "d"):
        found = translator.translate(line)
        assert translator.score([line], [found.text]) == [pytest.approx(found.log_probability, abs=1e-5)]
    sources, targets = ["a b", "c", "a b c d", ""], ["b a", "c", "", "a"]
    alone = [translator.score([source], [target])[0] for source, target in zip(sources, targets, strict=True)]
    assert translator.score(sources, targets) == pytest.approx(alone, abs=1e-5) and max(alone) < 0
    assert translator.score([], []) == []


def test_scores_that_cannot_be(translator):
    with pytest.raises(DataError, match=r"2 sources and 1 targets: target n must belong to source n"):
        translator.score(["a", "b"], ["a"])
    with pytest.raises(DataError, match=r"source 2 has 50 tokens, over the 20 that \[decode\] max_source_tokens"):
        translator.score(["a", LINES[4]], ["a", "b"])


@pytest.mark.parametrize("target", [None, "c b a", ""])
def test_look(translator, target):
    trace = translator.look("a b c", target)
    assert trace.source == ["a", "b", "c", "</s>"] and trace.target[-1] == "</s>"
    S, T = len(trace.source), len(trace.target)
    assert trace.cross.shape == (2, 2, T, S) and trace.encoder.shape == (2, 2, S, S)
    assert trace.decoder.shape == (2, 2, T, T)
    assert trace.cross.dtype == torch.float32
    for weights in (trace.cross, trace.encoder, trace.decoder):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    expected = translator.translate("a b c").text if target is None else target
    assert trace.target_text == expected and trace.model == "transformer, 2 + 2 layers, 2 heads"
    assert sum(trace.log_probabilities) == pytest.approx(translator.score(["a b c"], [expected])[0], abs=1e-5)


def test_look_at_a_fixed_vector_and_at_an_output_without_an_end(runs):
    translator = regard.load(runs["fixed-elman"].folder)
    trace = translator.look("a b")
    assert trace.cross is trace.encoder is trace.decoder is None and trace.model == "rnn (elman), fixed vector"
    short = translator.config.decode.model_copy(update={"max_length": 1})
    cut = Translator(translator.model, translator.tokenizers, translator.config.model_copy(update={"decode": short}))
    found = cut.look("a b", beam=1)
    assert len(found.target) == len(found.log_probabilities) == 1


@pytest.mark.parametrize("source, message", [
    ("", "cannot look: the source text is empty"), (LINES[4], "cannot look: 50 tokens, over the 20 that [decode]"),
])
def test_looks_that_cannot_be(translator, source, message):
    with pytest.raises(DataError) as error:
        translator.look(source)
    assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"beam = 0: expected 1 or more"):
        translator.look("a", beam=0)


def test_load_takes_the_checkpoint_that_is_asked_for(runs):
    run = runs["transformer-pre"]
    outputs = {name: next(regard.load(run.folder, name).model.parameters())
               for name in ("best", "last", "average", "step-00000030", str(run.step_path(30)))}
    assert torch.equal(outputs["step-00000030"], outputs[str(run.step_path(30))])
    others = [outputs["average"], outputs["step-00000030"]]
    assert not any(torch.equal(outputs["last"], other) for other in others)
    assert any(torch.equal(outputs["best"], other) for other in (outputs["last"], *others))


def test_loads_that_cannot_be(runs, tmp_path):
    folder = tmp_path / "copy"
    with pytest.raises(RunError, match=r"copy: there is no such folder"):
        regard.load(folder)
    shutil.copytree(runs["transformer-pre"].folder, folder)
    with pytest.raises(RunError, match=r'has no checkpoint "step-1". It has: step-00000030, step-00000060, '):
        regard.load(folder, "step-1")
    weights = folder / "checkpoints" / "step-00000060" / "model.safetensors"
    weights.write_bytes(pickle.dumps("not this either"))
    with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged"):
        regard.load(folder, "last")
    (folder / "config.toml").write_text((folder / "config.toml").read_text().replace("width = 8", "width = 16"))
    with pytest.raises(CheckpointError, match=r"these weights do not fit the model of the config: .* another shape of"):
        regard.load(folder, "step-00000030")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer"):
        regard.load(folder)


def test_options_do_not_outlive_their_call(translator):
    before = exact(translator.translate(LINES))
    translator.translate(LINES, beam=1, length_penalty=0.0)
    translator.look("a b")
    assert exact(translator.translate(LINES)) == before
