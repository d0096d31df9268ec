"""`regard demo` and `regard init`: how to begin."""

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from regard.errors import ConfigError


def demo(
    task: Annotated[str, typer.Option(metavar="NAME", help="What is learned: pronounce.")] = "pronounce",
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder that everything goes to.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(metavar="M", help="How long it may take in all, about.")] = 6.0,
) -> None:
    """See the three stages learn, side by side.

    Trains an RNN with a fixed vector, an RNN with attention and a Transformer on the CMU Pronouncing Dictionary
    (letters in, phones out), scores them, and shows where each looks. Writes DIR/report.html, and the data, a config
    and a run's folder for each of the three. Interrupted, it goes on when it is started again.

    \b
    Examples:
      regard demo
      regard demo --minutes 20 --out demo-longer
    """
    from regard.demo.run import run

    run(out, minutes, task)


def init(
    preset: Annotated[str | None, typer.Argument(metavar="PRESET", help="The name of a preset.")] = None,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets.")] = False,
) -> None:
    """Print a commented config to start from. Nothing is written: send it to a file of your own.

    \b
    Examples:
      regard init --list
      regard init en-de-transformer > en-de.toml
    """
    presets = _presets()
    if list_presets:
        width = max(map(len, presets))
        for name, text in presets.items():
            typer.echo(f"{name:<{width}}  {text.splitlines()[0].removeprefix('# ')}")
        return
    if preset not in presets:
        near = difflib.get_close_matches(preset or "", presets, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        what = f'there is no preset "{preset}".' if preset else "which preset?"
        raise ConfigError(f"regard init: {what}{hint} Presets: {', '.join(presets)}")
    typer.echo(presets[preset], nl=False)


def _presets() -> dict[str, str]:
    """The text of each preset by its name, in the order of names."""
    folder = files("regard") / "presets"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file.read_text(encoding="utf-8") for file in found}
