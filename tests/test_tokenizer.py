"""Tokenizers: round trips, offsets in the given text, special tokens that text cannot forge, files that do not load."""

import json
import os
import subprocess
import sys

import pytest

from regard.config import SideTokenizerConfig, TokenizerConfig
from regard.errors import CheckpointError, ConfigError, DataError
from regard.text.corpus import Pairs
from regard.text.tokenizer import BOS, EOS, PAD, SPECIALS, UNK, Tokenizer, Tokenizers

KINDS = ["bpe", "unigram", "char", "byte", "space"]
TEXT = [
    "two young men are outside near many bushes .",
    "a dog runs through the grass and the dog barks .",
    "ein Hund läuft über die Wiese , zwei Männer lachen .",
    "a man in a green shirt 👩‍👩‍👧 watches 日本 語 .",
] * 5
ODD = ["a  dog", "a dog ", "é日本 dog", "👩‍👩‍👧 a", "a\u2028b\u0085c", "tab\there", "nul\0 .", "zzz Жук q", "a",
       "non\u00a0breaking"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return Tokenizer.train(request.param, 90 if request.param == "unigram" else 300, TEXT)


def test_special_ids_come_first(tokenizer):
    assert [PAD, BOS, EOS, UNK] == [0, 1, 2, 3]
    assert tokenizer.texts(range(4)) == SPECIALS == ["<pad>", "<s>", "</s>", "<unk>"]


def test_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert all(UNK < id < tokenizer.size for row in ids for id in row)


@pytest.mark.parametrize("text", TEXT[:4] + ODD)
def test_tokens_are_the_encoded_ids_with_their_places(tokenizer, text):
    """Read in order, the spans cover every character but spaces, and show what the tokens show."""
    ids, texts, spans = tokenizer.tokens(text)
    assert ids == tokenizer.encode([text])[0]
    assert texts == tokenizer.texts(ids)
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert spans == sorted(spans)
    covered = {place for start, end in spans for place in range(start, end)}
    assert {place for place, character in enumerate(text) if character != " "} <= covered
    for id, shown, (start, end) in zip(ids, texts, spans, strict=True):
        if id != UNK and tokenizer.kind != "byte" and text[start:end].isprintable():
            assert text[start:end].strip(" ") == shown.replace("▁", "")


def test_offsets_after_wide_characters():
    tokenizer = Tokenizer.train("space", 300, TEXT)
    assert tokenizer.tokens("日本 👩‍👩‍👧 läuft  dog").spans == [(0, 2), (3, 8), (9, 14), (16, 19)]
    byte = Tokenizer.train("byte", 300, []).tokens("é日x")
    assert byte.spans == [(0, 1)] * 2 + [(1, 2)] * 3 + [(2, 3)]
    assert byte.texts == ["<0xC3>", "<0xA9>", "<0xE6>", "<0x97>", "<0xA5>", "x"]


def test_word_start_of_its_own_has_the_span_of_its_space():
    tokenizer = Tokenizer.train("bpe", 300, TEXT)
    tokens = tokenizer.tokens("Ж a  Ж")
    assert tokens.texts == ["▁", "<unk>", "▁a", "▁", "▁", "<unk>"]
    assert tokens.spans == [(0, 0), (0, 1), (2, 3), (3, 4), (4, 5), (5, 6)]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "space"])
def test_unseen_text_is_unknown(kind):
    tokenizer = Tokenizer.train(kind, 90, TEXT)
    assert UNK in tokenizer.encode(["Жук"])[0]
    assert "Ж" not in tokenizer.decode(tokenizer.encode(["Жук dog"]))[0]


@pytest.mark.parametrize(("kind", "texts"), [
    ("bpe", ["▁", "<unk>"]), ("unigram", ["▁", "<unk>"]), ("char", ["<unk>"] * 3), ("space", ["<unk>"])])
def test_an_unseen_word_is_one_unknown_except_by_characters(kind, texts):
    assert Tokenizer.train(kind, 90, TEXT).tokens("Жук").texts == texts


@pytest.mark.parametrize("kind", ["char", "space"])
def test_entries_are_in_order_of_count_then_of_characters(kind):
    assert Tokenizer.train(kind, 20, ["c b", "b a c", "d"]).vocabulary.entries[4:] == \
        [*([" "] if kind == "char" else []), "b", "c", "a", "d"]


def test_bytes_know_every_text():
    tokenizer = Tokenizer.train("byte", 8, [])
    assert tokenizer.size == 260
    assert tokenizer.encode(["a\0é"]) == [[4 + byte for byte in "a\0é".encode()]]
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD


TYPED = ["</s>", "a <pad> dog", "<s>", " </s>", " <unk>", "x </s> <pad>", "▁</s>", "\n</s>"]


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A tokenizer that met the names of the special tokens in the text it learned from."""
    return Tokenizer.train(tokenizer.kind, 70 if tokenizer.kind == "unigram" else 300, [*TEXT, *TYPED * 3])


@pytest.mark.parametrize("text", TYPED)
def test_special_tokens_cannot_be_typed(tokenizer, taught, text):
    for each in (tokenizer, taught):
        assert not {PAD, BOS, EOS} & set(each.encode([text])[0])
    ids = taught.encode([text])[0]
    assert UNK not in ids
    back = text.replace("▁", " ") if tokenizer.kind in ("bpe", "unigram") else text
    assert taught.decode([ids])[0].strip(" ") == back.strip(" ")


def test_decode_skips_special_tokens(tokenizer):
    ids = tokenizer.encode(["a dog runs"])[0]
    assert tokenizer.decode([[BOS, *ids, UNK, EOS, PAD, PAD], [], [EOS]]) == ["a dog runs", "", ""]


def test_single_spaces_are_kept_and_others_as_documented():
    bpe, char, space = (Tokenizer.train(kind, 300, TEXT) for kind in ("bpe", "char", "space"))
    for tokenizer in (bpe, char):
        assert tokenizer.decode(tokenizer.encode(["a  dog ", "dog"])) == ["a  dog ", "dog"]
    assert bpe.decode(bpe.encode([" a dog", "a▁dog"])) == ["a dog", "a dog"]
    assert char.decode(char.encode([" a dog"])) == [" a dog"]
    assert space.decode(space.encode([" a  dog "])) == ["a dog"]


def test_merges_stay_within_words():
    tokenizer = Tokenizer.train("bpe", 300, TEXT)
    assert tokenizer.tokens("a dog").texts == ["▁a", "▁dog"]
    assert not any("▁" in entry[1:] for entry in tokenizer.vocabulary.entries)


def test_shown_forms_are_printable():
    tokenizer = Tokenizer.train("char", 300, ["a\t\u2028\0 é👩‍👧\u200d"])
    assert tokenizer.tokens("a\t\u2028\0 é\u200d").texts == ["a", "\\t", "\\u2028", "\\x00", "▁", "é", "\\u200d"]


@pytest.mark.parametrize("kind", ["bpe", "char", "space"])
def test_size_is_a_limit_and_the_most_frequent_stay(kind):
    tokenizer = Tokenizer.train(kind, 12, TEXT)
    assert tokenizer.size == 12
    assert UNK not in tokenizer.encode(["." if kind == "space" else "e"])[0]


def test_less_text_than_size_gives_a_smaller_vocabulary():
    assert Tokenizer.train("bpe", 500, ["ab ab"]).vocabulary.entries == [*SPECIALS, "a", "b", "▁", "ab", "▁ab"]
    assert Tokenizer.train("unigram", 500, TEXT).size < 500


def test_unigram_refuses_more_characters_than_size():
    with pytest.raises(ConfigError, match=r"size = 10 is too small for unigram: .* Use a larger size, or kind = "):
        Tokenizer.train("unigram", 10, TEXT)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "space"])
def test_no_text_to_learn_from(kind):
    with pytest.raises(DataError, match=f"no text to learn a {kind} tokenizer from: every line is empty"):
        Tokenizer.train(kind, 100, ["", ""])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"'a\\ud800': character 2 is half of a surrogate pair"):
        tokenizer.encode(["fine", "a\ud800"])
    with pytest.raises(DataError, match="half of a surrogate pair"):
        tokenizer.tokens("\udfff")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        Tokenizer.train(tokenizer.kind, 100, ["a\ud800"])


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.kind, loaded.vocabulary) == (tokenizer.kind, tokenizer.vocabulary)
    assert [loaded.tokens(text) for text in TEXT + ODD] == [tokenizer.tokens(text) for text in TEXT + ODD]


def damaged(change):
    content = {"format": 1, "kind": "char", "entries": [*SPECIALS, "a"], "merges": [], "scores": []}
    return json.dumps(content | change)


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "null", '{"format": 1, "kind": "char"',
    damaged({"format": 2}), damaged({"kind": "word"}), damaged({"entries": ["a", "b"]}),
    damaged({"entries": [*SPECIALS, "a", "a"]}), damaged({"entries": [*SPECIALS, 5]}), damaged({"entries": None}),
    damaged({"kind": "unigram", "scores": [0.0]}), damaged({"kind": "bpe", "merges": [["x", "y"]]}),
    damaged({"kind": "byte"}),
])
def test_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "shared.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=rf"{path}: not a tokenizer of this version of Regard, or damaged"):
        Tokenizer.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/source.json: cannot read the tokenizer: No such file"):
        Tokenizers.load(tmp_path)


PAIRS = Pairs([text.upper() for text in TEXT], TEXT)


@pytest.mark.parametrize(("config", "files"), [
    (TokenizerConfig(kind="char", size=200), ["shared.json"]),
    (TokenizerConfig(kind="char", size=200, shared=False), ["source.json", "target.json"]),
    (TokenizerConfig(source=SideTokenizerConfig(kind="char"), target=SideTokenizerConfig(kind="bpe", size=90)),
     ["source.json", "target.json"]),
])
def test_one_tokenizer_for_both_sides_or_one_for_each(tmp_path, config, files):
    trained = Tokenizers.train(config, PAIRS)
    trained.save(tmp_path)
    loaded = Tokenizers.load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert trained.shared == loaded.shared == config.is_shared
    assert [each.kind for each in loaded] == [side.kind for side in config.sides]
    assert (UNK in loaded.source.encode([TEXT[0]])[0]) is not config.is_shared
    assert UNK not in loaded.target.encode([TEXT[0]])[0]


def test_training_is_the_same_in_every_process(tmp_path):
    """Many entries of equal count, so that any order that comes from hashing shows. (Not promised for unigram.)"""
    code = ("import sys; from pathlib import Path; from regard.text.tokenizer import Tokenizer\n"
            "lines = [f'{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i * 7 % 26)} x{i}' for i in range(3000)]\n"
            "for kind in ('bpe', 'char', 'space'):\n"
            "    Tokenizer.train(kind, 400, lines).save(Path(sys.argv[1]) / kind)")
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "TOKENIZERS_PARALLELISM": ("true", "false")[number]}
        subprocess.run([sys.executable, "-c", code, tmp_path / str(number)], env=environment, check=True)
    for kind in ("bpe", "char", "space"):
        assert (tmp_path / "0" / kind).read_bytes() == (tmp_path / "1" / kind).read_bytes()
