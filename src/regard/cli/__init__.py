"""The command line: thin, with no logic that a user of the library would miss.

    exits.py       exceptions → messages and exit codes, the only place where that happens
    options.py     what several commands share
    output.py      results to stdout, talk to stderr, files written whole
    start.py       demo, init
    train.py       prepare, train
    plan.py        plan
    verify.py      verify
    translate.py   translate, score
    evaluate.py    evaluate
    compare.py     compare
    look.py        look
    info.py        info
    export.py      export
    distill.py     distill

Nothing that takes long to import (torch, pydantic, numpy, matplotlib) is imported before a command runs, so that
`regard --help` is instant.
"""

import os
import sys
from typing import Annotated

import typer

from regard import __version__
from regard.cli.compare import compare
from regard.cli.distill import distill
from regard.cli.evaluate import evaluate
from regard.cli.exits import Commands, exit_codes
from regard.cli.export import export
from regard.cli.info import info
from regard.cli.look import look
from regard.cli.options import Panels
from regard.cli.plan import plan
from regard.cli.start import demo, init
from regard.cli.train import prepare, train
from regard.cli.translate import score, translate
from regard.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regard {__version__}")
        raise typer.Exit


@app.callback()
def regard(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train, run and explain models that turn one sequence into another.

    \b
    To see what it is about, in minutes:    regard demo
    To begin with pairs of your own:        regard init --list
    To use what was trained:                regard translate RUN
    To see where it looks:                  regard look RUN TEXT

    Results go to standard output, talk goes to standard error. Exit codes: 0 done, 1 verify found a fault, 2 a
    mistake that the message explains, 130 and 143 interrupted.
    """


for _command in (demo, init, plan, prepare, train, translate, score, evaluate, compare, look, info, verify, export,
                 distill):
    app.command(cls=Panels)(_command)


def main() -> None:
    """Run the command line: what the installed command `regard` calls. Text is UTF-8, whatever the locale says.

    Threads of torch that wait for each other sleep, unless the environment says otherwise or torch is imported already.
    Usually they turn in place for milliseconds, and take the cores from those that they wait for once another program
    runs too: a training on two cores was seven times as slow then (docs/log.md, 2026-12-01).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    with exit_codes():
        app(prog_name="regard")
