"""What a report tells of a run besides its scores: how it learned, what it was made from, and what set it apart."""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.errors import RunError
from regard.evaluate.charts import Chart, Series, chart, thin
from regard.evaluate.testset import TestSet
from regard.training.checkpoint import read_json
from regard.training.run import Run

Points = list[tuple[float, float]]

_NAMES = {"bleu": "BLEU", "token_error_rate": "token error rate"}


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none where it came without one.

    Raises:
        RunError: a line of it is no row of figures.
    """
    try:
        rows = run.metrics()
    except (ValueError, OSError) as error:
        raise RunError(f"{run.metrics_file}: cannot be read: {error}. Copy it again from where the run was made, or "
                       "rename it to have a report without curves") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "kind" not in row or not isinstance(row.get("step"), int):
            raise RunError(f"{run.metrics_file}:{number}: is no row of a training: expected kind and step. Copy the "
                           "file again from where the run was made, or rename it to have a report without curves")
    return rows


def points(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> Points:
    """One figure over the updates: those of the rows of a kind ("train" or "valid") that have it."""
    found = [(float(row["step"]), row.get(name)) for row in rows if row["kind"] == kind]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def learning(run: Run) -> list[Chart]:
    """A run's curves: both losses, the validation metric where it is another one, and the learning rate."""
    rows, metric = read_metrics(run), run.config.train.metric
    losses = [Series("training", thin(points(rows, "train", "loss")), 0),
              Series("validation", points(rows, "valid", "loss"), 1)]
    name = _NAMES.get(metric, metric)
    found = [
        chart(losses, "updates", "loss, nats per target token",
              "Line chart: training and validation loss over updates."),
        chart([Series(name, points(rows, "valid", metric), 1)] if metric != "loss" else [], "updates",
              f"{name} of the validation data, percent", f"Line chart: validation {name} over updates."),
        chart([Series("learning rate", thin(points(rows, "train", "learning_rate")), 2)], "updates", "learning rate",
              "Line chart: learning rate over updates.", from_zero=True),
    ]
    return [each for each in found if each is not None]


def learning_together(runs: Mapping[int, tuple[str, Run]]) -> list[Chart]:
    """The curves of several runs in one chart each: validation loss, and every validation metric that they used.

    Args:
        runs: name and run by the number of their colour.
    """
    rows = {style: read_metrics(run) for style, (_, run) in runs.items()}
    metrics = dict.fromkeys(["loss", *(run.config.train.metric for _, run in runs.values())])
    charts = []
    for metric in metrics:
        name = _NAMES.get(metric, metric)
        unit = "nats per target token" if metric == "loss" else "percent"
        series = [Series(runs[style][0], points(rows[style], "valid", metric), style) for style in runs]
        charts.append(chart(series, "updates", f"validation {name}, {unit}",
                            f"Line chart: validation {name} over updates, one line for each run."))
    return [each for each in charts if each is not None]


def training_facts(run: Run, checkpoint: Path) -> list[tuple[str, str]]:
    """What a run was made from, as names and texts."""
    state = read_json(checkpoint / "state.json")
    weights = read_json(checkpoint / "manifest.json").get("model.safetensors", "unknown")
    data = run.config.data
    files = dict.fromkeys(str(path) for corpus in data.train for path in (corpus.source, corpus.target, corpus.pairs)
                          if path)
    versions = (what if name == "machine" else f"{name} {what}" for name, what in state.get("versions", {}).items())
    found = {
        "run": str(run.folder),
        "checkpoint": f"{checkpoint.name}, weights SHA-256 {weights}",
        "trained": _trained(state, run),
        "validation": _validated(state, run),
        "learned from": f"{', '.join(files)} in {data.root}{_counts(run)}",
        "tokenizer": _tokenizer(run),
        "made with": ", ".join(versions),
    }
    return [(name, text) for name, text in found.items() if text]


def set_facts(test: TestSet) -> list[tuple[str, str]]:
    """What was translated, as names and texts."""
    return [("test set", test.summary), ("its SHA-256", f"{test.sha256}, over all its sources and references")]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, as their configs' keys, each with the value of every run."""
    flat = [dict(_flat(run.config.model_dump(mode="json"))) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = [(key, [settings.get(key, "–") for settings in flat]) for key in keys]
    return [(key, each) for key, each in values if len(set(each)) > 1]


def command(*words: str | Path) -> str:
    """A command as it is typed."""
    return shlex.join(map(str, words))


def duration(seconds: float) -> str:
    """Such as "9.7 minutes" or "12.3 seconds"."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def _trained(state: Mapping[str, Any], run: Run) -> str:
    """How long it learned."""
    known: dict[str, Callable[[Any], str]] = {
        "step": lambda step: f"{step:,} of {run.config.train.steps:,} updates",
        "epoch": lambda epoch: f"{epoch} whole epoch{'s' if epoch != 1 else ''}",
        "tokens": lambda tokens: f"{tokens:,} target tokens",
        "seconds": duration,
    }
    return ", ".join(tell(state[name]) for name, tell in known.items() if state.get(name) is not None)


def _validated(state: Mapping[str, Any], run: Run) -> str:
    """The score that the checkpoint had while it learned."""
    if state.get("score") is None:
        return "not scored"
    metric = state.get("metric", run.config.train.metric)
    return f"{_NAMES.get(metric, metric)} {state['score']:.3f}"


def _tokenizer(run: Run) -> str:
    """Kind and size of each side."""
    tokenizer = run.config.tokenizer
    sides = [side for side in (tokenizer.source, tokenizer.target) if side is not None]
    if sides:
        return ", ".join(f"{side.kind} up to {side.size:,}" for side in sides)
    return f"{tokenizer.kind} up to {tokenizer.size:,}, {'shared' if tokenizer.shared else 'one for each side'}"


def _counts(run: Run) -> str:
    """How much was prepared and left out, where the prepared data is at hand."""
    data = run.config.data
    prepared = data.root / data.prepared if data.prepared else run.folder / "data"
    try:
        manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
        counted = "; ".join(f"{manifest[name]:,} {name.replace('_', ' ')}"
                            for name in ("pairs", "source_tokens", "target_tokens"))
        dropped = "; ".join(f"{count:,} left out: {reason}" for reason, count in manifest["left_out"]["counts"].items())
    except (OSError, ValueError, KeyError, TypeError):  # a run that came without its data translates as well as before
        return ""
    return f": {'; '.join(filter(None, [counted, dropped]))}"


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys and texts, those that are not set left out."""
    if settings is None:
        return []
    if not isinstance(settings, dict):
        return [(prefix, json.dumps(settings, ensure_ascii=False))]
    return [pair for key, value in settings.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)]
