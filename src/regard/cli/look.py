"""`regard look`: where a model looks."""

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.options import Checkpoint, Device, RunFolder, open_translator
from regard.cli.output import page, say


def look(
    run: RunFolder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The source, in quotes.")],
    target: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Show how the model reads this output instead of its own.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw into FILE: .png, .svg or .pdf.")] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", help="Counted from 1. Default: the mean of all.")] = None,
    head: Annotated[int | None, typer.Option(metavar="N", help="Counted from 1. Default: the mean of all.")] = None,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
) -> None:
    """Show where the model looks as it translates.

    One row for each token of the output: how the model spread its attention over the source, and how sure it was. A
    model with a fixed vector has no attention; for it, the tokens come with their probabilities alone. Nothing is
    written but the FILE of --png.

    \b
    Examples:
      regard look runs/en-de "A dog runs."
      regard look runs/en-de "A dog runs." --target "Ein Hund läuft." --layer 4 --png dog.png
    """
    from regard.look.terminal import render

    trace = open_translator(run, checkpoint, device).look(text, target)
    page().print(render(trace, layer, head))
    if png is not None:
        trace.picture(png, layer, head)
        say(f"wrote {png}")


