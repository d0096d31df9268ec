"""Attention pooling: a curve from noisy samples, as attention whose keys are places and whose values are plain numbers.

    python examples/attention_pooling.py --out pooling.png

A thermometer was read 80 times in a day, unevenly and with noise. What was the temperature at any time? Each time asked
about is a query, each reading's time a key, its temperature a value, and three scores answer:

    mean      score 0                   every reading weighs the same, whatever is asked
    fixed     -(q - k)² / 2h², h = 3    near readings weigh more: the kernel regression of Nadaraya and Watson (1964)
    learned   the same                  h by gradient descent, so that each reading is foretold by the others

Without --out it prints the errors alone.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

import regard
from regard.model.attention import Gaussian

Score = Callable[[Tensor, Tensor], Tensor]
READINGS, NOISE, SEED = 80, 1.5, 1  # a count, °C, and the generator's seed
START = 3.0  # hours, the bandwidth that is fixed, and from which the learned one sets out
STEPS, RATE = 200, 0.05
INK, GREY, LINE = "#22272e", "#6e7781", "#d0d7de"
COLOURS = {"mean": "#2c8c62", "fixed": "#d1642a", "learned": "#1f6fb2"}
BLUES = LinearSegmentedColormap.from_list("weights", ["#f6f8fa", "#cfe0ec", "#8fb8d4", "#3f7fae", "#123f66"])


class Answer(NamedTuple):
    """What a score answers: its name, the temperatures, (T, 1), and the weights, (T, S)."""

    label: str
    context: Tensor
    weights: Tensor


def truth(hour: Tensor) -> Tensor:
    """The temperature, °C, at an hour of the day: a slow wave, and a faster one on it."""
    return 12 + 6 * torch.sin((hour - 10) * math.tau / 24) + 3 * torch.sin((hour - 2) * math.tau / 8)


def readings() -> tuple[Tensor, Tensor]:
    """Hours and temperatures, both (S, 1): numbers without a width get one by [:, None]."""
    generator = torch.Generator().manual_seed(SEED)
    hours = (torch.arange(READINGS) + torch.rand(READINGS, generator=generator)) * 24 / READINGS
    temperatures = truth(hours) + NOISE * torch.randn(READINGS, generator=generator)
    return hours[:, None], temperatures[:, None]


def mean(query: Tensor, keys: Tensor) -> Tensor:
    """The score that prefers nothing, (T, S): its softmax is 1 / S everywhere."""
    return torch.zeros(len(query), len(keys))


def held_out_error(score: Score, hours: Tensor, temperatures: Tensor) -> Tensor:
    """Root mean square, °C, of foretelling each reading from the others: if it saw itself, the best h would be 0."""
    others = ~torch.eye(len(hours), dtype=torch.bool)
    foretold, _ = regard.attend(hours, hours, temperatures, score, others)
    return (foretold - temperatures).square().mean().sqrt()


def learn(hours: Tensor, temperatures: Tensor) -> Gaussian:
    """A kernel whose bandwidth foretells the readings best."""
    kernel = Gaussian(START, learn=True)
    optimizer = torch.optim.Adam(kernel.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        held_out_error(kernel, hours, temperatures).backward()
        optimizer.step()
    return kernel


def draw(path: str, hours: Tensor, temperatures: Tensor, asked: Tensor, answers: dict[str, Answer]) -> None:
    """The curves above, and below them the weights of each: which reading counts how much at which time."""
    margins = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14, hspace=0.03)  # inches, inches, share of a panel
    figure = Figure(figsize=(11, 8.4), layout=margins)
    panels = figure.subplot_mosaic([["curves"] * 3, list(answers)], height_ratios=[1.2, 1])
    draw_curves(panels["curves"], hours, temperatures, asked, answers)
    scale = PowerNorm(0.5, 0, max(answer.weights.max().item() for answer in answers.values()))
    for name, answer in answers.items():
        shown = panels[name].pcolormesh(hours[:, 0], asked[:, 0], answer.weights, cmap=BLUES, norm=scale)
        panels[name].set_title(answer.label, loc="left", fontsize=10.5, color=COLOURS[name], fontweight="bold")
        panels[name].set(xlim=(0, 24), ylim=(24, 0), xlabel="key: time of the reading (h)", yticks=range(0, 25, 6),
                         box_aspect=1)
    panels["mean"].set_ylabel("query: time asked about (h)")
    for panel in panels.values():
        panel.set_xticks(range(0, 25, 3 if panel is panels["curves"] else 6))
        panel.tick_params(color=LINE, labelcolor=GREY)
        panel.spines[:].set_color(LINE)
    bar = figure.colorbar(shown, ax=[panels[name] for name in answers], pad=0.015,
                          ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4])
    bar.set_label("weight (a row sums to 1; square-root scale)")
    bar.ax.tick_params(color=LINE, labelcolor=GREY)
    bar.outline.set_color(LINE)
    figure.savefig(path, dpi=160, facecolor="white")


def draw_curves(panel: Axes, hours: Tensor, temperatures: Tensor, asked: Tensor, answers: dict[str, Answer]) -> None:
    """Readings, the truth and the three answers, over the day."""
    panel.scatter(hours, temperatures, s=18, color=GREY, alpha=0.7, linewidth=0, label=f"{READINGS} noisy readings")
    panel.plot(asked, truth(asked), color=INK, linewidth=1.4, linestyle=(0, (4, 3)), label="true temperature")
    for name, answer in answers.items():
        panel.plot(asked, answer.context, color=COLOURS[name], linewidth=2.2, label=answer.label)
    panel.set(xlim=(0, 24), xlabel="time of day (h)", ylabel="temperature (°C)", yticks=range(4, 25, 4))
    panel.set_title("Attention pooling: a day's temperature from noisy readings", loc="left", fontsize=14, pad=12)
    panel.legend(frameon=False, loc="upper left", ncols=2, labelcolor=INK)


def main() -> None:
    """Learn, print the errors, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.png", help="draw the curves and the weights into this file")
    out = parser.parse_args().out
    hours, temperatures = readings()
    asked = torch.linspace(0, 24, 241)[:, None]
    kernel = learn(hours, temperatures)
    scores: dict[str, tuple[str, Score]] = {
        "mean": ("mean of all readings", mean),
        "fixed": (f"fixed bandwidth, {START:.2f} h", Gaussian(START)),
        "learned": (f"learned bandwidth, {kernel.bandwidth:.2f} h", kernel),
    }
    answers = {}
    print("root mean square error, °C   of held-out readings   of the curve")
    for name, (label, score) in scores.items():
        with torch.no_grad():
            answers[name] = Answer(label, *regard.attend(asked, hours, temperatures, score))
            held_out = held_out_error(score, hours, temperatures)
        off = (answers[name].context - truth(asked)).square().mean().sqrt()
        print(f"{label:<29}{held_out:>20.2f} {off:>14.2f}")
    if out:
        draw(out, hours, temperatures, asked, answers)
        print(f"drawn in {out}")


if __name__ == "__main__":
    main()
