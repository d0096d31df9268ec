"""`regard info`: what a run is."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from regard.cli.options import Json, RunFolder
from regard.cli.output import figures
from regard.errors import CheckpointError

if TYPE_CHECKING:
    from regard.config_model import AnyModelConfig
    from regard.training.run import Run


def info(run: RunFolder, as_json: Json = False) -> None:
    """Tell what a run is.

    Its model, data and training, its best score, its checkpoints, and what it was made with. Nothing is written.

    \b
    Example:
      regard info runs/en-de
    """
    from regard.training.run import Run

    opened = Run.open(run)
    facts = _facts(opened)
    if as_json:
        figures(facts)
        return
    typer.echo(str(run))
    for name, text in _told(facts, opened.config.model).items():
        typer.echo(f"  {name:<12} {text}")
    typer.echo("\nGo on with:")
    for command in _commands(run, facts):
        typer.echo(f"  {command}")


def _facts(run: "Run") -> dict[str, Any]:
    """All that is known of a run, as JSON takes it; None for what is not there yet."""
    steps = run.checkpoints()
    average = [run.average_path] if run.average_path.is_dir() else []
    return {
        "run": str(run.folder),
        "model": run.config.model.model_dump(mode="json"),
        "tokenizer": run.config.tokenizer.model_dump(mode="json", exclude_none=True),
        "data": _data(run),
        "training": _training(run, steps[-1]) if steps else None,
        "best": _best(run) if steps or average else None,
        "checkpoints": [path.name for path in [*steps, *average]],
    }


def _data(run: "Run") -> dict[str, Any]:
    """The files, and the counts of the prepared data where it is there."""
    data = run.config.data
    paths = [path for corpus in data.train for path in (corpus.source, corpus.target, corpus.pairs) if path]
    prepared = data.root / data.prepared if data.prepared else run.folder / "data"
    try:
        manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run that came without its data translates as well as before
        manifest = {}
    counts = {name: manifest.get(name) for name in ("pairs", "source_tokens", "target_tokens")}
    left_out = manifest.get("left_out", {}).get("counts")
    return {"files": [str(data.root / path) for path in paths], **counts, "left_out": left_out}


def _training(run: "Run", last: Path) -> dict[str, Any]:
    """How far the training has come."""
    from regard.training.checkpoint import read_json

    state = read_json(last / "state.json")
    return {
        "step": state.get("step"),
        "steps": run.config.train.steps,
        "epoch": state.get("epoch"),
        "seconds": state.get("seconds"),
        "target_tokens": state.get("tokens"),
    }


def _best(run: "Run") -> dict[str, Any]:
    """The checkpoint that `regard translate` takes, its validation score, its size, and what made it."""
    from regard.training.checkpoint import read_json

    path = run.best()
    state = read_json(path / "state.json")
    return {
        "checkpoint": path.name,
        "metric": state.get("metric", run.config.train.metric),
        "score": state.get("score"),
        "parameters": _parameters(path / "model.safetensors"),
        "versions": state.get("versions", {}),
    }


def _parameters(path: Path) -> int:
    """How many numbers the weights are, by the file's header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is missing or damaged ({error}). Copy it again from where the run was made, or "
                              "train again") from None


def _told(facts: dict[str, Any], model: "AnyModelConfig") -> dict[str, str]:
    """The facts as lines for people."""
    best = facts["best"]
    told = {"model": _told_model(model)}
    if best:
        told["parameters"] = f"{best['parameters']:,}"
    told["tokenizer"] = _told_tokenizer(facts["tokenizer"])
    told["data"] = _told_data(facts["data"])
    told["trained"] = _told_training(facts["training"])
    if best:
        metric = best["metric"].replace("_", " ")
        scored = "not scored" if best["score"] is None else f"validation {metric} {best['score']:.2f}"
        told["best"] = f"{best['checkpoint']}, {scored}"
        told["checkpoints"] = ", ".join(facts["checkpoints"])
        versions = best["versions"].items()
        told["made with"] = ", ".join(what if name == "machine" else f"{name} {what}" for name, what in versions)
    return told


def _told_model(model: Any) -> str:
    """Its kind, its size, and each setting that is not at its default."""
    if not hasattr(model, "kind"):  # a mixed model: its sides have one each
        sides = [f"encoder {_told_model(model.encoder)}", f"decoder {_told_model(model.decoder)}"]
        return "; ".join([*sides, *model.changed("tie", "reverse_source")])
    size = [f"width = {model.width}", f"layers = {model.layers}"]
    others = [name for name in type(model).model_fields if name not in ("kind", "width", "layers")]
    return f"{model.kind}: {', '.join([*size, *model.changed(*others)])}"


def _told_tokenizer(tokenizer: dict[str, Any]) -> str:
    if "source" in tokenizer:
        sides = ((side, tokenizer[side]) for side in ("source", "target"))
        return ", ".join(f"{name} {side['kind']} up to {side['size']:,}" for name, side in sides)
    sharing = "shared" if tokenizer["shared"] else "one for each side"
    return f"{tokenizer['kind']} up to {tokenizer['size']:,}, {sharing}"


def _told_data(data: dict[str, Any]) -> str:
    files = ", ".join(data["files"])
    if data["pairs"] is None:
        return f"{files} (not prepared, or the prepared data is elsewhere)"
    left_out = "; ".join(f"{count:,} left out: {reason}" for reason, count in (data["left_out"] or {}).items())
    counts = f"{data['pairs']:,} pairs, {data['source_tokens']:,} source and {data['target_tokens']:,} target tokens"
    return f"{counts}{f'; {left_out}' if left_out else ''}; from {files}"


def _told_training(training: dict[str, Any] | None) -> str:
    if training is None:
        return "not yet: there is no checkpoint"
    seconds = training["seconds"] or 0
    time = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"
    return (f"{training['step']:,} of {training['steps']:,} updates, {training['target_tokens'] or 0:,} target tokens, "
            f"{training['epoch']} whole epochs, {time}")


def _commands(run: Path, facts: dict[str, Any]) -> list[str]:
    """What to do next."""
    training = facts["training"]
    commands = []
    if training is None or training["step"] < training["steps"]:
        commands.append(f"regard train {run / 'config.toml'} --out {run}")
    if facts["best"]:
        commands += [f"regard translate {run}", f"regard evaluate {run}", f'regard look {run} "TEXT"']
    return commands
