"""`regard distill`: training targets that a teacher wrote."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import Beam, Checkpoint, ConfigFile, Device, Engine, Json, Precision, Settings, open_translator
from regard.cli.output import QUIET_SECONDS, figures, say

if TYPE_CHECKING:
    from regard.distill import Distilled

Teachers = Annotated[list[Path], typer.Argument(metavar="TEACHER", help="A run's folder; several answer as one.")]


def distill(
    teachers: Teachers,
    config: ConfigFile,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder for the translations and the new config.")],
    settings: Settings = None,
    beam: Beam = None,
    closest: Annotated[str | None, typer.Option(metavar="NAME", help="bleu or chrf: of all hypotheses of the beam, "
                                                "take the closest to the reference.")] = None,
    engine: Engine = "auto", precision: Precision = None, checkpoint: Checkpoint = "best", device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Have a teacher rewrite the training targets of a config, for a student to learn from.

    Sequence-level knowledge distillation (Kim and Rush 2016): a small model learns more from what a large one says than
    from the references, whose variety it cannot follow. TEACHER translates the sources of all training corpora of
    CONFIG as its own [decode] says; several TEACHERs that share their vocabularies answer as one. CONFIG says what the
    student will be; its validation and test data stay as they are.

    Writes for each training corpus a file of as many lines into FOLDER, and last FOLDER/config.toml: CONFIG with those
    as targets. A line that cannot be translated keeps its reference, and is counted; one that has no reference gets a
    translation. Interrupted or killed, the same command goes on after the last chunk of 1,000 lines.

    \b
    Examples:
      regard distill runs/big small.toml --out distilled
      regard distill runs/big-1 runs/big-2 small.toml --out distilled --beam 8 --closest bleu
      regard train distilled/config.toml --out runs/small
    """
    from regard.config import read_config
    from regard.distill import digest_of
    from regard.distill import distill as write

    checked = read_config(config, settings or ())
    digests = [digest_of(teacher, checkpoint) for teacher in teachers]
    translator = open_translator(teachers, checkpoint, device, engine, precision)
    try:
        made = write(translator, digests, checked, out, beam=beam, closest=closest, say=say, progress=_progress())
    except KeyboardInterrupt:
        say(f"{out}: the same command goes on after the last whole chunk.")
        raise
    for line in _told(made, out):
        say(line)
    if as_json:
        figures({"config": str(made.config), "corpora": [asdict(part) for part in made.parts],
                 "seconds": made.seconds, "engine": made.engine})


def _progress() -> Callable[[int, int], None]:
    """Tells every so many seconds how far it is and how long the rest takes."""
    first, started, spoke = 0, time.monotonic(), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal first, started, spoke
        now = time.monotonic()
        if not spoke:
            first, started, spoke = done, now, now
            if 0 < done < total:
                say(f"going on after {done:,} of {total:,} lines")
        elif now - spoke >= QUIET_SECONDS and done < total:
            spoke = now
            rate = (done - first) / (now - started)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            say(f"translated {done:,} of {total:,} lines, {rate:,.0f} a second; {minutes // 60}:{minutes % 60:02}:"
                f"{seconds:02} left")

    return progress


def _told(made: "Distilled", out: Path) -> list[str]:
    """What came of it."""
    lines, kept = sum(part.lines for part in made.parts), sum(part.kept for part in made.parts)
    engine = f", engine {made.engine}" if made.engine else ""
    told = [f"{out}: {lines:,} lines in {len(made.parts)} file{'s' * (len(made.parts) > 1)}, this time in "
            f"{made.seconds:.1f} s{engine}"]
    if kept:
        places = [place for part in made.parts for place in part.places]
        told.append(f"{kept:,} kept their references, for they could not be translated: {'; '.join(places)}"
                    + "; …" * (kept > len(places)))
    return [*told, f"Now: regard train {made.config} --out RUN"]
