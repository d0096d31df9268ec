"""Word alignments: which words of a source and its target belong together, from a file's lines down to tokens.

A line holds the links of one pair in Pharaoh's form, "0-0 1-2 2-1": source word, target word, both counted from 0. A
word is what stands between spaces. An empty line holds no links, and a link that is there twice counts once.
"""

import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from regard.errors import DataError

LINE = re.compile(r" *(?:[0-9]{1,9}-[0-9]{1,9}(?: +|$))*")
LINK = re.compile(r"[0-9]{1,9}-[0-9]{1,9}")


class Links:
    """The links of some pairs: `links[i]` are those of pair i, int64 (L, 2), source word and target word."""

    def __init__(self) -> None:
        self.flat, self.ends = array("I"), array("Q", [0])

    def add(self, numbers: Iterable[int]) -> None:
        """Those of one more pair, source and target in turn."""
        self.flat.extend(numbers)
        self.ends.append(len(self.flat))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return np.array(self.flat[self.ends[index]:self.ends[index + 1]], dtype=np.int64).reshape(-1, 2)


def parse_links(line: str, pair: tuple[str, str], place: str) -> list[int]:
    """The numbers of one line, source and target in turn.

    Args:
        line: of an alignment file.
        pair: the source and the target that it is about.
        place: file:line, for errors.

    Raises:
        DataError: it is no list of links, or a link is to a word that is not there.
    """
    if not LINE.fullmatch(line):
        item = next(item for item in line.split(" ") if item and not LINK.fullmatch(item))
        raise DataError(f"{place}: {item[:40]!r} is no link. Expected the number of a source word and of a target "
                        "word, counted from 0, such as 0-0 1-2, and an empty line for no links.")
    numbers = list(map(int, line.replace("-", " ").split()))
    for side, name in enumerate(("source", "target")):
        words, last = sum(map(bool, pair[side].split(" "))), max(numbers[side::2], default=-1)
        if last >= words:
            raise DataError(f"{place}: a link to {name} word {last}, and the {name} has {words} words. Expected "
                            f"numbers from 0 to {words - 1}: words are what stands between spaces, counted from 0")
    return numbers


def words_of(text: str, spans: Sequence[tuple[int, int]], parted: bool) -> NDArray[np.int64]:
    """The word of each token, int64 (tokens,), counted from 0; -1 for a space that is a token of its own.

    Args:
        text: the line.
        spans: where each token stands in it, [start, end) characters.
        parted: whether the tokenizer parts words at spaces first (bpe, unigram): a space alone is then the start (▁) of
            the word behind it.
    """
    inside = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32) != ord(" ")
    starts = inside & ~np.concatenate([[False], inside[:-1]])
    words = np.append(np.where(inside, np.cumsum(starts) - 1, -1), -1)
    places = [end if parted and text[start:end] == " " else start for start, end in spans]
    return words[np.array(places, dtype=np.int64)]


def token_links(links: NDArray[np.int64], source: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    """Links between words as links between all of their tokens: int64 (L, 2), source token and target token.

    Args:
        links: int64 (L, 2), source word and target word.
        source: int64 (S,), the word of each source token, -1 for none.
        target: int64 (T,), the same of the target.
    """
    sizes = [max(int(words.max(initial=-1)), int(links[:, side].max(initial=-1))) + 2
             for side, words in enumerate((source, target))]
    linked = np.zeros(sizes, dtype=np.bool_)  # the last row and column, which -1 means, stay empty
    linked[links[:, 0], links[:, 1]] = True
    return np.argwhere(linked[source][:, target])
