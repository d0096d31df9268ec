"""Padding, masks, the shift of the target, and the order of training."""

import numpy as np
import pytest
import torch

from regard.data.batches import Batch, Order, by_length, cut, drawn, pad
from regard.text.tokenizer import BOS, EOS, PAD


class Known:
    """A corpus of random lengths in which each row's ids tell the row."""

    def __init__(self, rows=200, longest=12, parts=(), samples=1):
        draw, self.parts, self.samples = np.random.default_rng(1), parts, samples
        self.source_lengths, self.target_lengths = draw.integers(1, longest, (2, rows))

    def __len__(self):
        return len(self.source_lengths) // self.samples

    def source(self, row):
        return np.full(self.source_lengths[row], row + 10)

    def target(self, row):
        return [row + 10] * self.target_lengths[row]

    def alignment(self, row):
        return None


def test_batch_shifts_the_target_and_masks_the_padding():
    batch = Batch.of([[7, 8], [9]], [[5], [4, 5, 6]])
    assert batch.source.tolist() == [[7, 8, EOS], [9, EOS, PAD]]
    assert batch.source_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.target_in.tolist() == [[BOS, 5, PAD, PAD], [BOS, 4, 5, 6]]
    assert batch.target_out.tolist() == [[5, EOS, PAD, PAD], [4, 5, 6, EOS]]
    assert batch.target_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert (len(batch), batch.tokens) == (2, 6)
    assert batch.to(torch.device("cpu")) is batch and batch.to(torch.device("meta")).target_out.is_meta


def test_batch_without_targets_and_with_empty_rows():
    batch = Batch.of([[], [4]])
    assert batch.source.tolist() == [[EOS, PAD], [4, EOS]]
    assert batch.target_in.tolist() == [[BOS], [BOS]] and batch.target_out.tolist() == [[EOS], [EOS]]


@pytest.mark.parametrize("begin, end, ids", [
    (None, None, [[3, 4], [5, 0]]), (1, None, [[1, 3, 4], [1, 5, 0]]), (None, 2, [[3, 4, 2], [5, 2, 0]]),
    (1, 2, [[1, 3, 4, 2], [1, 5, 2, 0]]),
])
def test_pad(begin, end, ids):
    found, mask = pad([[3, 4], np.array([5], dtype=np.uint16)], begin, end)
    assert found.tolist() == ids and found.dtype == torch.int64
    assert torch.equal(mask, torch.tensor(ids) != 0)


@pytest.mark.parametrize("lengths, budget, runs", [
    ([], 5, []), ([9], 5, [(0, 1)]), ([1, 2, 3], 6, [(0, 2), (2, 3)]), ([3, 2, 1], 6, [(0, 2), (2, 3)]),
    ([2, 2, 2], 6, [(0, 3)]), ([9, 1, 9], 5, [(0, 1), (1, 2), (2, 3)]),
])
def test_cut(lengths, budget, runs):
    assert cut(np.array(lengths, dtype=np.int64), budget) == runs


@pytest.mark.parametrize("pieces", [1, 3])
def test_each_epoch_holds_every_row_once_within_the_budget(pieces):
    corpus = Known()
    order = Order(corpus, 60, 1, pieces)
    longer = np.maximum(corpus.source_lengths, corpus.target_lengths) + 1
    for epoch in range(3):
        updates = [order.rows(epoch, position) for position in range(order.updates(epoch))]
        assert all(len(update) == min(pieces, sum(map(len, update))) for update in updates)
        assert sorted(np.concatenate([rows for update in updates for rows in update])) == list(range(len(corpus)))
        for position, update in enumerate(updates):
            rows = np.concatenate(update)
            assert len(rows) * longer[rows].max() <= 60 or len(rows) == 1
            assert max(map(len, update)) - min(map(len, update)) <= 1
            assert order.tokens(epoch, position) == (corpus.target_lengths[rows] + 1).sum()
        padded = sum(len(rows) * longer[rows].max() for update in updates for rows in update)
        assert padded < 1.01 * longer.sum(), "rows of like length belong together"


def test_pieces_do_not_change_which_rows_an_update_has():
    whole, parted = Order(Known(), 60, 1), Order(Known(), 60, 1, 4)
    assert whole.updates(1) == parted.updates(1)
    for position in range(whole.updates(1)):
        rows = parted.rows(1, position)
        assert np.concatenate(rows).tolist() == whole.rows(1, position)[0].tolist()
        batches = [batch for first in range(2) for batch in parted.update(1, position, slice(first, None, 2))]
        assert sorted(batch.source[0, 0].item() - 10 for batch in batches) == sorted(rows[0] for rows in rows)


def test_the_order_is_a_function_of_seed_epoch_and_position():
    def rows(order, epoch):
        return [[piece.tolist() for piece in order.rows(epoch, position)] for position in range(order.updates(epoch))]

    one, other = Order(Known(), 60, 1, 2), Order(Known(), 60, 1, 2)
    last_first = {(epoch, position): other.rows(epoch, position)
                  for epoch in (3, 0, 2, 1) for position in reversed(range(other.updates(epoch)))}
    for (epoch, position), pieces in last_first.items():
        assert [piece.tolist() for piece in pieces] == rows(one, epoch)[position]
    assert len({str(rows(one, epoch)) for epoch in range(4)}) == 4
    assert rows(Order(Known(), 60, 2, 2), 0) != rows(one, 0)


@pytest.mark.parametrize("parts", [(), [(40, 1.0), (26, 1.5)]])
def test_each_epoch_reads_the_next_sample_and_after_the_last_the_first(parts):
    corpus = Known(198, parts=parts, samples=3)
    order = Order(corpus, 60, 1)
    for epoch in (0, 1, 2, 3, 7):
        rows = np.concatenate([order.rows(epoch, position)[0] for position in range(order.updates(epoch))])
        pairs = drawn(parts, 1, epoch) if parts else range(66)
        assert sorted(rows - 66 * (epoch % 3)) == sorted(pairs)
        assert order.sums(epoch) == (len(rows), *(lengths[rows].sum() + len(rows) for lengths in (
            corpus.source_lengths, corpus.target_lengths)))
        first, = order.rows(epoch, 0)
        assert order.update(epoch, 0)[0].source[:, 0].tolist() == [row + 10 for row in first]
        assert order.tokens(epoch, 0) == (corpus.target_lengths[first] + 1).sum()


def test_an_update_holds_the_ids_of_its_rows():
    corpus = Known()
    order = Order(corpus, 60, 1, 2)
    for rows, batch in zip(order.rows(1, 2), order.update(1, 2), strict=True):
        assert batch.source[:, 0].tolist() == [row + 10 for row in rows]
        assert batch.tokens == (corpus.target_lengths[rows] + 1).sum()
        assert batch.source_mask.sum(1).tolist() == (corpus.source_lengths[rows] + 1).tolist()


@pytest.mark.parametrize("most", [None, 2])
def test_by_length(most):
    lengths = [3, 1, 7, 3, 2, 1, 20]
    batches = list(by_length(lengths, 8, most))
    assert sorted(row for rows in batches for row in rows) == list(range(7))
    assert [lengths[row] for rows in batches for row in rows] == sorted(lengths, reverse=True)
    for rows in batches:
        assert len(rows) * max(lengths[row] for row in rows) <= 8 or len(rows) == 1
        assert most is None or len(rows) <= most
    assert list(by_length([], 8)) == []
