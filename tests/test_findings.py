"""What the demo measures, without any model."""

import pytest

from regard.demo.findings import error_by_length, marked, unheard
from regard.demo.pronounce import BUCKETS


def test_marked_shows_wrong_superfluous_and_missing_phones():
    assert marked("K AE T", "K AE T") == [("K", True), ("AE", True), ("T", True)]
    assert marked("K IH T", "K AE T") == [("K", True), ("IH", False), ("T", True)]
    assert marked("K AE AE T", "K AE T").count(("AE", False)) == 1
    assert marked("K T", "K AE T") == [("K", True), ("·", False), ("T", True)]
    assert marked("", "K AE") == [("·", False), ("·", False)]


def test_error_by_length_keeps_the_buckets_apart():
    sources = ["a" * shortest for shortest, _ in BUCKETS]
    references = ["A B"] * len(BUCKETS)
    outputs = ["A B", "A", "", "X Y Z", "A B", "B"]
    assert error_by_length(sources, outputs, references) == pytest.approx([0, 50, 100, 150, 0, 50])


def test_words_of_the_dictionary_are_not_called_unheard():
    assert "regardify" in unheard({})
    assert "regardify" not in unheard({"regardify": "R"})
