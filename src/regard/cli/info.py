"""`regard info`: what a run is."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from regard.cli.options import Json, RunFolder
from regard.cli.output import figures
from regard.errors import CheckpointError

if TYPE_CHECKING:
    from regard.training.run import Run


def info(run: RunFolder, as_json: Json = False) -> None:
    """Tell what a run is.

    Its model, data and training, its best score, its checkpoints, and what it was made with. RUN may be what `regard
    export` made: then also what it was made from, and how its check came out. Nothing is written.

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
    for name, text in _told(facts, opened).items():
        typer.echo(f"  {name:<12} {text}")
    typer.echo("\nGo on with:")
    for command in _commands(run, facts):
        typer.echo(f"  {command}")


def _facts(run: "Run") -> dict[str, Any]:
    """All that is known of a run, as JSON takes it; None for what is not there yet."""
    from regard.engines.converted import about
    from regard.evaluate.facts import data_facts, training_facts
    from regard.training.checkpoint import read_json

    steps = run.checkpoints()
    average = [run.average_path] if run.average_path.is_dir() else []
    return {
        "run": str(run.folder),
        "model": run.config.model.model_dump(mode="json"),
        "tokenizer": run.config.tokenizer.model_dump(mode="json", exclude_none=True),
        "data": data_facts(run),
        "training": training_facts(read_json(steps[-1] / "state.json"), run) if steps else None,
        "best": _best(run) if steps or average else None,
        "checkpoints": [path.name for path in [*steps, *average]],
        "export": about(run.folder),
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


def _told(facts: dict[str, Any], run: "Run") -> dict[str, str]:
    """The facts as lines for people."""
    from regard.evaluate import facts as tell

    best, training = facts["best"], facts["training"]
    told = {"model": _told_model(run.config.model)}
    if best:
        told["parameters"] = f"{best['parameters']:,}"
    told |= {"tokenizer": tell.told_tokenizer(run), "data": tell.told_data(run)}
    if training:
        told |= {"trained": tell.told_training(training), "began with": tell.told_start(training["start_from"])}
    elif not facts["export"]:
        told["trained"] = "not yet: there is no checkpoint"
    if best:
        told["best"] = f"{best['checkpoint']}, validation {tell.told_score(best['metric'], best['score'])}"
        told["checkpoints"] = ", ".join(facts["checkpoints"])
        told["made with"] = tell.told_versions(best["versions"])
    told |= tell.told_export(run)
    return {name: text for name, text in told.items() if text}


def _told_model(model: Any) -> str:
    """Its kind, its size, and each setting that is not at its default."""
    if not hasattr(model, "kind"):  # a mixed model: its sides have one each
        sides = [f"encoder {_told_model(model.encoder)}", f"decoder {_told_model(model.decoder)}"]
        return "; ".join([*sides, *model.changed("tie", "reverse_source")])
    size = [f"width = {model.width}", f"layers = {model.layers}"]
    others = [name for name in type(model).model_fields if name not in ("kind", "width", "layers")]
    return f"{model.kind}: {', '.join([*size, *model.changed(*others)])}"


def _commands(run: Path, facts: dict[str, Any]) -> list[str]:
    """What to do next."""
    training, export = facts["training"], facts["export"]
    commands = []
    if not export and (training is None or training["step"] < training["steps"]):
        commands.append(f"regard train {run / 'config.toml'} --out {run}")
    if facts["best"] or export:
        commands += [f"regard translate {run}", f"regard evaluate {run}"]
    if facts["best"]:
        commands.append(f'regard look {run} "TEXT"')
    return commands
