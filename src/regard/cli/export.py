"""`regard export`: a run for other engines."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from regard.cli.options import Checkpoint, Json
from regard.cli.output import figures, say


def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A run's folder; of several, the mean of their "
                                                "weights.")],
    to: Annotated[str, typer.Option(metavar="NAME", help="ctranslate2, or folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
    precision: Annotated[str | None, typer.Option(metavar="NAME", help="For ctranslate2: float32, bfloat16 or int8. "
                                                  "Default: float32.")] = None,
    checkpoint: Checkpoint = "best",
    sample: Annotated[Path | None, typer.Option(metavar="FILE", help="For ctranslate2: sources to check it on, one a "
                                                "line. Default: the run's test or validation set.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export made.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run for another engine, or only what is needed to translate.

    \b
    ctranslate2   a Transformer as CTranslate2 reads it; translates several times as fast on a CPU
    folder        config, tokenizer and one checkpoint: a run that cannot be trained further

    DIR is what `regard translate` and `regard.load` take in the place of a run. It is written whole or not at all. A
    model in CTranslate2 translates a sample of up to 100 sentences and is held against the run: in float32 each token's
    log-probability within 1e-4 nats and the same outputs, unless the search is at a tie; in bfloat16 and int8 within
    0.02 and 0.05 nats in the mean. If it is not, nothing is kept, and the exit code is 1. What a format cannot carry is
    refused, with all reasons.

    Several RUNs of one model and vocabulary become one folder with the mean of their weights. Of runs that were trained
    further from one (train.start_from), that often translates better than any of them (Wortsman et al. 2022).

    \b
    Examples:
      regard export runs/en-de --to ctranslate2 --precision int8 --out en-de.int8
      regard export runs/en-de --to folder --out en-de
      regard export runs/further-1 runs/further-2 --to folder --out runs/both
    """
    from regard.engines.converted import Unlike
    from regard.export import export as write
    from regard.text.corpus import read_lines

    try:
        agreement = write(runs, out, to, precision, checkpoint, read_lines(sample) if sample else None, force)
    except Unlike as error:
        say(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    say(f"{out}: written")
    if as_json:
        figures({"out": str(out), "to": to, "check": agreement and asdict(agreement)})
    elif agreement:
        typer.echo(str(agreement))
