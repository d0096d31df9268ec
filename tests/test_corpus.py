"""Parallel text: what ends a line, what is refused with file:line, what is left out and counted."""

import subprocess
from pathlib import Path

import pytest

from regard.config import CorpusConfig
from regard.errors import DataError
from regard.text.corpus import LeftOut, each_line, read_lines, read_pairs

TWO = CorpusConfig(source=Path("a.en"), target=Path("a.de"))
TSV = CorpusConfig(pairs=Path("a.tsv"))


def write(folder, **files):
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


@pytest.mark.parametrize(("content", "lines"), [
    ("", []),
    ("\n", [""]),
    ("a\nb\n", ["a", "b"]),
    ("a\nb", ["a", "b"]),
    ("a\n\nb\n\n", ["a", "", "b", ""]),
    ("a\r\nb\r\n", ["a", "b"]),
    ("a\r\r\nb\r", ["a\r", "b"]),
    ("a\rb\n", ["a\rb"]),
    ("a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\n", ["a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"]),
    ("\ufeffa\n\ufeffb\n", ["a", "\ufeffb"]),
    ("a\0b\n", ["a\0b"]),
    ("  a \t\n", ["  a \t"]),
    ("x" * 10_000_000 + "\ny\n", ["x" * 10_000_000, "y"]),
], ids=range(13))
def test_only_a_newline_ends_a_line(tmp_path, content, lines):
    path = write(tmp_path, a_en=content) / "a.en"
    assert read_lines(path) == lines == list(each_line(path))
    counted = int(subprocess.run(["wc", "-l", path], capture_output=True, check=True).stdout.split()[0])
    assert len(lines) == counted + (content != "" and not content.endswith("\n"))


@pytest.mark.parametrize(("content", "where"), [
    (b"fine\nna\xefve\n", ":2: byte 3 of the line, 0xef, is not UTF-8. .*iconv -f LATIN1"),
    (b"\xff", ":1: byte 1 of the line, 0xff"),
    (b"a\n\n\xc3\n", ":3: byte 1 of the line, 0xc3"),
    (b"a\xed\xa0\x80\n", ":1: byte 2 of the line, 0xed"),
    ("a\nb\n".encode("utf-16"), ":1: byte 1 of the line, 0xff, .*iconv -f UTF-16"),
])
def test_invalid_utf8_is_named_by_file_line_and_byte(tmp_path, content, where):
    path = write(tmp_path, a_en=content) / "a.en"
    with pytest.raises(DataError, match=f"^{path}{where}"):
        read_lines(path)


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=rf"{tmp_path}/a.en: cannot read it: No such file .*check the path.*data.root="):
        read_pairs(TWO, tmp_path)
    with pytest.raises(DataError, match=rf"^{tmp_path}: cannot read it: Is a directory.*give a file of lines"):
        read_lines(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a.en: cannot read it: Permission denied.*permissions"):
        read_pairs(TWO, tmp_path)


def test_pairs_of_two_files(tmp_path):
    pairs = read_pairs(TWO, write(tmp_path, a_en="a dog\na\tcat\n", a_de="ein Hund\r\neine Katze"))
    assert (pairs.sources, pairs.targets) == (["a dog", "a\tcat"], ["ein Hund", "eine Katze"])
    assert pairs.summary == "a.en + a.de: 2 pairs"
    assert (pairs.place(1), pairs.place(1, 1)) == ("a.en:2", "a.de:2")


def test_pairs_of_one_file(tmp_path):
    pairs = read_pairs(TSV, write(tmp_path, a_tsv="\ufeffa dog\tein Hund\r\n\n \na cat\teine Katze\nx\t\n"))
    assert (pairs.sources, pairs.targets) == (["a dog", "a cat"], ["ein Hund", "eine Katze"])
    assert pairs.summary == "a.tsv: 2 pairs; 3 left out: an empty side (a.tsv:2, a.tsv:3, a.tsv:5)"
    assert pairs.place(1) == "a.tsv:4"


@pytest.mark.parametrize(("line", "tabs"), [("a dog", "no tabs"), ("a\tb\tc", "2 tabs"), ("\ta\t\t", "3 tabs")])
def test_a_line_that_is_no_pair(tmp_path, line, tabs):
    write(tmp_path, a_tsv=f"a\tb\n{line}\n")
    with pytest.raises(DataError, match=rf"{tmp_path}/a.tsv:2: {tabs}\. Expected one: source TAB target\."):
        read_pairs(TSV, tmp_path)


def test_empty_sides_are_left_out_and_named(tmp_path):
    write(tmp_path, a_en="a\n\nc\n \u3000\ne\n", a_de="A\nB\n\t\n\nE\n")
    pairs = read_pairs(TWO, tmp_path)
    assert (pairs.sources, pairs.targets) == (["a", "e"], ["A", "E"])
    assert pairs.place(1) == "a.en:5"
    assert pairs.left_out == LeftOut({"an empty side": 3}, {"an empty side": ["a.en:2", "a.de:3", "a.en:4"]})


def test_only_the_first_places_are_named():
    left_out = LeftOut()
    for number in range(1, 9):
        left_out.add("an empty side", f"a:{number}")
    other = LeftOut()
    other.add("too long", "b:1")
    left_out.merge(other)
    assert str(left_out) == ("8 left out: an empty side (a:1, a:2, a:3, a:4, a:5, …); 1 left out: too long (b:1)")
    left_out.merge(left_out)
    assert left_out.counts == {"an empty side": 16, "too long": 2}
    assert left_out.places["an empty side"] == ["a:1", "a:2", "a:3", "a:4", "a:5"]


def sentences(count):
    """Lines of varied length, with translations about as long."""
    lengths = [3 + (number * number * 7 + number * 13) % 41 for number in range(count)]
    return ["x" * length for length in lengths], ["y" * (length + 2 + length % 3) for length in lengths]


@pytest.mark.parametrize(("side", "line", "extra"), [("en", 700, 1), ("de", 700, 1), ("de", 1500, 3), ("en", 1, 1)])
def test_unequal_files_are_refused_where_they_part(tmp_path, side, line, extra):
    en, de = sentences(2000)
    shorter = en if side == "en" else de
    del shorter[line - 1:line - 1 + extra]
    write(tmp_path, a_en="\n".join(en) + "\n", a_de="\n".join(de) + "\n")
    with pytest.raises(DataError) as caught:
        read_pairs(TWO, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/a.de has {len(de):,} lines and {tmp_path}/a.en has {len(en):,}. Line n of "
                              "one must translate line n of the other. First line where they drift apart by length: ")
    guess = int(message.split("about ")[1].removesuffix(".").replace(",", ""))
    assert abs(guess - line) <= 5


def test_an_empty_file_beside_a_full_one(tmp_path):
    write(tmp_path, a_en="", a_de="a\nb\n")
    with pytest.raises(DataError, match=r"a.de has 2 lines and .*a.en has 0\..*about 1\."):
        read_pairs(TWO, tmp_path)
