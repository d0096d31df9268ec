"""A run's folder: where its config, data, checkpoints and figures lie.

    config.toml   tokenizer/   data/   checkpoints/   metrics.jsonl   tensorboard/
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.config import Config, read_config, write_config
from regard.errors import CheckpointError, RunError
from regard.training.checkpoint import UNFINISHED, disk_errors, read_json

BETTER = {"bleu": 1, "token_error_rate": -1, "loss": -1}
"""Which way each validation metric is better: 1 up, -1 down."""


@dataclass(frozen=True)
class Run:
    """A folder that a training has made, or is making.

    Attributes:
        folder: where it is.
        config: every setting it was trained with.
    """

    folder: Path
    config: Config

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open the folder of a run that exists.

        Raises:
            RunError: there is no such folder, or it is no run.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file, not a run's folder" if folder.exists() else "there is no such folder"
            raise RunError(f"{folder}: {what}. A run is the folder that `regard train CONFIG --out RUN` makes")
        if not (folder / "config.toml").is_file():
            raise RunError(f"{folder}: is not a run: it has no config.toml. A run is the folder that `regard train "
                           "CONFIG --out RUN` makes")
        return cls(folder, read_config(folder / "config.toml"))

    @classmethod
    def create(cls, path: str | Path, config: Config, *, fresh: bool = False, force: bool = False) -> "Run":
        """Make the folder, or go on in one that this config's training has made.

        Args:
            path: the folder.
            config: what to train.
            fresh: start anew; what an earlier training left there is deleted, which needs `force`.
            force: allow that.

        Raises:
            RunError: the folder cannot be made, holds something else or the checkpoints of another model, or would
                lose its checkpoints and `force` is not given.
        """
        run = cls(Path(path), config)
        if run.folder.exists() and not run.folder.is_dir():
            raise RunError(f"{run.folder}: is a file; a run needs a folder. Choose another --out")
        if run.folder.is_dir() and any(run.folder.iterdir()) and not run.config_file.is_file():
            raise RunError(f"{run.folder}: holds other files and is no run; nothing was written. Choose another --out")
        if fresh and run.checkpoints():
            if not force:
                raise RunError(f"{run.folder}: holds {len(run.checkpoints())} checkpoints, which --fresh would delete. "
                               "Add --force to delete them, or choose another --out")
            for name in ("checkpoints", "data", "tokenizer", "tensorboard"):
                shutil.rmtree(run.folder / name, ignore_errors=True)
            run.metrics_file.unlink(missing_ok=True)
        elif run.checkpoints():
            run._refuse_another_model(cls.open(run.folder).config)
        with disk_errors(run.folder):
            (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not run.config_file.is_file():
            run.write_config()
        return run

    def write_config(self) -> None:
        """Write config.toml; done again once a training has found that it can go on with a changed config."""
        with disk_errors(self.config_file):
            write_config(self.config, self.config_file)

    @property
    def config_file(self) -> Path:
        """Every setting, resolved; enough to train again."""
        return self.folder / "config.toml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, for each logged step and each validation."""
        return self.folder / "metrics.jsonl"

    def step_path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / "checkpoints" / f"step-{step:08d}"

    @property
    def average_path(self) -> Path:
        """Where the average of the last checkpoints lies, once the training has ended."""
        return self.folder / "checkpoints" / "average"

    def checkpoints(self) -> list[Path]:
        """The checkpoints of single steps, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def best(self) -> Path:
        """The checkpoint with the best validation score, the average counted in; the last, where none is scored.

        Raises:
            RunError: there is no checkpoint.
        """
        found = self.checkpoints() + ([self.average_path] if self.average_path.is_dir() else [])
        if not found:
            raise RunError(f"{self.folder}: has no checkpoint yet. Train it with: regard train "
                           f"{self.folder / 'config.toml'} --out {self.folder}")
        return self._best_of(found) or found[-1]

    def validated(self) -> list[Path]:
        """The checkpoints of single steps that have a validation score, oldest first."""
        return [path for path in self.checkpoints() if self._score(path) is not None]

    def find(self, name: str) -> Path:
        """A checkpoint by name: "best", "last", "average", "step-00001000", or a path."""
        if name == "best":
            return self.best()
        if name == "last" and self.checkpoints():
            return self.checkpoints()[-1]
        for path in (self.folder / "checkpoints" / name, Path(name)):
            if (path / "manifest.json").is_file():
                return path
        names = [path.name for path in self.checkpoints()] + ["best", "last"]
        raise RunError(f'{self.folder}: has no checkpoint "{name}". It has: {", ".join(names)}')

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, oldest first; a last line without its end was cut off by a kill, and is no row."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def prune(self, keep: int) -> None:
        """Delete checkpoints but the last `keep` validated, the last two and the best, and what a killed save left."""
        validated = self.validated()
        kept = {*self.checkpoints()[-2:], *validated[-keep:], self._best_of(validated)}
        for path in self.checkpoints():
            if path not in kept:
                shutil.rmtree(path)
        for path in (self.folder / "checkpoints").glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, paths: Iterable[Path]) -> None:
        """Rename damaged checkpoints, so that they are not counted among the last ones."""
        for path in paths:
            aside = path.with_name(f"damaged-{path.name}")
            with disk_errors(aside):
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _best_of(self, paths: Sequence[Path]) -> Path | None:
        """The path with the best score, the first of equals; None where none is scored."""
        scores = {path: score for path in paths if (score := self._score(path)) is not None}
        return max(scores, key=scores.__getitem__, default=None)

    def _score(self, path: Path) -> float | None:
        """A checkpoint's validation score, the higher the better; None where it has none by this run's metric."""
        metric = self.config.train.metric
        try:
            state = read_json(path / "state.json")
        except CheckpointError:
            return None
        score = state.get("score") if state.get("metric") == metric else None
        return None if score is None else score * BETTER[metric]

    def _refuse_another_model(self, before: Config) -> None:
        """Going on is exact only with the model that began; of its settings the dropouts alone may change."""
        old, new = before.model.model_dump(), self.config.model.model_dump()
        changes = [f"{name} = {new.get(name)!r} (was {old.get(name)!r})" for name in sorted(old.keys() | new.keys())
                   if old.get(name) != new.get(name) and "dropout" not in name]
        if changes:
            named = ", ".join(changes[:3]) + (" …" if len(changes) > 3 else "")
            raise RunError(f"{self.folder}: holds checkpoints of another model: [model] now has {named}. Put it back "
                           "to go on, or begin anew with --fresh or another --out")
