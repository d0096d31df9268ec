"""The one training loop. `train` is the whole story; `Trainer.fit` is the loop itself."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.config import Config
from regard.config_train import TrainConfig
from regard.data.batches import Order
from regard.data.shards import Prepared, prepare
from regard.errors import CheckpointError, Interrupted, RunError
from regard.heap import keep_freed
from regard.model.seq2seq import Seq2Seq, build_model
from regard.training import checkpoint as checkpoints
from regard.training import start_from
from regard.training.ahead import Ahead
from regard.training.changes import common_settings
from regard.training.checkpoint import Checkpoint, mean_weights, put_weights, weights_of
from regard.training.cluster import Cluster, joined
from regard.training.device import memory_errors, pick_device, versions
from regard.training.ema import WeightAverage
from regard.training.gradients import Gradients
from regard.training.interrupt import STOPS, Stop, signals
from regard.training.log import MetricsLog
from regard.training.optimizer import freeze, make_optimizer, optimizer_tensors, put_optimizer
from regard.training.precision import chosen
from regard.training.progress import Reporter
from regard.training.run import BETTER, Run
from regard.training.schedule import learning_rate
from regard.training.sharding import gathered, own, shard, whole
from regard.training.standing import Clock, Standing
from regard.training.validation import Validation
from regard.training.watch import divergence


def train(
    config: Config, out: str | Path | None = None, *, fresh: bool = False, force: bool = False, quiet: bool = False,
    reporter: Reporter | None = None
) -> Run:
    """Train a model, or go on exactly where an interrupted training stood.

    Args:
        config: from `read_config`.
        out: the run's folder; default: runs/ and the name of the data's folder.
        fresh: start anew though the folder holds checkpoints; needs `force` to delete them.
        force: allow `fresh` to delete.
        quiet: no progress.
        reporter: is told how it goes; default: one that tells a person on stderr, unless `quiet`.

    Returns:
        the finished run; `regard.load(run.folder)` translates with it.

    Raises:
        RegardError: the data, the settings or the folder cannot be used, or what is computed is no number; what was
            saved before stays.
        Interrupted: SIGINT or SIGTERM came; the training has saved, and goes on when it is started again.
    """
    with torch.device("meta"):  # no weights are made: it is the names that are asked for
        freeze(build_model(config.model, 4, 4), config.train.freeze)
    out = out or Path("runs") / (config.data.root.name or "run")
    set_up(config.train)
    with ExitStack() as stack:
        cluster = stack.enter_context(joined(pick_device(config.train.device)))
        reporter = stack.enter_context(reporter or Reporter(config.train, quiet, silent=not cluster.is_first))
        cluster.refuse_other_settings(common_settings(config, chosen(config.train, cluster.device)[0]))
        if cluster.is_first:
            start_from.check(config, Path(out), fresh)
            stack.enter_context(Run.locked(out, reporter.warn))
            Run.create(out, config, fresh=fresh, force=force, reporter=reporter)
            prepared = prepare(config, Path(out), reporter.say)
        cluster.agree("the data is prepared")
        if not cluster.is_first:
            prepared = prepare(config, Path(out))
        cluster.refuse_unlike("prepared data", prepared.train.digest)
        trainer = Trainer(Run(Path(out), config), prepared, reporter, cluster)
        trainer.resume()
        with signals() as stop, closing(trainer.ahead):
            trainer.fit(stop)
        trainer.finish()
    return trainer.run


def set_up(settings: TrainConfig) -> None:
    """Make the process one that trains fast, or exactly."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed(1 << 30)


class Trainer:
    """A model, its optimizer and where they stand in the data.

    Args:
        run: the folder, with its config.
        prepared: the training data and tokenizers.
        reporter: tells a person.
        cluster: the processes that train together.
    """

    def __init__(self, run: Run, prepared: Prepared, reporter: Reporter, cluster: Cluster):
        self.run, self.config, self.reporter, self.cluster = run, run.config, reporter, cluster
        self.device = cluster.device
        self.precision, self.why = chosen(self.config.train, self.device)
        torch.manual_seed(self.config.train.seed)
        source, target = self.tokenizers = prepared.tokenizers
        settings = self.config.train
        self.make = partial(build_model, self.config.model, source.size, target.size)
        self.model = self.make()
        freeze(self.model, settings.freeze)
        self.sharded = settings.shard and cluster.size > 1
        if self.sharded:
            shard(self.model, self.device)
        else:
            self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, settings)
        self.ema = WeightAverage(self.model, settings.ema)
        pieces = 1 if settings.accumulate == "auto" else settings.accumulate
        self.order = Order(prepared.train, settings.batch_tokens, settings.seed, max(pieces, cluster.size))
        self.ahead = Ahead(self.order, cluster.part, self.device)
        self.validation = Validation(self.config, prepared.tokenizers, self.device)
        self.standing = Standing()
        self.start: dict[str, Any] = {}
        self.gradients = Gradients(self.model, settings, self.precision, self.standing, reporter.say, cluster)
        self.log = MetricsLog(run, settings.tensorboard, silent=not cluster.is_first)

    def fit(self, stop: "Stop") -> None:
        """Update until the steps, the minutes or the patience are used up."""
        settings, standing = self.config.train, self.standing
        clock = Clock(standing)
        if settings.accumulate == "auto" and standing.too_large is None:
            self.gradients.measure(self.order)
        while not self.is_done():
            loss, norm = self.update()
            if math.isfinite(loss + norm):
                self.count(self.order.tokens(standing.epoch, standing.position), loss, norm)
            else:
                self.skip()
            self.move_on(clock.lap())
            self.agree(stop)
            self.reporter.step(standing.step)
            if standing.step % settings.log_every == 0 and standing.window["tokens"]:
                self.log_window()
            validated = standing.step % settings.validate_every == 0 or self.is_done()
            if validated:
                self.validate_and_save()
                clock.lap()
            if stop.signal is not None:
                if not validated:  # else a save without a score would take the place of one that has it
                    self.save(None)
                raise Interrupted(stop.signal, f"Stopped at step {standing.step:,} of {settings.steps:,} and saved in "
                                  f"{self.run.folder}. The same command, started again, goes on from there exactly.")

    def update(self) -> tuple[float, float]:
        """One update; it is not made where its loss or gradient is no number.

        Returns:
            the cross-entropy without smoothing, summed, nats; and the norm of the gradient before clipping.
        """
        settings, step = self.config.train, self.standing.step + 1
        place = self.standing.epoch, self.standing.position
        batches = self.ahead.update(*place)
        total = self.gradients.add(batches, self.order.tokens(*place), len(self.order.rows(*place)))
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf))
        loss, size = torch.stack([total, norm]).tolist()  # the one place that waits for a GPU
        if math.isfinite(loss + size):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            with memory_errors("the optimizer's state"):
                self.optimizer.step()
            self.ema.update(step)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, size

    def count(self, tokens: int, loss: float, norm: float) -> None:
        """Count an update that was made, and warn a person when the loss goes up and up."""
        self.standing.count(tokens, loss, norm)
        if warning := divergence(self.standing, loss / tokens, len(self.model.output), self.config.train):
            self.reporter.warn(warning)

    def skip(self) -> None:
        """Name the batch of an update that was not made; too many of them in a row end the training."""
        standing, settings = self.standing, self.config.train
        standing.skip()
        rows = np.concatenate(self.order.rows(standing.epoch, standing.position)).tolist()
        self.log.write({"kind": "skipped", "step": standing.step + 1, "epoch": standing.epoch,
                        "position": standing.position, "rows": rows, "seconds": standing.seconds})
        what = f"the loss or its gradient is not a number at {standing}"
        if standing.skipped_in_row >= settings.max_skipped:
            raise RunError(f"{self.run.folder}: {what}, the {settings.max_skipped}. of such updates in a row; "
                           "none of them was made. Checkpoints before them are whole. Try a lower "
                           f"train.learning_rate (it is {settings.learning_rate}) or a longer train.warmup "
                           f"({settings.warmup}), with --fresh")
        some = ", ".join(map(str, rows[:5])) + (" …" if len(rows) > 5 else "")
        self.reporter.warn(f"{what}; no update was made. Its rows of the prepared data: {some} ({len(rows):,}, all of "
                           f"them in {self.run.metrics_file.name})")

    def move_on(self, seconds: float) -> None:
        """Go to the next batch."""
        standing = self.standing
        standing.step += 1
        standing.position += 1
        standing.window["seconds"] += seconds
        if standing.position >= self.order.updates(standing.epoch):
            standing.epoch, standing.position = standing.epoch + 1, 0

    def agree(self, stop: Stop) -> None:
        """What all processes know at the edge of a step: a signal that came to any, and the first one's clock."""
        if self.cluster.size > 1:
            clock = self.standing.seconds if self.cluster.is_first else 0.0
            asked = [float(stop.signal == number) for number in STOPS]
            *came, self.standing.seconds = self.cluster.sum(
                torch.tensor([*asked, clock], dtype=torch.float64, device=self.device)).tolist()
            stop.signal = next((number for number, count in zip(STOPS, came, strict=True) if count), None)

    def ending(self) -> str | None:
        """The setting by which nothing is left to do: steps, minutes or patience; None: something is."""
        settings, standing = self.config.train, self.standing
        reached = {"steps": standing.step >= settings.steps, "patience": 0 < settings.patience <= standing.bad,
                   "minutes": settings.minutes is not None and standing.seconds >= 60 * settings.minutes}
        return next((name for name, is_reached in reached.items() if is_reached), None)

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.ending() is not None

    def log_window(self) -> None:
        """One line of metrics.jsonl about the updates since the last."""
        standing, window = self.standing, self.standing.window
        self.write({
            "kind": "train",
            "step": standing.step,
            "epoch": standing.epoch,
            "loss": window["loss"] / window["tokens"],
            "learning_rate": learning_rate(standing.step, self.config.train),
            "gradient_norm": window["norm"],
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
        with self.ema.in_model():
            model = self.in_one_place()
            scores = self.cluster.agree(self.validation.scores(model) if self.cluster.is_first else None)
        score = score_of(scores, metric)
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
        """Save a checkpoint of this step, then delete those that need not stay.

        Raises:
            RunError: a weight is not a number, so that nobody could go on from it.
        """
        broken = sum(not torch.isfinite(own(weights)).all() for weights in self.model.parameters())
        if self.cluster.sum(torch.tensor(float(broken), device=self.device)):
            raise RunError(f"{self.run.folder}: weights are no numbers any more at step {self.standing.step}, so they "
                           "were not saved. Checkpoints before it are whole. Try a lower train.learning_rate (it is "
                           f"{self.config.train.learning_rate}), with --fresh")
        state = {**asdict(self.standing), "score": score, "metric": self.config.train.metric, "versions": versions(),
                 **self.run.record(), **self.start}
        with self.ema.in_model() as trained:
            tensors = weights_of(self.model), optimizer_tensors(self.optimizer, self.model) | trained
            weights, optimizer = (gathered(each, self.cluster.is_first) for each in tensors)
            if self.cluster.is_first:
                checkpoints.save(self.run.step_path(self.standing.step), Checkpoint(weights, optimizer, state))
        if self.cluster.is_first:
            self.run.prune(self.config.train.average)

    def in_one_place(self) -> Seq2Seq:
        """The model, on the first process also where its weights are shared out: a copy, as large as it translates."""
        if not self.sharded:
            return self.model
        weights = gathered(weights_of(self.model), self.cluster.is_first)
        return self.copy(weights) if self.cluster.is_first else self.model

    def copy(self, weights: Mapping[str, Tensor]) -> Seq2Seq:
        """Another model, which has such weights."""
        with torch.random.fork_rng(devices=[]):  # nothing that is drawn later changes
            model = self.make()
        put_weights(model, weights, self.run.folder)
        return model.to(self.device)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; the first process reads it for all."""
        path, saved = self.newest() if self.cluster.is_first else (self.run.folder, None)
        state = self.cluster.agree(saved and dict(saved.state))
        if state is None:
            self.log.rewind(0)
            size = sum(weights.numel() for weights in self.model.parameters())
            self.reporter.say(f"model: {size:,} parameters, on {self.device}, matrix products in {self.precision} "
                              f"({self.why}); {self.order.updates(0):,} updates an epoch")
            self.begin()
        else:
            weights, optimizer = (self.cluster.agree_on(each) for each in (
                (saved.model, saved.optimizer) if saved else ({}, {})))
            put_weights(self.model, weights, path)
            put_optimizer(self.optimizer, self.model, optimizer, path)
            self.ema.put(optimizer)
            self.start = {name: state[name] for name in (start_from.KEY,) if name in state}
            self.standing = self.gradients.standing = self.standing_of(state)
            self.log.rewind(self.standing.step)
            self.reporter.say(f"going on from {path}: step {self.standing.step:,}, epoch {self.standing.epoch}, "
                              f"update {self.standing.position} of it")
        if self.cluster.is_first:
            self.run.write_config()
        if self.config.train.shard and not self.sharded:
            self.reporter.say("train.shard: this process is alone and holds all weights; torchrun starts several")
        if self.cluster.size > 1:
            held = f", each holding 1 / {self.cluster.size} of the weights" if self.sharded else ""
            self.reporter.say(f"{self.cluster.size} processes, {self.order.pieces} pieces of each update{held}")

    def begin(self) -> None:
        """Give the new model another run's weights, where the config says so; the first process reads them for all."""
        path = self.config.train.start_from
        if path is None:
            return
        model = self.in_one_place()
        weights, facts = ({}, None) if not self.cluster.is_first else start_from.begin(
            path, self.config, model, self.tokenizers)
        self.start = {start_from.KEY: self.cluster.agree(facts)}
        put_weights(self.model, self.cluster.agree_on(weights), path)
        self.ema.put({})
        for line in start_from.told(self.start[start_from.KEY]):
            self.reporter.say(line)

    def newest(self) -> tuple[Path, Checkpoint | None]:
        """The newest whole checkpoint and where it lies, those that are damaged set aside; None: there is none yet."""
        damaged = []
        for path in reversed(self.run.checkpoints()):
            try:
                saved = checkpoints.load(path)
            except CheckpointError as error:
                self.reporter.warn(f"{error}\nGoing on from the checkpoint before it.")
                damaged.append(path)
                continue
            self.run.set_aside(damaged)
            return path, saved
        if damaged:
            raise CheckpointError(f"{self.run.folder}: all of its checkpoints are damaged. Start anew with "
                                  "--fresh --force")
        return self.run.folder, None

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
        if not self.cluster.is_first:
            return
        standing, settings = self.standing, self.config.train
        last = self.run.validated()[-settings.average :]
        if len(last) > 1 and not self.averaged(last):
            self.average(last)
        best = "" if standing.best_score is None else (
            f"; best validation {settings.metric} {standing.best_score:.2f} at step {standing.best_step:,}")
        ending = self.ending()
        early = f" of {settings.steps:,}, ended by train.{ending} = {getattr(settings, ending):g}," if ending in (
            "minutes", "patience") else ""
        self.reporter.say(f"done: {standing.step:,} updates{early} in {standing.seconds / 60:.1f} minutes{best}. "
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
        model = self.copy(mean_weights(paths))
        scores = self.validation.scores(model)
        metric = self.config.train.metric
        state = {"step": self.standing.step, "of": [path.name for path in paths], "score": score_of(scores, metric),
                 "metric": metric, "versions": versions(), **self.start}
        checkpoints.save(self.run.average_path, Checkpoint(weights_of(model), {}, state))
        self.reporter.say(f"average of the last {len(paths)} checkpoints: validation "
                          + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def score_of(scores: Mapping[str, float], metric: str) -> float | None:
    """A validation's score by a metric; none of a model whose loss is no number, whatever its outputs are worth."""
    return scores[metric] if all(map(math.isfinite, scores.values())) else None
