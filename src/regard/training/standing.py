"""Where a training stands, and how long it took."""

import time
from dataclasses import dataclass, field


@dataclass
class Standing:
    """Where a training stands; all of it goes into state.json.

    Attributes:
        step: updates done, those that were skipped included.
        epoch, position: the next update is number `position` of `epoch`.
        seconds: spent training, validations and savings included, over all sittings.
        cpu_seconds: processor time of this process over the same.
        tokens: real target tokens learnt from.
        best_score, best_step: of the best validation so far; bad: validations since then.
        skipped, skipped_in_row: updates not made because their loss or gradient was no number; those since the last
            that was made.
        too_large: padded tokens of the smallest batch that memory is known not to hold (None: not known).
        running, lowest: the training loss, nats a token, averaged over the last updates, and where that was lowest.
        warned: whether a person was told that the loss diverges.
        window: of the updates since the last line of metrics.jsonl: loss (nats), tokens and seconds, summed; norm of
            the last gradient.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    best_score: float | None = None
    best_step: int = 0
    bad: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    too_large: int | None = None
    running: float | None = None
    lowest: float | None = None
    warned: bool = False
    window: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.window = {"loss": 0.0, "tokens": 0.0, "seconds": 0.0, "norm": 0.0} | self.window

    def __str__(self) -> str:
        """The update that comes next."""
        return f"step {self.step + 1}, epoch {self.epoch}, position {self.position}"

    def count(self, tokens: int, loss: float, norm: float) -> None:
        """Take in an update that was made: its real target tokens, its loss in nats, and its gradient's norm."""
        self.tokens += tokens
        self.skipped_in_row = 0
        self.window |= {"loss": self.window["loss"] + loss, "tokens": self.window["tokens"] + tokens, "norm": norm}

    def skip(self) -> None:
        """Take in an update that was not made."""
        self.skipped += 1
        self.skipped_in_row += 1


class Clock:
    """Adds the time that passes to a standing's seconds."""

    def __init__(self, standing: Standing):
        self.standing = standing
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self) -> float:
        """Seconds since the last lap."""
        wall, cpu = time.perf_counter(), time.process_time()
        seconds = wall - self.wall
        self.standing.seconds += seconds
        self.standing.cpu_seconds += cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        return seconds
