"""BPE-dropout: as the library without it, as the paper's algorithm with it, and the same wherever it is drawn."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from regard.text.sampling import POOL, Sampler, Segmenter, parted
from regard.text.tokenizer import SPECIALS, UNK, Tokenizer, Vocabulary
from test_tokenizer import ODD, TEXT, TYPED

LINES = [*TEXT[:4], *ODD, *TYPED,
         "", " ", "  ", "▁", "▁▁a", "a▁dog", " a  dog ", "日本語と日本 語", "ЖЖ aЖЖb Ж", "👩‍👩‍👧👩", "\n"]
AB = Tokenizer("bpe", Vocabulary([*SPECIALS, "▁", "a", "b", "ab", "▁ab"], [("a", "b"), ("▁", "ab")], []))


def learned(size=120):
    return Tokenizer.train("bpe", size, TEXT)


def drawn(tokenizer, lines, dropout, samples=1, longest=10**6, seed=0):
    """Each sample as lists of ids."""
    return [[row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]
            for ids, lengths in Sampler(tokenizer, dropout, samples, seed).draw(lines, longest)]


def made_up(count=2000):
    """Lines of letters that were learned and some that were not, so that all kinds of neighbours meet."""
    draw = random.Random(1)
    return ["".join(draw.choice("aaeinrstdogmh ▁éЖ日.") for _ in range(draw.randrange(20))) for _ in range(count)]


@pytest.mark.parametrize("line", LINES)
def test_lines_are_parted_as_the_library_does(line):
    words = learned()._engine.pre_tokenizer.pre_tokenize_str(line) if line else []
    assert parted(line) == [word for word, _ in words]


@pytest.mark.parametrize("size", [10, 60, 120, 300])
def test_without_dropout_it_is_the_library(size):
    """Of 10 entries most characters are unknown, ▁ perhaps among them."""
    tokenizer, lines = learned(size), LINES + made_up()
    assert drawn(tokenizer, lines, 0.0, samples=2) == [tokenizer.encode(lines)] * 2


def test_an_unknown_word_start():
    tokenizer = Tokenizer("bpe", Vocabulary([*SPECIALS, "a", "b", "ab"], [("a", "b")], []))
    assert drawn(tokenizer, ["ab Жab Ж"], 0.0)[0] == tokenizer.encode(["ab Жab Ж"])


def shares(segmenter, word, dropout, count=4000):
    return {pieces: times / count for pieces, times in
            Counter(islice(segmenter.drawn(word, dropout), count)).items()}


def test_the_shares_of_a_word_of_two_merges():
    """▁ab: without its first merge it stays ▁ a b, without its second ▁ ab."""
    found = shares(Segmenter(AB), "▁ab", 0.4)
    assert found == pytest.approx({(4, 5, 6): 0.4, (4, 7): 0.6 * 0.4, (8,): 0.6 * 0.6}, abs=0.025)


def algorithm_1(pieces, merges, dropout, chance):
    """As Provilkov et al. (2020) write it: a coin for each merge, at each step."""
    while True:
        possible = [(merges.index(pair), place) for place, pair in enumerate(pairwise(pieces))
                    if pair in merges and chance() >= dropout]
        if not possible:
            return tuple(pieces)
        _, place = min(possible)
        pieces = [*pieces[:place], pieces[place] + pieces[place + 1], *pieces[place + 2:]]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_it_is_the_algorithm_of_the_paper(dropout):
    tokenizer, chance = learned(300), random.Random(2).random
    entries, merges, _ = tokenizer.vocabulary
    for word in ("▁through", "▁bushes", "▁läuft"):
        expected = Counter(algorithm_1(list(word), merges, dropout, chance) for _ in range(4000))
        found = {tuple(entries[id] for id in pieces): share
                 for pieces, share in shares(Segmenter(tokenizer), word, dropout).items()}
        assert len(found) > 5
        for pieces in expected | found:
            assert found.get(pieces, 0) == pytest.approx(expected[pieces] / 4000, abs=0.035)


def test_the_plain_segmentation_is_the_most_frequent_and_others_appear():
    tokenizer = learned(300)
    for word in ("▁through", "▁bushes", "▁Männer"):
        plain, found = Segmenter(tokenizer).plain(word), shares(Segmenter(tokenizer), word, 0.1)
        assert max(found, key=found.get) == plain and 0.3 < found[plain] < 0.95 and len(found) > 3


def test_near_1_words_fall_into_characters():
    tokenizer = learned(300)
    row, = drawn(tokenizer, ["a dog runs through the grass"], 0.999999)[0]
    assert tokenizer.texts(row) == list("▁a▁dog▁runs▁through▁the▁grass")


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_every_segmentation_is_that_text(dropout):
    tokenizer, lines = learned(300), [*TEXT, *LINES]
    plain = tokenizer.encode(lines)
    samples = drawn(tokenizer, lines, dropout, samples=8)
    assert all(tokenizer.decode(rows) == tokenizer.decode(plain) for rows in samples)
    assert len({str(rows) for rows in samples}) == 8 and all(rows != plain for rows in samples)
    assert all(UNK not in row for rows in samples for row in rows[:len(TEXT)])


def test_a_word_that_comes_once_has_a_draw_of_its_own_in_each_sample():
    tokenizer = learned(300)
    for samples in (5, POOL):
        found = [tuple(row) for row, in drawn(tokenizer, ["through"], 0.5, samples)]
        own = list(islice(Segmenter(tokenizer).drawn("▁through", 0.5), samples))
        begin = next(number for number in range(samples) if own[number:] + own[:number] == found)
        assert begin == np.random.default_rng(0).integers(2**32) % samples


def test_places_of_a_word_do_not_go_together():
    first, second = zip(*drawn(AB, ["ab", "ab"], 0.5, 40), strict=True)
    assert first != second and all(len({str(row) for row in rows}) == 3 for rows in (first, second))


def test_what_grows_too_long_is_plain():
    tokenizer, text = learned(300), TEXT[0]
    plain, = tokenizer.encode([text])
    free = [row for row, in drawn(tokenizer, [text], 0.1, 30)]
    held = [row for row, in drawn(tokenizer, [text], 0.1, 30, longest=len(plain) + 2)]
    assert max(map(len, free)) > len(plain) + 2
    assert held == [row if len(row) <= len(plain) + 2 else plain for row in free]


def test_no_lines():
    assert [(ids.tolist(), lengths.tolist()) for ids, lengths in Sampler(AB, 0.1, 3).draw([], 9)] == [([], [])] * 3


def test_it_is_the_same_in_every_process():
    code = ("from test_sampling import *\n"
            "rows = drawn(learned(300), TEXT + LINES, 0.1, 20)\n"
            "print(hashlib.sha256(str(rows).encode()).hexdigest())")
    told = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={
        **os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout for seed in "12"}
    here = hashlib.sha256(str(drawn(learned(300), TEXT + LINES, 0.1, 20)).encode()).hexdigest()
    assert told == {f"{here}\n"}


def test_what_was_drawn_before_is_drawn_now():
    """A prepared corpus that was deleted must come back as it was, also with later versions of Python and numpy."""
    assert list(islice(Segmenter(AB).drawn("▁ab", 0.5), 8)) == GOLDEN
    assert [row for row, in drawn(AB, ["ab"], 0.5, 6)] == GOLDEN_ROWS


GOLDEN = [(4, 5, 6), (4, 7), (8,), (4, 5, 6), (4, 5, 6), (8,), (4, 5, 6), (8,)]
GOLDEN_ROWS = [[4, 5, 6], [4, 5, 6], [8], [4, 5, 6], [4, 7], [8]]
