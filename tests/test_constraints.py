"""Phrases that an output must hold: the tables against a search for phrases in plain Python, and the beam that serves
them."""

import random

import pytest
import torch

from regard.config import DecodeConfig
from regard.data.batches import Batch
from regard.decode.constraints import Constraints
from regard.decode.hypotheses import Paths
from regard.decode.search import Demands, search
from regard.decode.strategies import ConstrainedBeam
from tiny_search import Hashed, holds, run


def count(phrase, tokens):
    """Tokens of a phrase that stand at the end; all of it once it has been there."""
    if holds(tokens, phrase):
        return len(phrase)
    return max(held for held in range(len(phrase)) if list(tokens[len(tokens) - held:]) == list(phrase[:held]))


def test_counts_are_those_of_a_plain_search():
    draw = random.Random(1)
    for _ in range(30):
        phrases = [[[draw.randint(3, 5) for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(0, 3))]
                   for _ in range(3)]
        phrases[0] = phrases[0] or [[4, 4, 5]]
        unit = torch.tensor([0, 0, 1, 2])
        constraints = Constraints(phrases, torch.tensor([2, 0, 1]))
        rows = [phrases[(2, 0, 1)[each]] for each in unit]
        said = [[] for _ in rows]
        met = constraints.start(Paths(unit, torch.ones(4, 1), torch.zeros(4)))
        for _ in range(12):
            tokens = [draw.randint(3, 6) for _ in rows]
            met = constraints.advance(unit, met, torch.tensor(tokens))
            said = [[*before, token] for before, token in zip(said, tokens, strict=True)]
            ahead = constraints.next_tokens(unit, met)
            complete = constraints.complete(Paths(unit, torch.ones(4, 1), torch.zeros(4), met=met))
            for row, own in enumerate(rows):
                expected = [count(phrase, said[row]) for phrase in own]
                assert met[row, : len(own)].tolist() == expected and met[row, len(own):].sum() == 0
                assert complete[row] == all(holds(said[row], phrase) for phrase in own)
                waits = [[*phrase, -1][held] for held, phrase in zip(expected, own, strict=True)]
                assert ahead[row].tolist() == waits + [-1] * (ahead.shape[1] - len(own))


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_each_output_holds_its_phrases_however_narrow_the_beam(beam):
    sources, force = [[4, 5], [5], [4]], [[[4, 5, 4], [5, 5]], [[3]], []]
    for seed in range(25):
        found = run(Hashed(seed), sources, Demands(outputs=beam, force=force), beam=beam, max_length=9)
        free = run(Hashed(seed), sources, Demands(outputs=beam), beam=beam, max_length=9)
        assert found[2] == free[2]  # who is asked for nothing loses nothing
        for phrases, hypotheses in zip(force, found, strict=True):
            assert hypotheses and all(holds(one.tokens, phrase) for one in hypotheses for phrase in phrases)
            assert len({tuple(one.tokens) for one in hypotheses}) == len(hypotheses) <= beam


def test_phrases_of_exactly_the_longest_length():
    found = run(Hashed(), [[4]], Demands(force=[[[4, 5, 5, 4]]]), beam=2, max_length=4)
    assert [one.tokens for one in found[0]] == [[4, 5, 5, 4]]


def test_a_forced_beam_is_no_worse_than_placing_the_phrase_by_hand():
    """Of all places for a phrase, a beam of 12 finds one that at most a few percent of all outputs beat."""
    model = Hashed(7)
    batch, settings = Batch.of([[4, 5]]), DecodeConfig(beam=12, max_length=5, length_penalty=0.0)
    narrow = search(model, batch, settings, Demands(force=[[[5, 4]]]))[0]
    wide = search(model, batch, DecodeConfig(beam=300, max_length=5, length_penalty=0.0),
                  Demands(outputs=300, force=[[[5, 4]]]))[0]
    place = [one.tokens for one in wide].index(narrow[0].tokens)
    assert place < 0.05 * len(wide)


def test_banks_share_the_beam_evenly_and_the_fullest_comes_first():
    constraints = Constraints([[[4, 5]]], torch.tensor([0]))
    paths = Paths(torch.zeros(4, dtype=torch.int64), torch.ones(4, 2, dtype=torch.int64),
                  torch.tensor([0.0, -1.0, -2.0, -3.0]).double(), met=torch.tensor([[0], [0], [1], [1]]))
    log_p = torch.log_softmax(torch.tensor([[-9.0, -9, 0, 3, 1, 0, 2, -9]]).expand(4, -1), -1)
    parents, tokens, found = ConstrainedBeam(4, constraints)(log_p, paths)
    banks = constraints.advance(paths.unit[parents], paths.met[parents], tokens).squeeze(-1)[0].tolist()
    assert banks[:6] == [2, 1, 0, 2, 1, 0]  # one of each bank in turn, as long as it has some
    totals = (paths.totals[parents] + log_p[parents, tokens])[0].tolist()
    assert found[0].tolist() == totals
    for bank in (0, 1, 2):
        own = [total for total, each in zip(totals, banks, strict=True) if each == bank]
        assert own == sorted(own, reverse=True)
    assert len(set(zip(parents[0].tolist(), tokens[0].tolist(), strict=True))) == parents.shape[1] == 8
