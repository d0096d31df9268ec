"""Text in, text out, on a small trained run."""

import math
import pickle
import shutil
from itertools import islice, repeat

import pytest
import torch

import regard
from conftest import make_config, write_reversal
from regard.config import TokenizerConfig
from regard.data.batches import Batch
from regard.decode.search import forced
from regard.errors import CheckpointError, ConfigError, DataError, RunError
from regard.text.tokenizer import UNK, Tokenizer
from regard.training.loop import train
from regard.translator import CHARACTERS, WINDOWS, Translation, Translator, _insert, tasks_of, windows

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
    ({"nbest": 3, "groups": 3, "top_k": 1}, "groups = 3 do not divide beam = 2: use beam = 3\ntop_k = 1 means nothing"),
    ({"prefix": "z"}, 'prefix "z" holds what the vocabulary does not'),
    ({"force": ["a", "b z"]}, 'force: "b z" holds what the vocabulary does not'),
    ({"force": ["", "a"]}, 'force: "" holds no token'), ({"ban": ["a", " "]}, 'ban: " " holds no token'),
    ({"force": ["a b c", "d"], "ban": ["b c"]}, 'force: "a b c" holds "b c", which is banned'),
    ({"prefix": "z", "force": "y"}, 'prefix "z" holds what the vocabulary does not\nforce: "y" holds what'),
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


def test_lines_before_a_none_are_answered_before_the_next_is_read(translator):
    read, lines = [], [None, "a b", None, "", "c", None, None, "b"]
    stream = translator.stream((read.append(line) or line for line in lines), beam=1)
    found = []
    for behind in (3, 6, 6, 8):
        found.append(next(stream))
        assert len(read) == behind
    assert next(stream, None) is None and [one.text for one in found] == [
        translator.translate(line, beam=1).text for line in lines if line is not None]


def test_windows_grow_and_end_at_a_none_and_where_texts_are_long():
    def sizes(texts, size=4):
        return [[task.number for task in window] for window in windows(tasks_of(texts, "", ()), size)]

    assert sizes("abcdefghijklmnop") == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16]]
    assert sizes(["a", None, "b", "c", None, None]) == [[1], [2, 3]] and sizes([None]) == sizes([]) == []
    assert sizes(["a", "b" * CHARACTERS, "c"]) == [[1, 2], [3]]


def outputs(translation):
    return [translation, *translation.alternatives]


def test_a_prefix_for_all_and_one_for_each(translator):
    for found in translator.translate(["a b c", "d"], prefix="c a", nbest=2):
        assert all(one.tokens[:2] == ["c", "a"] and one.text.startswith("c a") for one in outputs(found))
    prefixes = ["b", "", "d d d"]
    each = translator.translate(["a b", "c", "a"], prefix=iter(prefixes))
    assert [one.text.split()[: len(prefix.split())] for one, prefix in zip(each, prefixes, strict=True)] == [
        prefix.split() for prefix in prefixes]
    assert exact(each[1:2]) == approx([translator.translate("c")])
    for one, prefix in zip(each, prefixes, strict=True):
        assert translator.score(["a b", "c", "a"][each.index(one) :][:1], [one.text]) == [
            pytest.approx(one.log_probability, abs=1e-5)], prefix


def test_phrases_for_all_and_for_each(translator):
    for found in translator.translate(LINES[:2], beam=3, nbest=3, force=["d a", "c"]):
        assert all("d a" in one.text and "c" in one.tokens for one in outputs(found))
    each = translator.translate(["a b", "c", "a"], beam=3, force=(phrases for phrases in (["d d"], [], ["b", "c"])))
    assert "d d" in each[0].text and {"b", "c"} <= set(each[2].tokens)
    assert exact(each[1:2]) == approx([translator.translate("c", beam=3)])
    assert "b b" in translator.translate("a", force="b b").text


def test_bans_and_repetition(translator):
    free = translator.translate(LINES[:4], beam=3, nbest=3)
    assert any("a" in one.tokens for found in free for one in outputs(found))
    for found in translator.translate(LINES[:4], beam=3, nbest=3, ban=["a", "b c"]):
        assert not any("a" in one.tokens or "b c" in one.text for one in outputs(found))
    for one in translator.translate(LINES, no_repeat_ngram=1, min_length=3):
        assert len(set(one.tokens)) == len(one.tokens)
    assert "a" not in translator.translate("a b", ban="a").tokens


def test_lengths(translator):
    for found in translator.translate(["a b c", "d"], min_length=4, max_length=5):
        assert 3 <= len(found.tokens) <= 5
    assert len(translator.translate("a b c d", min_ratio=2.0, max_ratio=2.0, max_extra=0).tokens) in (9, 10)


def test_no_two_outputs_of_a_beam_have_the_same_text(translator):
    found = outputs(translator.translate("a b", beam=31, nbest=31, max_length=2))
    texts = [one.text for one in found]
    assert len(set(texts)) == len(texts) == 1 + 4 + 16 < 1 + 5 + 25  # <unk> leaves no trace in a text
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert texts[:4] == [one.text for one in outputs(translator.translate("a b", beam=31, nbest=4, max_length=2))]


def test_samples(translator):
    drawn = translator.translate(LINES, sample=True, seed=3, nbest=4, max_length=6)
    alone = translator.translate(LINES, sample=True, seed=3, nbest=4, max_length=6, batch_sentences=1)
    assert exact(drawn) == approx(alone)
    assert exact(drawn) != exact(translator.translate(LINES, sample=True, seed=4, nbest=4, max_length=6))
    first = translator.translate(LINES, sample=True, seed=3, max_length=6)
    assert [one.text for one in first] == [one.text for one in drawn]
    assert {len(one.alternatives) for one in drawn} == {0, 3}  # of lines that are not translated, and of all others
    same = translator.translate(["a b"] * 30, sample=True, max_length=6)
    assert len({one.text for one in same}) > 5  # each line draws for itself
    cold = translator.translate(["a b"] * 5, sample=True, temperature=1e-4)
    assert {one.text for one in cold} == {translator.translate("a b", beam=1).text}


def test_parts_of_the_score_and_of_the_tokens(translator):
    found = translator.translate("a b c", beam=3, nbest=2, length_penalty=0.8, length_penalty_kind="gnmt",
                                 coverage_penalty=0.3, token_scores=True)
    for one in outputs(found):
        parts = one.parts
        assert parts.keys() == {"model", "length", "coverage"} and parts["coverage"] < 0
        assert parts["length"] == pytest.approx(((5 + len(one.tokens) + 1) / 6) ** 0.8)
        assert one.score == pytest.approx(parts["model"] / parts["length"] + parts["coverage"])
        assert sum(one.log_probabilities) == pytest.approx(one.log_probability, abs=1e-5) == parts["model"]
        assert len(one.entropies) == len(one.tokens) + 1 and min(one.entropies) >= 0 and one.tree is None
    assert translator.translate("a b c").entropies is None


def test_the_tree_for_people(translator):
    found = translator.translate("a b c", beam=3, tree=True)
    assert [node["fate"] for node in found.tree if node["step"] == 1].count("open") <= 3
    tokens, ends = [], [node for node in found.tree if node["log_probability"] == found.log_probability]
    node = ends[0]
    while node["parent"] >= 0:
        tokens.insert(0, node["token"])
        node = found.tree[node["parent"]]
    assert [node["token"], *tokens] == [*found.tokens, "</s>"] and found.alternatives == []


# --- <unk> ---------------------------------------------------------------------------------------------------------


def test_unknown_tokens_are_replaced_by_what_they_look_at(translator):
    options = {"ban": ["a", "b", "c", "d"], "min_length": 4, "max_length": 4, "beam": 1}
    line = "a zebra in c"
    plain, filled = (translator.translate(line, replace_unknown=wanted, **options) for wanted in (False, True))
    assert plain.tokens == filled.tokens and set(plain.tokens[:3]) == {"<unk>"} and plain.text == ""
    source, unknown = translator.tokenizers.source.encode([line])[0], [UNK] * len(plain.tokens)
    taps = {}
    forced(translator.model, Batch.of([source], [unknown]), taps)
    places = torch.stack([weights.mean(1)[0] for name, weights in taps.items() if name.startswith("cross")]).mean(0)
    words = [line.split()[place] for place in places[: len(unknown), : len(source)].argmax(-1).tolist()]
    assert filled.text == " ".join(words)
    assert translator.translate("a b", replace_unknown=True).text == translator.translate("a b").text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "space"])
def test_words_stand_where_the_unknown_tokens_stood(kind):
    tokenizer = Tokenizer.train(kind, 60, ["the red dog runs", "a red cat", "the dog is a dog"])
    for text in ("the ☃ runs", "☃ dog", "dog ☃", "☃", "a ☃ is the ☂", "dog☃cat ☂"):
        ids = tokenizer.encode([text])[0]
        shown = tokenizer.tokens(text)
        words = {place: text[slice(*shown.spans[place])] for place, id in enumerate(ids) if id == UNK}
        assert words and _insert(tokenizer, ids, words) == text


# --- lines that cannot be had ----------------------------------------------------------------------------------------


def test_each_nasty_line_has_its_outcome(translator):
    lines = ["", " ", "a" * 10_000, "a " * 10_000, "\x00\x1b[2J\x07", "☃ zebra", "a\nb\r\tc", "\ud800 a", "\u2028",
             "a b"]
    for options in ({}, {"beam": 50}, {"beam": 1}, {"sample": True}, {"force": ["a"]}, {"prefix": "a"}):
        found = translator.translate(lines, **options)
        assert len(found) == len(lines)
        problems = [one.problem for one in found]
        assert problems[3].startswith("10,000 tokens, over the 20 that [decode] max_source_tokens allows")
        assert "half of a surrogate pair" in problems[7]
        assert [problem for place, problem in enumerate(problems) if place not in (3, 7)] == [None] * 8
        assert all(one.text == "" for one in (found[0], found[1], found[3], found[7]))
        assert exact(found[-1:]) == approx([translator.translate(lines, **options)[-1]])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "byte", "space"])
def test_a_line_of_blanks_is_empty_also_where_blanks_are_tokens(tmp_path, kind):
    write_reversal(tmp_path)
    config = make_config(tmp_path, steps=1, validate_every=1)
    config = config.model_copy(update={"tokenizer": TokenizerConfig(kind=kind, size=20)})
    translator = regard.load(train(config, tmp_path / "run", quiet=True).folder)
    blank = ["", " ", "   \t ", "\r", "\u2028\u3000\xa0"]
    assert translator.translate(blank) == [Translation("")] * len(blank)
    assert translator.translate(" a").tokens


def test_lines_whose_wishes_cannot_be_met_are_reported_and_the_others_translated(translator):
    prefixes = ["a " * 15, "", "z", "a"]
    found = translator.translate(["b", "b", "b", "b"], prefix=prefixes)
    assert [one.problem for one in found] == [
        "the prefix has 15 tokens, and this output may have 14", None, 'prefix "z" holds what the vocabulary does not',
        None]
    force = [["a " * 30], ["b c", "a b"], ["z"], []]
    found = translator.translate(["b", "b", "b", "b"], force=force, ban=["b c"])
    assert found[0].problem == ("no output of at most 14 tokens was found that keeps all rules: loosen one of them, or "
                                "use a wider beam")
    assert [one.problem for one in found[1:]] == ['force: "b c" holds "b c", which is banned',
                                                  'force: "z" holds what the vocabulary does not', None]
    nothing = translator.translate(["b", ""], ban=["a", "b", "c", "d"], no_repeat_ngram=1, min_length=8)
    assert nothing[0].problem.startswith("no output of at most 14 tokens") and nothing[1] == Translation("")


@pytest.mark.parametrize("options, message", [
    ({"prefix": ["a"]}, "prefix: 1 of them, and there are more texts; give one for each text"),
    ({"force": [["a"], []]}, "force: 2 of them, and there are more texts"),
    ({"prefix": ["a"] * 4}, "prefix: more than 3 of them, and 3 texts; give one for each text"),
    ({"force": [[]] * 4}, "force: more than 3 of them, and 3 texts")])
def test_as_many_wishes_as_texts(translator, options, message):
    with pytest.raises(DataError) as error:
        translator.translate(["a", "b", "c"], **options)
    assert message in str(error.value)


# --- several models as one -------------------------------------------------------------------------------------------


def test_an_ensemble(runs, translator):
    both = regard.load([runs["transformer-pre"].folder, runs["fixed-elman"].folder])
    found = both.translate(LINES, beam=3)
    assert exact(found) == approx(both.translate(LINES, beam=3, batch_sentences=1))
    assert exact(found) != exact(translator.translate(LINES, beam=3))
    assert both.score(["a b"], [both.translate("a b").text]) == [
        pytest.approx(both.translate("a b").log_probability, abs=1e-5)]
    twice = regard.load([runs["transformer-pre"].folder] * 2)
    assert exact(twice.translate(LINES)) == approx(translator.translate(LINES))
    trace = both.look("a b c")
    assert trace.cross.shape[:2] == (1, 1) and trace.encoder is None
    assert trace.model == "transformer, 2 + 2 layers, 2 heads with rnn (elman), fixed vector"
    assert both.translate("a b", coverage_penalty=0.2, replace_unknown=True).problem is None
    one = regard.load([runs["transformer-pre"].folder])
    assert exact([one.translate("a b")]) == exact([translator.translate("a b")])


def test_ensembles_that_cannot_be(runs, tmp_path):
    write_reversal(tmp_path, longest=3, seed=5)
    (tmp_path / "train.source").write_text((tmp_path / "train.source").read_text().replace("d", "e"))
    other = train(make_config(tmp_path, "conv", steps=4, model={"max_positions": 257}), tmp_path / "other", quiet=True)
    first = tmp_path / "first"
    shutil.copytree(runs["transformer-pre"].folder, first)
    (first / "config.toml").write_text((first / "config.toml").read_text().replace("max_length = 256",
                                                                                   "max_length = 300"))
    with pytest.raises(ConfigError) as error:
        regard.load([first, runs["fixed-elman"].folder, other.folder])
    reasons = str(error.value).splitlines()
    assert [reason.split(": ", 1)[1][:40] for reason in reasons] == [
        "the source vocabularies differ (space of", "the target vocabularies differ (space of",
        "its decoder has max_positions = 257, and"]
    assert all(reason.startswith(f"{other.folder} cannot answer as one with {first}") for reason in reasons)
    with pytest.raises(ConfigError, match="expected a run's folder, or several, and got none"):
        regard.load([])


def test_a_model_without_attention_refuses_what_needs_it(runs):
    translator = regard.load(runs["fixed-elman"].folder)
    with pytest.raises(ConfigError, match="replace_unknown needs attention to the source"):
        translator.translate("a", replace_unknown=True)


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
