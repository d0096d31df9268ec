"""The next batches are made while the processor or the GPU is busy with these."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from regard.data.batches import Batch, Order

Place = tuple[int, int]


class Ahead:
    """The batches of update after update, in order; the following update's are made meanwhile by a thread, which also
    plans the next epoch. What is asked for is what comes, in whatever order one asks.

    Args:
        order: of the data.
        part: which pieces of an update this process computes.
        device: where it does; batches for a GPU come in memory that it can read by itself.
    """

    def __init__(self, order: Order, part: slice, device: torch.device):
        self.order, self.part, self.pins = order, part, device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, "batches")
        self.made: dict[Place, Future[list[Batch]]] = {}

    def update(self, epoch: int, position: int) -> list[Batch]:
        """The batches of one update, as `Order.update` gives them."""
        place = (epoch, position)
        asked = self.made.pop(place, None) or self.thread.submit(self.make, place)
        batches = asked.result()
        following = (epoch, position + 1) if position + 1 < self.order.updates(epoch) else (epoch + 1, 0)
        self.made = {following: self.thread.submit(self.make, following)}
        return batches

    def make(self, place: Place) -> list[Batch]:
        """The batches of an update."""
        batches = self.order.update(*place, self.part)
        return [batch.pinned() for batch in batches] if self.pins else batches

    def close(self) -> None:
        """Make no more."""
        self.thread.shutdown(wait=False, cancel_futures=True)
