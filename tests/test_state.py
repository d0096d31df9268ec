"""Memory and State; what models put into them is checked by the laws."""

import torch

from regard.model.state import Memory, State


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def test_select_takes_the_rows_of_everything():
    memory = Memory(numbered(3, 2, 4), numbered(3, 2) > 2, numbered(3, 4), numbered(3, 2), numbered(3, 2, 4))
    state = State(memory, 5, {"hidden": numbered(3, 4), "0.keys": numbered(3, 2, 5, 2)})
    rows = torch.tensor([2, 0, 2, 2])
    chosen = state.select(rows)
    assert chosen.length == 5 and chosen.cache.keys() == state.cache.keys()
    pairs = [(getattr(chosen.memory, name), getattr(memory, name)) for name in vars(memory)]
    for after, before in [*pairs, *((chosen.cache[name], state.cache[name]) for name in state.cache)]:
        assert torch.equal(after, torch.stack([before[2], before[0], before[2], before[2]]))
    one = Memory(memory.states, memory.mask, memory.summary, memory.source, memory.states).select(rows)
    assert one.values is one.states
    assert state.select(rows[:0]).cache["hidden"].shape == (0, 4)


def test_advance_leaves_the_old_state_as_it_was():
    memory = Memory(numbered(1, 2, 4), numbered(1, 2) > -1, numbered(1, 4), numbered(1, 2), numbered(1, 2, 4))
    state = State(memory, 5, {"hidden": numbered(1, 4), "projected": numbered(1, 2, 4)})
    after = state.advance(2, {"hidden": -numbered(1, 4)})
    assert (after.length, state.length) == (7, 5) and after.memory is memory
    assert torch.equal(after.cache["hidden"], -state.cache["hidden"])
    assert after.cache["projected"] is state.cache["projected"]
