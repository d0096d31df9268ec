"""Parallel text in, checked pairs out, with what was left out and why.

Only "\\n" ends a line, so that line counts agree with `wc -l`; U+2028, U+0085, NUL and a lone "\\r" are characters
like any other. A byte order mark at the start of a file and the "\\r" of a "\\r\\n" are removed. A file that is not
UTF-8, or does not match its partner, is refused whole. docs/data.md holds the table of all outcomes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from regard.config import CorpusConfig
from regard.errors import DataError
from regard.text.alignment import Links, parse_links

PLACES_NAMED = 5
NEWLINE = b"\n"
TAB = "\t"


@dataclass
class LeftOut:
    """What was left out and why: for each reason, how many pairs, and where the first few are (file:line)."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one pair."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_NAMED:
            places.append(place)

    def merge(self, other: "LeftOut") -> None:
        """Count another corpus's pairs too."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.places[reason] = (self.places.get(reason, []) + other.places[reason])[:PLACES_NAMED]

    def __str__(self) -> str:
        """Such as "2 left out: an empty side (train.en:5, train.de:9)"; empty when nothing was."""
        return "; ".join(f"{count:,} left out: {reason} ({', '.join(self.places[reason])}"
                         f"{', …' if count > len(self.places[reason]) else ''})"
                         for reason, count in self.counts.items())


@dataclass
class Pairs:
    """Checked pairs: source i is translated by target i, and both hold text.

    `numbers[i]` is the line of pair i in its files, counted from 1, and `files` the names of those; `links[i]` its word
    alignment, where the corpus has one.
    """

    sources: list[str]
    targets: list[str]
    numbers: Sequence[int] = ()
    files: tuple[str, str] = ("source", "target")
    left_out: LeftOut = field(default_factory=LeftOut)
    links: Links | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def place(self, index: int, side: int = 0) -> str:
        """Where a pair comes from: file:line of its source (side 0) or its target (side 1)."""
        return f"{self.files[side]}:{self.numbers[index] if self.numbers else index + 1}"

    @property
    def summary(self) -> str:
        """One line for people: how many pairs, and what was left out."""
        names = " + ".join(dict.fromkeys(self.files))
        return "; ".join(filter(None, [f"{names}: {len(self):,} pairs", str(self.left_out)]))


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a text file that cannot be read."""
    hint = "give a file of lines, not a folder" if path.is_dir() else "check the path and its permissions"
    return DataError(f"{path}: cannot read it: {error.strerror or error}. Expected a text file: {hint} (paths in a "
                     "config are relative to data.root, which --set data.root=FOLDER points elsewhere).")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends; a last line counts with or without one.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; the message names file, line and byte.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, data, error.start)) from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def each_line(path: Path) -> Iterator[str]:
    """The lines of a text file as `read_lines` reads them, one by one; raises DataError or UnicodeDecodeError."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                line = line.removesuffix("\n").removesuffix("\r")
                yield line if number else line.removeprefix("\ufeff")
    except OSError as error:
        raise unreadable(path, error) from None


def read_pairs(corpus: CorpusConfig, root: Path) -> Pairs:
    """Read a parallel corpus; pairs with an empty side are left out and counted.

    Args:
        corpus: its two files, or its one file of source TAB target; and the file of its word alignment, if it has one.
        root: the folder that their paths are relative to.

    Raises:
        DataError: a file cannot be read or is not UTF-8, the line counts differ, or a line is not a pair, or not the
            links of its pair.
    """
    if corpus.pairs is not None:
        path = root / corpus.pairs
        files = (str(corpus.pairs), str(corpus.pairs))
        sources, targets = _split(path, read_lines(path))
    else:
        assert corpus.source is not None and corpus.target is not None
        paths = root / corpus.source, root / corpus.target
        files = (str(corpus.source), str(corpus.target))
        sources, targets = (read_lines(path) for path in paths)
        if len(sources) != len(targets):
            raise DataError(_unequal(paths, sources, targets))
    pairs = _without_empty(sources, targets, files)
    if corpus.alignment is not None:
        pairs.links = _read_links(root / corpus.alignment, pairs, len(sources))
    return pairs


def each_pair(corpus: CorpusConfig, root: Path) -> Iterator[tuple[str, str]]:
    """The pairs of a corpus as `read_pairs` reads them, empty sides included, one by one; raises ValueError."""
    if corpus.pairs is None:
        assert corpus.source is not None and corpus.target is not None
        yield from zip(each_line(root / corpus.source), each_line(root / corpus.target), strict=True)
        return
    for line in each_line(root / corpus.pairs):
        source, tab, target = line.partition(TAB)
        if (line.strip() and not tab) or TAB in target:
            raise ValueError("not a pair")
        yield source, target


def _read_links(path: Path, pairs: Pairs, count: int) -> Links:
    """The word links of the pairs that are left of so many; the lines of the others are not looked at."""
    lines, links = read_lines(path), Links()
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines):,} lines, and {' and '.join(dict.fromkeys(pairs.files))} {count:,}. "
                        "Expected the links of pair n in line n, and an empty line where it has none. Nothing was "
                        "written.")
    for source, target, number in zip(pairs.sources, pairs.targets, pairs.numbers, strict=True):
        links.add(parse_links(lines[number - 1], (source, target), f"{path}:{number}"))
    return links


def _not_utf8(path: Path, data: bytes, position: int) -> str:
    """The message for a byte that is not UTF-8: file, line, place in the line, and how to mend it."""
    line = data.count(NEWLINE, 0, position) + 1
    column = position - data.rfind(NEWLINE, 0, position)
    codec = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
    return (f"{path}:{line}: byte {column} of the line, 0x{data[position]:02x}, is not UTF-8. Expected UTF-8 text: "
            f"convert the file, for example with `iconv -f {codec} -t UTF-8`, or mend the line.")


def _split(path: Path, lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """The two sides of tab-separated lines; an empty line is an empty pair."""
    sources, targets = [], []
    for number, line in enumerate(lines, 1):
        source, tab, target = line.partition(TAB)
        if (line.strip() and not tab) or TAB in target:
            raise DataError(f"{path}:{number}: {1 + target.count(TAB) if tab else 'no'} tabs. Expected one: source TAB "
                            "target. Mend the line.")
        sources.append(source)
        targets.append(target)
    return sources, targets


def _without_empty(sources: list[str], targets: list[str], files: tuple[str, str]) -> Pairs:
    """The pairs of which both sides hold more than white space."""
    left_out, kept = LeftOut(), []
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source.strip() and target.strip():
            kept.append(index)
        else:
            left_out.add("an empty side", f"{files[bool(source.strip())]}:{index + 1}")
    return Pairs([sources[i] for i in kept], [targets[i] for i in kept], [i + 1 for i in kept], files, left_out)


def _unequal(paths: Sequence[Path], sources: Sequence[str], targets: Sequence[str]) -> str:
    """The message for two files of different length."""
    source, target = paths
    return (f"{target} has {len(targets):,} lines and {source} has {len(sources):,}. Line n of one must translate line "
            f"n of the other. First line where they drift apart by length: about {_drift(sources, targets):,}.")


def _drift(sources: Sequence[str], targets: Sequence[str]) -> int:
    """The line, from 1, where the longer side most likely has its extra lines.

    Before it, line n is paired with line n; from it on, with line n + the difference of counts. The line chosen is the
    one that makes the lengths of all pairs agree best.
    """
    short, long = sorted((sources, targets), key=len)
    brief, full = (np.log1p(np.fromiter(map(len, lines), float, len(lines))) for lines in (short, long))
    if not len(short):
        return 1
    extra = len(full) - len(brief)
    ratio = full.mean() - brief.mean()
    straight = np.abs(full[: len(brief)] - brief - ratio)
    shifted = np.abs(full[extra:] - brief - ratio)
    gain = np.concatenate([[0.0], np.cumsum(straight - shifted)])
    return int(np.argmin(gain)) + 1
