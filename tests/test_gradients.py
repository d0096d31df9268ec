"""The gradient of an update in pieces: exact, and whole when memory runs out."""

from mmap import PAGESIZE, mmap

import pytest
import torch

from conftest import make_batch, make_config, make_model
from regard.config_train import TrainConfig
from regard.data.batches import Order
from regard.data.shards import prepare
from regard.errors import RunError
from regard.training import device as machine
from regard.training import gradients as module
from regard.training.gradients import Gradients, largest, size, some
from regard.training.objective import loss_of
from regard.training.standing import Standing

LENGTHS = ((5, 4), (2, 6), (1, 1), (7, 3), (4, 4))
NO_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried "
                        "to allocate 9000000000 bytes. Error code 12 (Cannot allocate memory)"),
    "Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory"),
    "Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
    "oneDNN": RuntimeError("could not create a primitive"),
}


def make(name="transformer-pre", **settings):
    """Gradients of a model of the table, in float64, and what they say."""
    said, changes = [], settings.pop("model", {})
    return Gradients(make_model(name, **changes), TrainConfig(**settings), "float32", Standing(), said.append), said


def gradients_of(model):
    return {name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None}


def add(gradients, batches):
    """The gradient of an update that this process computes alone."""
    return gradients.add(batches, sum(batch.tokens for batch in batches), len(batches))


def same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance)


def refuse(monkeypatch, most, error):
    """A memory that holds no batch of more padded tokens, and breaks off the backward pass near its end."""

    def loss(model, batch, *others):
        found = loss_of(model, batch, *others)
        if size(batch) > most:
            last = next(iter(model.encoder.parameters()))
            hook = last.register_hook(lambda grad: (_ for _ in ()).throw(error))
            handles.append(hook)
        else:
            while handles:
                handles.pop().remove()
        sizes.append(size(batch))
        return found

    handles, sizes = [], []
    monkeypatch.setattr(module, "loss_of", loss)
    return sizes


@pytest.mark.parametrize("r_drop", [0.0, 2.0])
def test_pieces_make_the_gradient_of_the_whole(r_drop):
    gradients, _ = make(label_smoothing=0.1, r_drop=r_drop)
    batch = make_batch(LENGTHS)
    total = add(gradients, [batch])
    expected = gradients_of(gradients.model)
    loss, surprise = loss_of(gradients.model, batch, 0.1)
    torch.testing.assert_close(total, surprise)
    same(expected, dict(zip(expected, torch.autograd.grad(loss / batch.tokens, [
        dict(gradients.model.named_parameters())[name] for name in expected]), strict=True)))
    gradients.model.zero_grad()
    parts = [some(batch, rows) for rows in (slice(2), slice(2, 3), slice(3, 5))]
    torch.testing.assert_close(add(gradients, parts), total)
    same(gradients_of(gradients.model), expected)


def test_some_rows_are_a_batch_of_their_own():
    batch = make_batch(LENGTHS)
    part = some(batch, slice(1, 3))
    rows = [[row[mask][:-1].tolist() for row, mask in zip(ids, masks, strict=True)]
            for ids, masks in ((part.source, part.source_mask), (part.target_out, part.target_mask))]
    again = type(batch).of(*rows)
    assert part.alignment is again.alignment is None
    for name in vars(again).keys() - {"alignment"}:
        assert torch.equal(*(torch.as_tensor(getattr(each, name)) for each in (part, again))), name
    assert part.source.shape[1] < batch.source.shape[1] and size(part) == 2 * (3 + 7)


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
@pytest.mark.parametrize("most", [40, 25, 17])
def test_out_of_memory_parts_the_batch_and_leaves_no_sentence_out(most, error, monkeypatch):
    gradients, said = make(label_smoothing=0.1)
    batches = [make_batch([(3, 3)]), make_batch(LENGTHS)]
    total = add(gradients, batches)
    expected = gradients_of(gradients.model)
    gradients.model.zero_grad()
    sizes = refuse(monkeypatch, most, error)
    torch.testing.assert_close(add(gradients, batches), total)
    same(gradients_of(gradients.model), expected, 1e-10)
    assert len(said) == 1 and said[0].startswith("Memory does not hold a batch of 5 pairs of up to 8 + 7 tokens: from")
    assert max(sizes) > most, "nothing was refused"
    refused = gradients.standing.too_large
    assert refused > most

    # The next time, and after going on elsewhere, nothing has to fail first.
    sizes.clear()
    gradients.model.zero_grad()
    add(gradients, batches)
    assert max(sizes) < refused and len(said) == 1
    same(gradients_of(gradients.model), expected, 1e-10)


def test_a_failed_attempt_changes_nothing_that_is_drawn_later(monkeypatch):
    changes = {"dropout": 0.3}
    expected, _ = make(model=changes)
    expected.standing.too_large = size(make_batch(LENGTHS))
    add(expected, [make_batch(LENGTHS)])
    after = torch.get_rng_state()
    found, _ = make(model=changes)
    refuse(monkeypatch, size(make_batch(LENGTHS)) - 1, NO_MEMORY["GPU"])
    add(found, [make_batch(LENGTHS)])
    assert torch.equal(torch.get_rng_state(), after)
    same(gradients_of(found.model), gradients_of(expected.model), 0)


def test_a_pair_that_memory_does_not_hold(monkeypatch):
    gradients, _ = make()
    refuse(monkeypatch, 15, NO_MEMORY["CPU"])
    with pytest.raises(RunError) as error:
        add(gradients, [make_batch(((9, 8), (2, 2)))])
    assert str(error.value) == ("memory does not hold the gradient of one pair of up to 10 + 9 tokens "
                                f"({NO_MEMORY['CPU']}). What was saved before is whole. Lower data.max_tokens, or use "
                                "a smaller model")
    assert not gradients_of(gradients.model)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_faults_are_not_hidden(error, monkeypatch):
    gradients, _ = make()
    refuse(monkeypatch, 0, error)
    with pytest.raises(type(error), match=str(error)):
        add(gradients, [make_batch(LENGTHS)])


# --- accumulate = "auto" -------------------------------------------------------------------------------------------


@pytest.fixture
def order(corpus, tmp_path):
    return Order(prepare(make_config(corpus), tmp_path / "run").train, 64, 1)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_largest_batch(pieces, order):
    order = Order(order.corpus, 64, 1, pieces)
    sizes = [size(order.update(0, position)[0]) for position in range(order.updates(0))]
    batch = largest(order)
    assert size(batch) >= 0.9 * max(sizes) and len(set(sizes)) > 1
    length = batch.source.shape[1] + batch.target_in.shape[1]
    assert all(len(each) * (each.source.shape[1] + each.target_in.shape[1]) ** 2 <= len(batch) * length**2
               for each in (order.update(0, position)[0] for position in range(order.updates(0))))


@pytest.mark.parametrize("free", [1e12, 40_000, 1])
def test_memory_is_measured_by_more_and_more_rows(free, order, monkeypatch):
    """On a machine where a padded token takes 200 bytes."""
    gradients, said = make(model={"dropout": 0.3}, accumulate="auto")
    sizes, batch, model = refuse(monkeypatch, 1e9, None), largest(order), gradients.model
    kept = 2 * sum(weights.numel() * weights.element_size() for weights in model.parameters())
    monkeypatch.setattr(machine, "free_memory", lambda device: free + kept)
    monkeypatch.setattr(machine, "taken_memory", lambda device: 1000)
    monkeypatch.setattr(machine, "peak_memory", lambda device: 1000 + 200 * max(sizes))
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    gradients.measure(order)
    assert not gradients_of(model)
    assert all(torch.equal(weights, before[name]) for name, weights in model.named_parameters())
    parts = list(gradients.parted(batch))
    if free == 1e12:
        assert len(parts) == 1 and sizes[-1] == size(batch) and gradients.standing.too_large > size(batch)
    elif free == 1:
        assert len(parts) == len(batch) and len(sizes) == 1
    else:
        assert len(batch) > len(parts) > 1 and 200 * max(sizes) <= 0.5 * free >= 200 * max(map(size, parts))
    pieces = "1 piece" if free == 1e12 else f"{len(parts)} pieces"
    assert said == [f"memory: the largest batch has {len(batch)} pairs and is computed in {pieces}; "
                    f"{0.5 * free / 2**30:.1f} GiB can be planned with"]


def test_what_does_not_fit_while_it_is_measured_is_parted(order, monkeypatch):
    gradients, said = make(accumulate="auto")
    batch = largest(order)
    refuse(monkeypatch, size(batch) // 2, NO_MEMORY["GPU"])
    gradients.measure(order)
    assert len(said) == 1 and not gradients_of(gradients.model)
    assert all(size(part) <= size(batch) // 2 for part in gradients.parted(batch))


def test_figures_of_this_machine():
    cpu = torch.device("cpu")
    before, free = machine.taken_memory(cpu), machine.free_memory(cpu)
    assert 2**24 < before < 2**36 and 2**20 < free < 2**50
    machine.reset_peak(cpu)
    with mmap(-1, 2**27) as block:  # of the system: a tensor could lie in what the heap has kept from other tests
        block[::PAGESIZE] = bytes(2**27 // PAGESIZE)
        assert machine.peak_memory(cpu) - before > 2**26


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY)
def test_memory_that_runs_out_where_nothing_can_be_parted(error):
    with pytest.raises(RunError) as raised, machine.memory_errors("the optimizer's state"):
        raise error
    assert str(raised.value) == ("memory does not hold the optimizer's state. What was saved before is whole. Use a "
                                 "smaller model, or a machine with more memory")
    with pytest.raises(RuntimeError, match="other"), machine.memory_errors("it"):
        raise RuntimeError("other")
