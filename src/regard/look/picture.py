"""The alignment matrix as a picture: source across, output down, the darker the cell the larger the weight.

Where the layer or the head is left open, there is one panel for each, as long as their labels can be read side by
side; failing that, one panel for each layer with the mean of its heads; failing that, one panel with the mean of all.
All panels share one scale from 0 to 1. Sizes are in inches, font sizes in points.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from rich.cells import cell_len, set_cell_size

from regard.errors import ConfigError, RunError
from regard.look import fonts
from regard.look.trace import FIXED_VECTOR, Trace, visible

FORMATS = (".png", ".svg", ".pdf")
MOST_TOKENS = 120
_DOTS_PER_INCH = 160
_INK, _GREY, _LINE = "#22272e", "#6e7781", "#d0d7de"
_COLOURS = LinearSegmentedColormap.from_list("regard", ["#f6f8fa", "#cfe0ec", "#8fb8d4", "#3f7fae", "#123f66"])
_SCALE = Normalize(0, 1)
_WIDEST, _TALLEST = 22.0, 26.0  # of all panels; a wider picture cannot be read without scrolling both ways
_SMALLEST_CELL, _LARGEST_CELL = 0.105, 0.34
_LONGEST_LABEL = 24


def save_picture(trace: Trace, path: str | Path, layer: int | None = None, head: int | None = None) -> None:
    """Draw a trace into a file.

    A model with a fixed vector has no matrix; its picture shows the probability of each output token. Of a side with
    more than 120 tokens the first 120 are drawn, and the picture says so.

    Args:
        trace: what to draw.
        path: ends in .png, .svg or .pdf; the folder must exist. A file of this name is replaced.
        layer: from 1; None draws each layer where there is room, else their mean.
        head: from 1; None draws each head where there is room, else their mean.

    Raises:
        ConfigError: an unknown suffix, or no such layer or head.
        RunError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f'{path}: a picture\'s name ends in one of {", ".join(FORMATS)}, and this one in "{suffix}"')
    if trace.cross is not None or layer is not None or head is not None:
        trace.matrix(layer, head)
    content = io.BytesIO()
    _figure(trace, layer, head).savefig(content, format=suffix[1:], dpi=_DOTS_PER_INCH, bbox_inches="tight",
                                        pad_inches=0.25, facecolor="white")
    try:
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise RunError(f"{path}: cannot write the picture: {error.strerror}. Give a name in a folder that exists and "
                       "can be written to") from None


@dataclass(frozen=True)
class _Side:
    """The labels of one axis and the fonts to draw them in."""

    labels: list[str]
    text: str
    families: list[str]
    missing: str
    note: str


@dataclass(frozen=True)
class _Grid:
    """Which panels there are, row by row, and the size of a cell of theirs."""

    panels: list[tuple[int | None, int | None]]
    columns: int
    cell: float
    note: str

    @property
    def rows(self) -> int:
        """Rows of panels."""
        return math.ceil(len(self.panels) / self.columns)

    @property
    def font_size(self) -> float:
        """Of the tokens."""
        return min(9.5, max(5.5, self.cell * 72 * 0.62))


def _figure(trace: Trace, layer: int | None, head: int | None) -> Figure:
    """The whole picture. Its size is that of the panels alone; saving widens it to hold what is written around them."""
    source = _side("source", trace.source, trace.source_text)
    target = _side("output", trace.target, trace.target_text)
    if trace.cross is None:
        figure = _draw_probabilities(trace, target)
        single, caption = True, "no attention"
        notes = [FIXED_VECTOR]
    else:
        grid = _grid(trace, layer, head, len(source.labels), len(target.labels))
        figure = _draw_grid(trace, grid, source, target)
        single, caption = len(grid.panels) == 1, trace.caption(*grid.panels[0])
        notes = [grid.note]
    title = _side("model", [], f"{trace.model}: {caption}" if single else trace.model)
    fonts.report("".join(dict.fromkeys(source.missing + target.missing + title.missing)))
    _write_header(figure, title, source, target, [source.note, target.note, *notes], up=0.4)
    return figure


def _side(name: str, tokens: list[str], text: str) -> _Side:
    """Labels and fonts for one side, cut to what can be read."""
    labels = [_crop(visible(token), _LONGEST_LABEL) for token in tokens[:MOST_TOKENS]]
    text = visible(text)
    chosen = fonts.choose("".join(labels) + text)
    blank = str.maketrans(dict.fromkeys(chosen.missing, fonts.BOX))
    note = f"The first {MOST_TOKENS} of {len(tokens)} {name} tokens are drawn." if len(tokens) > MOST_TOKENS else ""
    return _Side([label.translate(blank) for label in labels], text.translate(blank), *chosen, note)


def _crop(text: str, width: int) -> str:
    """The text, or as much of it as fits into so many narrow letters."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def _grid(trace: Trace, layer: int | None, head: int | None, S: int, T: int) -> _Grid:
    """As many panels as can be read side by side."""
    layers = [layer] if layer is not None else list(range(1, trace.layers + 1))
    heads = [head] if head is not None else list(range(1, trace.heads + 1))
    note = ""
    for rows, columns in ((layers, heads), (layers, [head]), ([layer], [head])):
        panels = [(row, column) for row in rows for column in columns]
        across = len(columns) if len(rows) > 1 and len(columns) > 1 else _balanced(len(panels), S, T)
        down = math.ceil(len(panels) / across)
        if across * S * _SMALLEST_CELL <= _WIDEST and down * T * _SMALLEST_CELL <= _TALLEST:
            break
        note = (f"{len(layers) * len(heads)} panels of this size could not be read, so these are means. "
                "Choose a layer and a head to see one alone.")
    return _Grid(panels, across, _cell(across * S, down * T), note)


def _balanced(panels: int, S: int, T: int) -> int:
    """The number of panels in a row that leaves the largest cells."""
    return max(range(1, panels + 1), key=lambda across: (_cell(across * S, math.ceil(panels / across) * T), -across))


def _cell(across: int, down: int) -> float:
    """The side of a cell when so many stand side by side, and so many below each other."""
    return max(_SMALLEST_CELL, min(_LARGEST_CELL, 13 / across, 13 / down))


def _draw_grid(trace: Trace, grid: _Grid, source: _Side, target: _Side) -> Figure:
    """All panels, tokens at the left and below, and the scale at the right."""
    width, height = len(source.labels) * grid.cell, len(target.labels) * grid.cell
    gap_x, gap_y = 0.2, 0.36
    total_x = grid.columns * (width + gap_x) - gap_x
    total_y = grid.rows * (height + gap_y) - gap_y
    figure = Figure(figsize=(total_x, total_y))
    for number, (layer, head) in enumerate(grid.panels):
        row, column = divmod(number, grid.columns)
        bottom = total_y - height - row * (height + gap_y)
        left = column * (width + gap_x)
        axes = _axes(figure, left, bottom, width, height)
        _draw_panel(axes, trace.matrix(layer, head)[: len(target.labels), : len(source.labels)].numpy(), grid.cell)
        if len(grid.panels) > 1:
            axes.set_title(_title(trace, layer, head), loc="left", pad=4, **_text(8.5, _GREY))
        if column == 0:
            _label_rows(axes, target, grid)
        if number + grid.columns >= len(grid.panels):
            _label_columns(axes, source, grid)
    if len(grid.panels) == 1:
        _write_probabilities(axes, trace, grid.font_size)
    _draw_scale(figure, 0.95 if len(grid.panels) == 1 else 0.3)
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches, plain whatever the user's settings are."""
    total_x, total_y = figure.get_size_inches()
    axes = figure.add_axes((left / total_x, bottom / total_y, width / total_x, height / total_y), facecolor="white")
    axes.grid(False)
    axes.tick_params(length=0, pad=3)
    return axes


def _draw_panel(axes: Axes, weights: Any, cell: float) -> None:
    """One matrix (T, S), first output token at the top."""
    axes.pcolormesh(weights, cmap=_COLOURS, norm=_SCALE, edgecolors="white", linewidth=min(0.8, cell * 3))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=_LINE, linewidth=0.6)


def _title(trace: Trace, layer: int | None, head: int | None) -> str:
    """Which matrix a panel of several shows."""
    names = [("layer", layer, trace.layers), ("head", head, trace.heads)]
    return ", ".join(f"{name} {chosen}" if chosen else f"mean of {count} {name}s" for name, chosen, count in names
                     if count > 1)


def _label_rows(axes: Axes, target: _Side, grid: _Grid) -> None:
    """Output tokens beside their rows."""
    places = [row + 0.5 for row in range(len(target.labels))]
    axes.set_yticks(places, target.labels, **_text(grid.font_size, _INK, target.families))


def _label_columns(axes: Axes, source: _Side, grid: _Grid) -> None:
    """Source tokens below their columns: upright where they fit, slanted where they part, else vertical."""
    places = [column + 0.5 for column in range(len(source.labels))]
    room, size = grid.cell * 72, grid.font_size
    text = _text(size, _INK, source.families)
    widths = [cell_len(label) * size * 0.6 for label in source.labels]
    if max(widths[:-1], default=0) <= room and widths[-1] <= 1.6 * room:
        axes.set_xticks(places, source.labels, **text)
    elif room >= 1.65 * size:
        axes.set_xticks(places, source.labels, rotation=45, ha="right", va="top", rotation_mode="anchor", **text)
    else:
        axes.set_xticks(places, source.labels, rotation=90, **text)


def _write_probabilities(axes: Axes, trace: Trace, size: float) -> None:
    """The probability of each output token, right of its row."""
    beside: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points",
                              "annotation_clip": False}
    axes.annotate("probability", (1, 0), (6, 4), **beside, **_text(8, _GREY))
    for row, probability in enumerate(trace.probabilities[:MOST_TOKENS]):
        axes.annotate(f"{probability:.2f}", (1, row + 0.5), (6, 0), va="center_baseline", **beside,
                      **_text(size, _GREY))


def _draw_scale(figure: Figure, offset: float) -> None:
    """The colours' scale, at the right margin."""
    width, height = figure.get_size_inches()
    bar = 1.4
    axes = _axes(figure, width + offset, height - bar, 0.09, bar)
    scale = figure.colorbar(ScalarMappable(_SCALE, _COLOURS), cax=axes)
    scale.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"], **_text(7.5, _GREY))
    scale.set_label("attention weight", **_text(7.5, _GREY))
    scale.outline.set(color=_LINE, linewidth=0.6)


def _draw_probabilities(trace: Trace, target: _Side) -> Figure:
    """A bar for the probability of each output token."""
    T = len(target.labels)
    grid = _Grid([(None, None)], 1, _cell(1, T), "")
    figure = Figure(figsize=(4.5, T * grid.cell))
    axes = _axes(figure, 0, 0, 4.5, T * grid.cell)
    places = [row + 0.5 for row in range(T)]
    axes.barh(places, trace.probabilities[:T], height=0.72, color=_COLOURS(0.6))
    axes.set(xlim=(0, 1), ylim=(T, 0), facecolor="#f6f8fa")
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], **_text(8, _GREY))
    _label_rows(axes, target, grid)
    _write_probabilities(axes, trace, grid.font_size)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _write_header(figure: Figure, title: _Side, source: _Side, target: _Side, notes: list[str], up: float) -> None:
    """What is drawn, both texts and what there is to say about them, from `up` inches above the panels upwards."""
    width, height = figure.get_size_inches()
    room = max(6.5, width)
    indent = 0.78
    for note in reversed(wrap(" ".join(filter(None, notes)), _letters(room, 8))):
        figure.text(0, (height + up) / height, note, **_text(8, _GREY))
        up += 0.17
    up += 0.05
    for name, side in (("output ↓", target), ("source →", source)):
        figure.text(0, (height + up) / height, name, **_text(9, _GREY))
        figure.text(indent / width, (height + up) / height, _crop(side.text, _letters(room - indent, 9)),
                    **_text(9, _INK, side.families))
        up += 0.21
    figure.text(0, (height + up + 0.04) / height, _crop(title.text, _letters(room, 12)),
                **_text(12, _INK, title.families))


def _letters(inches: float, size: float) -> int:
    """How many letters of a size go into a line."""
    return int(inches * 72 / (size * 0.57))


def _text(size: float, colour: str, families: list[str] | None = None) -> dict[str, Any]:
    """How a text is drawn: as it stands, never as mathematics or TeX, whatever the user's settings are."""
    return {"fontsize": size, "color": colour, "fontfamily": families or [fonts.BASE], "parse_math": False,
            "usetex": False}
