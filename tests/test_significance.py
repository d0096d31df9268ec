"""The paired tests against sacreBLEU's own on texts, against exact counting, and their draws."""

import os
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from regard.errors import ConfigError
from regard.evaluate.significance import Draws, _Metric, paired
from regard.metrics import count

FEW = Draws(resamples=100, trials=200)
WORDS = ["ein", "hund", "läuft", "schnell", "über", "die", "grüne", "wiese", "zum", "alten", "haus"]


def texts(seed, lines=40, wrong=0.3):
    """References, and outputs in which some words are others."""
    draw = random.Random(seed)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(lines)]
    return references, [" ".join(draw.choice(WORDS) if draw.random() < wrong else word for word in line.split())
                        for line in references]


REFERENCES, ONE = texts(1)
OTHER = [line.replace("hund", "katze") for line in texts(1)[1]]
THIRD = texts(1, wrong=0.35)[1]


def counts(*systems):
    return [count(outputs, REFERENCES) for outputs in systems]


@pytest.fixture
def theirs(monkeypatch):
    """sacreBLEU's results on the texts themselves, with a seed: name of a metric → results of all systems."""
    def run(kind, systems, draws, seed):
        monkeypatch.setenv("SACREBLEU_SEED", str(seed))
        named = [(str(place), outputs) for place, outputs in enumerate(systems)]
        metrics = {"BLEU": BLEU(), "chrF": CHRF(), "TER": TER()}
        found = PairedTest(named, metrics, [REFERENCES], kind, n_samples=draws)()[1]
        monkeypatch.delenv("SACREBLEU_SEED")
        return {"BLEU": found["BLEU"], "chrF": found["chrF2"], "TER": found["TER"]}

    return run


@pytest.mark.parametrize("seed", [1, 12345])
def test_the_bootstrap_is_sacrebleu_s(theirs, seed):
    ours = paired(counts(ONE, OTHER, THIRD), Draws(100, 10, seed))
    expected = theirs("bs", [ONE, OTHER, THIRD], 100, seed)
    for name, results in expected.items():
        for place, result in enumerate(results):
            assert ours[place][name].mean == pytest.approx(result.mean, rel=1e-5)  # theirs sums in float32
            assert ours[place][name].interval == pytest.approx(result.ci, rel=1e-4)
            assert ours[place][name].bootstrap == result.p_value


def test_the_randomisation_is_sacrebleu_s_where_no_draw_ties(theirs):
    ours = paired(counts(ONE, THIRD), FEW)[1]
    expected = theirs("ar", [ONE, THIRD], FEW.trials, FEW.seed)
    for name in ("BLEU", "chrF"):
        assert ours[name].randomisation == expected[name][1].p_value


def test_without_counting_ties_all_of_it_is_sacrebleu_s(theirs, monkeypatch):
    monkeypatch.setattr("regard.evaluate.significance._TIE", 0.0)
    ours = paired(counts(ONE, OTHER), FEW)[1]
    for name, results in theirs("ar", [ONE, OTHER], FEW.trials, FEW.seed).items():
        assert ours[name].randomisation == results[1].p_value


def test_a_difference_in_one_line_is_not_certain(theirs):
    nearly = [*ONE[:-1], "x y z"]
    ours = paired(counts(ONE, nearly), FEW)[1]
    assert all(ours[name].randomisation == 1 for name in ours)  # swapping one line changes the sign and nothing else
    assert theirs("ar", [ONE, nearly], FEW.trials, FEW.seed)["BLEU"][1].p_value < 0.01


def test_randomisation_equals_counting_every_swap():
    right = [1, 1, 1, 1, 1, 1, 0, 0, 0, 1]
    base = [0, 0, 0, 0, 0, 1, 0, 0, 1, 1]
    references = ["w"] * 10
    systems = [count(["w" if good else "v" for good in lines], references) for lines in (base, right)]
    found = paired(systems, Draws(10, 20_000))[1]["exact match"].randomisation
    differing = np.array(right) - np.array(base)
    signs = 1 - 2 * ((np.arange(2**10)[:, None] >> np.arange(10)) & 1)
    exact = np.mean(np.abs(signs @ differing) >= abs(differing.sum()))
    assert found == pytest.approx(exact, abs=0.01)


def test_equal_systems_do_not_differ(theirs):
    same = paired(counts(ONE, list(ONE)), FEW)[1]
    assert all((each.difference, each.bootstrap, each.randomisation) == (0, 1, 1) for each in same.values())
    assert theirs("bs", [ONE, ONE], 100, 1)["BLEU"][1].p_value < 0.05  # what this guards against


def test_the_baseline_has_an_interval_and_no_tests():
    baseline, other = paired(counts(ONE, OTHER), FEW)
    assert all((each.difference, each.bootstrap, each.randomisation) == (None,) * 3 for each in baseline.values())
    assert all(each.interval > 0 for each in baseline.values())
    assert other["BLEU"].difference == count(OTHER, REFERENCES)["BLEU"].score().value - count(
        ONE, REFERENCES)["BLEU"].score().value


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_environment_alone(monkeypatch):
    systems = counts(ONE, THIRD)
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    first, again, another = (paired(systems, Draws(100, 200, seed)) for seed in (3, 3, 4))
    assert first == again != another
    assert os.environ["SACREBLEU_SEED"] == "7"
    monkeypatch.delenv("SACREBLEU_SEED")
    assert paired(systems, Draws(100, 200, 3)) == first
    assert "SACREBLEU_SEED" not in os.environ


@pytest.mark.parametrize("draws", [Draws(resamples=0), Draws(trials=-1), Draws(seed=0)])
def test_numbers_below_one_are_refused(draws):
    with pytest.raises(ConfigError, match=r"(resamples|trials|seed) = (0|-1): expected 1 or more"):
        paired(counts(ONE, OTHER), draws)


def test_more_than_the_memory_holds_is_refused_with_what_fits():
    Draws().check(30_000)
    with pytest.raises(ConfigError, match=r"resamples = 1,000 on 100,000 lines would take 8\.0 GB.*--resamples 500,"):
        Draws(1000, 100).check(100_000)
    with pytest.raises(ConfigError, match=r"trials = 10,000 on 100,000 lines .* give --trials 4000"):
        Draws(100).check(100_000)


def test_signatures_are_written_as_sacrebleu_writes_them():
    metric = BLEU()
    metric.corpus_score(ONE, [REFERENCES])
    signature = metric.get_signature()
    plain = str(signature)
    signature.update("bs", 1000)
    signature.update("seed", "12345")
    assert Draws().signature(plain, "bs") == str(signature)
    assert Draws().signature("nrefs:1|case:mixed", "ar") == "nrefs:1|ar:10000|seed:12345|case:mixed"


def test_only_whole_systems_are_scored_smaller():
    counted = count(ONE, REFERENCES)["BLEU"]
    metric = _Metric("BLEU", [counted], 0.5)
    assert metric._aggregate_and_compute(counted.table).score == counted.score().value / 2
    assert metric._aggregate_and_compute(counted.table.copy()).score == counted.score().value
