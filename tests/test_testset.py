"""Test sets from files and configs: what is read, what is left out, and what is refused."""

from pathlib import Path

import pytest

from regard.config import DataConfig
from regard.errors import DataError
from regard.evaluate import testset
from regard.evaluate.testset import TestSet as Lines


def write(folder, **files):
    """Files of lines; returns their paths."""
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return [folder / name for name in files]


def test_one_reference(tmp_path):
    source, target = write(tmp_path, s=["a", "", "c", "d"], t=["A", "B", "", "D"])
    test = Lines.read(source, [target])
    assert (test.sources, test.references, test.numbers) == (["a", "d"], [["A", "D"]], [1, 4])
    assert len(test) == 2 and test.file_lines == 4 and test.files == (str(source), str(target))
    assert test.summary == (f"{source} + {target}: 2 pairs; 2 left out: an empty side ({source}:2, {target}:3)")
    assert test.place(1) == f"{source}:4" and test.references_of(1) == ["D"]


def test_several_references(tmp_path):
    source, *targets = write(tmp_path, s=["a", "b", "c"], t=["A", "", ""], u=["", "B", ""])
    test = Lines.read(source, targets)
    assert test.sources == ["a", "b"] and test.references == [["A", None], [None, "B"]]
    assert [test.references_of(row) for row in range(2)] == [["A"], ["B"]]
    assert "2 lines, 2 references; 1 left out: no source or no reference" in test.summary


def test_that_of_a_config(tmp_path):
    write(tmp_path, s=["a"], t=["A"])
    train = {"source": "s", "target": "t"}
    data = DataConfig(root=tmp_path, train=[train], valid=train, test=train)
    test = Lines.of(data)
    assert test is not None and test.sources == ["a"] and test.files == ("s", "t")
    assert Lines.of(DataConfig(root=tmp_path, train=[train], valid=train)) is None


def test_that_of_tab_separated_pairs(tmp_path):
    (tmp_path / "p.tsv").write_text("a\tA\n\nb\tB\n")
    pairs = {"pairs": "p.tsv"}
    test = Lines.of(DataConfig(root=tmp_path, train=[pairs], valid=pairs, test=pairs))
    assert test is not None and test.numbers == [1, 3] and test.file_lines == 3
    assert test.summary.startswith("p.tsv: 2 pairs; 1 left out")


def test_its_fingerprint_is_that_of_its_texts(tmp_path):
    (tmp_path / "x").mkdir()
    same = [Lines.read(*read) for read in ((write(folder, s=["a", "b"], t=["A", "B"])[0], [folder / "t"])
                                           for folder in (tmp_path, tmp_path / "x"))]
    assert same[0].sha256 == same[1].sha256 and len(same[0].sha256) == 64
    other = Lines.read(tmp_path / "s", [tmp_path / "t", tmp_path / "t"])
    assert other.sha256 != same[0].sha256


def test_lines_of_an_output_file(tmp_path):
    source, target = write(tmp_path, s=["a", "", "c"], t=["A", "B", "C"])
    test = Lines.read(source, [target])
    assert test.choose(["x", "", "z"], "out") == ["x", "z"]
    with pytest.raises(DataError, match=r"out has 2 lines and .*s has 3\. An output file holds one line for each"):
        test.choose(["x", "z"], "out")


def test_what_cannot_be_read_is_refused(tmp_path):
    source, target, short = write(tmp_path, s=["a", "b"], t=["A", "B"], u=["A"])
    with pytest.raises(DataError, match=r"no: cannot read it: No such file"):
        Lines.read(tmp_path / "no", [target])
    with pytest.raises(DataError, match=r"u has 1 lines and .*s has 2"):
        Lines.read(source, [target, short])
    (tmp_path / "t").write_bytes(b"A\n\xff\n")
    with pytest.raises(DataError, match=r"t:2: byte 1 of the line, 0xff, is not UTF-8"):
        Lines.read(source, [target])


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_test_set_without_lines_is_refused(tmp_path, lines):
    source, target = write(tmp_path, s=lines, t=lines)
    with pytest.raises(DataError, match=r"0 pairs.*: nothing to score\. Expected at least one line"):
        Lines.read(source, [target])


def test_names_of_the_module_are_not_taken_for_tests():
    assert testset.TestSet.__test__ is False and Path(testset.__file__).name == "testset.py"
