"""A test set: sources, one or several references for each, and where every line stands in its files."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regard.config import CorpusConfig, DataConfig
from regard.errors import DataError
from regard.text.corpus import LeftOut, Pairs, read_pairs


@dataclass(frozen=True)
class TestSet:
    """Lines to translate and what they should become. Lines without a source or without any reference are left out.

    Attributes:
        sources: one text a line.
        references: for each reference file one list, with None where the file has nothing for a line.
        numbers: the line of each source in the files, counted from 1.
        file_lines: lines of each file, those left out counted in.
        files: names of the source and the reference files.
        left_out: what was left out and why.
    """

    sources: list[str]
    references: list[list[str | None]]
    numbers: list[int]
    file_lines: int
    files: tuple[str, ...]
    left_out: LeftOut = field(default_factory=LeftOut)

    __test__ = False  # not a class of pytest's tests

    @classmethod
    def read(cls, source: Path, targets: Sequence[Path]) -> "TestSet":
        """Read a test set from its files.

        Args:
            source: one text a line.
            targets: files of references, of which line n belongs to line n of the source; an empty line is none.

        Raises:
            DataError: a file cannot be read or is not UTF-8, the line counts differ, or no line is left.
        """
        return _joined([read_pairs(CorpusConfig(source=source, target=target, pairs=None), Path())
                        for target in targets])

    @classmethod
    def of(cls, data: DataConfig) -> "TestSet | None":
        """The test set that a config names; None: it names none.

        Raises:
            DataError: as for `read`.
        """
        return None if data.test is None else _joined([read_pairs(data.test, data.root)])

    def __len__(self) -> int:
        return len(self.sources)

    def place(self, row: int) -> str:
        """Where a line comes from: file:line of its source."""
        return f"{self.files[0]}:{self.numbers[row]}"

    def references_of(self, row: int) -> list[str]:
        """The right answers to a line, at least one."""
        return [file[row] for file in self.references if file[row] is not None]  # type: ignore[misc]

    @property
    def summary(self) -> str:
        """One line for people: files, how many lines, and what was left out."""
        files = list(dict.fromkeys(self.files))
        counted = f"{len(self):,} pairs" if len(self.references) == 1 else (
            f"{len(self):,} lines, {len(self.references)} references")
        return "; ".join(filter(None, [f"{' + '.join(files)}: {counted}", str(self.left_out)]))

    @property
    def sha256(self) -> str:
        """A fingerprint of all its texts: two test sets are the same when theirs is the same."""
        return hashlib.sha256(json.dumps([self.sources, self.references]).encode()).hexdigest()

    def choose(self, lines: Sequence[str], name: str) -> list[str]:
        """Of the lines of an output file, one for each line of the source file, those that belong to this set.

        Raises:
            DataError: there are not as many lines as in the source file.
        """
        if len(lines) != self.file_lines:
            raise DataError(f"{name} has {len(lines):,} lines and {self.files[0]} has {self.file_lines:,}. An output "
                            "file holds one line for each source line, an empty one where there is no output")
        return [lines[number - 1] for number in self.numbers]


def _joined(corpora: Sequence[Pairs]) -> TestSet:
    """One test set of pairs with the same sources."""
    first = corpora[0]
    file_lines = len(first) + sum(first.left_out.counts.values())
    sources = {number: source for pairs in corpora for number, source in zip(pairs.numbers, pairs.sources, strict=True)}
    numbers = sorted(sources)
    targets = [dict(zip(pairs.numbers, pairs.targets, strict=True)) for pairs in corpora]
    left_out = first.left_out
    if len(corpora) > 1:
        left_out = LeftOut()
        for number in sorted(set(range(1, file_lines + 1)) - sources.keys()):
            left_out.add("no source or no reference", f"{first.files[0]}:{number}")
    found = TestSet(
        sources=[sources[number] for number in numbers],
        references=[[lines.get(number) for number in numbers] for lines in targets],
        numbers=numbers,
        file_lines=file_lines,
        files=(first.files[0], *(pairs.files[1] for pairs in corpora)),
        left_out=left_out,
    )
    if not numbers:
        raise DataError(f"{found.summary}: nothing to score. Expected at least one line with text on both sides")
    return found
