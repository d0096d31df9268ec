"""The alignment matrix as text: source tokens across the top, output tokens down the side, one shaded cell for each.

    ┌ A
    │ ┌ dog
    │ │ ┌ runs
    Ein    0.91  ▓▓· ·   A 0.62

The shade alone carries the value, so that it reads the same in one colour, in a file, and with TERM=dumb.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.text import Text

from regard.look.trace import FIXED_VECTOR, Trace, visible

LEVELS = (0.05, 0.15, 0.35, 0.6)  # a mean of heads is rarely near 1, so the steps are finer below
_STYLES = ("dim", "#5f9fd7", "#5f9fd7", "#5f9fd7", "#5f9fd7")
_GAP = 2
_NARROWEST = 24
_TAIL = 12  # of the source token that is repeated at the end of a row, in cells, where the screen is full
_FLAT = 3  # the longest label, in cells, that stands above its column instead of hanging beside a line


class _Marks(NamedTuple):
    """The characters it draws with."""

    shades: tuple[str, ...]
    corner: str
    stem: str
    ellipsis: str
    bar: str


_UNICODE = _Marks(("·", "░", "▒", "▓", "█"), "┌", "│", "…", "█")
_ASCII = _Marks((".", "-", "+", "*", "#"), ",", "|", "~", "#")


def render(trace: Trace, layer: int | None = None, head: int | None = None, width: int | None = None) -> RenderableType:
    """A trace for a rich console, which fits it to its width when it prints it.

    A source too long for one line of cells is cut into blocks, each with all output tokens. A model with a fixed vector
    gets its output tokens and their probabilities, and the reason why there is no matrix.

    Args:
        trace: what to show.
        layer: from 1; None takes the mean over all layers.
        head: from 1; None takes the mean over all heads.
        width: columns of text; None takes the console's.

    Raises:
        ConfigError: there is no such layer or head.
    """
    if trace.cross is not None or layer is not None or head is not None:
        trace.matrix(layer, head)
    return _View(trace, layer, head, width)


@dataclass(frozen=True)
class _View:
    """The trace once the console is known."""

    trace: Trace
    layer: int | None
    head: int | None
    width: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(_NARROWEST, self.width or options.max_width)
        page = _Page(self.trace, width, options.encoding)
        if self.trace.cross is None:
            lines = page.without_attention()
        else:
            caption = self.trace.caption(self.layer, self.head)
            lines = page.with_attention(self.trace.matrix(self.layer, self.head).tolist(), caption)
        yield Constrain(Group(*lines), width)


class _Page:
    """Lines of text for one trace at one width.

    Args:
        trace: what to show.
        width: columns of the page.
        encoding: of the console; characters outside it are escaped.
    """

    def __init__(self, trace: Trace, width: int, encoding: str):
        self.trace = trace
        self.width = width
        self.encoding = encoding
        self.marks = _UNICODE if encoding.lower().startswith("utf") else _ASCII
        self.target = [self.crop(self.plain(token), width // 3) for token in trace.target]
        self.side = max(map(cell_len, self.target))
        self.source = [self.crop(self.plain(token), self.space - 2) for token in trace.source]

    @property
    def space(self) -> int:
        """Columns right of the output tokens and their probabilities."""
        return self.width - self.side - 4 - 2 * _GAP

    def plain(self, text: str) -> str:
        """Text that this console can write, and only as text."""
        return visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)

    def crop(self, text: str, width: int) -> str:
        """The text, or as much of it as fits."""
        return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + self.marks.ellipsis

    def line(self, *parts: str | tuple[str, str]) -> Text:
        """One line, never wrapped and never read as markup."""
        line = Text.assemble(*parts, no_wrap=True, overflow="ignore")
        line.rstrip()
        return line

    def head(self, caption: str) -> Iterator[Text]:
        """The model, the two texts, and how probable the output was."""
        yield Text(f"{self.plain(self.trace.model)}: {caption}", style="bold")
        for name, text in (("source", self.trace.source_text), ("output", self.trace.target_text)):
            yield Text.assemble((f"{name}  ", "dim"), self.plain(text), overflow="fold")
        total = self.trace.log_probability
        yield Text.assemble(("log-probability of the output  ", "dim"), f"{total:.2f} nats")
        yield self.line()

    def row_label(self, row: int) -> str:
        """An output token and its probability, as the left side of a row."""
        probability = self.trace.probabilities[row]
        return f"{set_cell_size(self.target[row], self.side)}{' ' * _GAP}{probability:4.2f}{' ' * _GAP}"

    def without_attention(self) -> Iterator[Text]:
        """A bar for the probability of each output token."""
        yield from self.head("no attention")
        yield Text(f"{FIXED_VECTOR} Each output token and its probability:")
        yield self.line()
        for row, probability in enumerate(self.trace.probabilities):
            bar = self.marks.bar * round(probability * min(40, self.space))
            yield self.line(self.row_label(row), (bar, _STYLES[-1]))

    def with_attention(self, matrix: list[list[float]], caption: str) -> Iterator[Text]:
        """The matrix, in as many blocks as the width asks for, and the legend."""
        yield from self.head(caption)
        widths = [cell_len(token) for token in self.source]
        flat = max(widths[:-1], default=0) <= _FLAT
        cell = max(1, *widths[:-1], 1) + 1 if flat else 2
        reserve = min(_GAP + min(max(widths), _TAIL) + len(" 0.00"), self.space // 2)
        blocks = _blocks(widths, cell, self.space, reserve)
        strongest = [row.index(max(row)) for row in matrix]
        for block in blocks:
            if len(blocks) > 1:
                yield Text(f"source tokens {block[0] + 1} to {block[-1] + 1} of {len(self.source)}", style="dim")
            yield from self.flat_labels(block, cell) if flat else self.hung_labels(block)
            for row, weights in enumerate(matrix):
                cells = [self.cell(weights[column], cell) for column in block]
                yield self.line(self.row_label(row), *cells, *self.tail(weights, strongest[row], block, cell))
            yield self.line()
        yield self.legend()

    def cell(self, weight: float, cell: int) -> tuple[str, str]:
        """One weight as a shade and its style."""
        level = sum(weight >= bound for bound in LEVELS)
        shade = self.marks.shades[level]
        filled = 1 if level == 0 else cell if cell == 2 else cell - 1
        return set_cell_size(shade * filled, cell), _STYLES[level]

    def tail(self, weights: list[float], strongest: int, block: range, cell: int) -> list[str | tuple[str, str]]:
        """The source token with the largest weight of a row, in the block that holds it."""
        room = self.space - len(block) * cell - _GAP - len(" 0.00")
        if strongest not in block or room < 1:
            return []
        return [" " * _GAP, (f"{self.crop(self.source[strongest], room)} {weights[strongest]:.2f}", "dim")]

    def flat_labels(self, block: range, cell: int) -> Iterator[Text]:
        """Short source tokens, each above its column."""
        indent = " " * (self.width - self.space)
        yield self.line(indent, "".join(set_cell_size(self.source[column], max(cell, cell_len(self.source[column])))
                                        for column in block))

    def hung_labels(self, block: range) -> Iterator[Text]:
        """Source tokens on lines of their own, each at the end of a stem that rises from its column."""
        indent = " " * (self.width - self.space)
        for depth, column in enumerate(block):
            stems = f"{self.marks.stem} " * depth
            yield self.line(indent, (f"{stems}{self.marks.corner} ", "dim"), self.source[column])

    def legend(self) -> Text:
        """What each shade stands for."""
        steps = [f"{self.marks.shades[level + 1]} {bound:.2f}" for level, bound in enumerate(LEVELS)]
        return Text(f"weight  {self.marks.shades[0]} less than {LEVELS[0]:.2f}   {'   '.join(steps)} and more\n"
                    "Left: probability of each output token. Right: source token of largest weight.", style="dim")


def _blocks(widths: list[int], cell: int, space: int, reserve: int) -> list[range]:
    """Cut the columns into blocks of about equal size in which every label ends before the right margin.

    Args:
        widths: of each label, in cells.
        cell: columns of text for each source token.
        space: columns of text for a block.
        reserve: how many of them stay free at its right.
    """
    most = max(1, (space - reserve) // cell)
    count = len(_cut(widths, cell, space, most))
    return _cut(widths, cell, space, min(most, math.ceil(len(widths) / count)))


def _cut(widths: list[int], cell: int, space: int, most: int) -> list[range]:
    """Blocks of at most so many columns, each as long as fits."""
    blocks = []
    start = 0
    while start < len(widths):
        stop = start + 1
        while stop < min(len(widths), start + most) and (stop - start) * cell + 2 + widths[stop] <= space:
            stop += 1
        blocks.append(range(start, stop))
        start = stop
    return blocks
