"""What the demo shows on a terminal."""

import io
import re
import sys

import pytest
from rich.console import Console

from demo_results import findings_in
from regard.demo.screen import Screen, next_commands, phones, spoken


@pytest.fixture
def found(tmp_path):
    return findings_in(tmp_path)


def shown(found, tmp_path, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    Screen(console).findings(found, tmp_path / "report.html")
    return console.file.getvalue()


def test_the_table_holds_what_was_asked_for(found, tmp_path):
    text = shown(found, tmp_path)
    assert re.search(r"parameters +updates +seconds +phone error rate +exact match", text)
    assert re.search(r"RNN, fixed vector +281,344 +4,210 +105 +45\.6% +31\.4%", text)
    assert re.search(r"Transformer +281,344 +4,210 +105 +16\.7% +31\.4%", text)


def test_bars_grow_with_the_error(found, tmp_path):
    text = shown(found, tmp_path)
    first = re.search(r"1–10 +(\S+) +24%", text)
    last = re.search(r"51–60 +(\S+) +78%", text)
    assert first and last and len(last[1]) == 10 > len(first[1])


def test_attention_new_words_and_what_to_type_are_shown(found, tmp_path):
    text = shown(found, tmp_path)
    assert "RNN with attention: one layer, one head" in text
    assert re.search(r"chatbot +CH AE T B AA T", text)
    for command, _ in next_commands(found):
        assert command in text
    assert str(tmp_path / "report.html") in text


def test_nothing_is_wider_than_the_terminal_but_commands(found, tmp_path):
    commands = [command for command, _ in next_commands(found)]
    for line in shown(found, tmp_path).splitlines():
        assert len(line.rstrip()) <= 80 or line.strip() in [*commands, str(tmp_path / "report.html")]


def test_the_best_model_is_the_one_to_go_on_with(found, tmp_path):
    assert all(str(tmp_path / "rnn-attention") in command for command, _ in next_commands(found)[:3])


def test_wrong_phones_are_marked():
    text = phones([("K", True), ("IH", False)])
    assert text.plain == "K IH"
    assert [(span.start, span.end) for span in text.spans if "red" in str(span.style)] == [(2, 4)]


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (60, "1 min"), (105.2, "1 min 45 s")])
def test_times(seconds, text):
    assert spoken(seconds) == text


def test_a_terminal_without_unicode_gets_what_it_can_show(found, tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    Screen().findings(found, tmp_path / "report.html")
    output.flush()
    text = output.buffer.getvalue().decode("ascii")
    assert re.search(r"51.60 +#+ +78%", text)
