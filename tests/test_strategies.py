"""What each strategy looks at: sampling against its exact distribution, diverse beams against the paper in plain loops.
Beam and forced phrases are tested against every output in test_search.py."""

import math
from collections import Counter

import pytest
import torch

from regard.decode.hypotheses import Paths
from regard.decode.search import Demands
from regard.decode.strategies import BLOCK, Sampling, greedy, top
from regard.text.tokenizer import EOS
from tiny_search import LETTERS, Hashed, every_output, likeliest, run

SAMPLINGS = {
    "plain": {}, "sharper": {"temperature": 0.5}, "flatter": {"temperature": 2.0}, "top 2": {"top_k": 2},
    "top 0.6": {"top_p": 0.6}, "top 0.1": {"top_p": 0.1}, "all three": {"temperature": 1.5, "top_k": 3, "top_p": 0.8}}


def cut(log_p, temperature=1.0, top_k=None, top_p=None):
    """The distribution that is drawn from, token by token."""
    weights = {token: math.exp(value / temperature) for token, value in log_p.items()}
    order = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total = sum(weights[token] for token in order)
    kept, held = {}, 0.0
    for token in order:
        if top_p is not None and held >= top_p:
            break
        kept[token] = weights[token]
        held += weights[token] / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def of_output(model, source, output, settings):
    """The probability that sampling draws an output."""
    each = (cut(likeliest(model, source, output[:place]), **settings).get(token, 0.0)
            for place, token in enumerate(output))
    return math.prod(each)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_samples_are_as_frequent_as_they_should_be(name):
    """Seeded. 4,000 draws of one sentence; each frequency within 4.5 standard deviations of what is exact."""
    model, settings, draws = Hashed(2), SAMPLINGS[name], 4000
    found, = run(model, [[4, 5]], Demands(outputs=draws), sample=True, seed=3, max_length=3, **settings)
    seen = Counter(tuple(one.tokens) for one in found)
    exact = {output: of_output(model, [4, 5], output, settings) for output in every_output(LETTERS, 3)}
    assert sum(exact.values()) == pytest.approx(1.0) and sum(seen.values()) == draws
    assert seen.keys() <= {output for output, p in exact.items() if p > 0}
    for output, p in exact.items():
        assert abs(seen[output] - draws * p) <= 4.5 * math.sqrt(draws * p * (1 - p)) + 1e-9
    for one in found[:20]:  # the model's own log-probability, whatever it was drawn from
        own = sum(likeliest(model, [4, 5], one.tokens[:at])[token] for at, token in enumerate(one.tokens))
        assert one.log_probability == pytest.approx(own, abs=1e-5)


def test_a_draw_depends_on_seed_line_and_number_alone():
    sources = [[4, 5], [5], [4, 5], [4, 4, 5]]
    lines = [10, 20, 30, 40]

    def draws(rows, outputs=3, seed=1):
        demands = Demands(outputs=outputs, lines=[lines[row] for row in rows])
        found = run(Hashed(), [sources[row] for row in rows], demands, sample=True, seed=seed, max_length=6)
        return [[one.tokens for one in each] for each in found]

    together = draws([0, 1, 2, 3])
    assert [draws([row])[0] for row in range(4)] == together == draws([3, 2, 1, 0])[::-1]
    assert [each[:2] for each in together] == draws([0, 1, 2, 3], outputs=2)
    assert draws([0, 1, 2, 3], seed=2) != together and together[0] != together[2]  # the same source on two lines
    assert len({tuple(tokens) for each in together for tokens in each}) > 6


def test_chances_are_in_the_unit_interval_and_differ():
    chances = Sampling.chances_of(1, [1, 2], 2, [3, 5])
    assert chances.shape == (4, 5) and chances.min() >= 0 and chances.max() < 1
    assert (chances[:2, 3:] == 0).all() and len(set(chances.flatten().tolist())) == 2 * 3 + 2 * 5 + 1


def test_a_tiny_temperature_is_greedy():
    for seed in range(10):
        drawn = run(Hashed(seed), [[4], [5, 5]], sample=True, temperature=1e-4, max_length=6)
        best = run(Hashed(seed), [[4], [5, 5]], beam=1, max_length=6)
        assert [one[0].tokens for one in drawn] == [one[0].tokens for one in best]
        assert [one[0].tokens for one in run(Hashed(seed), [[4], [5, 5]], sample=True, top_k=1, max_length=6)] == [
            one[0].tokens for one in best]


def diverse_beam(model, source, beam, groups, diversity, longest):
    """Diverse beam search of Vijayakumar et al. (2018), section 3: ended outputs with their log-probabilities."""
    width = beam // groups
    states = [([((), 0.0)], []) for _ in range(groups)]  # of each group: open hypotheses, and ended ones
    for _ in range(longest):
        taken, after = Counter(), []
        for beams, ended in states:
            kids = [((*tokens, token), total + value, total + value - diversity * taken[token])
                    for tokens, total in beams for token, value in likeliest(model, source, tokens).items()]
            kids.sort(key=lambda kid: -kid[2])
            taken.update(kid[0][-1] for kid in kids[:width])
            ended = ended + [kid[:2] for kid in kids[:width] if kid[0][-1] == EOS]
            beams = [kid[:2] for kid in kids if kid[0][-1] != EOS][:width]
            after.append(([] if len(ended) >= width else beams, ended))
        states = after
    return [one for beams, ended in states for one in [*ended, *beams]]


@pytest.mark.parametrize("beam, groups, diversity", [(4, 2, 0.5), (4, 4, 2.0), (6, 2, 0.0), (6, 3, 1.0)])
def test_diverse_beams_are_those_of_the_paper(beam, groups, diversity):
    different = 0
    for seed in range(15):
        found = run(Hashed(seed), [[4, 5], [5]], Demands(outputs=beam), beam=beam, groups=groups, diversity=diversity,
                    max_length=5, length_penalty=0.0)
        for source, hypotheses in zip([[4, 5], [5]], found, strict=True):
            expected = sorted(diverse_beam(Hashed(seed), source, beam, groups, diversity, 5), key=lambda one: -one[1])
            assert [tuple(one.tokens) for one in hypotheses] == [tokens for tokens, _ in expected[:beam]]
            assert [one.score for one in hypotheses] == pytest.approx([total for _, total in expected[:beam]], abs=1e-5)
        plain = run(Hashed(seed), [[4, 5], [5]], Demands(outputs=beam), beam=beam, max_length=5, length_penalty=0.0)
        different += [one[0].tokens for one in plain] != [one[0].tokens for one in found]
    assert different or diversity < 2.0


def test_without_diversity_all_groups_are_the_same_narrow_beam():
    found, = run(Hashed(4), [[4, 5]], Demands(outputs=6), beam=6, groups=3, diversity=0.0, max_length=5)
    narrow, = run(Hashed(4), [[4, 5]], Demands(outputs=2), beam=2, max_length=5)
    assert [one.tokens for one in found] == [one.tokens for one in narrow for _ in range(3)]


@pytest.mark.parametrize("rows, size, k", [(3, 7, 7), (3, 7, 1), (2, 8 * BLOCK, 2), (5, 40 * BLOCK + 3, 10),
                                           (1, 4 * BLOCK - 1, 1), (4, 9 * BLOCK + 63, 1)])
def test_the_quick_top_is_the_plain_one(rows, size, k):
    torch.manual_seed(1)
    for x in (torch.randn(rows, size), torch.full((rows, size), -torch.inf).index_fill(1, torch.tensor([size - 1]), 0)):
        values, places = top(x, k)
        torch.testing.assert_close(values, x.topk(k).values, rtol=0, atol=0)
        torch.testing.assert_close(x.gather(1, places), values, rtol=0, atol=0)
        assert all(len(set(row)) == k for row in places.tolist())


def test_greedy_takes_the_likeliest():
    log_p = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]).log()
    parents, tokens, totals = greedy(log_p, Paths.start(2, 1, torch.device("cpu")))
    assert totals.flatten().exp().tolist() == pytest.approx([0.7, 0.5])
    assert parents.tolist() == [[0], [1]] and tokens.tolist() == [[1], [0]]
