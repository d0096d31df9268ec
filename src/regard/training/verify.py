"""Proof that a run's training goes on exactly after a stop, and that its checkpoints are what was saved.

Three trainings with the run's own config and data, each a process of its own, in a temporary folder: N updates in one
go; N/2 and a stop; and the rest of those. The losses and the last states of the first and the last must be the same,
bit by bit. In the run's folder nothing is written.
"""

import hashlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.config import Config, TokenizerConfig, read_config, write_config
from regard.config_train import TrainConfig
from regard.errors import Interrupted, RegardError, RunError
from regard.training import checkpoint as checkpoints
from regard.training.loop import train
from regard.training.optimizer import RANDOM
from regard.training.progress import Reporter
from regard.training.run import Run

STANDING = ("step", "epoch", "position", "tokens", "best_step", "bad")
"""What state.json tells of where a training stands, times left out."""


@dataclass(frozen=True)
class Outcome:
    """What a training must end in, however it was interrupted.

    Attributes:
        losses: of each update, nats a target token, and the norm of its gradient, as hexadecimal floats, by step.
        standing: where it stands in the data.
        tensors: SHA-256 of each tensor, by what it is part of ("weights", "optimizer", "random state") and its name.
    """

    losses: Mapping[int, tuple[str, str]]
    standing: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, run: Run, step: int) -> "Outcome":
        """What a run's log and its checkpoint of a step say."""
        saved = checkpoints.load(run.step_path(step))
        rows = (row for row in run.metrics() if row["kind"] == "train" and row["step"] <= step)
        parts: dict[str, dict[str, str]] = {"weights": {}, "optimizer": {}, "random state": {}}
        parts["weights"] = {name: _digest(tensor) for name, tensor in saved.model.items()}
        for name, tensor in saved.optimizer.items():
            parts["random state" if name.startswith(RANDOM) else "optimizer"][name] = _digest(tensor)
        return cls({row["step"]: (float(row["loss"]).hex(), float(row["gradient_norm"]).hex()) for row in rows},
                   {name: saved.state.get(name) for name in STANDING}, parts)

    def digests(self) -> dict[str, str]:
        """One SHA-256 for each part."""
        return {part: hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()
                for part, tensors in self.tensors.items()}

    def difference(self, other: "Outcome") -> str | None:
        """Where two outcomes first differ, in words; None if they are the same."""
        return next(self._differences(other), None)

    def _differences(self, other: "Outcome") -> Iterator[str]:
        for step in sorted(self.losses.keys() | other.losses.keys()):
            one, two = (outcome.losses.get(step, ("none", "none")) for outcome in (self, other))
            for what, left, right in zip(("loss", "norm of the gradient"), one, two, strict=True):
                if left != right:
                    yield f"update {step}: {what} {left} in one go, {right} after a stop"
        for name, value in self.standing.items():
            if value != other.standing[name]:
                yield f"{name} {value} in one go, {other.standing[name]} after a stop"
        for part, tensors in self.tensors.items():
            names = sorted(tensors.items() ^ other.tensors[part].items())
            if names:
                yield f"{part}: {names[0][0]} is another"


@dataclass(frozen=True)
class Verification:
    """What `verify_resume` found.

    Attributes:
        steps, stopped_at: updates in one go, and after how many of them the other training was stopped.
        outcome: of the training in one go.
        difference: where the other first differs from it; None: nowhere.
    """

    steps: int
    stopped_at: int
    outcome: Outcome
    difference: str | None


def verify_checkpoints(run: Run) -> dict[str, str | None]:
    """Hold every checkpoint of a run against its manifest: what is wrong with each, None for those that are whole."""
    found: dict[str, str | None] = {}
    for path in [*run.checkpoints(), *([run.average_path] if run.average_path.is_dir() else [])]:
        try:
            checkpoints.load(path)
            found[path.name] = None
        except RunError as error:  # also one of a newer format
            if path.is_dir():  # else a training that runs now has deleted it
                found[path.name] = str(error)
    return found


def verify_resume(run: Run, steps: int = 8, advance: Callable[[], object] = lambda: None) -> Verification:
    """Train a run's first updates in one go and with a stop half way, and compare.

    Args:
        run: whose config and data are used; nothing is written into its folder.
        steps: updates, 2 or more.
        advance: called after each of the 2 x steps updates.

    Raises:
        RunError: the training cannot run here, or the run's data has changed since it began.
    """
    stopped_at = steps // 2
    with tempfile.TemporaryDirectory(prefix="regard-verify-") as name:
        place = Path(name)
        whole, parts = (_folder(place / kind, run, steps) for kind in ("whole", "parts"))
        for folder, last in ((whole, steps), (parts, stopped_at), (parts, steps)):
            _train_in_a_process(folder, last, advance)
            _refuse_other_data(run, Run.open(folder))
        one, other = (Outcome.of(Run.open(folder), steps) for folder in (whole, parts))
    return Verification(steps, stopped_at, one, one.difference(other))


def _config_for(run: Run, steps: int) -> Config:
    """The run's config, for so few updates: a row of figures for each, and no end and no validation before the last.

    What it took from another run, which may be gone, it takes from itself: its best weights, and its tokenizers.
    """
    settings, tokens = run.config.train, run.config.tokenizer
    changes = {"steps": max(settings.steps, steps + 1), "validate_every": steps + 1, "minutes": None, "patience": 0,
               "log_every": 1, "tensorboard": False, "start_from": settings.start_from and run.best().resolve()}
    return run.config.model_copy(update={
        "train": settings.model_copy(update=changes),
        "data": run.config.data.model_copy(update={"prepared": None}),
        "tokenizer": tokens if tokens.take_from is None else TokenizerConfig(
            take_from=run.folder.resolve(), dropout=tokens.dropout, samples=tokens.samples),
    })


def _folder(folder: Path, run: Run, steps: int) -> Path:
    """A new run with links to this one's prepared data; where that is out of date, the links alone are replaced."""
    (folder / "data").mkdir(parents=True)
    if (run.prepared / "manifest.json").is_file():
        for file in run.prepared.iterdir():
            (folder / "data" / file.name).symlink_to(file.resolve())
    write_config(_config_for(run, steps), folder / "config.toml")
    return folder


def _train_in_a_process(folder: Path, last: int, advance: Callable[[], object]) -> None:
    """Train in a folder up to an update, stop and save there, as a process of its own."""
    command = [sys.executable, "-m", "regard.training.verify", str(folder), str(last)]
    with (folder.parent / "errors").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for _ in process.stdout:
                advance()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().strip()
    if code == 2:
        raise RunError(said)
    if code < 0:
        raise RunError(f"{folder}: the training there was killed by signal {-code} ({signal.Signals(-code).name}). Is "
                       "there memory for it?")
    if code:
        raise RuntimeError(f"a training in a process of its own ended with {code}:\n{said}")


def _refuse_other_data(run: Run, made: Run) -> None:
    """Refuse a run that could not go on, for its data is not there any more."""
    if run.fingerprint not in (None, made.fingerprint):
        raise RunError(f"{run.folder}: the training data or the tokenizer settings have changed since this run began, "
                       "so it cannot go on. Put them back")


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, its type and its shape."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data.tobytes()).hexdigest()


class _Stopping(Reporter):
    """Says the number of each update on standard output, and asks for a stop after the last.

    Args:
        config: of the training.
        last: the update to stop after.
    """

    def __init__(self, config: TrainConfig, last: int):
        super().__init__(config, quiet=True)
        self.last = last

    def step(self, step: int) -> None:
        print(step, flush=True)
        if step == self.last:
            signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """What `verify_resume` runs in each process; its arguments are the folder and the last update."""
    folder, last = Path(sys.argv[1]), int(sys.argv[2])
    config = read_config(folder / "config.toml")
    try:
        train(config, folder, reporter=_Stopping(config.train, last))
    except Interrupted:
        pass
    except (RegardError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
