"""Memory, Past and State; what models put into them is checked by the laws."""

import random

import pytest
import torch

from conftest import MODELS, make_batch, make_model
from regard.data.batches import Batch
from regard.model.state import ROOM, Memory, Past, State


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def numbered_memory(sources):
    return Memory(numbered(sources, 2, 4), numbered(sources, 2) > 2, numbered(sources, 4), numbered(sources, 2),
                  -numbered(sources, 2, 4))


def test_select_takes_the_rows_of_everything():
    memory = numbered_memory(3)
    state = State(memory, 5, {"hidden": numbered(3, 4), "0.past": numbered(3, 2, 5)}, {"keys": numbered(3, 2, 5, 2)})
    rows = torch.tensor([2, 0, 2, 2])
    chosen = state.select(rows)
    assert chosen.length == 5 and chosen.beam == 1
    for name in ("cache", "shared"):
        assert getattr(chosen, name).keys() == getattr(state, name).keys()
    pairs = [(getattr(chosen.memory, name), getattr(memory, name)) for name in vars(memory) if name != "held"]
    pairs += [(chosen.cache[name], state.cache[name]) for name in state.cache]
    for after, before in [*pairs, (chosen.shared["keys"], state.shared["keys"])]:
        assert torch.equal(after, torch.stack([before[2], before[0], before[2], before[2]]))
    one = Memory(memory.states, memory.mask, memory.summary, memory.source, memory.states).select(rows)
    assert one.values is one.states
    assert state.select(rows[:0]).cache["hidden"].shape == (0, 4)


def test_rows_of_a_source_share_what_depends_on_it_alone():
    state = State(numbered_memory(3), 1, {"hidden": numbered(3, 4)}, {"keys": numbered(3, 5)})
    wide = state.select(torch.tensor([[0, 0], [1, 1], [2, 2]]))
    assert wide.beam == 2 and wide.memory is state.memory and wide.shared is state.shared
    assert torch.equal(wide.cache["hidden"], state.cache["hidden"].repeat_interleave(2, 0))
    moved = wide.select(torch.tensor([[1, 0], [2, 2], [5, 4]]))  # among the rows of each source alone
    assert moved.memory is state.memory and moved.shared is state.shared
    assert torch.equal(moved.cache["hidden"], state.cache["hidden"].repeat_interleave(2, 0))
    fewer = wide.select(torch.tensor([[4, 5], [1, 1]]))  # the source in the middle leaves
    assert fewer.beam == 2 and torch.equal(fewer.memory.states, state.memory.states[[2, 0]])
    assert torch.equal(fewer.shared["keys"], state.shared["keys"][[2, 0]])
    alone = wide.select(torch.tensor([5, 0, 1]))  # each row with a source of its own
    assert alone.beam == 1 and torch.equal(alone.memory.source, state.memory.source[[2, 0, 0]])
    none = wide.select(torch.zeros(0, 2, dtype=torch.int64))
    assert len(none.memory.mask) == 0 and none.shared["keys"].shape == (0, 5)


def test_advance_leaves_the_old_state_as_it_was():
    state = State(numbered_memory(1), 5, {"hidden": numbered(1, 4), "fed": numbered(1, 2, 4)})
    after = state.advance(2, {"hidden": -numbered(1, 4)})
    assert (after.length, state.length) == (7, 5) and after.memory is state.memory
    assert torch.equal(after.cache["hidden"], -state.cache["hidden"])
    assert after.cache["fed"] is state.cache["fed"]


# --- the past --------------------------------------------------------------------------------------------------------


class Told:
    """A `Past` of one block, and beside it what each row has been told, plainly: a list of vectors for each row."""

    def __init__(self, past, beam, rows):
        self.past, self.beam, self.rows = past, beam, rows

    def read(self, tokens):
        """All rows read so many more tokens."""
        past = self.past.grow(tokens, self.beam)
        new = torch.randn(len(self.rows), 2, tokens, 3)  # (R, H, T, D / H)
        together = new.unflatten(0, (-1, self.beam)).transpose(1, 2).flatten(2, 3)
        assert past.put("keys", together).shape[2] == past.used
        return Told(past, self.beam, [[*row, *own.unbind(1)] for row, own in zip(self.rows, new, strict=True)])

    def select(self, rows):
        state = State(numbered_memory(len(self.rows) // self.beam), past=self.past, beam=self.beam).select(rows)
        return Told(state.past, state.beam, [self.rows[row] for row in rows.flatten().tolist()])

    def check(self, tokens):
        """What each row may look at are its own vectors, in their order, and no others."""
        block = self.past.blocks["keys"][:, :, : self.past.used]
        mask, bias = self.past.hidden(tokens, self.beam, None)
        seen = torch.zeros(len(block), 1, self.beam * tokens, self.past.used) if bias is None else bias
        if mask is not None:
            seen = seen.masked_fill(~mask, -torch.inf)
        for number, row in enumerate(self.rows):
            source, place = divmod(number, self.beam)
            own = block[source][:, self.past.places[number]]
            assert torch.equal(own, torch.stack(row, dim=1))
            for t in range(tokens):
                visible = (seen[source, 0, place * tokens + t] == 0).nonzero().flatten().tolist()
                assert visible == self.past.places[number, : len(row) - tokens + t + 1].tolist()


def begin(sources):
    return Told(Past(torch.zeros(sources, 0, dtype=torch.int64)), 1, [[] for _ in range(sources)])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_each_row_finds_its_own_tokens_whatever_is_moved_repeated_or_left_out(seed, gradients):
    draw, sources, packed = random.Random(seed), 4, 0
    torch.manual_seed(seed)
    with torch.set_grad_enabled(gradients):
        told = begin(sources)
        for _ in range(3 * ROOM):
            tokens, before = draw.choice([1, 1, 1, 2]), told
            told = told.read(tokens)
            told.check(tokens)
            if draw.random() < 0.2:  # the state before may be gone on from again, and neither changes the other
                again = before.read(1)
                again.check(1)
                told.check(tokens)
                told = draw.choice([told, again])
            packed += told.past.used < len(told.rows) // told.beam * told.past.places.shape[1]
            held = len(told.rows) // told.beam
            kept = draw.sample(range(held), held - (held > 1 and draw.random() < 0.1))
            beam = draw.choice([1, 2, 3]) if draw.random() < 0.1 else told.beam
            choice = [[source * told.beam + draw.randrange(told.beam) for _ in range(beam)] for source in sorted(kept)]
            told = told.select(torch.tensor(choice))
    assert packed


def test_blocks_are_written_in_place_and_copied_once_in_a_while():
    told, copies = begin(2).read(1).select(torch.tensor([[0] * 3, [1] * 3])), 0
    with torch.no_grad():
        for step in range(4 * ROOM):
            before = told.past.blocks["keys"].data_ptr()
            told = told.read(1).select(torch.tensor([[1, 1, 1], [3, 3, 3]]))
            copies += told.past.blocks["keys"].data_ptr() != before
            assert told.past.used <= step + 2 + 3 * ROOM + 3  # not three slots for each token
    assert copies == 4


def test_scores_gain_their_bias_at_each_tokens_slot():
    with torch.no_grad():
        told = begin(2).read(1).select(torch.tensor([[0, 0], [1, 1]])).read(1).select(torch.tensor([[1, 0], [2, 2]]))
        told = told.read(1)
        bias = numbered(5, 1, 3).float()  # of 5 heads, by distance
        mask, found = told.past.hidden(1, 2, bias)
    assert mask is None and found.shape == (2, 5, 2, told.past.used)
    for row, places in enumerate(told.past.places):
        gained = found[row // 2, :, row % 2]
        assert torch.equal(gained[:, places], bias[:, 0]) and gained.isinf().sum() == 5 * (told.past.used - 3)
    weights = torch.rand(2, 5, 2, told.past.used)
    for row, seen in enumerate(told.past.seen(weights, 2)):
        assert torch.equal(seen[:, 0], weights[row // 2, :, row % 2, told.past.places[row]])


# --- every model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(1, 1, 1), (2, 1), (3,)])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_share_a_source_are_as_if_each_had_its_own(name, gradients, chunks):
    """Sources leave and rows are moved, as in a search, and any number of tokens is read at once."""
    model, batch = make_model(name), make_batch([(5, 6), (2, 6), (1, 6), (7, 6)])
    names = ("source", "source_mask", "target_in", "target_out", "target_mask")

    def anew(rows):
        return model(Batch(**{each: getattr(batch, each)[rows] for each in names}, tokens=0))

    with torch.set_grad_enabled(gradients):
        _, state = model.decoder(batch.target_in[:, :2], model.start(batch))
        state = state.select(torch.tensor([[0, 0, 0], [2, 2, 2], [3, 3, 3]]))
        rows = torch.tensor([0, 0, 0, 2, 2, 2, 3, 3, 3])
        features, state = model.decoder(batch.target_in[rows, 2:3], state)
        torch.testing.assert_close(features, anew(rows)[:, 2:3], rtol=1e-12, atol=1e-12)
        state, rows, place = state.select(torch.tensor([[2, 0], [7, 8]])), torch.tensor([0, 0, 3, 3]), 3
        for length in chunks:
            taps = {}
            features, state = model.decoder(batch.target_in[rows, place : place + length], state, taps)
            torch.testing.assert_close(features, anew(rows)[:, place : place + length], rtol=1e-12, atol=1e-12)
            place += length
            assert all(len(weights) == 4 and weights.shape[-2] == length for weights in taps.values())
            assert all(weights.shape[-1] == place for kind, weights in taps.items() if kind.startswith("decoder"))
