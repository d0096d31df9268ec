"""What a person sees of a training."""

import io

import pytest
from rich.console import Console

from regard.config_train import TrainConfig
from regard.training.progress import Reporter

TRAIN = {"kind": "train", "step": 50, "loss": 1.23456, "tokens_per_second": 12345.6, "seconds": 100.0}
VALID = {"kind": "valid", "step": 50, "loss": 1.5, "bleu": 30.25, "seconds": 90.0, "mark": "  best so far"}


def said(quiet=False, terminal=False, rows=(TRAIN, VALID), lines=(), **settings):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, quiet=quiet, soft_wrap=True, width=100)
    with Reporter(TrainConfig(steps=200, **settings), quiet, console) as reporter:
        for line in lines:
            reporter.say(line)
        for row in rows:
            reporter.step(row["step"])
            reporter.row(row)
    return file.getvalue()


def test_piped_every_row_is_a_line():
    assert said() == ("step     50/200  loss 1.235  12,346 tokens/s  0:05:00 left\n"
                      "step     50  validation: loss 1.500  BLEU 30.250  (1.5 min)  best so far\n")


def test_the_time_left_is_that_of_the_earlier_limit():
    assert "0:00:20 left" in said(minutes=2.0) and "0:05:00 left" in said(minutes=60.0)
    assert "0:00:00 left" in said(minutes=1.0)


def test_on_a_terminal_rows_move_the_bar_and_validations_are_lines():
    shown = said(terminal=True)
    assert "training" in shown and "50/200" in shown and "1.235" in shown
    assert "step     50/200" not in shown and "validation: loss 1.500" in shown


def test_quiet_says_nothing():
    assert said(quiet=True, lines=["hello"]) == ""


def test_lines_are_not_taken_for_markup_and_not_wrapped():
    line = "folder [bold]/x[/bold] " + "long " * 40
    assert said(rows=(), lines=[line]) == line + "\n"


@pytest.mark.parametrize("metric, name", [("token_error_rate", "token error rate 12.000"), ("bleu", "BLEU 12.000")])
def test_each_metric_has_its_name(metric, name):
    row = {"kind": "valid", "step": 1, "loss": 1.0, metric: 12.0, "seconds": 0.0, "mark": ""}
    assert said(rows=[row]) == f"step      1  validation: loss 1.000  {name}  (0.0 min)\n"
