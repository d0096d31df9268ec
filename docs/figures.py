"""The figures of docs/from-rnn-to-transformer.md, each by one command.

    python docs/figures.py length    --ladder runs/ladder     BLEU by the length of the source, for the five main steps
    python docs/figures.py learning  --ladder runs/ladder     training loss by processor time
    python docs/figures.py positions                          what each scheme of positions adds to a score, by distance
    python docs/figures.py waiting                            time of one pass as the target grows

Each writes docs/figures/NAME.png; with --chinese its labels are Chinese, and it writes docs/figures/NAME.zh.png. The
ladder is made by benchmarks/ladder.py.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from regard.config_model import AnyModelConfig
from regard.data.batches import Batch
from regard.look import fonts
from regard.model.positions import Alibi, Relative, Rotary, Sinusoidal
from regard.model.seq2seq import Seq2Seq, build_model
from regard.training.objective import loss_of

HERE = Path(__file__).parent / "figures"
INK, GREY, LINE = "#22272e", "#6e7781", "#d0d7de"
MAIN = {
    "fixed, initial": ("fixed vector", "固定向量", "#b5651d"),
    "fixed, initial, reversed": ("fixed vector, source reversed", "固定向量,源句反转", "#e0a458"),
    "before, additive": ("attention before the cell", "注意力(先看再算)", "#3a8f5c"),
    "conv": ("convolution", "卷积", "#7b5ea7"),
    "transformer, sinusoidal": ("Transformer", "Transformer", "#1f6fae"),
}
"""The main steps: their names on a picture in English and Chinese, and their colours."""
CHINESE = {
    "tokens of the source": "源句词元数", "BLEU": "BLEU", "minutes of processor time": "处理器时间(分钟)",
    "training loss, nats a token": "训练损失(纳特/词元)", "distance from query to key": "查询与键的距离",
    "added to the score": "加到分数上的值", "score of equal vectors": "相同向量的分数(相对值)",
    "bucket of the learned bias": "可学习偏置的桶号", "target tokens": "目标词元数",
    "milliseconds of one training pass": "一次训练(前向加反向)的毫秒数",
}


class Words:
    """Labels in the language that was asked for."""

    def __init__(self, chinese: bool):
        self.chinese = chinese

    def __call__(self, text: str) -> str:
        """A label of an axis."""
        return CHINESE[text] if self.chinese else text

    def step(self, name: str) -> str:
        """A main step."""
        return MAIN[name][1 if self.chinese else 0]

    def path(self, name: str) -> Path:
        """Where a figure goes."""
        return HERE / f"{name}{'.zh' if self.chinese else ''}.png"


def axes_of(figure: Figure, words: Words, x: str, y: str, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Plain axes with their labels."""
    axes = figure.add_subplot(*place)
    axes.set_xlabel(words(x), color=GREY)
    axes.set_ylabel(words(y), color=GREY)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    return axes


def save(figure: Figure, words: Words, name: str) -> None:
    """Write a figure in fonts that have its letters."""
    families = fonts.choose("".join(CHINESE.values()) if words.chinese else "abc").families
    for text in figure.findobj(lambda artist: hasattr(artist, "set_fontfamily")):
        text.set_fontfamily(families)  # type: ignore[attr-defined]
    HERE.mkdir(exist_ok=True)
    figure.savefig(words.path(name), dpi=160, bbox_inches="tight", facecolor="white")
    print(words.path(name))


def results_of(ladder: Path, name: str) -> list[dict[str, object]]:
    """What the ladder found for a step, all seeds."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ladder.glob("*/result.json"))]
    return [result for result in found if result["name"] == name]


def draw_length(words: Words, ladder: Path) -> None:
    """BLEU by the length of the source."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = axes_of(figure, words, "tokens of the source", "BLEU")
    for name, (_, _, colour) in MAIN.items():
        found = results_of(ladder, name)
        lengths = [length for length in found[0]["by_length"] if length != "0-5"]
        scores = [statistics.mean(result["by_length"][length] for result in found) for length in lengths]
        axes.plot(lengths, scores, color=colour, marker="o", markersize=4, label=words.step(name))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, bbox_to_anchor=(1, 1), loc="upper left")
    save(figure, words, "length")


def draw_learning(words: Words, ladder: Path) -> None:
    """Training loss by processor time."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = axes_of(figure, words, "minutes of processor time", "training loss, nats a token")
    for name, (_, _, colour) in MAIN.items():
        result = results_of(ladder, name)[0]
        folder = ladder / f"{name.replace(', ', '-').replace(' ', '_')}-{result['seed']}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["kind"] == "train"]
        pace = result["cpu_minutes"] / result["updates"]  # updates are alike, so their share of the time is, too
        axes.plot([row["step"] * pace for row in rows], [row["loss"] for row in rows], color=colour, linewidth=1.2,
                  label=words.step(name))
    axes.set_ylim(1.5, 6)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save(figure, words, "learning")


def draw_positions(words: Words, ladder: Path) -> None:
    """What each scheme of positions tells a score about the distance of query and key."""
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    distance = torch.arange(0, 64)
    axes = axes_of(figure, words, "distance from query to key", "score of equal vectors", (1, 3, 1))
    waves = Sinusoidal(64).embed(torch.zeros(1, 64, 64))[0]
    turned = Rotary(64).rotate(torch.ones(1, 1, 64, 64))[0, 0]
    for told, name, colour, style in ((waves, "sinusoidal", "#1f6fae", "-"), (turned, "rotary", "#e0a458", "--")):
        scores = told @ told[0]
        axes.plot(distance, scores / scores[0], style, color=colour, label=name, linewidth=1.4)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes = axes_of(figure, words, "distance from query to key", "added to the score", (1, 3, 2))
    bias = Alibi(4).bias(torch.zeros(1, 64, 1))
    for head, colour in enumerate(("#c6dbef", "#6baed6", "#2171b5", "#08306b")):
        axes.plot(distance, bias[head, -1].flip(0), color=colour, label=f"alibi, {head + 1}", linewidth=1.2)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes = axes_of(figure, words, "distance from query to key", "bucket of the learned bias", (1, 3, 3))
    buckets = Relative(4, both_sides=False).bucket(torch.arange(0, -160, -1))
    axes.step(range(160), buckets, color="#3a8f5c", label="relative", where="post", linewidth=1.2)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save(figure, words, "positions")


TINY = {"width": 128, "layers": 2, "dropout": 0.0}
WAITING: dict[str, tuple[str, dict[str, object]]] = {
    "fixed, initial": ("o", TINY | {"kind": "rnn"}),
    "before, additive": ("s", TINY | {"kind": "rnn", "attention": "before"}),
    "conv": ("^", TINY | {"kind": "conv"}),
    "transformer, sinusoidal": ("D", TINY | {"kind": "transformer", "feedforward": 256}),
}


def draw_waiting(words: Words, ladder: Path) -> None:
    """Time of one training pass over the same number of tokens, in ever longer sentences."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = axes_of(figure, words, "target tokens", "milliseconds of one training pass")
    lengths = (8, 16, 32, 64, 128)
    for name, (marker, settings) in WAITING.items():
        model = build_model(TypeAdapter(AnyModelConfig).validate_python(settings), 1000, 1000)
        times = []
        for length in lengths:
            rows = [[5] * length] * (1024 // length)
            times.append(1000 * pass_time(partial(learn, model, Batch.of(rows, rows))))
        axes.plot(lengths, times, color=MAIN[name][2], marker=marker, markersize=4, label=words.step(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    save(figure, words, "waiting")


def learn(model: Seq2Seq, batch: Batch) -> None:
    """Forward and backward."""
    loss_of(model, batch)[0].backward()  # type: ignore[no-untyped-call]


def pass_time(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds, the least of some rounds."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


FIGURES: dict[str, Callable[[Words, Path], None]] = {
    "length": draw_length, "learning": draw_learning, "positions": draw_positions, "waiting": draw_waiting}


def main() -> None:
    """Draw one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(FIGURES))
    parser.add_argument("--ladder", type=Path, default=Path("runs/ladder"), help="folder of benchmarks/ladder.py")
    parser.add_argument("--chinese", action="store_true", help="labels in Chinese")
    options = parser.parse_args()
    FIGURES[options.name](Words(options.chinese), options.ladder)


if __name__ == "__main__":
    main()
