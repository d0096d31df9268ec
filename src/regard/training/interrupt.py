"""How a training is told to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """The signal that asked the training to stop, once one has."""

    signal: int | None = None


@contextmanager
def signals() -> Iterator[Stop]:
    """Have SIGINT and SIGTERM ask for a stop at the end of a step; a second one ends at once."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    try:
        before = {number: signal.signal(number, ask) for number in STOPS}
    except ValueError:  # not in the main thread, where signals do not arrive
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
