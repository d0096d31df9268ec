"""Batches that are made ahead are those that the order gives."""

import threading

import pytest
import torch

from regard.data.batches import Order
from regard.errors import DataError
from regard.training.ahead import Ahead


class Corpus:
    """Ten rows; the thread that reads them is remembered."""

    def __init__(self):
        self.source_lengths = self.target_lengths = torch.arange(1, 11).numpy()
        self.samples, self.parts, self.readers, self.broken = 1, [(10, 1.0)], set(), False

    def __len__(self):
        return 10

    def source(self, row):
        if self.broken:
            raise DataError("a file is gone")
        self.readers.add(threading.current_thread().name)
        return [4 + row] * (row + 1)

    target = source

    def alignment(self, row):
        return None


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(one.source, other.source) and torch.equal(one.target_out, other.target_out)
        for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("part", [slice(None), slice(1, None, 2)])
def test_they_are_the_orders(part):
    corpus = Corpus()
    order = Order(corpus, 12, seed=1, pieces=2)
    ahead = Ahead(order, part, torch.device("cpu"))
    places = [(epoch, position) for epoch in range(3) for position in range(order.updates(epoch))]
    for place in [*places, (0, 1), (0, 0), *places[2:5]]:
        assert same(ahead.update(*place), order.update(*place, part))
    ahead.close()


def test_the_next_ones_are_made_by_another_thread():
    corpus = Corpus()
    ahead = Ahead(Order(corpus, 12, seed=1), slice(None), torch.device("cpu"))
    ahead.update(0, 0)
    (made,) = ahead.made.values()
    assert made.result()  # nobody has asked for them
    assert corpus.readers == {"batches_0"}
    ahead.close()


def test_what_fails_there_is_told_here():
    corpus = Corpus()
    ahead = Ahead(Order(corpus, 12, seed=1), slice(None), torch.device("cpu"))
    corpus.broken = True
    with pytest.raises(DataError, match="a file is gone"):
        ahead.update(0, 0)
    ahead.close()
