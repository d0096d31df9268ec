"""What the tests of search share: models small enough to try every output, and that trial, in plain Python."""

import itertools
import math

import torch

from regard.config import DecodeConfig
from regard.data.batches import Batch
from regard.decode.search import Demands, forced, search
from regard.model.state import Memory, State
from regard.text.tokenizer import BOS, EOS, UNK

SIZE = 6
LETTERS = [UNK, 4, 5]
STATES = 1009


class Hashed:
    """A model of random tables: what follows depends on the source and on all tokens before, and so does where it
    looks. R rows, T tokens."""

    def __init__(self, seed=0, size=SIZE, attends=True):
        draw = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(STATES, size, generator=draw, dtype=torch.float64)
        self.looks = 2 * torch.randn(STATES, 100, generator=draw, dtype=torch.float64)
        self.attends, self.steps = attends, 0

    def start(self, batch):
        mask, places = batch.source_mask, torch.arange(1, batch.source.shape[1] + 1)
        number = (batch.source * places**2 * mask).sum(1, keepdim=True) % STATES
        states = mask[:, :, None].double()
        return State(Memory(states, mask, mask.double(), batch.source, states), 0, {"number": number})

    def decoder(self, tokens, state, taps=None):
        self.steps += 1
        number, numbers = state.cache["number"], []
        for token in tokens.unbind(1):
            number = (number * 37 + token[:, None] * 11 + 5) % STATES
            numbers.append(number)
        numbers = torch.stack(numbers, dim=1)  # (R, T, 1)
        if taps is not None and self.attends:
            mask = state.memory.mask.repeat_interleave(state.beam, 0)
            looks = self.looks[numbers.squeeze(-1), : mask.shape[1]]
            taps["cross.0"] = looks.masked_fill(~mask[:, None], -torch.inf).softmax(-1)  # (R, T, S)
        return numbers, state.advance(tokens.shape[1], {"number": number})

    def log_probabilities(self, features, source):
        return self.table[features.squeeze(-1)].log_softmax(-1)

    def __call__(self, batch, taps=None):
        return self.decoder(batch.target_in, self.start(batch), taps)[0]


def every_output(letters, longest):
    """All outputs: ended by </s>, or as long as they may be."""
    for length in range(longest + 1):
        for output in itertools.product(letters, repeat=length):
            yield output if length == longest else (*output, EOS)


def holds(tokens, phrase):
    return any(tuple(tokens[start : start + len(phrase)]) == tuple(phrase) for start in range(len(tokens)))


def repeats(tokens, n):
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams)


def brute_force(model, source, outputs, settings):
    """Log-probability and score of each output, by the formulas of Wu et al. (2016), eq. 14."""
    batch = Batch.of([source] * len(outputs), [[id for id in output if id != EOS] for output in outputs])
    taps, found = {}, {}
    model(batch, taps)
    alpha, beta = settings.length_penalty, settings.coverage_penalty
    for row, (output, values) in enumerate(zip(outputs, forced(model, batch).tolist(), strict=True)):
        length, total = len(output), sum(values[: len(output)])
        power = settings.length_penalty_kind == "power"
        norm = length**alpha if power else (5 + length) ** alpha / 6**alpha
        covered = 0.0
        if beta:
            for place in range(len(source) + 1):
                seen = sum(taps["cross.0"][row, step, place].item() for step in range(length))
                covered += beta * math.log(min(seen, 1.0))
        found[output] = total, total / norm + covered
    return found


def run(model, sources, demands=None, trees=None, **settings):
    """One search."""
    return search(model, Batch.of(sources), DecodeConfig(**settings), demands or Demands(), trees)


def likeliest(model, source, tokens):
    """Log-probabilities of what follows tokens, from a forced pass, as floats; <pad> and <s> left out."""
    batch = Batch.of([source], [list(tokens)])
    values = model.log_probabilities(model(batch), batch.source)[0, -1].tolist()
    return {token: value for token, value in enumerate(values) if token not in (0, BOS)}
