"""The figures of a training, on disk: metrics.jsonl, and TensorBoard's files where they are asked for."""

import json
from typing import Any

from regard.errors import MissingExtra, RunError
from regard.training.checkpoint import disk_errors, write_whole
from regard.training.run import Run


class MetricsLog:
    """metrics.jsonl, and TensorBoard's files where they are asked for.

    Args:
        run: its folder.
        tensorboard: whether they are.
        silent: write nothing: another process does.
    """

    def __init__(self, run: Run, tensorboard: bool, silent: bool = False):
        self.run, self.silent = run, silent
        self.board: Any = None
        if tensorboard and not silent:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingExtra("tensorboard", "tensorboard", "train.tensorboard = true") from None
            self.board = SummaryWriter(str(run.folder / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Take back the rows after a step: they will be made again."""
        if self.silent:
            return
        try:
            rows = [row for row in self.run.metrics() if row["step"] <= step]
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{self.run.metrics_file}: is damaged: {error!r}. Rename it: the training goes on without "
                           "the figures of the steps before") from None
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(self.run.metrics_file, lambda file: file.write_text(text, encoding="utf-8"))

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        if self.silent:
            return
        with disk_errors(self.run.metrics_file), self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"{row['kind']}/{name}", value, row["step"])
            self.board.flush()
