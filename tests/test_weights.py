"""Several corpora, each with a weight: what an epoch holds, and that it is the same however a training got there."""

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest

from conftest import make_config, write_reversal
from regard.data.batches import Order, drawn
from regard.data.shards import Corpus, prepare
from regard.errors import DataError, Interrupted, RunError
from regard.training.loop import train
from regard.training.progress import Reporter
from test_batches import Known
from test_laws import digest, outcome

PARTS = [(50, 1.0), (30, 2.5), (20, 0.3), (40, 2.0)]


def rows_of(order, epoch):
    return [np.concatenate(order.rows(epoch, position)).tolist() for position in range(order.updates(epoch))]


def weighted(corpus, *weights, **settings):
    """A config over the reversal task's files and a second corpus, of these weights."""
    (corpus / "more").mkdir(exist_ok=True)
    write_reversal(corpus / "more", 40, seed=2)
    config = make_config(corpus, **settings)
    first, = config.data.train
    more = first.model_copy(update={"source": "more/train.source", "target": "more/train.target"})
    both = [each.model_copy(update={"weight": weight}) for each, weight in zip((first, more), weights, strict=True)]
    return config.model_copy(update={"data": config.data.model_copy(update={"train": both})})


def test_an_epoch_holds_each_pair_as_often_as_its_weight_says():
    seen, begin = Counter(), 0
    for epoch in range(10):
        once = Counter(drawn(PARTS, 1, epoch).tolist())
        seen += once
        for row in range(140):
            weight = next(weight for (_, weight), end in zip(PARTS, (50, 80, 100, 140), strict=True) if row < end)
            assert once[row] in (int(weight), int(np.ceil(weight)))
    for pairs, weight in PARTS:
        assert {seen[row] for row in range(begin, begin + pairs)} == {round(10 * weight)}, "all of them equally often"
        begin += pairs


def test_the_rest_of_a_weight_is_drawn_by_seed_and_epoch():
    parts = [(2000, 0.3)]
    first, second, other = drawn(parts, 1, 0), drawn(parts, 1, 1), drawn(parts, 2, 0)
    assert all(abs(len(each) - 600) < 100 for each in (first, second, other))
    assert not set(first) & set(second), "0.3 an epoch: nothing comes twice in two"
    assert len(set(first) & set(other)) > 100
    halves = drawn([(1000, 0.5), (1000, 0.5)], 1, 0)
    assert set(halves[halves < 1000]) != {row - 1000 for row in halves if row >= 1000}, "each corpus has its own draw"


@pytest.mark.parametrize("share", [1 / 3, 0.1, 1e-3, 1 - 1e-12, 0.9999, 7 / 9])
def test_no_share_drifts_and_no_count_differs_by_more_than_one(share):
    counts = np.zeros(500, dtype=int)
    for epoch in range(5000, 5300):
        counts[drawn([(500, share), (1, 1.0)], 3, epoch)[:-1]] += 1
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == pytest.approx(300 * 500 * share, rel=0.05, abs=100)


def test_weights_of_one_change_nothing_and_cost_nothing():
    plain, ones = Order(Known(), 60, 1), Order(Known(parts=[(150, 1.0), (50, 1.0)]), 60, 1)
    assert [rows_of(plain, epoch) for epoch in range(3)] == [rows_of(ones, epoch) for epoch in range(3)]


def test_the_order_before_weights_is_the_order_now():
    """The first rows of two epochs, as they were before corpora had weights."""
    order = Order(Known(), 60, 1)
    assert [rows_of(order, epoch)[0][:6] for epoch in (0, 3)] == GOLDEN


GOLDEN = [[9, 170, 108, 158, 91, 69], [137, 21, 86, 48, 172, 103]]


def test_the_order_of_weighted_corpora_is_a_function_of_seed_epoch_and_position():
    known = Known(140, parts=PARTS)
    one, other = Order(known, 60, 1), Order(known, 60, 1, 3)
    for epoch in (4, 0, 7):
        assert rows_of(one, epoch) == rows_of(other, epoch)
        rows = np.concatenate(rows_of(one, epoch))
        assert sorted(rows.tolist()) == sorted(drawn(PARTS, 1, epoch).tolist())
        tokens = known.source_lengths[rows].sum() + len(rows), known.target_lengths[rows].sum() + len(rows)
        assert one.sums(epoch) == (len(rows), *tokens)
        for update in rows_of(one, epoch):
            longest = 1 + max(max(known.source_lengths[row], known.target_lengths[row]) for row in update)
            assert len(update) * longest <= 60 or len(update) == 1
    assert rows_of(one, 1) != rows_of(one, 2)


@pytest.mark.parametrize("parts, least", [([(100, 1.0), (40, 1e-6)], 100), ([(140, 1e-6)], 1), ([(140, 1e-12)], 1)])
def test_a_weight_may_be_so_small_that_a_corpus_yields_nothing(parts, least):
    order = Order(Known(140, parts=parts), 60, 1)
    for epoch in range(3):
        assert least <= sum(map(len, rows_of(order, epoch))) <= least + 1
        assert order.updates(epoch) >= 1


# --- prepared and told


def prepared(config, run):
    said = []
    return prepare(config, run, said.append).train, said


def test_the_shares_are_told_and_weights_make_nothing_anew(corpus, tmp_path):
    train, said = prepared(weighted(corpus, 1.0, 2.5), tmp_path / "run")
    assert said[-1] == ("data: an epoch holds 60 pairs x 1 of train.source + train.target (37.5%), 40 pairs x 2.5 of "
                        "more/train.source + more/train.target (62.5%)")
    assert train.manifest["corpora"] == [60, 40] and train.parts == [(60, 1.0), (40, 2.5)]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").iterdir()}
    train, said = prepared(weighted(corpus, 1.0, 1.0), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").iterdir()} == before
    assert train.parts == [] and len(said) == 2 and "60 pairs x 1 of train.source + train.target (60.0%)" in said[1]


def test_counts_are_of_the_pairs_that_stay(corpus, tmp_path):
    config = weighted(corpus, 1.0, 2.0)
    lines = (corpus / "train.source").read_text().splitlines()
    (corpus / "train.source").write_text("\n".join(["", *lines[1:]]) + "\n")
    short = config.model_copy(update={"data": config.data.model_copy(update={"max_tokens": 3})})
    train, _ = prepared(short, tmp_path / "run")
    kept = [sum(0 < len(line.split()) <= 3 for line in (corpus / name / "train.source").read_text().splitlines())
            for name in (".", "more")]
    assert train.manifest["corpora"] == kept and sum(kept) == len(train)


def older(run):
    """Make a prepared folder one of a version that did not count the corpora's pairs."""
    path = run / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["corpora"]
    path.write_text(json.dumps(manifest))


def test_a_folder_of_an_earlier_version_serves_where_its_counts_are_not_needed(corpus, tmp_path):
    prepared(weighted(corpus, 1.0, 1.0), tmp_path / "run")
    older(tmp_path / "run")
    train, said = prepared(weighted(corpus, 1.0, 1.0), tmp_path / "run")
    assert len(said) == 1 and len(train) == 100 and train.parts == []
    assert len(Corpus(tmp_path / "run" / "data")) == 100
    train, said = prepared(weighted(corpus, 1.0, 2.0), tmp_path / "run")
    assert said[0] == (f"{tmp_path / 'run' / 'data'}: an earlier version made it, and did not count the pairs of each "
                       "corpus: it is made anew")
    assert train.parts == [(60, 1.0), (40, 2.0)]


def test_one_corpus_needs_no_count(corpus, tmp_path):
    config = make_config(corpus)
    prepared(config, tmp_path / "run")
    older(tmp_path / "run")
    twice = [config.data.train[0].model_copy(update={"weight": 2.0})]
    train, said = prepared(config.model_copy(update={"data": config.data.model_copy(update={"train": twice})}),
                           tmp_path / "run")
    assert train.parts == [(60, 2.0)] and said[-1] == (
        "data: an epoch holds 60 pairs x 2 of train.source + train.target (100.0%)")


@pytest.mark.parametrize("counts", [[60], [60, 41], [100], ["60", 40], "many", 5])
def test_counts_that_are_not_those_of_the_corpora_are_named(counts, corpus, tmp_path):
    prepared(weighted(corpus, 1.0, 2.0), tmp_path / "run")
    path = tmp_path / "run" / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpora": counts}))
    with pytest.raises(DataError, match=r"manifest.json: its corpora are .*, expected 2 numbers whose sum is 100\."):
        prepared(weighted(corpus, 1.0, 2.0), tmp_path / "run")


# --- trained on


def test_a_training_on_weighted_corpora_goes_on_exactly(corpus, monkeypatch, tmp_path):
    config = weighted(corpus, 0.4, 1.5, steps=20, accumulate=2, average=2)
    expected = outcome(train(config, tmp_path / "whole", quiet=True))
    epochs = {row["epoch"] for row in train(config, tmp_path / "whole", quiet=True).metrics() if row["kind"] == "train"}
    assert len(epochs) > 1, "it never came to a second epoch"
    arrived = []

    def step(self, number):
        if number in (3, 11, 13) and number not in arrived:
            arrived.append(number)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Reporter, "step", step)
    for _ in range(3):
        with pytest.raises(Interrupted):
            train(config, tmp_path / "parts", quiet=True)
    assert outcome(train(config, tmp_path / "parts", quiet=True)) == expected


def test_other_weights_are_refused_once_a_training_has_begun(corpus, tmp_path):
    train(weighted(corpus, 1.0, 2.0, steps=4), tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=r"saw the corpora in other shares: \[data\] now has train.2.weight = 3.0 \(was "
                                       r"2.0\)\. Put it back to go on"):
        train(weighted(corpus, 1.0, 3.0, steps=8), tmp_path / "run", quiet=True)
    assert train(weighted(corpus, 1.0, 2.0, steps=8), tmp_path / "run", quiet=True)


def test_a_run_that_began_with_an_earlier_version_goes_on(corpus, tmp_path):
    config = weighted(corpus, 1.0, 1.0, steps=8)
    expected = digest(train(config, tmp_path / "whole", quiet=True).checkpoints()[-1])
    train(weighted(corpus, 1.0, 1.0, steps=4), tmp_path / "parts", quiet=True)
    older(tmp_path / "parts")
    assert digest(train(config, tmp_path / "parts", quiet=True).checkpoints()[-1]) == expected
