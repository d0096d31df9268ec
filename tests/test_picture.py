"""Pictures: the cells are the tensor's values, the labels are the tokens, and no label lies on another."""

import io
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from regard.errors import ConfigError, RegardError, RunError
from regard.look.picture import MOST_TOKENS, _figure, save_picture
from regard.look.trace import Trace

ENGLISH = ["A", "young", "brown", "dog", "runs", "happ@@", "ily", "through", "the", "snow", ".", "</s>"]
GERMAN = ["Ein", "junger", "brauner", "Hund", "rennt", "fröh@@", "lich", "durch", "den", "Schnee", ".", "</s>"]


def make(source: list[str], target: list[str], layers: int = 1, heads: int = 1, **changes: Any) -> Trace:
    """A trace with random attention."""
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "source": source, "target": target, "source_text": " ".join(source[:-1]), "target_text": " ".join(target[:-1]),
        "cross": torch.randn(layers, heads, len(target), len(source)).mul(3).softmax(-1), "encoder": None,
        "decoder": None, "log_probabilities": [math.log(0.25)] * len(target), "model": "transformer"}
    return Trace(**(values | changes))


def panels(figure: Figure) -> list[Axes]:
    """The axes that show a matrix, in reading order."""
    return [axes for axes in figure.axes if axes.collections and axes.get_ylabel() != "attention weight"]


def values(axes: Axes) -> np.ndarray:
    """The matrix that a panel shows."""
    return np.asarray(axes.collections[0].get_array())


def texts(figure: Figure) -> list[str]:
    """Everything that is written anywhere in a picture."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def overlaps(labels: list[Text], figure: Figure) -> list[tuple[str, str]]:
    """Neighbouring labels whose boxes share room."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    boxes = [label.get_window_extent(renderer) for label in labels]
    return [(labels[index].get_text(), labels[index + 1].get_text()) for index in range(len(labels) - 1)
            if boxes[index].overlaps(boxes[index + 1])]


def test_cells_are_the_values_of_the_tensor_and_rows_the_output() -> None:
    trace = make(ENGLISH, GERMAN, 2, 3)
    assert trace.cross is not None
    figure = _figure(trace, None, None)
    assert len(panels(figure)) == 6
    for number, axes in enumerate(panels(figure)):
        layer, head = divmod(number, 3)
        np.testing.assert_array_equal(values(axes), trace.cross[layer, head].numpy())
        assert axes.get_title("left") == f"layer {layer + 1}, head {head + 1}"
        assert axes.yaxis_inverted() and not axes.xaxis_inverted()
    assert [label.get_text() for label in panels(figure)[0].get_yticklabels()] == GERMAN
    assert [label.get_text() for label in panels(figure)[3].get_xticklabels()] == ENGLISH
    assert panels(figure)[0].get_xticklabels() == [] and panels(figure)[1].get_yticklabels() == []


def test_all_panels_have_one_scale_from_0_to_1() -> None:
    figure = _figure(make(ENGLISH, GERMAN, 2, 2), None, None)
    assert {axes.collections[0].get_clim() for axes in panels(figure)} == {(0, 1)}
    assert "attention weight" in texts(figure)


@pytest.mark.parametrize(("layers", "heads", "layer", "head", "titles"), [
    (2, 3, 2, None, ["layer 2, head 1", "layer 2, head 2", "layer 2, head 3"]),
    (2, 3, None, 3, ["layer 1, head 3", "layer 2, head 3"]),
    (1, 2, None, None, ["head 1", "head 2"]),
    (2, 1, None, None, ["layer 1", "layer 2"]),
    (2, 2, 2, 1, [""]),
    (1, 1, None, None, [""]),
])
def test_one_panel_for_each_layer_and_head_left_open(
    layers: int, heads: int, layer: int | None, head: int | None, titles: list[str]
) -> None:
    figure = _figure(make(["a", "b", "</s>"], ["c", "</s>"], layers, heads), layer, head)
    assert [axes.get_title("left") for axes in panels(figure)] == titles


def test_a_single_panel_shows_the_probabilities_and_names_its_matrix_in_the_heading() -> None:
    trace = make(["a", "b", "</s>"], ["c", "d", "</s>"], 2, 2, log_probabilities=[math.log(0.5), -9.0, 0.0])
    written = texts(_figure(trace, 2, 1))
    assert "transformer: layer 2 of 2, head 1 of 2" in written
    assert {"probability", "0.50", "0.00", "1.00", "a b", "c d"} <= set(written)


def test_heads_are_averaged_where_there_is_no_room_and_the_picture_says_so() -> None:
    source = [f"word{index}" for index in range(60)] + ["</s>"]
    trace = make(source, source, 4, 4)
    figure = _figure(trace, None, None)
    assert [axes.get_title("left") for axes in panels(figure)] == [f"layer {n}, mean of 4 heads" for n in range(1, 5)]
    np.testing.assert_array_equal(values(panels(figure)[2]), trace.matrix(3).numpy())
    assert ("16 panels of this size could not be read, so these are means. Choose a layer and a head to see one alone."
            in texts(figure))


def test_layers_are_averaged_too_where_there_is_still_no_room() -> None:
    source = [f"word{index}" for index in range(110)] + ["</s>"]
    figure = _figure(make(source, source, 12, 8), None, None)
    assert len(panels(figure)) == 1
    assert "transformer: mean of 12 layers, mean of 8 heads" in texts(figure)


def test_more_tokens_than_can_be_read_are_cut_and_the_picture_says_so() -> None:
    trace = make([f"s{index}" for index in range(200)], [f"t{index}" for index in range(150)])
    figure = _figure(trace, None, None)
    assert values(panels(figure)[0]).shape == (MOST_TOKENS, MOST_TOKENS)
    note = " ".join(texts(figure))
    assert f"The first {MOST_TOKENS} of 200 source tokens are drawn." in note
    assert f"The first {MOST_TOKENS} of 150 output tokens are drawn." in note


@pytest.mark.parametrize(("source", "rotation"), [
    ([*"knight", "</s>"], 0), ([*"两个孩子正在公园里。", "</s>"], 0), (ENGLISH, 45),
    ([f"word{index}" for index in range(90)], 90),
])
def test_source_labels_are_upright_where_they_fit_then_slanted_then_vertical(source: list[str], rotation: int) -> None:
    pytest.importorskip("noto_cjk_sans_otc", reason="the extra 'fonts' is not installed")
    figure = _figure(make(source, GERMAN), None, None)
    labels = panels(figure)[0].get_xticklabels()
    assert {label.get_rotation() for label in labels} == {rotation}
    if rotation != 45:  # a slanted label's box is not the room it takes
        assert overlaps(labels, figure) == []
    assert overlaps(panels(figure)[0].get_yticklabels(), figure) == []


@pytest.mark.parametrize("tokens", [1, 3, 30, 119])
def test_the_heading_stays_clear_of_the_panels_and_of_itself(tokens: int) -> None:
    long = ["a rather long token"] * tokens
    figure = _figure(make([*long, "</s>"], [*long, "</s>"]), None, None)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    above = panels(figure)[0].get_window_extent(renderer).y1
    assert all(box.y0 > above for box in boxes)
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[index + 1 :])


def test_a_fixed_vector_gets_bars_and_the_reason() -> None:
    trace = make(ENGLISH, ["x", "y", "</s>"], cross=None, model="rnn", log_probabilities=[math.log(0.5), -9.0, 0.0])
    figure = _figure(trace, None, None)
    axes = figure.axes[0]
    widths = [bar.get_extents().width / axes.bbox.width for bar in axes.patches]
    assert widths == pytest.approx([0.5, math.exp(-9), 1.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y", "</s>"]
    assert "This model read the whole source into one vector" in " ".join(texts(figure))
    assert "rnn: no attention" in texts(figure)
    with pytest.raises(ConfigError, match="no attention to show"):
        trace.picture("fixed.png", layer=1)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"),
                                               (".PNG", b"\x89PNG")])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"dog{suffix}"
    make(["a", "</s>"], ["b", "</s>"]).picture(path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["dog.jpeg", "dog", "dog.html"])
def test_an_unknown_suffix_is_refused_with_the_choices(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(RegardError) as caught:
        save_picture(make(["a"], ["b"]), path)
    assert str(caught.value) == (f'{path}: a picture\'s name ends in one of .png, .svg, .pdf, and this one in '
                                 f'"{path.suffix}"')
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no" / "dog.png"
    with pytest.raises(RunError) as caught:
        save_picture(make(["a"], ["b"]), str(path))
    assert str(caught.value) == (f"{path}: cannot write the picture: No such file or directory. Give a name in a "
                                 "folder that exists and can be written to")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "dog.png").mkdir()
    with pytest.raises(RunError, match=r"dog\.png: cannot write the picture: Is a directory"):
        save_picture(make(["a"], ["b"]), tmp_path / "dog.png")


def test_a_layer_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 3: this model's cross attention has layers 1 to 2"):
        save_picture(make(["a"], ["b"], 2), tmp_path / "dog.png", layer=3)
    assert list(tmp_path.iterdir()) == []


HOSTILE = ["$x_1$", "$\\frac{", "\\$", "_{a}^", "</script>", "<img onerror=x>", "]]>", "-->", "&amp;", "%s", "\x1b[31m",
           "\n", "\u200b", "\ud800", "", "\u202eabc", "</s>"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_nothing_inside_a_token_is_obeyed(tmp_path: Path, suffix: str, recwarn: pytest.WarningsRecorder) -> None:
    text = " ".join(HOSTILE)
    path = tmp_path / f"dog{suffix}"
    trace = make(HOSTILE, HOSTILE, model="$a$ </svg><script>alert(1)</script>", source_text=text, target_text=text)
    trace.picture(path)
    assert not recwarn.list
    if suffix == ".svg":
        names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(path.read_bytes()).iter()}
        assert names and not names & {"script", "img", "foreignObject", "a"}


def test_tokens_are_drawn_as_they_stand() -> None:
    figure = _figure(make(HOSTILE, HOSTILE), None, None)
    labels = [label.get_text() for label in panels(figure)[0].get_yticklabels()]
    assert labels == ["$x_1$", "$\\frac{", "\\$", "_{a}^", "</script>", "<img onerror=x>", "]]>", "-->", "&amp;", "%s",
                      "\\x1b[31m", "\\n", "\\u200b", "\\ud800", "(empty)", "\\u202eabc", "</s>"]
    assert not any(text.get_parse_math() or text.get_usetex() for text in figure.findobj(Text) if text.get_text())


def test_a_persons_matplotlib_settings_are_neither_used_nor_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would choose a backend for everybody
    trace = make(["$a", "b", "</s>"], ["c$", "</s>"])
    trace.picture(tmp_path / "plain.png")
    with matplotlib.rc_context({"text.usetex": True, "axes.grid": True, "font.size": 30, "axes.facecolor": "red",
                                "figure.facecolor": "red", "savefig.facecolor": "red", "font.family": "serif"}):
        before = matplotlib.rcParams.copy()
        trace.picture(tmp_path / "styled.png")
        assert matplotlib.rcParams.copy() == before
    plain, styled = (matplotlib.image.imread(tmp_path / name) for name in ("plain.png", "styled.png"))
    np.testing.assert_array_equal(plain, styled)


def test_a_character_without_a_glyph_is_boxed_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    figure = _figure(make(["\U00013000", "</s>"], ["\U00013000", "</s>"]), None, None)
    assert [label.get_text() for label in panels(figure)[0].get_yticklabels()] == ["□", "</s>"]
    assert len(caplog.records) == 1 and "\U00013000" in caplog.text
    figure.savefig(io.BytesIO(), format="png")
