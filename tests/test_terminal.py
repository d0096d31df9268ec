"""The terminal view, read back from what it prints."""

import io
import math
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from regard.errors import ConfigError
from regard.look.terminal import LEVELS, render
from regard.look.trace import Trace

ENGLISH = ["Two", "children", "are", "playing", "in", "the", "park", ".", "</s>"]
CHINESE = [*"两个孩子在公园里。", "</s>"]


def make(source: list[str], target: list[str], cross: torch.Tensor | None = None, **changes: Any) -> Trace:
    """A trace whose attention runs down the diagonal, unless given."""
    if cross is None:
        cross = torch.zeros(1, 1, len(target), len(source))
        for row in range(len(target)):
            cross[0, 0, row, min(row, len(source) - 1)] = 1.0
    values: dict[str, Any] = {
        "source": source, "target": target, "source_text": " ".join(source[:-1]), "target_text": " ".join(target[:-1]),
        "cross": cross, "encoder": None, "decoder": None, "log_probabilities": [math.log(0.25)] * len(target),
        "model": "rnn, attention after the cell"}
    return Trace(**(values | changes))


def shown(trace: Trace, screen: int = 80, encoding: str = "utf-8", colour: bool = False, **choice: Any) -> list[str]:
    """The lines that a console of this width prints."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, newline="\n")
    console = Console(file=stream, width=screen, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(render(trace, **choice))
    stream.flush()
    return buffer.getvalue().decode(encoding).splitlines()


def at(line: str, column: int) -> str:
    """The character that begins in a column of the screen."""
    for end in range(len(line) + 1):
        if cell_len(line[:end]) >= column:
            return line[end : end + 1]
    return ""


def column_of(line: str, text: str) -> int:
    """The column of the screen in which a text begins."""
    return cell_len(line[: line.index(text)])


def test_every_cell_has_the_shade_of_its_weight_below_its_source_token() -> None:
    cross = torch.tensor([[0.0, 0.04, 0.06, 0.9], [0.14, 0.16, 0.3, 0.4], [0.61, 0.34, 0.05, 0.0]])[None, None]
    lines = shown(make(["alpha", "beta", "gamma", "</s>"], ["x", "y", "z"], cross))
    columns = [column_of(next(line for line in lines if line.endswith(f"┌ {token}")), "┌")
               for token in ("alpha", "beta", "gamma", "</s>")]
    rows = [next(line for line in lines if line.startswith(token)) for token in "xyz"]
    assert ["".join(at(row, column) for column in columns) for row in rows] == ["··░█", "░▒▒▓", "█▒░·"]


def block_sizes(lines: list[str]) -> list[int]:
    """How many source tokens each block holds, by its heading."""
    return [int(words[4]) - int(words[2]) + 1 for words in map(str.split, lines) if words[:2] == ["source", "tokens"]]


@pytest.mark.parametrize(("source", "target"), [
    (CHINESE, ENGLISH), (ENGLISH, CHINESE), ([*"knight", "</s>"], ["N", "AY1", "T", "</s>"]),
    (["N", "AY1", "T", "</s>"], [*"knight", "</s>"]), (["走って", "い", "ます", "</s>"], ["runs", "</s>"]),
])
def test_columns_stand_under_their_labels_for_wide_characters_too(source: list[str], target: list[str]) -> None:
    lines = shown(make(source, target))
    first = next(index for index, line in enumerate(lines) if line.startswith(target[0]) and "0.25" in line)
    heading = [line for line in lines[:first] if line.startswith("    ")]
    hung = "┌" in heading[0]
    marks = [column_of(heading[row], "┌") if hung else column_of(heading[0], token) for row, token in enumerate(source)]
    for row in range(len(target)):
        strongest = marks[min(row, len(source) - 1)]
        assert at(lines[first + row], strongest) == "█", (row, lines[first + row])


def test_short_source_tokens_stand_in_one_line() -> None:
    lines = shown(make([*"knight", "</s>"], ["N", "AY1", "T", "</s>"]))
    assert "k n i g h t </s>" in "\n".join(lines) and not any("┌" in line for line in lines)


def test_each_output_token_has_its_probability_and_strongest_source_token() -> None:
    lines = shown(make(["a", "longer-token", "</s>"], ["ein", "</s>"], log_probabilities=[-0.01, -2.0]))
    assert any(line.startswith("ein   0.99  ") and line.endswith("  a 1.00") for line in lines), lines
    assert any(line.startswith("</s>  0.14  ") and line.endswith("  longer-token 1.00") for line in lines), lines


def test_heading_names_model_matrix_and_texts() -> None:
    cross = torch.full((4, 4, 2, 3), 1 / 3)
    lines = shown(make(["a", "b", "</s>"], ["x", "</s>"], cross, model="transformer"), layer=4)
    assert lines[:4] == ["transformer: layer 4 of 4, mean of 4 heads", "source  a b", "output  x",
                         "log-probability of the output  -2.77 nats"]


def test_layer_and_head_choose_the_matrix() -> None:
    cross = torch.zeros(2, 2, 2, 3)
    cross[..., 0] = 1
    cross[1, 0, :, 0], cross[1, 0, :, 2] = 0, 1
    trace = make(["a", "b", "</s>"], ["x", "y"], cross)
    assert any(line.endswith("</s> 1.00") for line in shown(trace, layer=2, head=1))
    assert any(line.endswith("a 1.00") for line in shown(trace, layer=2, head=2))
    assert any(line.endswith("a 0.75") for line in shown(trace))


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_a_long_source_is_cut_into_blocks_that_hold_every_token(width: int) -> None:
    source = [f"token{index}" for index in range(60)] + ["</s>"]
    target = [f"out{index}" for index in range(20)] + ["</s>"]
    lines = shown(make(source, target), width)
    assert max(map(cell_len, lines)) <= width
    blocks = [line for line in lines if line.startswith("source tokens ")]
    assert len(blocks) == sum(line.startswith("out0   0.25") for line in lines) > 1
    assert blocks[0].startswith("source tokens 1 to ") and blocks[-1].endswith("to 61 of 61")
    heads = [line.split("┌ ")[1] for line in lines if "┌ " in line]
    assert [head.replace("…", "") for head in heads] == [
        token[: len(head) - 1] if "…" in head else token for token, head in zip(source, heads, strict=True)]


def test_the_blocks_beside_each_other_are_the_matrix() -> None:
    torch.manual_seed(1)
    cross = torch.rand(1, 1, 3, 61) * 0.9
    lines = shown(make([f"token{index}" for index in range(60)] + ["</s>"], ["x", "y", "</s>"], cross), 60)
    for row, token in enumerate(["x", "y", "</s>"]):
        rows = [line for line in lines if line.startswith(f"{token} ")]
        shades = "".join(line[12 : 12 + 2 * size : 2].ljust(size, "·")
                         for line, size in zip(rows, block_sizes(lines), strict=True))
        strongest = f"token{int(cross[0, 0, row].argmax())} {float(cross.amax(-1)[0, 0, row]):.2f}"
        assert sum(line.endswith(f"  {strongest}") for line in rows) == sum("token" in line for line in rows) == 1
        assert shades == "".join("·░▒▓█"[sum(weight >= bound for bound in LEVELS)] for weight in cross[0, 0, row])


def test_blocks_are_of_about_equal_size() -> None:
    lines = shown(make([f"token{index}" for index in range(50)], ["x", "</s>"]))
    sizes = block_sizes(lines)
    assert len(sizes) > 1 and max(sizes) - min(sizes) <= 1


def test_one_source_token_wider_than_the_screen_is_cut_and_marked() -> None:
    lines = shown(make(["x" * 300, "漢" * 300, "</s>"], ["y" * 300, "</s>"]), 60)
    cells = [line for line in lines if "┌" in line or "█" in line]
    assert max(map(cell_len, cells)) <= 60
    assert sum("…" in line for line in cells) >= 3


def test_a_fixed_vector_is_said_to_be_one() -> None:
    trace = make(ENGLISH, ["x", "y", "</s>"], model="rnn, fixed vector", log_probabilities=[math.log(0.5), -50.0, 0.0])
    object.__setattr__(trace, "cross", None)
    lines = shown(trace)
    assert lines[0] == "rnn, fixed vector: no attention"
    assert "This model read the whole source into one vector" in " ".join(lines)
    assert "there is no place in the source to point to" in " ".join(line.strip() for line in lines)
    bars = {line.split()[0]: (line.split()[1], line.count("█")) for line in lines[-3:]}
    assert bars == {"x": ("0.50", 20), "y": ("0.00", 0), "</s>": ("1.00", 40)}
    with pytest.raises(ConfigError, match="no attention to show"):
        render(trace, layer=1)


def test_a_layer_that_is_not_there_is_refused_before_anything_is_printed() -> None:
    with pytest.raises(ConfigError, match="layer 2: this model's cross attention has layers only 1"):
        render(make(["a", "</s>"], ["b", "</s>"]), layer=2)


HOSTILE = ["[bold]red[/bold]", "[/]", "\x1b[31m", "\x9b31m", "a\u200bb", "\r\n", "\x07", "\ud800", ":smile:", "",
           "</s>"]


def test_nothing_inside_a_token_is_obeyed() -> None:
    text = "[bold]x[/bold] \x1b[2J \r\n :smile:"
    lines = shown(make(HOSTILE, HOSTILE, source_text=text, target_text=text, model="[red]rnn[/red] \x1b[1m"))
    output = "\n".join(lines)
    assert not any(character in output for character in "\x1b\x9b\r\x07\u200b")
    assert lines[0] == "[red]rnn[/red] \\x1b[1m: one layer, one head"
    assert lines[1] == "source  [bold]x[/bold] \\x1b[2J \\r\\n :smile:"
    for token in ("[bold]red[/bold]", "[/]", "\\x1b[31m", "\\x9b31m", "a\\u200bb", "\\r\\n", "\\x07", "\\ud800",
                  ":smile:", "(empty)"):
        assert any(line.endswith(f"┌ {token}") for line in lines), token
        assert any(line.startswith(f"{token} ") for line in lines), token


def test_colour_adds_and_never_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make(ENGLISH, CHINESE)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = "\n".join(shown(trace, colour=True))
    assert "\x1b[38;2;" in coloured
    plain = [line for line in shown(trace) if "█" in line]
    stripped = coloured
    while "\x1b[" in stripped:
        start = stripped.index("\x1b[")
        stripped = stripped[:start] + stripped[stripped.index("m", start) + 1 :]
    assert [line for line in stripped.splitlines() if "█" in line] == plain


def test_a_console_without_unicode_gets_ascii_marks_and_escaped_tokens() -> None:
    lines = shown(make(["naïve", "</s>"], ["犬", "</s>"]), encoding="ascii")
    assert any(line.startswith("\\u72ac  0.25  ##.") for line in lines), lines
    assert any(line.endswith(", na\\xefve") for line in lines), lines


def test_width_given_is_kept_on_a_wider_console() -> None:
    trace = make([f"token{index}" for index in range(40)], ["x", "</s>"])
    assert 40 < max(map(cell_len, shown(trace, 200, width=50))) <= 50
    assert max(map(cell_len, shown(trace, 200))) > 100
