"""Arguments and options that several commands share, so that they mean and say the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A config, such as `regard init` prints.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/en-de.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, such as train.steps=500. Repeatable."),
]
Checkpoint = Annotated[
    str, typer.Option(metavar="NAME", help="best, last, average, a name such as step-00001000, or a path.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Beam = Annotated[
    int | None, typer.Option(metavar="N", help="Hypotheses kept; 1 is greedy. Default: the run's [decode] beam.")
]
