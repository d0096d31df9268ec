"""`regard prepare` and `regard train`: from text to a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.options import ConfigFile, Settings
from regard.cli.output import say

Out = Annotated[
    Path | None, typer.Option(metavar="RUN", help="The run's folder. Default: runs/ and the config's name.")
]


def prepare(config: ConfigFile, settings: Settings = None, out: Out = None) -> None:
    """Make a run's tokenizer and prepared data.

    Says what was read and what was left out, and why. `regard train` does this itself when it is missing; to do it
    apart shows early whether the text is in order. Writes RUN/config.toml, RUN/tokenizer and RUN/data, and leaves alone
    what is up to date.

    \b
    Example:
      regard prepare en-de.toml --set tokenizer.size=4000
    """
    from regard.config import read_config
    from regard.data.shards import prepare as prepare_data
    from regard.training.run import Run

    checked = read_config(config, settings or ())
    folder = out or default_run(config)
    with Run.locked(folder, say):
        if not (folder / "config.toml").is_file():
            Run.create(folder, checked)
        prepare_data(checked, folder, say)
    say(f"Train on it with: regard train {config}{_again(settings, out)}")


def train(
    config: ConfigFile,
    settings: Settings = None,
    out: Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of going on from a checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Let --fresh delete the checkpoints that are there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")] = False,
) -> None:
    """Train a model, or go on with it.

    When RUN holds a checkpoint, training goes on from it exactly. Writes RUN/config.toml, tokenizer, data, checkpoints
    and metrics.jsonl. Ctrl-C, or SIGTERM, ends the update, saves, and leaves; the same command goes on from there.

    \b
    Examples:
      regard train en-de.toml
      regard train en-de.toml --set train.steps=20000 --set model.dropout=0.2 --out runs/more-dropout
    """
    from regard.config import read_config
    from regard.errors import ConfigError
    from regard.training.loop import train as train_model

    if force and not fresh:
        raise ConfigError("--force lets --fresh delete checkpoints, and --fresh is not given: leave it out to go on "
                          "from them, or give both to begin anew")

    checked = read_config(config, settings or ())
    train_model(checked, out or default_run(config), fresh=fresh, force=force, quiet=quiet)


def default_run(config: Path) -> Path:
    """runs/en-de in the current folder, for a config en-de.toml wherever it is; for a run's own config, that run."""
    if config.name == "config.toml" and (config.parent / "checkpoints").is_dir():
        return config.parent
    return Path("runs") / config.stem


def _again(settings: list[str] | None, out: Path | None) -> str:
    """The options of this command as they must be given to the next."""
    import shlex

    changes = "".join(f" --set {shlex.quote(setting)}" for setting in settings or ())
    return changes + (f" --out {shlex.quote(str(out))}" if out else "")
