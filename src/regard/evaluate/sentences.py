"""Single lines of a test set: which came out best and worst, where systems differ most, and what is wrong in them."""

import re
from collections.abc import Iterator, Sequence

from regard.look.trace import visible

_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA, _HANGUL = "\u3040-\u30ff", "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
_WORDS = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+")


def best(closeness: Sequence[float], outputs: Sequence[str], wanted: int) -> list[int]:
    """Rows of the outputs nearest to their references, of equals the longest first."""
    return sorted(range(len(outputs)), key=lambda row: (-closeness[row], -len(outputs[row]), row))[:wanted]


def worst(closeness: Sequence[float], outputs: Sequence[str], wanted: int) -> list[int]:
    """Rows of the outputs farthest from their references, of equals the longest first; none of them is right."""
    wrong = (row for row in range(len(outputs)) if closeness[row] < 100)
    return sorted(wrong, key=lambda row: (closeness[row], -len(outputs[row]), row))[:wanted]


def most_different(closeness: Sequence[Sequence[float]], wanted: int) -> list[int]:
    """Rows on which systems are farthest apart, by the distance of the best from the worst.

    Args:
        closeness: for each system, how near each of its outputs is to the reference.
        wanted: how many rows at most; rows on which all are equal do not count.
    """
    spread = [max(row) - min(row) for row in zip(*closeness, strict=True)]
    apart = (row for row, distance in enumerate(spread) if distance > 0)
    return sorted(apart, key=lambda row: (-spread[row], row))[:wanted]


def typical(lengths: Sequence[int], longest: int) -> int | None:
    """The row of median length among those no longer than `longest`; None: there is none."""
    rows = sorted((row for row, length in enumerate(lengths) if 0 < length <= longest), key=lambda row: lengths[row])
    return rows[len(rows) // 2] if rows else None


def marked(output: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """An output in pieces, each with whether it is right, by the fewest edits that lead to the closest reference.

    A piece is a word, or a single Chinese or Japanese character, and takes along the space before it. All pieces
    together are the output, as text that can only be looked at; an empty output is one piece and right if that is.
    """
    from rapidfuzz.distance import Levenshtein

    pieces = list(_pieces(output))
    words = [piece.strip() for piece in pieces]
    wanted = [[piece.strip() for piece in _pieces(reference)] for reference in references]
    closest = min(wanted, key=lambda each: Levenshtein.distance(words, each))
    if not pieces:
        return [(visible(""), not closest)]
    right = {place for edit in Levenshtein.opcodes(words, closest) if edit.tag == "equal"
             for place in range(edit.src_start, edit.src_end)}
    return [(_shown(piece), place in right) for place, piece in enumerate(pieces)]


def language(text: str) -> str | None:
    """The language whose letter forms a text of ideographs needs: "ja" with kana, "ko" with hangul, else "zh"."""
    for name, letters in (("ja", _KANA), ("ko", _HANGUL), ("zh", _WIDE)):
        if re.search(f"[{letters}]", text):
            return name
    return None


def plain_lengths(sources: Sequence[str]) -> tuple[list[int], str]:
    """The length of each source where no tokenizer is at hand, and its unit.

    It is words; or characters, where most lines hold no space: Chinese text, or single words to pronounce.
    """
    words = [len(source.split()) for source in sources]
    if 2 * sum(count > 1 for count in words) >= len(words):
        return words, "words"
    return [len(source) for source in sources], "characters"


def _pieces(text: str) -> Iterator[str]:
    """Words and wide characters, each with the white space before it; white space at the end goes with the last."""
    start, found = 0, list(_WORDS.finditer(text))
    for number, word in enumerate(found, start=1):
        end = len(text) if number == len(found) else word.end()
        yield text[start:end]
        start = end


def _shown(piece: str) -> str:
    """A piece with its leading space as it is, and the rest as text that can only be looked at."""
    word = piece.lstrip(" ")
    return " " * (len(piece) - len(word)) + visible(word)
