"""What search promises beside the laws: limits, order, what is never said, on a model whose every step is known."""

import math

import pytest
import torch

from regard.data.batches import Batch
from regard.decode.search import NEVER, Limits, beam_search, forced, greedy, ranked
from regard.model.state import Memory, State
from regard.text.tokenizer import EOS

SIZE = 7
A, B, C = 4, 5, 6


class Known:
    """A model whose next token depends on the one before: `table` gives probabilities; the source's first id shifts."""

    def __init__(self, table):
        self.log_p = torch.full((SIZE, SIZE), -30.0)
        for before, after in table.items():
            for token, probability in after.items():
                self.log_p[before, token] = math.log(probability)

    def start(self, batch):
        mask = batch.source_mask
        states = mask[:, :, None].float()
        return State(Memory(states, mask, mask.float(), batch.source, states), 0, {"read": torch.zeros(len(mask), 0)})

    def decoder(self, tokens, state):
        read = torch.cat([state.cache["read"], tokens], dim=1)
        return self.log_p[tokens], state.advance(tokens.shape[1], {"read": read})

    def log_probabilities(self, features, source):
        return features.log_softmax(-1)

    def __call__(self, batch, taps=None):
        return self.log_p[batch.target_in]


START = 1
GARDEN = Known({  # greedy takes A; the best whole output begins with B
    START: {A: 0.6, B: 0.4}, A: {A: 0.5, C: 0.3, EOS: 0.2}, B: {EOS: 0.9, C: 0.1}, C: {EOS: 1.0},
})
ENDLESS = Known({START: {A: 0.9, B: 0.1}, A: {A: 0.9, B: 0.1}, B: {A: 0.9, B: 0.1}})


def search(model, beam=3, length_penalty=0.0, limits=None, sources=([4],)):
    return beam_search(model, Batch.of(list(sources)), beam, length_penalty, limits)


def test_beam_finds_what_greedy_misses():
    assert greedy(GARDEN, Batch.of([[4]]), Limits(3))[0].tokens == [A, A, A]
    best, second, _ = search(GARDEN)[0]
    assert best.tokens == [B, EOS] and best.log_probability == pytest.approx(math.log(0.36), abs=1e-5)
    assert second.tokens == [A, C, EOS] and second.log_probability == pytest.approx(math.log(0.18), abs=1e-5)


@pytest.mark.parametrize("length_penalty, tokens", [(0.0, [A, EOS]), (3.0, [A, B, EOS])])
def test_the_length_penalty_ranks(length_penalty, tokens):
    model = Known({START: {A: 1.0}, A: {EOS: 0.6, B: 0.4}, B: {EOS: 1.0}})
    best = search(model, 4, length_penalty)[0][0]
    assert best.tokens == tokens
    assert best.score == best.log_probability / len(tokens) ** length_penalty
    assert ranked(-6.0, 0, 1.0) == -6.0 and ranked(-6.0, 2, 1.0) == -3.0 and ranked(-6.0, 2, 0.0) == -6.0


@pytest.mark.parametrize("source, most, longest", [([], 256, 12), ([4] * 5, 256, 22), ([4] * 5, 7, 7), ([4], 1, 1)])
def test_limits_count_the_end_symbol_of_source_and_output(source, most, longest):
    limits, batch = Limits(most), Batch.of([source, [4] * 40])
    assert limits.of(batch.source_mask).tolist() == [longest, min(most, 92)]
    for found in (greedy(ENDLESS, batch, limits)[0], *search(ENDLESS, 2, limits=limits, sources=[source, [4] * 40])[0]):
        assert len(found.tokens) == longest and EOS not in found.tokens


def test_sentences_of_all_lengths_end_each_in_its_time():
    sources = [[4] * length for length in (3, 0, 9, 1)]
    for found, source in zip(search(ENDLESS, sources=sources), sources, strict=True):
        assert {len(one.tokens) for one in found} == {2 * (len(source) + 1) + 10}
        assert [found] == search(ENDLESS, sources=[source])
    for one, source in zip(greedy(ENDLESS, Batch.of(sources)), sources, strict=True):
        assert one.tokens == [A] * (2 * (len(source) + 1) + 10)


def test_padding_and_start_are_never_said():
    flat = Known({before: dict.fromkeys(range(SIZE), 1 / SIZE) for before in range(SIZE)})
    outputs = [one.tokens for one in search(flat, 30, limits=Limits(3))[0]]
    assert len(outputs) == 30 and not {token for tokens in outputs for token in tokens} & set(NEVER)
    assert all(one.log_probability == pytest.approx(len(one.tokens) * math.log(1 / SIZE)) for one in search(flat)[0])


def test_a_beam_wider_than_the_vocabulary_gives_what_there_is():
    found = search(Known({START: {A: 1.0}, A: {EOS: 1.0}}), 50, limits=Limits(1))[0]
    assert [one.tokens for one in found][:2] == [[A], [EOS]] or found[0].tokens == [A]
    assert sorted(one.tokens[0] for one in found) == [token for token in range(SIZE) if token not in NEVER]


def test_forced_is_zero_at_padding():
    found = forced(GARDEN, Batch.of([[4], [4]], [[B], [A, C]]))
    expected = [[math.log(0.4), math.log(0.9), 0.0], [math.log(0.6), math.log(0.3), 0.0]]
    for row, values in zip(found.tolist(), expected, strict=True):
        assert row == pytest.approx(values, abs=1e-5)
