"""What the demo shows on a terminal."""

import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.demo.findings import SHORT_TITLE, TITLE, Findings, marked
from regard.demo.pronounce import BUCKETS, LONGEST, Split
from regard.demo.stages import STAGES, Stage
from regard.look.terminal import render

COLOURS = {"rnn-fixed": "#d55e00", "rnn-attention": "#3391d4", "transformer": "#009e73"}
"""Of the three stages, here and in the report: told apart by every kind of colour vision, on dark and on light."""

NOTHING = "(nothing)"
"""What stands for an empty output."""

_BAR = 12  # cells for 100%


class Screen:
    """The terminal, or the file that stands for it.

    Args:
        console: where to print; default: standard output, where a character that its encoding lacks becomes "?".
    """

    def __init__(self, console: Console | None = None):
        if console is None and isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self.console = console or Console(highlight=False)

    def busy(self, doing: str) -> AbstractContextManager[object]:
        """A sign of life while something takes a few seconds, gone when it is done."""
        return self.console.status(doing)

    def heading(self, title: str, text: str = "") -> None:
        """A new part of the demo, and what it is about."""
        self.console.print()
        self.console.rule(Text(title, style="bold"), align="left", style="dim")
        if text:
            self.console.print(f"{text}\n", markup=False)

    def opening(self, pairs: Mapping[Split, int], seconds: float) -> None:
        """What is going to happen."""
        self.heading(
            "Regard: from one fixed vector to attention",
            'English spelling in, pronunciation out: "attention" becomes AH T EH N SH AH N. The CMU Pronouncing '
            f"Dictionary gives {pairs['train']:,} pairs to learn from, single words and phrases of up to {LONGEST} "
            f"letters. Three models of like size learn from the same pairs, each for {spoken(seconds)} at most. Then "
            "they are compared on words that none of them has seen.",
        )

    def stage(self, stage: Stage) -> None:
        """The heading above a training."""
        number = STAGES.index(stage) + 1
        self.heading(f"{number} of {len(STAGES)}: {stage.title} ({stage.papers})", stage.idea)

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
        self.heading(
            "Scores",
            f"On {found.pairs['test']:,} test texts, as many of each length. The phone error rate is the share of "
            "phones to insert, delete or replace. Exact match: texts without any error.",
        )
        table = _table("", "parameters", "updates", "seconds", "phone error rate", "exact match")
        for result in found.results:
            table.add_row(_name(result.stage), f"{result.parameters:,}", f"{result.updates:,}", f"{result.seconds:.0f}",
                          f"{result.error_rate:.1f}%", f"{result.exact_match:.1f}%")
        self.console.print(table)

    def lengths(self, found: Findings) -> None:
        """Error by source length, a bar for each."""
        self.heading(
            "Phone error rate by length",
            "A fixed vector has no more room for a phrase of sixty letters than for a word of three. Attention goes "
            "back to the letters for each phone.",
        )
        table = _table("letters", *(_name(result.stage) for result in found.results), justify="left")
        for row, (shortest, longest) in enumerate(BUCKETS):
            rates = [(result.by_length[row], COLOURS[result.stage.name]) for result in found.results]
            table.add_row(f"{shortest:>2}–{longest}", *(self.bar(*rate) for rate in rates))
        self.console.print(table)

    def title(self, found: Findings) -> None:
        """One long text, pronounced by all three."""
        self.heading(
            f"{len(TITLE)} letters, pronounced by all three",
            f'"{TITLE}". Wrong phones are red and underlined, and · stands for a missing one.',
        )
        table = _table("", "", justify="left")
        table.add_row("dictionary", found.title_phones)
        for result in found.results:
            table.add_row(_name(result.stage), phones(marked(result.title, found.title_phones)))
        self.console.print(table)

    def words(self, found: Findings) -> None:
        """New words."""
        self.heading("Words that are in no dictionary", "Not in this one, at least: nobody told the models how these "
                     "sound.")
        table = _table("", *(_name(result.stage) for result in found.results), justify="left")
        for row, word in enumerate(found.words):
            table.add_row(word, *(result.words[row] or NOTHING for result in found.results))
        self.console.print(table)

    def looks(self, found: Findings) -> None:
        """Where the first model that has attention looked; the report shows the others too."""
        self.heading(
            "Where attention looked",
            f'"{SHORT_TITLE}": a line for each phone, and in it a cell for each letter, the darker the more of the '
            "phone's attention lay there. Nobody told the model which letter makes which sound.",
        )
        trace = next(result.trace for result in found.results if result.trace.cross is not None)
        self.console.print(render(trace))

    def closing(self, found: Findings, report: Path) -> None:
        """What to type next."""
        self.heading("Next")
        self.console.print(f"Done in {spoken(found.seconds)}. In a browser, with charts and pictures:", markup=False)
        self.console.print(Text(f"  {report}", style="bold"), soft_wrap=True)
        for command, purpose in next_commands(found):
            self.console.print(f"\n{purpose}:", markup=False)
            self.console.print(Text(f"  {command}", style="bold"), soft_wrap=True)

    def bar(self, percent: float, colour: str) -> Text:
        """A bar and its value; from 100% on the bar is full."""
        eighths = round(min(percent, 100) / 100 * _BAR * 8)
        if self.console.encoding.lower().startswith("utf"):
            bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
        else:
            bar = "#" * round(eighths / 8)
        return Text.assemble((f"{bar:<{_BAR}}", colour), f" {percent:.0f}%")


def next_commands(found: Findings) -> list[tuple[str, str]]:
    """What to type next, and what for."""
    best = min(found.results, key=lambda result: result.error_rate)
    folder = shlex.quote(str(best.folder))
    return [
        (f'echo "your own words" | regard translate {folder}', "Pronounce anything, in letters a–z and spaces"),
        (f'regard look {folder} "through thorough thought"', "See where it looks"),
        (f"regard evaluate {folder}", "Score it again, by every metric"),
        ("regard init --list", "List configs to start from, for pairs of lines of your own"),
    ]


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


def _table(*columns: str | Text, justify: str = "right") -> Table:
    """A table without lines, its first column at the left and never broken."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(map(str, columns)))
    for number, column in enumerate(columns):
        left = number == 0 or justify == "left"
        table.add_column(column, justify="left" if left else "right", no_wrap=number == 0, overflow="fold")
    return table
