"""Single lines: which are chosen, what is marked in them, and in what language they are written."""

import pytest

from regard.evaluate.sentences import best, language, marked, most_different, plain_lengths, typical, worst

CLOSENESS = [100.0, 20.0, 100.0, 0.0, 0.0]
OUTPUTS = ["short", "a", "a longer one", "", "bad"]


def test_best_and_worst_take_the_longest_of_equals():
    assert best(CLOSENESS, OUTPUTS, 3) == [2, 0, 1]
    assert worst(CLOSENESS, OUTPUTS, 10) == [4, 3, 1]
    assert best([], [], 3) == worst([100.0], ["right"], 3) == []


def test_most_different_are_those_with_the_widest_spread():
    assert most_different([[1, 50, 9, 9], [1, 10, 90, 8], [2, 40, 9, 9]], 3) == [2, 1, 0]
    assert most_different([[1.0, 2.0], [1.0, 2.0]], 3) == []


def test_typical_is_of_median_length_among_the_short():
    assert typical([9, 0, 3, 100, 5], 10) == 4
    assert typical([0, 100], 10) is None


@pytest.mark.parametrize(("output", "references", "wrong"), [
    ("ein Hund läuft", ["ein Hund läuft"], []),
    ("ein Hund läuft", ["der Hund rennt"], ["ein", " läuft"]),
    ("der Hund läuft", ["ein Kater schläft", "der Hund rennt"], [" läuft"]),
    ("我喜欢猫", ["我喜欢狗"], ["猫"]),
    ("ein ein Hund", ["ein Hund"], [" ein"]),
    ("", ["x"], ["(empty)"]),
    ("", [""], []),
])
def test_marks_are_what_the_fewest_edits_would_change(output, references, wrong):
    pieces = marked(output, references)
    assert [piece for piece, right in pieces if not right] == wrong
    assert "".join(piece for piece, _ in pieces) == (output or "(empty)")


def test_pieces_can_only_be_looked_at():
    assert "".join(piece for piece, _ in marked("a\x1b[31m \u202eb ", ["a"])) == "a\\x1b[31m \\u202eb␣"


@pytest.mark.parametrize(("text", "expected"), [
    ("ein Hund", None), ("我喜欢猫", "zh"), ("猫が好き", "ja"), ("고양이", "ko"), ("", None), ("K AE T 猫", "zh"),
])
def test_language_of_ideographs(text, expected):
    assert language(text) == expected


def test_lengths_without_a_tokenizer():
    assert plain_lengths(["a b c", "d e", "f"]) == ([3, 2, 1], "words")
    assert plain_lengths(["attention", "word", "two words"]) == ([9, 4, 9], "characters")
    assert plain_lengths(["我喜欢猫。", "你好"]) == ([5, 2], "characters")
