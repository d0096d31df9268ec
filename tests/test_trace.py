"""Traces: what they refuse, which matrix they give, and tokens made visible."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from regard.errors import ConfigError
from regard.look import Trace
from regard.look.trace import visible


def make(layers: int = 2, heads: int = 3, **changes: Any) -> Trace:
    """A trace of 4 source and 3 target tokens with random attention."""
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "source": ["a", "dog", "runs", "</s>"], "target": ["ein", "Hund", "</s>"], "source_text": "a dog runs",
        "target_text": "ein Hund", "cross": torch.rand(layers, heads, 3, 4).softmax(-1), "encoder": None,
        "decoder": None, "log_probabilities": [-0.5, -1.0, 0.0], "model": "transformer"}
    return Trace(**(values | changes))


def test_matrix_is_the_layer_and_head_asked_for_counted_from_one() -> None:
    trace = make()
    assert trace.cross is not None
    assert torch.equal(trace.matrix(2, 3), trace.cross[1, 2])
    assert torch.equal(trace.matrix(1, 1), trace.cross[0, 0])


def test_matrix_takes_the_mean_of_what_is_left_open() -> None:
    trace = make()
    assert trace.cross is not None
    torch.testing.assert_close(trace.matrix(layer=2), trace.cross[1].mean(0))
    torch.testing.assert_close(trace.matrix(head=3), trace.cross[:, 2].mean(0))
    torch.testing.assert_close(trace.matrix(), trace.cross.mean((0, 1)))


def test_matrix_of_half_precision_weights_with_a_gradient_can_be_drawn() -> None:
    weights = torch.full((1, 1, 3, 4), 0.25, dtype=torch.bfloat16, requires_grad=True)
    assert make(cross=weights).matrix().numpy().dtype == "float32"


@pytest.mark.parametrize(("shape", "layer", "head", "caption"), [
    ((4, 4), 4, None, "layer 4 of 4, mean of 4 heads"),
    ((4, 2), 1, 2, "layer 1 of 4, head 2 of 2"),
    ((4, 4), None, None, "mean of 4 layers, mean of 4 heads"),
    ((1, 4), None, None, "mean of 4 heads"),
    ((3, 1), 2, None, "layer 2 of 3"),
    ((1, 1), None, None, "one layer, one head"),
    ((1, 1), 1, 1, "one layer, one head"),
])
def test_caption_names_the_matrix(shape: tuple[int, int], layer: int | None, head: int | None, caption: str) -> None:
    assert make(*shape).caption(layer, head) == caption


@pytest.mark.parametrize(("layer", "head", "message"), [
    (0, None, "layer 0: this model's cross attention has layers 1 to 2, counted from 1"),
    (3, None, "layer 3: this model's cross attention has layers 1 to 2, counted from 1"),
    (None, -1, "head -1: this model's cross attention has heads 1 to 3, counted from 1"),
    (1, 4, "head 4: this model's cross attention has heads 1 to 3, counted from 1"),
])
def test_a_layer_or_head_that_is_not_there(layer: int | None, head: int | None, message: str) -> None:
    for ask in (make().matrix, make().caption):
        with pytest.raises(ConfigError) as caught:
            ask(layer, head)
        assert str(caught.value) == message


def test_only_one_layer_is_said_to_be_there() -> None:
    with pytest.raises(ConfigError, match="layer 2: this model's cross attention has layers only 1"):
        make(1, 1).matrix(layer=2)


def test_a_fixed_vector_has_no_matrix() -> None:
    trace = make(cross=None, model="rnn, fixed vector")
    assert (trace.layers, trace.heads) == (0, 0)
    with pytest.raises(ConfigError, match=r"rnn, fixed vector: no attention to show\. This model read"):
        trace.matrix()


def test_probabilities() -> None:
    trace = make(log_probabilities=[math.log(0.5), -math.inf, 1e-6])
    assert trace.probabilities == pytest.approx([0.5, 0.0, 1.0])
    assert max(trace.probabilities) <= 1.0
    assert make().log_probability == -1.5


@pytest.mark.parametrize(("changes", "message"), [
    ({"source": []}, "at least one token"),
    ({"target": []}, "at least one token"),
    ({"log_probabilities": [-1.0]}, "1 log_probabilities for 3 target tokens"),
    ({"log_probabilities": [-1.0, 0.5, 0.0]}, "not above 0"),
    ({"log_probabilities": [-1.0, math.nan, 0.0]}, "not above 0"),
    ({"cross": torch.zeros(2, 3, 4, 3)}, r"cross has shape \(2, 3, 4, 3\), expected \(layers, heads, 3, 4\)"),
    ({"cross": torch.zeros(3, 4)}, r"cross has shape \(3, 4\)"),
    ({"cross": torch.zeros(0, 1, 3, 4)}, r"cross has shape \(0, 1, 3, 4\)"),
    ({"encoder": torch.zeros(1, 1, 4, 3)}, r"encoder has shape .* expected \(layers, heads, 4, 4\)"),
    ({"decoder": torch.zeros(1, 1, 4, 4)}, r"decoder has shape .* expected \(layers, heads, 3, 3\)"),
    ({"cross": torch.full((1, 1, 3, 4), math.nan)}, "cross must hold weights from 0 to 1"),
    ({"cross": torch.full((1, 1, 3, 4), 1.5)}, "cross must hold weights from 0 to 1, and holds 1.5 to 1.5"),
    ({"cross": torch.full((1, 1, 3, 4), -0.5)}, "cross must hold weights from 0 to 1"),
])
def test_what_no_model_can_give_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_trace_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("token", "shown"), [
    ("dog", "dog"),
    ("naïve", "naïve"),
    ("犬が", "犬が"),
    ("🙂", "🙂"),
    ("two words", "two words"),
    (" dog ", "␣dog␣"),
    ("  ", "␣␣"),
    ("", "(empty)"),
    ("\x1b[31m", "\\x1b[31m"),
    ("\x9b31m", "\\x9b31m"),
    ("a\nb\tc\r\x00", "a\\nb\\tc\\r\\x00"),
    ("a\u200bb\u200d\ufeff", "a\\u200bb\\u200d\\ufeff"),
    ("\u202eabc", "\\u202eabc"),
    ("\u2028\u2029\u0085", "\\u2028\\u2029\\x85"),
    ("\u00a0\u3000", "\\xa0\\u3000"),
    ("❤\ufe0f", "❤\\ufe0f"),
    ("\u3164", "\\u3164"),
    ("\ud800", "\\ud800"),
    ("\ue000", "\\ue000"),
    ("\U000e0041", "\\U000e0041"),
    ("\u0301e", "◌\u0301e"),
    ("e\u0301", "e\u0301"),
    ("[bold]", "[bold]"),
    ("</script>", "</script>"),
])
def test_visible(token: str, shown: str) -> None:
    assert visible(token) == shown
