"""`regard compare`: which of several runs or outputs is better, and whether that is more than chance."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from regard.cli.evaluate import Source, Targets, Tokenize, again, given_test, not_translated
from regard.cli.options import Beam, Checkpoint, Device, Engine, Json, Precision, open_translator
from regard.cli.output import figures, page, progress, results, say
from regard.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from regard.evaluate.comparison import Comparison, Contestant, System
    from regard.evaluate.significance import Significance
    from regard.evaluate.testset import TestSet
    from regard.look.trace import Trace

_STYLES = ("blue", "dark_orange", "green", "magenta", "cyan", "red", "yellow", "bright_black")
_BAR = 30  # cells of the longest bar


class _Way(NamedTuple):
    """How the runs translate."""

    beam: int | None
    engine: str
    precision: str | None
    checkpoint: str
    device: str
    look: bool


class _Outputs(NamedTuple):
    """What the systems made of the test set: outputs, lengths of the sources and their unit, one sentence's traces."""

    systems: "list[System]"
    lengths: list[int]
    unit: str
    traces: "dict[int, Trace]"


def compare(
    systems: Annotated[
        list[Path],
        typer.Argument(metavar="RUN-OR-FILE", help="Runs' folders, or files of outputs; the first is the baseline."),
    ],
    source: Source = None,
    target: Targets = None,
    tokenize: Tokenize = None,
    sentences: Annotated[
        int, typer.Option(metavar="N", min=0, help="Show so many of the lines on which they differ most.")
    ] = 10,
    resamples: Annotated[int, typer.Option(metavar="N", help="Draws of the paired bootstrap.")] = 1000,
    trials: Annotated[int, typer.Option(metavar="N", help="Trials of the approximate randomisation.")] = 10_000,
    seed: Annotated[int, typer.Option(metavar="N", help="What both tests draw from.")] = 12_345,
    beam: Beam = None,
    engine: Engine = "auto",
    precision: Precision = None,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that shows it all.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs and files of outputs on one test set.

    All metrics of `regard evaluate`, with 95% confidence intervals; whether each system differs from the first by more
    than chance (paired bootstrap and approximate randomisation, by sacreBLEU); the scores by source length; and the
    lines on which they differ most. A file holds one output for each source line. The test set is that of the runs, or
    the files given. Systems that cannot be compared are refused with all reasons. What translates is chosen for each
    run as by `regard translate`, and told. Nothing is written but the FILE of --html, and what the engine ctranslate2
    keeps in RUN/engines.

    \b
    Examples:
      regard compare runs/rnn runs/transformer
      regard compare runs/transformer other.out --source test.en --target test.de --html compared.html
    """
    from regard.evaluate.comparison import Contestant, common_ground
    from regard.evaluate.comparison import compare as judge
    from regard.evaluate.report import comparison_page, headline, require_jinja
    from regard.evaluate.significance import Draws

    if html is not None:
        require_jinja()
    contestants = [Contestant.open(path) for path in systems]
    test, words = common_ground(contestants, given_test("compare", source, target), tokenize)
    way, draws = _Way(beam, engine, precision, checkpoint, device, html is not None), Draws(resamples, trials, seed)
    _check_way(way, contestants)
    draws.check(len(test))
    say(test.summary)
    made = _translate(contestants, test, way)
    comparison = judge(made.systems, test, made.lengths, made.unit, tokenize=words, draws=draws)
    if as_json:
        figures(comparison.figures(sentences))
    else:
        _show(comparison, headline([each.run for each in contestants if each.run]), sentences)
    if html is not None:
        command = again("compare", *systems, source=source, target=target, tokenize=tokenize, sentences=sentences,
                        beam=beam, engine=None if engine == "auto" else engine, precision=precision,
                        checkpoint=checkpoint, html=html, **draws._asdict())
        runs = [contestant.run for contestant in contestants]
        text = comparison_page(comparison, runs, made.traces, sentences, checkpoint, command)
        with results(html) as file:
            file.write(text.encode())
        say(f"wrote {html}")


def _check_way(way: _Way, contestants: "Sequence[Contestant]") -> None:
    """Refuse options about translating where nothing is translated."""
    given = [name for name, value, default in (
        ("--beam", way.beam, None), ("--engine", way.engine, "auto"), ("--precision", way.precision, None),
        ("--checkpoint", way.checkpoint, "best"), ("--device", way.device, "auto"),
    ) if value != default]
    if given and not any(contestant.run for contestant in contestants):
        raise ConfigError(f"regard compare: {', '.join(given)} say how runs translate, and there are only files of "
                          "outputs. Leave them out")


def _translate(contestants: "Sequence[Contestant]", test: "TestSet", way: _Way) -> _Outputs:
    """The outputs of all: files as they are, runs one after the other. The first run's tokens measure the sources."""
    from regard.evaluate.comparison import System, translated
    from regard.evaluate.evaluation import token_lengths
    from regard.evaluate.facts import for_another_engine
    from regard.evaluate.report import LONGEST_LOOK
    from regard.evaluate.sentences import plain_lengths, typical

    lengths, unit = plain_lengths(test.sources)
    systems: list[System] = []
    traces: dict[int, Trace] = {}
    measured = False
    for place, contestant in enumerate(contestants):
        if contestant.run is None:
            systems.append(System(contestant.name, test.choose(contestant.lines, contestant.name), {}))
            continue
        translator = open_translator(contestant.run.folder, way.checkpoint, way.device, way.engine, way.precision)
        if not measured:
            lengths, unit, measured = token_lengths(translator, test.sources), f"tokens of {contestant.name}", True
        with progress(f"translating with {contestant.name}", len(test)) as advance:
            systems.append(translated(contestant.name, translator, test, way.beam, advance))
        say(f"{contestant.name}: engine {translator.taken}")
        not_translated(test, systems[-1].problems, contestant.name)
        row = typical(lengths, LONGEST_LOOK) if way.look and not for_another_engine(contestant.run) else None
        if row is not None and row + 1 not in systems[-1].problems:
            traces[place] = translator.look(test.sources[row], beam=way.beam)
    return _Outputs(systems, lengths, unit, traces)


def _show(comparison: "Comparison", metric: str, sentences: int) -> None:
    """The scores and their tests, the chart by length, and the lines that differ most."""
    from regard.evaluate.comparison import short_names
    from regard.evaluate.report import reading

    console, names = page(), short_names([system.name for system in comparison.systems])
    console.print(_score_table(comparison, names))
    console.print(reading(comparison, names[0]), markup=False)
    for score in comparison.ratings[0].scores:
        console.print(f"{score.name:<16} {score.signature}", markup=False, soft_wrap=True)
    console.print()
    console.print(_length_chart(comparison, names, metric))
    _show_sentences(console, comparison, names, sentences)


def _score_table(comparison: "Comparison", names: "Sequence[str]") -> "Table":
    """A system below the other, with every metric, its interval, and its difference from the baseline."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from regard.metrics import BETTER

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name, way in BETTER.items():
        table.add_column(f"{name} {'↑' if way > 0 else '↓'}", justify="right")
    for place, (name, rating) in enumerate(zip(names, comparison.ratings, strict=True)):
        tests = comparison.significance[place]
        values = [f"{score.value:.2f}" for score in rating.scores]
        table.add_row(Text(name, style=_style(place), overflow="fold"), *values)
        rows = zip(*(_tested(tests[score.name]) for score in rating.scores), strict=True)
        labels = ("±", "difference", "p, bootstrap", "p, randomised") if place else ("±, baseline",)
        for label, row in zip(labels, rows, strict=True):
            table.add_row(f"  {label}", *row)
    return table


def _tested(test: "Significance") -> list[str]:
    """The interval of one score and, if it is not the baseline's, its difference and both p-values."""
    interval = f"± {test.interval:.2f}"
    if test.difference is None or test.bootstrap is None or test.randomisation is None:
        return [interval]
    chances = [f"{p:.4f}{'*' if p < 0.05 else ' '}" for p in (test.bootstrap, test.randomisation)]
    return [interval, f"{test.difference:+.2f}", *chances]


def _length_chart(comparison: "Comparison", names: "Sequence[str]", metric: str) -> "Table":
    """One metric by length, a bar for each system."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{metric} by {comparison.unit}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="")
    for name in (comparison.unit.split()[0], "lines", "", metric):
        table.add_column(name, justify="left" if name in ("", metric) else "right", overflow="fold")
    by_system = [rating.by_length for rating in comparison.ratings]
    values = [[{score.name: score.value for score in bucket.scores}.get(metric) for bucket in system]
              for system in by_system]
    highest = max((value for system in values for value in system if value is not None), default=0.0)
    for row, bucket in enumerate(by_system[0]):
        for place, name in enumerate(names):
            first = (bucket.name, f"{bucket.lines:,}") if not place else ("", "")
            table.add_row(*first, Text(name), _bar(values[place][row], highest, _style(place)))
    return table


def _bar(value: float | None, highest: float, style: str) -> "Text":
    """A bar and its value."""
    from rich.text import Text

    if value is None:
        return Text("–")
    eighths = round(8 * _BAR * value / highest) if highest else 0
    bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
    return Text.assemble((bar, style), f" {value:.2f}")


def _show_sentences(console: "Console", comparison: "Comparison", names: "Sequence[str]", wanted: int) -> None:
    """The lines that differ most, with source, references and every output."""
    from rich.table import Table
    from rich.text import Text

    from regard.look.trace import visible

    rows = comparison.differing(wanted)
    if rows:
        console.print("The lines on which they differ most, by chrF", markup=False)
    for row in rows:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(overflow="fold", max_width=24)
        grid.add_column(justify="right")
        grid.add_column(overflow="fold")
        grid.add_row(Text("source"), "", Text(visible(comparison.test.sources[row])))
        for reference in comparison.test.references_of(row):
            grid.add_row(Text("reference"), "", Text(visible(reference)))
        for place, (name, rating) in enumerate(zip(names, comparison.ratings, strict=True)):
            output = visible(comparison.systems[place].outputs[row])
            grid.add_row(Text(name, style=_style(place)), f"{rating.closeness[row]:.1f}", Text(output))
        console.print(f"\n{comparison.test.place(row)}", markup=False)
        console.print(grid)


def _style(place: int) -> str:
    """The colour of a system."""
    return _STYLES[place % len(_STYLES)]
