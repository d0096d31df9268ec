"""Guided alignment: from a file of links to tokens, batches, the loss, and what attention learns from it."""

import math
import os
import random
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import TARGET_SIZE, TRANSFORMER, make_batch, make_config, make_model, model_config
from regard.config import CorpusConfig, parse_config
from regard.config_train import TrainConfig
from regard.data.batches import Batch, Order
from regard.data.shards import Corpus, prepare
from regard.errors import ConfigError, DataError, Interrupted, RunError
from regard.model.seq2seq import build_model
from regard.text.alignment import parse_links, token_links, words_of
from regard.text.corpus import read_pairs
from regard.text.tokenizer import Tokenizer
from regard.training.gradients import Gradients, some
from regard.training.loop import train
from regard.training.objective import Guide, alignment_loss, loss_of
from regard.training.progress import Reporter
from regard.training.r_drop import r_drop_loss_of
from regard.training.standing import Standing
from test_gradients import LENGTHS, gradients_of, same
from test_laws import outcome

KINDS = ["bpe", "unigram", "char", "byte", "space"]
LINES = ["the dogs run in the garden", "a dog  barks ", " the cat's garden", "gärten and ▁ dogs", "unseen ẞ wörds", "a"]
ATTENTIVE = {"transformer-pre": "cross.0", "transformer-none": "cross.1", "transformer-reversed": "cross.0",
             "conv-kernel-5": "cross.1", "conv": "cross.0", "before-additive": "cross.0", "after-everything": "cross.0",
             "mixed-rnn-transformer": "cross.0"}
"""Models, and the attention that is guided when nothing else is said."""
LINKS = torch.tensor(
    [[0, 0, 1], [0, 0, 3], [0, 3, 0], [1, 2, 2], [1, 5, 0], [3, 0, 6], [4, 3, 3], [4, 2, 1], [4, 2, 2]])


def linked(lengths=LENGTHS):
    """The batch of `make_batch` with links, to </s> none."""
    batch = make_batch(lengths)
    return type(batch)(**{**vars(batch), "alignment": LINKS})


# --- the loss


def oracle(weights, links):
    """The equation as a loop over rows and positions."""
    total, weights = 0.0, weights.detach()
    for row in range(weights.shape[0]):
        for t in range(weights.shape[1]):
            sources = [s for each, place, s in links.tolist() if (each, place) == (row, t)]
            for s in sources:
                total -= math.log(float(weights[row, t, s])) / len(sources)
    return total


def test_the_loss_is_its_equation():
    torch.manual_seed(1)
    weights = torch.randn(5, 7, 8, dtype=torch.float64).softmax(-1)
    assert float(alignment_loss(weights, LINKS)) == pytest.approx(oracle(weights, LINKS), rel=1e-12)
    heads = torch.stack([weights, torch.full_like(weights, 1 / 8)], dim=1)
    assert float(alignment_loss(heads, LINKS)) == pytest.approx(oracle(weights, LINKS), rel=1e-12), "the first head"
    assert alignment_loss(weights, LINKS[:0]) == 0
    assert alignment_loss(weights.bfloat16(), LINKS).dtype == torch.float32


def test_its_gradients_are_those_of_differences():
    torch.manual_seed(1)
    scores = torch.randn(5, 7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x.softmax(-1), LINKS), scores)


def test_what_cannot_be_looked_at_makes_no_infinity():
    weights = torch.zeros(5, 7, 8, requires_grad=True)
    loss = alignment_loss(weights, LINKS)
    loss.backward()
    assert torch.isfinite(loss) and not weights.grad.any()


@pytest.mark.parametrize("name", ATTENTIVE)
def test_the_loss_of_a_batch_has_it_weighted(name):
    model, batch, taps = make_model(name), linked(), {}
    model(batch, taps)
    guide = Guide.of(model, TrainConfig(guided_alignment=0.3))
    assert guide == (0.3, ATTENTIVE[name])
    loss, surprise = loss_of(model, batch, 0.1, guide=guide)
    plain = loss_of(model, batch, 0.1)
    torch.testing.assert_close(loss - plain[0], 0.3 * alignment_loss(taps[guide.name], LINKS))
    assert surprise == plain[1], "what people are shown stays the cross-entropy"
    if name == "after-everything":
        assert alignment_loss(taps["cross.0"], LINKS).item() > 100, "some links are outside of the local window"
    else:
        weights = taps[guide.name] if taps[guide.name].dim() == 3 else taps[guide.name][:, 0]
        assert alignment_loss(taps[guide.name], LINKS).item() == pytest.approx(oracle(weights, LINKS))
    for none in (None, LINKS[:0]):
        bare = type(batch)(**{**vars(batch), "alignment": none})
        assert loss_of(model, bare, 0.1, guide=guide) == plain


def test_a_layer_may_be_chosen():
    model = make_model("conv-kernel-5")
    assert [Guide.of(model, TrainConfig(guided_alignment=1, guided_layer=layer)).name for layer in (None, 1, 2, 3)] == [
        "cross.1", "cross.0", "cross.1", "cross.2"]
    assert Guide.of(model, TrainConfig()) is None


def test_both_passes_of_r_drop_are_guided():
    model, batch, guide = make_model("transformer-pre").train(), linked(), Guide(0.3)
    guided = loss_of(model, batch, 0.1, 0, guide)
    torch.testing.assert_close(r_drop_loss_of(model, batch, 5.0, 0.1, guide=guide), guided)
    assert r_drop_loss_of(model, batch, 5.0, 0.1) != r_drop_loss_of(model, batch, 5.0, 0.1, guide=guide)


@pytest.mark.parametrize("r_drop", [0.0, 2.0])
@pytest.mark.parametrize("name", ["transformer-pre", "before-coverage", "transformer-reversed"])
def test_pieces_make_the_gradient_of_the_whole(name, r_drop):
    settings = TrainConfig(label_smoothing=0.1, r_drop=r_drop, guided_alignment=0.5)
    gradients = Gradients(make_model(name), settings, "float32", Standing(), print)
    batch = linked()
    total = gradients.add([batch])
    expected = gradients_of(gradients.model)
    for cuts in ((0, 2, 3, 5), (0, 1, 2, 3, 4, 5)):
        gradients.model.zero_grad()
        parts = [some(batch, slice(*each)) for each in pairwise(cuts)]
        assert sum(len(part.alignment) for part in parts) == len(LINKS)
        torch.testing.assert_close(gradients.add(parts), total)
        same(gradients_of(gradients.model), expected)
    gradients.model.zero_grad()
    gradients.guide = None
    gradients.add([batch])
    unguided = gradients_of(gradients.model)
    assert any(not torch.equal(gradient, unguided[name]) for name, gradient in expected.items())


def test_rows_take_their_links_along():
    part = some(linked(), slice(3, None))
    assert part.alignment.tolist() == [[0, 0, 6], [1, 3, 3], [1, 2, 1], [1, 2, 2]]
    assert some(linked(), slice(2, 3)).alignment.tolist() == []
    batch = Batch.of([[4], [5, 6]], [[7, 8], [4]], [np.array([[0, 1]]), np.array([[1, 0], [0, 0]])])
    assert batch.alignment.tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 0]] and batch.alignment.dtype == torch.int64
    assert batch.to(torch.device("meta")).alignment.is_meta
    empty = np.empty((0, 2), dtype=np.int64)
    assert Batch.of([[4]], [[5]], [empty]).alignment.shape == (0, 3) and Batch.of([[4]], [[5]]).alignment is None


# --- from words to tokens


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_knows_its_word(kind):
    tokenizer = Tokenizer.train(kind, 300 if kind == "byte" else 50, LINES[:4] * 3)
    for line in LINES:
        spans = tokenizer.tokens(line).spans
        found, words = words_of(line, spans, kind in ("bpe", "unigram")), [word for word in line.split(" ") if word]
        assert len(found) == len(tokenizer.encode([line])[0])
        for index, word in enumerate(words):
            pieces = dict.fromkeys(span for span, each in zip(spans, found, strict=True) if each == index)
            assert "".join(line[start:end] for start, end in pieces).strip(" ") == word
        none = {line[start:end] for (start, end), each in zip(spans, found, strict=True) if each == -1}
        assert none <= {" "} and set(found) <= set(range(-1, len(words)))
        if kind in ("bpe", "unigram"):  # a ▁ alone that stands before a word is of the word
            for (start, end), each in zip(spans, found, strict=True):
                assert (each == -1) == (line[start:end] == " " and line[end:end + 1] in (" ", ""))


def test_links_hold_between_all_tokens_of_both_words():
    source, target = np.array([0, 0, -1, 1, 2]), np.array([0, 1, 1, -1, 2])
    links = np.array([[0, 1], [2, 0], [0, 1]])
    expected = [[s, t] for s in range(5) for t in range(5) if [source[s], target[t]] in links.tolist()]
    assert token_links(links, source, target).tolist() == expected == [[0, 1], [0, 2], [1, 1], [1, 2], [4, 0]]
    assert token_links(links[:0], source, target).shape == (0, 2)
    assert token_links(np.array([[7, 0]]), source, target).tolist() == [], "a word that became no token"


@pytest.mark.parametrize("line, numbers", [
    ("", []), ("  ", []), ("0-0", [0, 0]), ("0-2 1-1  2-0", [0, 2, 1, 1, 2, 0]), (" 0-0 ", [0, 0])])
def test_lines_of_links(line, numbers):
    assert parse_links(line, ("a b c", "x y  z "), "here:1") == numbers


@pytest.mark.parametrize("line, message", [
    ("0-0 1:1", "here:7: '1:1' is no link. Expected the number of a source word and of a target word, counted from "
                "0, such as 0-0 1-2, and an empty line for no links."),
    ("0-0-0", "here:7: '0-0-0' is no link"), ("0-", "'0-' is no link"), ("-1-0", "'-1-0' is no link"),
    ("0-0\t1-1", "is no link"), ("٣-0", "is no link"), ("0-0,", "is no link"),
    (f"0-{'9' * 50}", f"'0-{'9' * 38}' is no link"),
    ("3-0", "here:7: a link to source word 3, and the source has 3 words. Expected numbers from 0 to 2: words are"),
    ("0-0 2-1 0-2", "here:7: a link to target word 2, and the target has 2 words. Expected numbers from 0 to 1"),
])
def test_lines_that_are_no_links(line, message):
    with pytest.raises(DataError) as error:
        parse_links(line, ("a b  c", "x y"), "here:7")
    assert message in str(error.value)


# --- in files and on disk


def aligned(corpus, lines=None, weight=0.5, **settings):
    """A config over the reversal task whose training pairs have links, by default each word to its own place."""
    if lines is None:
        lengths = [len(line.split()) for line in (corpus / "train.source").read_text().splitlines()]
        lines = [" ".join(f"{place}-{length - 1 - place}" for place in range(length)) for length in lengths]
    (corpus / "train.align").write_text("".join(line + "\n" for line in lines))
    config = make_config(corpus, **settings)
    first, = config.data.train
    both = [first.model_copy(update={"alignment": "train.align"})]
    data = config.data.model_copy(update={"train": both})
    train = config.train.model_copy(update={"guided_alignment": weight})
    return config.model_copy(update={"data": data, "train": train})


def with_tokenizer(config, kind):
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"kind": kind, "size": 60})})


@pytest.mark.parametrize("kind", KINDS)
def test_links_on_disk_are_those_of_the_file(kind, tmp_path):
    (tmp_path / "train.source").write_text("the garden dogs\n\nrun run\nalpha beta gamma delta epsilon\na b\n")
    (tmp_path / "train.target").write_text("die Gartenhunde\nleer\nlauft lauft\nx y z\nc  d\n")
    config = aligned(tmp_path, ["0-0 1-1 2-1", "no line of a pair", "", "0-0", "1-0 1-1 0-1"])
    config = with_tokenizer(config, kind)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 17})})
    tokenizers, train = prepare(config, tmp_path / "run")
    kept = [("the garden dogs", "die Gartenhunde", [(0, 0), (1, 1), (2, 1)]), ("run run", "lauft lauft", []),
            ("alpha beta gamma delta epsilon", "x y z", [(0, 0)]), ("a b", "c  d", [(1, 0), (1, 1), (0, 1)])]
    kept = [each for each in kept if max(len(tokenizers.source.encode([each[0]])[0]),
                                         len(tokenizers.target.encode([each[1]])[0])) <= 17]
    assert len(train) == len(kept) == (4 if kind in ("bpe", "space") else 3)
    for row, (source, target, links) in enumerate(kept):
        words = [words_of(text, tokenizer.tokens(text).spans, kind in ("bpe", "unigram")).tolist()
                 for text, tokenizer in ((source, tokenizers.source), (target, tokenizers.target))]
        expected = [[s, t] for s, left in enumerate(words[0]) for t, right in enumerate(words[1])
                    if (left, right) in links]
        assert train.alignment(row).tolist() == expected and train.alignment(row).dtype == np.int64
        assert bool(expected) == bool(links)
    assert all(isinstance(array.base, np.memmap) and not array.flags.writeable for array in train._links)
    assert train._links[0].dtype == np.uint16
    order = Order(train, 10_000, 1)
    (batch,), (rows,) = order.update(0, 0), order.rows(0, 0)
    assert batch.alignment.tolist() == [
        [place, t, s] for place, row in enumerate(rows) for s, t in train.alignment(row).tolist()]


def test_a_corpus_without_links_beside_one_with(corpus, tmp_path):
    config = aligned(corpus)
    plain = CorpusConfig(source="valid.source", target="valid.target")
    both = config.data.model_copy(update={"train": [plain, *config.data.train]})
    train = prepare(config.model_copy(update={"data": both}), tmp_path / "run").train
    assert [len(train.alignment(row)) for row in range(6)] == [0] * 6
    assert all(len(train.alignment(row)) == train.source_lengths[row] for row in range(6, len(train)))
    bare = prepare(make_config(corpus), tmp_path / "other").train
    assert bare.alignment(0) is None and not list((tmp_path / "other" / "data").glob("alignment*"))


@pytest.mark.parametrize("name", ["alignment.links.npy", "alignment.offsets.npy"])
def test_damaged_links_are_named(name, corpus, tmp_path):
    prepare(aligned(corpus), tmp_path / "run")
    path = tmp_path / "run" / "data" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path}: its SHA-256 begins with .* It is not as it was written"):
        Corpus(path.parent)


def test_other_links_make_the_data_anew_and_are_refused_once_it_has_begun(corpus, tmp_path):
    train(aligned(corpus, steps=4), tmp_path / "other", quiet=True)
    first = prepare(aligned(corpus), tmp_path / "run").train
    lines = (corpus / "train.align").read_text().splitlines()
    second = prepare(aligned(corpus, ["", *lines[1:]]), tmp_path / "run").train
    assert len(first.alignment(0)) and not len(second.alignment(0)) and first.digest != second.digest
    with pytest.raises(RunError, match="the training data or the tokenizer settings have changed since this run began"):
        train(aligned(corpus, ["", *lines[1:]], steps=8), tmp_path / "other", quiet=True)
    assert train(aligned(corpus, lines, steps=8), tmp_path / "other", quiet=True)


@pytest.mark.parametrize("lines, message", [
    (["0-0"], r"train.align has 1 lines, and train.source and train.target 2\. Expected the links of pair n in line n"),
    (["0-0", "0-0", ""], "train.align has 3 lines, and train.source and train.target 2"),
    (["0-0", "0-5"], "train.align:2: a link to target word 5, and the target has 1 words"),
    (["0+0", ""], r"train.align:1: '0\+0' is no link"),
])
def test_files_that_do_not_fit(lines, message, tmp_path):
    for side in ("source", "target"):
        (tmp_path / f"train.{side}").write_text("a b\nc\n")
    with pytest.raises(DataError, match=message):
        prepare(aligned(tmp_path, lines), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_missing(tmp_path):
    (tmp_path / "train.tsv").write_text("a b\tc\n")
    corpus = CorpusConfig(pairs="train.tsv", alignment="train.align")
    with pytest.raises(DataError, match=r"train.align: cannot read it: No such file"):
        read_pairs(corpus, tmp_path)
    (tmp_path / "train.align").write_text("1-0\n")
    assert read_pairs(corpus, tmp_path).links[0].tolist() == [[1, 0]]


# --- settings

PAIRS, LINKED = {"pairs": "train.tsv"}, {"pairs": "train.tsv", "alignment": "train.align"}
RNN, ATTENTION = {"kind": "rnn"}, {"kind": "rnn", "attention": "after"}


@pytest.mark.parametrize("data, model, settings, message", [
    (LINKED, TRANSFORMER, {}, "[data] train has an alignment, which means nothing with [train] guided_alignment = 0: "
                              "set guided_alignment = 0.05, or leave alignment out."),
    (PAIRS, TRANSFORMER, {"guided_alignment": 0.05}, "[train] guided_alignment = 0.05 needs word links: give a corpus"),
    (LINKED, RNN, {"guided_alignment": 0.05}, "guided_alignment = 0.05 needs an attention to guide, and attention = "
                                              '"none": set attention = "before" or "after", or leave guided_align'),
    (LINKED, ATTENTION, {"guided_alignment": 0.05, "guided_layer": 1}, "guided_layer = 1 means nothing with an RNN's"),
    (LINKED, TRANSFORMER, {"guided_alignment": 0.05, "guided_layer": 3},
     "[train] guided_layer = 3 is over the decoder's 2 layers: use guided_layer = 2, or leave it out."),
    (PAIRS, TRANSFORMER, {"guided_layer": 1}, "[train]: guided_layer = 1 means nothing with guided_alignment = 0: set"),
    (PAIRS | {"weight": 0}, RNN, {}, "[data.train.1]: weight = 0: input should be greater than 0."),
    (PAIRS | {"weight": 1001}, RNN, {}, "[data.train.1]: weight = 1001: input should be less than or equal to 1000."),
])
def test_settings_that_cannot_work(data, model, settings, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        parse_config({"data": {"train": [data], "valid": PAIRS}, "model": model, "train": settings}, "my.toml",
                     tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_only_training_has_is_refused_elsewhere(tmp_path):
    with pytest.raises(ConfigError) as error:
        parse_config({"data": {"train": [PAIRS], "valid": PAIRS | {"weight": 2}, "test": LINKED}, "model": RNN},
                     "my.toml", tmp_path)
    assert str(error.value) == ("my.toml, [data]: valid.weight = 2.0 and test.alignment = train.align: only the "
                                "corpora of train have these; leave them out.")


# --- it learns


def attention_accuracy(name, weight, updates):
    """Of new sequences, the share of target tokens whose attention is highest where the token stands in the source,
    after some updates of learning to reverse."""
    config, tokens, draw = model_config(name, width=32, dropout=0.0), range(4, TARGET_SIZE), random.Random(1)

    def batch(count):
        sources = [draw.choices(tokens, k=draw.randint(3, 6)) for _ in range(count)]
        links = [np.array([[place, len(source) - 1 - place] for place in range(len(source))]) for source in sources]
        return Batch.of(sources, [source[::-1] for source in sources], links)

    torch.manual_seed(1)
    model = build_model(config, TARGET_SIZE, TARGET_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    guide = Guide.of(model, TrainConfig(guided_alignment=weight))
    for _ in range(updates):
        each = batch(32)
        (loss_of(model, each, guide=guide)[0] / each.tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    new, taps = batch(100), {}
    with torch.no_grad():
        model.eval()(new, taps)
    weights = taps[ATTENTIVE[name]]
    weights = weights[:, 0] if weights.dim() == 4 else weights
    row, target, source = new.alignment.unbind(1)
    return float((weights.argmax(-1)[row, target] == source).float().mean())


@pytest.mark.parametrize("name, updates", [
    ("before-additive", 25), ("transformer-pre", 25), ("transformer-reversed", 25), ("conv", 15)])
def test_attention_follows_the_links(name, updates):
    """Measured: 98% guided and 28% not, 83% and 42%, 98% and 22%, 85% and 48%."""
    guided, free = (attention_accuracy(name, weight, updates) for weight in (1.0, 0.0))
    assert guided > 0.75 and guided > free + 0.25


def test_a_guided_training_goes_on_exactly(corpus, monkeypatch, tmp_path):
    config = aligned(corpus, accumulate=2, average=2, r_drop=1.0)
    expected = outcome(train(config, tmp_path / "whole", quiet=True))
    arrived = []

    def step(self, number):
        if number in (2, 7) and number not in arrived:
            arrived.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", step)
        for _ in range(2):
            with pytest.raises(Interrupted):
                train(config, tmp_path / "parts", quiet=True)
    assert outcome(train(config, tmp_path / "parts", quiet=True)) == expected
    other = train(aligned(corpus, accumulate=2, average=2, r_drop=1.0, weight=0.1), tmp_path / "o", quiet=True)
    assert outcome(other)[1] != expected[1]
