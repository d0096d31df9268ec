"""The figures of a training, on disk: metrics.jsonl, and TensorBoard's files where they are asked for."""

import json
from typing import Any

from regard.errors import MissingExtra
from regard.training.checkpoint import UNFINISHED, disk_errors
from regard.training.run import Run


class MetricsLog:
    """metrics.jsonl, and TensorBoard's files where they are asked for."""

    def __init__(self, run: Run, tensorboard: bool):
        self.run = run
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingExtra("tensorboard", "tensorboard", "train.tensorboard = true") from None
            self.board = SummaryWriter(str(run.folder / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Take back the rows after a step: they will be made again."""
        rows = [row for row in self.run.metrics() if row["step"] <= step]
        unfinished = self.run.metrics_file.with_name(UNFINISHED + self.run.metrics_file.name)
        with disk_errors(self.run.metrics_file):
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            unfinished.replace(self.run.metrics_file)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        with disk_errors(self.run.metrics_file), self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name not in ("kind", "step"):
                    self.board.add_scalar(f"{row['kind']}/{name}", value, row["step"])
            self.board.flush()
