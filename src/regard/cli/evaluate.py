"""`regard evaluate`: how good a run is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import Beam, Checkpoint, Device, Json, RunFolder, open_translator
from regard.cli.output import figures, page, progress, say
from regard.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from regard.config import Config
    from regard.evaluate import Bucket, Evaluation
    from regard.text.corpus import Pairs


def evaluate(
    run: RunFolder,
    source: Annotated[Path | None, typer.Option(metavar="FILE", help="Sources, one a line; needs --target.")] = None,
    target: Annotated[Path | None, typer.Option(metavar="FILE", help="Their references; needs --source.")] = None,
    tokenize: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How BLEU parts words: 13a | none | intl | char | zh. Default: the run's."),
    ] = None,
    beam: Beam = None,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Translate a test set and score the output.

    The test set is the run's own, or the files given. BLEU, chrF and TER are sacreBLEU's, each with its signature; with
    them come exact match and token error rate (edits per reference token), all in percent, and all of them by the
    length of the source too. Nothing is written.

    \b
    Examples:
      regard evaluate runs/en-de
      regard evaluate runs/en-de --source new.en --target new.de --json > new.json
    """
    from regard.evaluate import evaluate as judge
    from regard.metrics import check_tokenize
    from regard.training.run import Run

    if tokenize is not None:
        check_tokenize(tokenize)
    opened = Run.open(run)
    pairs = _test_set(opened.config, source, target)
    translator = open_translator(run, checkpoint, device)
    with progress("translating", len(pairs)) as advance:
        evaluation = judge(translator, pairs.sources, pairs.targets, tokenize=tokenize, beam=beam, progress=advance)
    for number, problem in evaluation.problems.items():
        say(f"{pairs.place(number - 1)}: not translated, scored as empty: {problem}")
    beam = beam or opened.config.decode.beam
    chosen = opened.find(checkpoint).name
    if as_json:
        files = list(dict.fromkeys(pairs.files))
        figures({"run": str(run), "checkpoint": chosen, "files": files, "beam": beam, **evaluation.figures()})
        return
    say(f"{pairs.summary}; {chosen}, beam {beam}: translated in {evaluation.seconds:.1f} s")
    for score in evaluation.scores:
        typer.echo(f"{score.name:<16} {score.value:>7.2f}   {score.signature}")
    page().print(_length_table(evaluation))


def _test_set(config: "Config", source: Path | None, target: Path | None) -> "Pairs":
    """The files given, or the test set of the run's config."""
    from regard.config import CorpusConfig
    from regard.text.corpus import read_pairs

    if (source is None) != (target is None):
        raise ConfigError("regard evaluate: --source and --target come together: give both, or neither for the test "
                          "set of the run's config")
    if source is not None:
        return read_pairs(CorpusConfig(source=source, target=target, pairs=None), Path.cwd())
    if config.data.test is None:
        raise ConfigError("regard evaluate: the run's config has no [data] test. Give --source FILE --target FILE")
    return read_pairs(config.data.test, config.data.root)


def _length_table(evaluation: "Evaluation") -> "Table":
    """Each metric by length of the source."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("source tokens", "lines", *(score.name for score in evaluation.scores)):
        table.add_column(name, justify="right")
    for bucket in evaluation.by_length:
        values = [f"{score.value:.2f}" for score in bucket.scores] or ["–"] * len(evaluation.scores)
        table.add_row(_range(bucket), f"{bucket.lines:,}", *values)
    return table


def _range(bucket: "Bucket") -> str:
    """Such as "up to 5", "6–10" or "241 and more"."""
    if bucket.longest is None:
        return f"{bucket.shortest} and more"
    return f"{bucket.shortest}–{bucket.longest}" if bucket.shortest else f"up to {bucket.longest}"
