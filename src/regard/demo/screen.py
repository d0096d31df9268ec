"""What the demo shows on a terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.demo.findings import SHORT_TITLE, TITLE, Findings, marked
from regard.demo.pronounce import BUCKETS
from regard.demo.stages import STAGES, Stage
from regard.look.terminal import render

COLOURS = {"rnn-fixed": "#d55e00", "rnn-attention": "#3391d4", "transformer": "#009e73"}
"""Of the three stages, here and in the report: told apart by every kind of colour vision, on dark and on light."""

_BAR = 16  # cells for 100%


class Screen:
    """The terminal, or the file that stands for it.

    Args:
        console: where to print; default: standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def heading(self, title: str, text: str = "") -> None:
        """A new part of the demo, and what it is about."""
        self.console.print()
        self.console.rule(Text(title, style="bold"), align="left", characters="─")
        if text:
            self.console.print(text, markup=False)

    def opening(self, pairs: dict[str, int], seconds: float) -> None:
        """What is going to happen."""
        self.heading("Regard: three ways to turn one sequence into another",
                     "English spelling in, pronunciation out: \"attention\" → AH T EH N SH AH N. From the CMU "
                     f"Pronouncing Dictionary come {pairs['train']:,} pairs to learn from, single words and phrases of up "
                     f"to 60 letters. Three models of like size learn from them for {spoken(seconds)} each. Then they are "
                     "compared on words that none of them has seen.")

    def stage(self, stage: Stage) -> None:
        """The heading above a training."""
        number = STAGES.index(stage) + 1
        self.heading(f"{number} of {len(STAGES)}  {stage.title}  ({stage.papers})", stage.idea)

    def findings(self, found: Findings, report: Path) -> None:
        """Everything that was found out."""
        self.scores(found)
        self.lengths(found)
        self.title(found)
        self.words(found)
        self.looks(found)
        self.closing(found, report)

    def scores(self, found: Findings) -> None:
        """The one table."""
        self.heading("Scores", f"On {found.pairs['test']:,} words and phrases of words that none of them has seen. The phone "
                     "error rate is the share of phones to insert, delete or replace; lower is better.")
        table = _table("", "parameters", "updates", "seconds", "phone error rate", "exact match")
        for result in found.results:
            table.add_row(_name(result.stage), f"{result.parameters:,}", f"{result.updates:,}", f"{result.seconds:.0f}",
                          f"{result.error_rate:.1f}%", f"{result.exact_match:.1f}%")
        self.console.print(table)

    def lengths(self, found: Findings) -> None:
        """Error by source length, a bar for each."""
        self.heading("Phone error rate by length", "One vector holds a short word, but has to hold a long phrase too. "
                     "Attention goes back to the letters instead.")
        table = Table(box=None, padding=(0, 3, 0, 0))
        table.add_column("letters", justify="right", no_wrap=True)
        for result in found.results:
            table.add_column(_name(result.stage), no_wrap=True)
        for row, (shortest, longest) in enumerate(BUCKETS):
            bars = [_bar(result.by_length[row], COLOURS[result.stage.name]) for result in found.results]
            table.add_row(f"{shortest}–{longest}", *bars)
        self.console.print(table)

    def title(self, found: Findings) -> None:
        """One long text, pronounced by all three."""
        self.heading(f"{len(TITLE)} letters, pronounced by all three",
                     f'"{TITLE}". Wrong phones are red and underlined, missing ones are dots.')
        table = _table("", "", justify="left")
        table.add_row("dictionary", found.title_phones)
        for result in found.results:
            table.add_row(_name(result.stage), phones(marked(result.title, found.title_phones)))
        self.console.print(table)

    def words(self, found: Findings) -> None:
        """New words."""
        self.heading("Words that are in no dictionary", "Nobody told them how these sound.")
        table = _table("", *(_name(result.stage) for result in found.results), justify="left")
        for row, word in enumerate(found.words):
            table.add_row(word, *(result.words[row] for result in found.results))
        self.console.print(table)

    def looks(self, found: Findings) -> None:
        """Where the RNN's attention looked; the report shows the Transformer's too."""
        self.heading("Where attention looked", f'"{SHORT_TITLE}": a line for each phone, and in it a cell for each letter, '
                     "the darker the more of its weight lies there. Nobody told the model which letter makes which sound.")
        for result in found.results:
            if result.trace.cross is not None:
                self.console.print(render(result.trace))
                return

    def closing(self, found: Findings, report: Path) -> None:
        """What to type next."""
        self.heading("Next")
        best = min(found.results, key=lambda result: result.error_rate)
        rows = [
            (f"open {report}", "the same with charts and pictures, in a browser"),
            (f'echo "your own words" | regard translate {best.folder}', "pronounce anything, letters a–z and spaces"),
            (f'regard look {best.folder} "through thorough thought"', "see where it looks"),
            (f"regard evaluate {best.folder}", "its scores again, by every metric"),
            ("regard init --list", "configs to start from with your own pairs of lines"),
        ]
        table = _table("", "", justify="left")
        for command, purpose in rows:
            table.add_row(Text(command, style="bold"), Text(purpose, style="dim"))
        self.console.print(table)
        self.console.print(f"\nDone in {spoken(found.seconds)}.", markup=False)


def spoken(seconds: float) -> str:
    """A time for people: "45 s", "1 min 45 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes and rest else f"{minutes} min" if minutes else f"{rest} s"


def phones(marks: Iterable[tuple[str, bool]]) -> Text:
    """Phones, the wrong ones marked."""
    return Text(" ").join(Text(phone, style="" if right else "bold red underline") for phone, right in marks)


def _name(stage: Stage) -> Text:
    """A stage's title in its colour."""
    return Text(stage.title, style=COLOURS[stage.name])


def _bar(percent: float, colour: str) -> Text:
    """A bar and its value; above 100% the bar is full."""
    eighths = round(min(percent, 100) / 100 * _BAR * 8)
    bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
    return Text.assemble((f"{bar:<{_BAR}}", colour), f" {percent:5.1f}%")


def _table(*columns: str | Text, justify: str = "right") -> Table:
    """A table without lines, its first column at the left."""
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=any(map(str, columns)))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or justify == "left" else "right", overflow="fold")
    return table


def plain(cells: Sequence[str]) -> str:
    """Cells as one line."""
    return "  ".join(cells)
