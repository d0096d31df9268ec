"""What a person sees of a training: a bar with loss, speed and time left on a terminal, plain lines when piped."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from regard.config_train import TrainConfig


class Reporter:
    """Talks on stderr, so that stdout is left to results.

    Args:
        config: for the number of updates and the time limit.
        quiet: say nothing but warnings.
        silent: say nothing at all: another process does.
        console: where to talk; default: stderr.
    """

    def __init__(
        self, config: TrainConfig, quiet: bool = False, console: Console | None = None, silent: bool = False
    ):
        self.config, self.silent = config, silent
        quiet = quiet or silent
        self.console = console or Console(stderr=True, quiet=quiet, soft_wrap=True)
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(" {task.fields[figures]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("train", total=config.steps, figures="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, markup=False, highlight=False)

    def warn(self, line: str) -> None:
        """A line that stays and is seen by those too who asked for quiet."""
        quiet, self.console.quiet = self.console.quiet, self.silent
        self.say(f"Warning: {line}")
        self.console.quiet = quiet

    def step(self, step: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        """A new row of metrics.jsonl: training rows move the bar (or are lines when piped), validations are lines."""
        if row["kind"] == "valid":
            scores = "  ".join(f"{NAMES[name]} {row[name]:.3f}" for name in NAMES if name in row)
            self.say(f"step {row['step']:>6}  validation: {scores}  ({row['seconds'] / 60:.1f} min){row['mark']}")
            return
        figures = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  {self._left(row)} left"
        self.bar.update(self.task, completed=row["step"], figures=figures)
        if self.bar.disable:
            self.say(f"step {row['step']:>6}/{self.config.steps}  {figures}")

    def _left(self, row: dict[str, Any]) -> str:
        """Time left, by the steps or by `train.minutes`, whichever ends first."""
        left = (self.config.steps - row["step"]) * row["seconds"] / row["step"]
        if self.config.minutes is not None:
            left = min(left, max(0.0, 60 * self.config.minutes - row["seconds"]))
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


NAMES = {"loss": "loss", "bleu": "BLEU", "token_error_rate": "token error rate"}
"""How each validation figure is called on the screen."""
