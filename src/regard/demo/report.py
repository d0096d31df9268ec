"""The demo's page, report.html: one file with everything in it, which needs no network and runs no script."""

import base64
import io
import os
import platform
import shlex
import tempfile
from datetime import date
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regard import __version__
from regard.demo.findings import SHORT_TITLE, TITLE, Findings, Result, marked
from regard.demo.pronounce import BUCKETS
from regard.demo.screen import COLOURS, NOTHING, next_commands, spoken
from regard.errors import MissingExtra, RunError
from regard.look.trace import FIXED_VECTOR

MARKERS = {"rnn-fixed": ("o", "●"), "rnn-attention": ("s", "■"), "transformer": ("^", "▲")}
"""Of the three stages' lines, as matplotlib names them and as a character, for those who do not tell by colour."""


class Look(NamedTuple):
    """How a chart is drawn: for a wide or a narrow screen, on a light or a dark page."""

    width: float  # inches
    height: float
    ink: str
    lines: str


_LIGHT, _DARK = ("#3d444d", "#d8dee4"), ("#c3cad2", "#3a424c")
_WIDE, _NARROW = (8.4, 3.8), (3.6, 3.0)
LOOKS = {
    "(max-width: 40rem) and (prefers-color-scheme: dark)": Look(*_NARROW, *_DARK),
    "(max-width: 40rem)": Look(*_NARROW, *_LIGHT),
    "(prefers-color-scheme: dark)": Look(*_WIDE, *_DARK),
    "all": Look(*_WIDE, *_LIGHT),
}
"""The drawings of each chart, by the media query that chooses it; the first that fits is shown."""


def require_jinja() -> None:
    """Fail before the training, not after it.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise MissingExtra("jinja2", "demo", "The demo's report")


def write_report(found: Findings, path: Path) -> Path:
    """Write the page.

    Args:
        found: what to show.
        path: of the page; its folder must exist.

    Returns:
        the path.

    Raises:
        MissingExtra: jinja2 is not installed.
        RunError: the file cannot be written.
    """
    require_jinja()
    from jinja2 import Environment, StrictUndefined

    template = (files("regard.demo") / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        found=found,
        results=found.results,
        buckets=[f"{shortest}–{longest}" for shortest, longest in BUCKETS],
        colours=COLOURS,
        glyphs={name: glyph for name, (_, glyph) in MARKERS.items()},
        by_length=drawings(_by_length, found),
        learning=drawings(_learning, found),
        titles=[(result.stage, marked(result.title, found.title_phones)) for result in found.results],
        looks=[(result.stage, picture(result)) for result in found.results if result.trace.cross is not None],
        nothing=NOTHING,
        title=TITLE,
        short_title=SHORT_TITLE,
        fixed_vector=FIXED_VECTOR,
        commands=next_commands(found),
        rerun=f"regard demo --minutes {found.minutes:g} --out {shlex.quote(str(path.parent))}",
        seconds=spoken(found.seconds),
        training=spoken(max(result.seconds for result in found.results)),
        made=f"{date.today().isoformat()}, Regard {__version__}, torch {torch.__version__}, Python "
             f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} processor cores",
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot write the report: {error.strerror}. The models are trained and saved: free the "
                       "place and start the demo again to have it written") from None
    return path


def data_uri(content: bytes, kind: str) -> str:
    """A file as an address that holds it, such as "data:image/png;base64,…"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def picture(result: Result) -> str:
    """Where a model's last layer looked, as the address of a picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "look.png"
        result.trace.picture(path, layer=result.trace.layers)
        return data_uri(path.read_bytes(), "image/png")


def drawings(draw: Any, found: Findings) -> dict[str, str]:
    """A chart in each of LOOKS: media query → address of an SVG."""
    return {media: data_uri(_svg(draw, found, look), "image/svg+xml") for media, look in LOOKS.items()}


def _svg(draw: Any, found: Findings, look: Look) -> bytes:
    """One drawing of a chart, on a transparent ground."""
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "regard", "font.family": "sans-serif", "font.size": 10,
        "font.sans-serif": ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
        "text.color": look.ink, "axes.labelcolor": look.ink, "xtick.color": look.ink, "ytick.color": look.ink,
        "text.usetex": False,
    }
    content = io.BytesIO()
    with rc_context(settings):
        figure = Figure(figsize=(look.width, look.height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(look.lines)
        axes.grid(axis="y", color=look.lines, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=6)
        draw(axes, found)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return content.getvalue()


def _line(axes: Axes, result: Result, x: list[float], y: list[float]) -> None:
    """One stage's line."""
    name = result.stage.name
    axes.plot(x, y, color=COLOURS[name], marker=MARKERS[name][0], markersize=6, linewidth=2.2, clip_on=False, zorder=3)


def _by_length(axes: Axes, found: Findings) -> None:
    """Phone error rate over source length."""
    places = [float(place) for place in range(len(BUCKETS))]
    for result in found.results:
        _line(axes, result, places, result.by_length)
    highest = max(max(result.by_length) for result in found.results)
    axes.set_ylim(0, max(20, 10 * -(-highest // 10)))
    axes.yaxis.set_major_formatter("{x:.0f}%")
    axes.set_xticks(places, [f"{shortest}–{longest}" for shortest, longest in BUCKETS])
    axes.set_xlim(-0.3, len(BUCKETS) - 0.7)
    axes.set_xlabel("letters of the text")
    axes.set_ylabel("phone error rate")


def _learning(axes: Axes, found: Findings) -> None:
    """Validation loss over seconds of training."""
    for result in found.results:
        _line(axes, result, [seconds for seconds, _ in result.curve], [loss for _, loss in result.curve])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation loss, nats per phone")
