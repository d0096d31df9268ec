"""`regard evaluate`: how good a run is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.options import Beam, Checkpoint, Device, Engine, Json, Precision, RunFolder, open_translator
from regard.cli.output import figures, page, progress, results, say
from regard.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from regard.evaluate import Evaluation, TestSet
    from regard.evaluate.report import Told

Source = Annotated[Path | None, typer.Option(metavar="FILE", help="Sources, one a line; needs --target.")]
Targets = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Their references; needs --source. Give it once for each of several references."),
]
Tokenize = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How BLEU parts words: 13a | none | intl | char | zh. Default: the run's."),
]


def evaluate(
    run: RunFolder,
    source: Source = None,
    target: Targets = None,
    tokenize: Tokenize = None,
    beam: Beam = None,
    engine: Engine = "auto",
    precision: Precision = None,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    report: Annotated[bool, typer.Option("--report", help="Write RUN/report.html, a page that shows it all.")] = False,
    as_json: Json = False,
) -> None:
    """Translate a test set and score the output.

    The test set is the run's own, or the files given. BLEU, chrF and TER are sacreBLEU's, each with its signature; with
    them come exact match and token error rate (edits per reference token), all in percent, and all of them by the
    length of the source too. Of several references the closest counts. What translates is chosen as by `regard
    translate`, and told. Nothing is written but the page of --report, and what the engine ctranslate2 keeps in
    RUN/engines. RUN may be what `regard export` made.

    \b
    Examples:
      regard evaluate runs/en-de --report
      regard evaluate runs/en-de --source new.en --target new.de --target new.2.de --json > new.json
    """
    from regard.evaluate import TestSet
    from regard.evaluate import evaluate as judge
    from regard.evaluate.facts import for_another_engine
    from regard.evaluate.report import Told, require_jinja, run_page
    from regard.metrics import check_tokenize
    from regard.training.run import Run

    if tokenize is not None:
        check_tokenize(tokenize)
    opened = Run.open(run)
    if report:
        require_jinja()
        if for_another_engine(opened):
            raise ConfigError(f"regard evaluate: {run} was exported for another engine and holds neither curves nor "
                              "attention for --report: leave it out, or give the run that it was made from")
    test = given_test("evaluate", source, target) or TestSet.of(opened.config.data)
    if test is None:
        raise ConfigError("regard evaluate: the run's config has no [data] test. Give --source FILE --target FILE")
    translator = open_translator(run, checkpoint, device, engine, precision)
    with progress("translating", len(test)) as advance:
        evaluation = judge(translator, test.sources, test.references, tokenize=tokenize, beam=beam, progress=advance)
    not_translated(test, evaluation.problems)
    told = Told(translator.checkpoints[0], beam or opened.config.decode.beam,
                tokenize or opened.config.data.bleu_tokenize, translator.taken,
                again("evaluate", run, source=source, target=target, tokenize=tokenize, beam=beam,
                      engine=evaluation.engine, precision=evaluation.precision, checkpoint=checkpoint, report=report))
    if as_json:
        about = {"files": list(dict.fromkeys(test.files)), "references": len(test.references), "sha256": test.sha256}
        figures({"run": str(run), "checkpoint": told.checkpoint, **about, "beam": told.beam, **evaluation.figures()})
    else:
        _show(evaluation, test, told)
    if report:
        text = run_page(evaluation, test, opened, translator, told)
        with results(run / "report.html") as file:
            file.write(text.encode())
        say(f"wrote {run / 'report.html'}")


def given_test(command: str, source: Path | None, targets: list[Path] | None) -> "TestSet | None":
    """The test set of --source and --target; None where they are not given.

    Raises:
        ConfigError: one of them without the other.
        DataError: the files cannot be read, do not belong together, or hold nothing to score.
    """
    from regard.evaluate import TestSet

    if (source is None) != (not targets):
        raise ConfigError(f"regard {command}: --source and --target come together: give both, or neither for the test "
                          "set of the run's config")
    return TestSet.read(source, targets) if source is not None and targets else None


def not_translated(test: "TestSet", problems: dict[int, str], name: str = "") -> None:
    """Say which lines could not be translated."""
    by = f" by {name}" if name else ""
    for number, problem in problems.items():
        say(f"{test.place(number - 1)}: not translated{by}, scored as empty: {problem}")


def again(*words: str | Path, **options: object) -> str:
    """The command that does the same once more: options left out or at "best", the default checkpoint, are not told."""
    from regard.evaluate.facts import command

    given = [(f"--{name}", value) for name, value in options.items()
             if value is not None and value is not False and value not in ([], "best")]
    typed = [part for name, value in given for one in (value if isinstance(value, list) else [value])
             for part in ([name] if one is True else [name, str(one)])]
    return command("regard", *words, *typed)


def _show(evaluation: "Evaluation", test: "TestSet", told: "Told") -> None:
    """The scores and their table by length."""
    say(f"{test.summary}; {told.checkpoint}, beam {told.beam}: translated in {evaluation.seconds:.1f} s; engine "
        f"{told.engine}")
    for score in evaluation.scores:
        typer.echo(f"{score.name:<16} {score.value:>7.2f}   {score.signature}")
    page().print(_length_table(evaluation))


def _length_table(evaluation: "Evaluation") -> "Table":
    """Each metric by length of the source."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("source tokens", "lines", *(score.name for score in evaluation.scores)):
        table.add_column(name, justify="right")
    for bucket in evaluation.by_length:
        values = [f"{score.value:.2f}" for score in bucket.scores] or ["–"] * len(evaluation.scores)
        table.add_row(bucket.name, f"{bucket.lines:,}", *values)
    return table
