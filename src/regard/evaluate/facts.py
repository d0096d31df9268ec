"""What a report tells of a run besides its scores: how it learned, what it was made from, and what set it apart."""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.engines.check import Agreement
from regard.engines.converted import about
from regard.errors import RunError
from regard.evaluate.charts import Chart, Series, chart, thin
from regard.evaluate.testset import TestSet
from regard.training.checkpoint import read_json
from regard.training.run import Run
from regard.training.start_from import told

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


def for_another_engine(run: Run) -> bool:
    """Whether a folder was exported for another engine, so that it holds neither checkpoints nor a log."""
    return (about(run.folder) or {}).get("to") == "ctranslate2"


def provenance(run: Run, checkpoint: str) -> list[tuple[str, str]]:
    """What a run was made from, as names and texts.

    Args:
        run: a run, or what was exported.
        checkpoint: by name, as `Run.find` takes it; an export for another engine has none.
    """
    found = {"run": str(run.folder), **told_export(run)}
    made = {"learned from": told_data(run), "tokenizer": told_tokenizer(run)}
    if for_another_engine(run):
        return [*found.items(), *made.items()]
    path = run.find(checkpoint)
    state = read_json(path / "state.json")
    weights = read_json(path / "manifest.json").get("model.safetensors", "unknown")
    found |= {
        "checkpoint": f"{path.name}, weights SHA-256 {weights}",
        "trained": told_training(training_facts(state, run)),
        "began with": told_start(state.get("start_from")),
        "validation": told_score(state.get("metric", run.config.train.metric), state.get("score")),
        **made,
        "made with": told_versions(state.get("versions", {})),
    }
    return [(name, text) for name, text in found.items() if text]


def data_facts(run: Run) -> dict[str, Any]:
    """The files it learned from, and the counts of the prepared data; None where that is not at hand."""
    data = run.config.data
    paths = [path for corpus in data.train for path in (corpus.source, corpus.target, corpus.pairs) if path]
    try:
        manifest = dict(json.loads((run.prepared / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # a run that came without its data translates as well as before
        manifest = {}
    counts = {name: manifest.get(name) for name in ("pairs", "samples", "source_tokens", "target_tokens")}
    return {"files": [str(data.root / path) for path in paths], **counts,
            "left_out": manifest.get("left_out", {}).get("counts")}


def training_facts(state: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """How far a training had come at a checkpoint, by its state."""
    return {"step": state.get("step"), "steps": run.config.train.steps, "epoch": state.get("epoch"),
            "start_from": state.get("start_from"), "seconds": state.get("seconds"),
            "target_tokens": state.get("tokens")}


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


def told_training(training: Mapping[str, Any]) -> str:
    """Such as "200 of 300 updates, 2 whole epochs, 4,000 target tokens, 12.3 seconds"."""
    known: dict[str, Callable[[Any], str]] = {
        "step": lambda step: f"{step:,} of {training['steps']:,} updates",
        "epoch": lambda epoch: f"{epoch} whole epoch{'s' if epoch != 1 else ''}",
        "target_tokens": lambda tokens: f"{tokens:,} target tokens",
        "seconds": duration,
    }
    return ", ".join(tell(training[name]) for name, tell in known.items() if training[name] is not None)


def told_start(start: Mapping[str, Any] | None) -> str:
    """What a training began with, where it was another run's weights; else nothing."""
    return "; ".join(told(start)) if start else ""


def told_score(metric: str, score: float | None) -> str:
    """The score that a checkpoint had while it learned."""
    return "not scored" if score is None else f"{_NAMES.get(metric, metric)} {score:.3f}"


def told_tokenizer(run: Run) -> str:
    """Kind and size of each side."""
    tokenizer = run.config.tokenizer
    drawn = f", dropout {tokenizer.dropout:g}" if tokenizer.dropout else ""
    if tokenizer.take_from is not None:
        return f"that of {tokenizer.take_from}{drawn}"
    if tokenizer.source is not None and tokenizer.target is not None:
        return ", ".join(f"{name} {side.kind} up to {side.size:,}"
                         for name, side in (("source", tokenizer.source), ("target", tokenizer.target))) + drawn
    shared = "shared" if tokenizer.shared else "one for each side"
    return f"{tokenizer.kind} up to {tokenizer.size:,}, {shared}{drawn}"


def told_data(run: Run) -> str:
    """The files, and how much was prepared and left out, where the prepared data is at hand."""
    data, facts = run.config.data, data_facts(run)
    files = dict.fromkeys(str(path) for corpus in data.train for path in (corpus.source, corpus.target, corpus.pairs)
                          if path)
    names = {"pairs": "pairs", "samples": "segmentations of each", "source_tokens": "source tokens",
             "target_tokens": "target tokens"}
    counted = [f"{facts[name]:,} {what}" for name, what in names.items() if facts[name] is not None]
    dropped = [f"{count:,} left out: {reason}" for reason, count in (facts["left_out"] or {}).items()]
    return f"{', '.join(files)} in {data.root}" + f": {'; '.join([*counted, *dropped])}" * bool(counted)


def told_versions(versions: Mapping[str, str]) -> str:
    """What a checkpoint was made with."""
    return ", ".join(what if name == "machine" else f"{name} {what}" for name, what in versions.items())


def told_export(run: Run) -> dict[str, str]:
    """What an exported folder was made from, and how its check came out; nothing of a run."""
    export = about(run.folder)
    if export is None:
        return {}
    found = {"exported": f"to {export['to']}, {export['precision']}, from {export['checkpoint']}, by regard "
                         f"{export['regard']}"}
    return found | ({"checked": str(Agreement(**export["check"]))} if export["check"] else {})


def _flat(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys and texts, those that are not set left out."""
    if settings is None:
        return []
    if not isinstance(settings, dict):
        return [(prefix, json.dumps(settings, ensure_ascii=False))]
    return [pair for key, value in settings.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else key)]
