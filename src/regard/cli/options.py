"""Arguments and options that several commands share, so that they mean and say the same everywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.errors import ConfigError

if TYPE_CHECKING:
    from regard.translator import Translator

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
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, or auto: a GPU where there is one.")]


def open_translator(run: Path, checkpoint: str, device: str) -> "Translator":
    """Open a run for translation, on the device that --device names.

    Raises:
        ConfigError: there is no such device.
        RunError: there is no such run or checkpoint, or it is damaged.
    """
    import torch

    from regard.translator import load

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here. Use --device cpu, or install a torch with CUDA")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(run, checkpoint, device)
