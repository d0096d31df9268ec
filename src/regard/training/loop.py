"""The one training loop. `train` is the whole story; `Trainer.fit` is the loop itself."""

import math
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from regard import __version__
from regard.config import Config
from regard.data.batches import Batch, Order
from regard.data.shards import Prepared, prepare
from regard.errors import CheckpointError, Interrupted, RunError
from regard.model.seq2seq import build_model
from regard.training import checkpoint as checkpoints
from regard.training.checkpoint import Checkpoint, mean_weights, put_weights, weights_of
from regard.training.log import MetricsLog
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer, optimizer_tensors, put_optimizer
from regard.training.precision import chosen, matrix_products, measured
from regard.training.progress import Reporter
from regard.training.run import BETTER, Run
from regard.training.schedule import learning_rate
from regard.training.validation import Validation


def train(
    config: Config, out: str | Path | None = None, *, fresh: bool = False, force: bool = False, quiet: bool = False
) -> Run:
    """Train a model, or go on exactly where an interrupted training stood.

    Args:
        config: from `read_config`.
        out: the run's folder; default: runs/ and the name of the data's folder.
        fresh: start anew though the folder holds checkpoints; needs `force` to delete them.
        force: allow `fresh` to delete.
        quiet: no progress.

    Returns:
        the finished run; `regard.load(run.folder)` translates with it.

    Raises:
        RegardError: the data, the settings or the folder cannot be used; what was saved before stays.
        Interrupted: SIGINT or SIGTERM came; the training has saved, and goes on when it is started again.
    """
    out = out or Path("runs") / (config.data.root.name or "run")
    run = Run.create(out, config, fresh=fresh, force=force)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with Reporter(config.train, quiet) as reporter:
        prepared = prepare(config, run.folder, reporter.say)
        trainer = Trainer(run, prepared, reporter)
        trainer.resume()
        run.write_config()
        with signals() as stop:
            trainer.fit(stop)
        trainer.finish()
    return run


@dataclass
class Standing:
    """Where a training stands; all of it goes into state.json.

    Attributes:
        step: updates done. epoch, position: the next update is number `position` of `epoch`.
        seconds: spent training, validations and savings included, over all sittings.
        cpu_seconds: processor time of this process over the same.
        tokens: real target tokens learnt from.
        best_score, best_step: of the best validation so far; bad: validations since then.
        window: sums since the last line of metrics.jsonl: loss (nats), tokens, seconds.
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
    window: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "tokens": 0.0, "seconds": 0.0})


class Trainer:
    """A model, its optimizer and where they stand in the data.

    Args:
        run: the folder, with its config.
        prepared: the training data and tokenizers.
        reporter: tells a person.
    """

    def __init__(self, run: Run, prepared: Prepared, reporter: Reporter):
        self.run, self.config, self.reporter = run, run.config, reporter
        self.device = pick_device(self.config.train.device)
        self.precision = chosen(self.config.train, self.device)
        torch.manual_seed(self.config.train.seed)
        source, target = prepared.tokenizers
        self.model = build_model(self.config.model, source.size, target.size).to(self.device)
        self.optimizer = make_optimizer(self.model, self.config.train)
        settings = self.config.train
        self.order = Order(prepared.train, settings.batch_tokens, settings.seed, settings.accumulate)
        self.validation = Validation(self.config, prepared.tokenizers, self.device)
        self.standing = Standing()
        self.log = MetricsLog(run, settings.tensorboard)

    def fit(self, stop: "Stop") -> None:
        """Update until the steps, the minutes or the patience are used up."""
        settings, standing = self.config.train, self.standing
        clock = Clock(standing)
        while not self.is_done():
            batches = self.order.update(standing.epoch, standing.position)
            loss, norm = self.update(batches)
            self.move_on(sum(batch.tokens for batch in batches), loss, clock.lap())
            self.reporter.step(standing.step)
            if standing.step % settings.log_every == 0:
                self.log_window(norm)
            validated = standing.step % settings.validate_every == 0 or self.is_done()
            if validated:
                self.validate_and_save()
                clock.lap()
            if stop.signal is not None:
                if not validated:  # else a save without a score would take the place of one that has it
                    self.save(None)
                raise Interrupted(stop.signal, f"Stopped at step {standing.step:,} of {settings.steps:,} and saved in "
                                  f"{self.run.folder}. The same command, started again, goes on from there exactly.")

    def update(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """One update from the batches of one step, its loss normalised by their real target tokens.

        Returns:
            the cross-entropy without smoothing, summed, nats; and the norm of the gradient before clipping.
        """
        settings = self.config.train
        tokens = sum(batch.tokens for batch in batches)
        total = torch.zeros((), device=self.device)
        self.model.train()
        for batch in batches:
            with matrix_products(self.precision):
                loss, surprise = loss_of(self.model, batch.to(self.device), settings.label_smoothing,
                                         settings.coverage_loss)
                (loss / tokens).backward()  # type: ignore[no-untyped-call]
            total += surprise
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        if not torch.isfinite(norm + total):
            where = f"step {self.standing.step + 1}, epoch {self.standing.epoch}, position {self.standing.position}"
            raise RunError(f"{self.run.folder}: the loss or its gradient is not a number at {where}; no update was "
                           f"made. Checkpoints before it are whole. Try a lower train.learning_rate (it is "
                           f"{settings.learning_rate}) or a longer train.warmup ({settings.warmup}), with --fresh")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.standing.step + 1, settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)

    def move_on(self, tokens: int, loss: float, seconds: float) -> None:
        """Count one update."""
        standing = self.standing
        standing.step += 1
        standing.position += 1
        standing.tokens += tokens
        for name, value in (("loss", loss), ("tokens", tokens), ("seconds", seconds)):
            standing.window[name] += value
        if standing.position >= self.order.updates(standing.epoch):
            standing.epoch, standing.position = standing.epoch + 1, 0

    def is_done(self) -> bool:
        """Whether nothing is left to do: steps, minutes or patience."""
        settings, standing = self.config.train, self.standing
        late = settings.minutes is not None and standing.seconds >= 60 * settings.minutes
        return standing.step >= settings.steps or late or 0 < settings.patience <= standing.bad

    def log_window(self, norm: float) -> None:
        """One line of metrics.jsonl about the updates since the last."""
        standing, window = self.standing, self.standing.window
        self.write({
            "kind": "train",
            "step": standing.step,
            "epoch": standing.epoch,
            "loss": window["loss"] / window["tokens"],
            "learning_rate": learning_rate(standing.step, self.config.train),
            "gradient_norm": norm,
            "tokens_per_second": window["tokens"] / max(window["seconds"], 1e-9),
            "seconds": standing.seconds,
        })
        standing.window = Standing().window

    def write(self, row: dict[str, Any]) -> None:
        """Log a row, and show it."""
        self.log.write({name: value for name, value in row.items() if name != "mark"})
        self.reporter.row(row)

    def validate_and_save(self) -> None:
        """Score the model on the validation data, remember whether it is the best, and save a checkpoint."""
        standing, metric = self.standing, self.config.train.metric
        scores = self.validation.scores(self.model)
        score = scores[metric] if math.isfinite(scores[metric]) else None
        better = score is not None and (
            standing.best_score is None or (score - standing.best_score) * BETTER[metric] > 0)
        if better:
            standing.best_score, standing.best_step, standing.bad = score, standing.step, 0
        else:
            standing.bad += 1
        self.write({"kind": "valid", "step": standing.step, **scores, "seconds": standing.seconds,
                    "mark": "  best so far" if better else ""})
        self.save(score)

    def save(self, score: float | None) -> None:
        """Save a checkpoint of this step, then delete those that need not stay."""
        state = {**asdict(self.standing), "score": score, "metric": self.config.train.metric, "versions": versions()}
        checkpoints.save(self.run.step_path(self.standing.step), Checkpoint(
            weights_of(self.model), optimizer_tensors(self.optimizer, self.model), state))
        self.run.prune(self.config.train.average)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        damaged = []
        for path in reversed(self.run.checkpoints()):
            try:
                saved = checkpoints.load(path)
            except CheckpointError as error:
                self.reporter.say(f"Warning: {error}\nGoing on from the checkpoint before it.")
                damaged.append(path)
                continue
            put_weights(self.model, saved.model, path)
            put_optimizer(self.optimizer, self.model, saved.optimizer, path)
            self.standing = self.standing_of(saved.state)
            self.run.set_aside(damaged)
            self.log.rewind(self.standing.step)
            self.reporter.say(f"going on from {path}: step {self.standing.step:,}, epoch {self.standing.epoch}, "
                              f"update {self.standing.position} of it")
            return
        if damaged:
            raise CheckpointError(f"{self.run.folder}: all of its checkpoints are damaged. Start anew with "
                                  "--fresh --force")
        self.log.rewind(0)
        size = sum(weights.numel() for weights in self.model.parameters())
        self.reporter.say(f"model: {size:,} parameters, on {self.device}, matrix products in "
                          f"{measured(self.precision, self.device)}; {self.order.updates(0):,} updates an epoch")

    def standing_of(self, state: Mapping[str, Any]) -> Standing:
        """Where a checkpoint's training stood, as far as the settings still say the same."""
        standing = Standing(**{name: value for name, value in state.items() if name in Standing.__dataclass_fields__})
        if state.get("metric") != self.config.train.metric:
            standing = replace(standing, best_score=None, best_step=0, bad=0)
        if standing.position >= self.order.updates(standing.epoch):  # other batch sizes: the epoch is shorter now
            standing = replace(standing, epoch=standing.epoch + 1, position=0)
        return standing

    def finish(self) -> None:
        """Average the last checkpoints where that is asked for, and say how it ended."""
        standing, settings = self.standing, self.config.train
        last = self.run.validated()[-settings.average :]
        if len(last) > 1 and not self.averaged(last):
            self.average(last)
        best = "" if standing.best_score is None else (
            f"; best validation {settings.metric} {standing.best_score:.2f} at step {standing.best_step:,}")
        self.reporter.say(f"done: {standing.step:,} updates in {standing.seconds / 60:.1f} minutes{best}. "
                          f"Now: regard translate {self.run.folder}")

    def averaged(self, paths: Sequence[Path]) -> bool:
        """Whether the average of these very checkpoints is there already, and whole."""
        if not self.run.average_path.is_dir():
            return False
        try:
            state = checkpoints.load(self.run.average_path).state
        except CheckpointError:
            return False
        return bool(state["of"] == [path.name for path in paths] and state["metric"] == self.config.train.metric)

    def average(self, paths: Sequence[Path]) -> None:
        """Save the mean of some checkpoints' weights as one more checkpoint, with its own validation score."""
        own = {name: tensor.clone() for name, tensor in weights_of(self.model).items()}
        put_weights(self.model, mean_weights(paths), self.run.average_path)
        scores = self.validation.scores(self.model)
        metric = self.config.train.metric
        state = {"step": self.standing.step, "of": [path.name for path in paths], "score": scores[metric],
                 "metric": metric, "versions": versions()}
        checkpoints.save(self.run.average_path, Checkpoint(weights_of(self.model), {}, state))
        put_weights(self.model, own, self.run.folder)
        self.reporter.say(f"average of the last {len(paths)} checkpoints: validation "
                          + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


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
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals do not arrive
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_device(name: str) -> torch.device:
    """The device a config asks for; "auto" takes a GPU where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RunError('train.device = "cuda", but torch sees no GPU here. Use "auto" or "cpu", or install a torch '
                       "with CUDA")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def versions() -> dict[str, str]:
    """What made a checkpoint: versions and the kind of machine."""
    return {"regard": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
