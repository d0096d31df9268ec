"""Batches side by side: several of them, with one processor thread each, are done sooner than one after the other.

A search is many small operations, which share out badly among threads. Its Python runs in one thread at a time, though,
so that a greedy search of a small model gains little.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(make: Callable[[Item], Made], items: Sequence[Item], workers: int) -> Iterator[Made]:
    """What comes of each item, in their order, by so many threads at once; what one of them raises is raised here.

    Args:
        make: the work; it may use torch, and has one of torch's own threads.
        items: to work on.
        workers: threads; 1: all is done by the caller.
    """
    if min(workers, len(items)) <= 1:
        yield from map(make, items)
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "batches", torch.set_num_threads, (1,))
    try:
        yield from pool.map(make, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # part of what the threads have set holds for the whole process
