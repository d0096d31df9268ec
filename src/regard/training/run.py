"""A run's folder: where its config, data, checkpoints and figures lie.

    config.toml   tokenizer/   data/   checkpoints/   metrics.jsonl   tensorboard/   .lock
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.config import Config, read_config, write_config
from regard.errors import CheckpointError, RunError
from regard.training.changes import check_changes
from regard.training.checkpoint import UNFINISHED, discard, disk_errors, flush, read_json, state_of, tidy, write_whole
from regard.training.device import versions
from regard.training.lock import lock
from regard.training.progress import Reporter

LOCK = ".lock"
EXPORT = "export.json"  # what only an exported folder has
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
    def create(cls, path: str | Path, config: Config, *, fresh: bool = False, force: bool = False,
               reporter: Reporter | None = None) -> "Run":
        """Make the folder, or go on in one that this config's training has made.

        Args:
            path: the folder.
            config: what to train.
            fresh: start anew; what an earlier training left there is deleted, which needs `force`.
            force: allow that.
            reporter: is told what has changed in the config.

        Raises:
            RunError: the folder cannot be made, holds something else or the checkpoints of another training, or
                would lose its checkpoints and `force` is not given.
        """
        run = cls(Path(path), config)
        _refuse_strangers(run.folder)
        for folder in (run.folder, run.folder / "checkpoints"):
            tidy(folder)
        if fresh and run.checkpoints():
            run._empty(force)
        elif run.checkpoints():
            run._refuse_another(reporter)
        with disk_errors(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            if not run.config_file.is_file():  # first of all: it makes the folder a run, whenever a kill comes
                run.write_config()
            (run.folder / "checkpoints").mkdir(exist_ok=True)
            flush(run.folder)
            with suppress(PermissionError):  # one may write below a folder that one may not read
                flush(run.folder.parent)
        return run

    @staticmethod
    @contextmanager
    def locked(path: str | Path, warn: Callable[[str], object]) -> Iterator[None]:
        """Keep other trainings out of a folder, which is made if it is missing.

        Args:
            path: the folder.
            warn: told where the file system has no locks.

        Raises:
            RunError: another training is in it, or it cannot be made, or holds something else.
        """
        folder = Path(path)
        _refuse_strangers(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK, warn):
            yield

    def write_config(self) -> None:
        """Write config.toml; done again once a training has found that it can go on with a changed config."""
        write_whole(self.config_file, lambda file: write_config(self.config, file))

    def record(self) -> dict[str, Any]:
        """What each checkpoint says of the training that makes it: its config, and the fingerprint of its data."""
        return {"config": self.config.model_dump(mode="json"), "data": self.fingerprint}

    @property
    def config_file(self) -> Path:
        """Every setting, resolved; enough to train again."""
        return self.folder / "config.toml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, for each logged step and each validation."""
        return self.folder / "metrics.jsonl"

    @property
    def prepared(self) -> Path:
        """Where the prepared data lies."""
        data = self.config.data
        return data.root / data.prepared.expanduser() if data.prepared else self.folder / "data"

    @property
    def fingerprint(self) -> str | None:
        """Of the text and the settings that the run's tokenizer and data were made from; None where there are none."""
        try:
            return read_json(self.folder / "tokenizer" / "manifest.json").get("fingerprint")
        except CheckpointError:
            return None

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
        """Delete checkpoints but the last `keep` validated, the last two and the best."""
        validated = self.validated()
        kept = {*self.checkpoints()[-2:], *validated[-keep:], self._best_of(validated)}
        for path in self.checkpoints():
            if path not in kept:
                discard(path)

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
            state = state_of(path)
        except CheckpointError:
            return None
        score = state.get("score") if state.get("metric") == metric else None
        return None if score is None else score * BETTER[metric]

    def _empty(self, force: bool) -> None:
        """Delete what an earlier training left."""
        if not force:
            raise RunError(f"{self.folder}: holds {len(self.checkpoints())} checkpoints, which --fresh would delete. "
                           "Add --force to delete them, or choose another --out")
        for path in (self.folder / "checkpoints").iterdir():
            discard(path)
        for name in ("data", "tokenizer", "tensorboard", self.metrics_file.name):
            path = self.folder / name
            if path.exists() and not path.is_symlink():  # a link leads to what others may use too
                discard(path)

    def _refuse_another(self, reporter: Reporter | None) -> None:
        """Going on is exact only with what the training began with; what else has changed is told."""
        state = self._last_state()
        before = state.get("config") or Run.open(self.folder).config.model_dump(mode="json")
        check_changes(self.folder, before, self.config, reporter)
        if state and reporter:
            _tell_versions(state, reporter)
        if state.get("data") not in (None, self.fingerprint):
            raise RunError(f"{self.folder / 'tokenizer'}: is not that of the data which the checkpoints learned from. "
                           "Put it back to go on, or begin anew with --fresh or another --out")

    def _last_state(self) -> dict[str, Any]:
        """The state.json of the newest checkpoint that can be read; empty where none can."""
        for path in reversed(self.checkpoints()):
            try:
                return state_of(path)
            except CheckpointError:
                continue
        return {}


def _tell_versions(state: Mapping[str, Any], reporter: Reporter) -> None:
    """Say why going on from a checkpoint may not be exact to the last bit."""
    if "format" not in state:
        reporter.warn("the last checkpoint is of format 1, and the data came in another order then: the rest of the "
                      "epoch may show some pairs again and leave others out. The training goes on, but not to the last "
                      "bit")
    now = versions()
    others = [f"{name} {made} then, {now[name]} now" for name, made in state.get("versions", {}).items()
              if name in ("regard", "torch") and made != now[name]]
    if others:
        reporter.say(f"{', '.join(others)}: the same to the last bit is promised with the same versions alone")


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder that no training has made."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; a run needs a folder. Choose another --out")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "config.toml" not in names and names - {LOCK, f"{UNFINISHED}config.toml"}:
        raise RunError(f"{folder}: holds other files and is no run; nothing was written. Choose another --out")
    if EXPORT in names:
        raise RunError(f"{folder}: is an export, which is not trained further; nothing was written. Choose "
                       f"another --out, and begin from its weights with --set train.start_from={folder}")
