"""Text to ids and back: five kinds of tokenizer behind one class, with character offsets kept.

    kind      a token is                                     "a dog" becomes       text never seen
    bpe       a piece of a word, most frequent pairs merged  ▁a ▁dog               <unk>
    unigram   a piece of a word, most probable split         ▁a ▁dog               <unk>
    char      a character, the space included                a ▁ d o g             <unk>
    byte      a byte of the text's UTF-8                     a ▁ d o g             its bytes, so never <unk>
    space     whatever stands between spaces                 a dog                 <unk>

No kind changes a character: no case folding, no Unicode normalisation. `bpe` (Sennrich et al. 2016) and `unigram`
(Kudo 2018) part words at spaces only, and write a word's start as ▁ (U+2581); a ▁ of the text itself comes back as a
space, and one leading space is not kept. `space` comes back parted by single spaces. The first four ids are the
special tokens. They are added by whoever needs them, never by text: "</s>" typed by a user is four ordinary characters.

The same text gives the same vocabulary, except with unigram: the library adds its counts in an order that differs from
process to process, so scores differ in the fourth digit, and with them the order of near-equal entries.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from regard.config import TokenizerConfig
from regard.errors import CheckpointError, ConfigError, DataError
from regard.text.corpus import Pairs

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
FORMAT = 1

# What the library's models call the special tokens. No piece of text ever holds a space beside other characters (it is
# ▁, Ġ or a token of its own), so no text can be taken for one of these.
_INNER = [f" {name}" for name in SPECIALS]
WORD_START = "▁"
# GPT-2's visible stand-ins for the 256 bytes, which the library's ByteLevel reads and writes.
_VISIBLE = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}


class Tokens(NamedTuple):
    """One text as tokens: ids, what people are shown, and where each stands in the text, as [start, end) characters."""

    ids: list[int]
    texts: list[str]
    spans: list[tuple[int, int]]


class Vocabulary(NamedTuple):
    """What training finds, and all that is written to disk.

    `entries` are in order of their ids and begin with the special tokens; `merges` are those of bpe, best first;
    `scores` are unigram's log-probabilities (nats), one for each entry.
    """

    entries: list[str]
    merges: list[tuple[str, str]]
    scores: list[float]


class Tokenizer:
    """One side's tokenizer. Make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, kind: str, vocabulary: Vocabulary):
        self.kind = kind
        self.vocabulary = vocabulary
        self._engine = _engine(kind, vocabulary)
        self._shown = SPECIALS + [_shown(kind, entry) for entry in vocabulary.entries[len(SPECIALS):]]

    @classmethod
    def train(cls, kind: str, size: int, lines: Iterable[str]) -> Self:
        """Learn a vocabulary of at most `size` entries, special tokens included.

        Text with fewer pieces than that to learn gives a smaller vocabulary: look at `size` afterwards. When the
        characters alone outnumber `size`, bpe keeps the most frequent ones, and unigram refuses.

        Raises:
            DataError: the lines hold no text, or half of a surrogate pair.
            ConfigError: unigram finds more characters than `size` has room for.
        """
        lines = _encodable(lines)
        if kind == "byte":
            vocabulary = Vocabulary(SPECIALS + sorted(_BYTES, key=_BYTES.__getitem__), [], [])
        elif kind in ("char", "space"):
            pieces = chain.from_iterable(lines if kind == "char" else (line.split(" ") for line in lines))
            vocabulary = Vocabulary(SPECIALS + _most_frequent(pieces, size - len(SPECIALS)), [], [])
        else:
            vocabulary = _learn(kind, size, lines)
        if len(vocabulary.entries) <= len(SPECIALS):
            raise DataError(f"no text to learn a {kind} tokenizer from: every line is empty")
        return cls(kind, vocabulary)

    @property
    def size(self) -> int:
        """Entries of the vocabulary, special tokens included."""
        return len(self.vocabulary.entries)

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """The ids of each line, without special tokens around them.

        Raises:
            DataError: a line holds half of a surrogate pair, which is no text in any encoding.
        """
        return [encoding.ids for encoding in self._engine.encode_batch_fast(_encodable(lines))]

    def tokens(self, text: str) -> Tokens:
        """One text as ids with what people are shown and where each token stands in the text.

        A span holds the characters of the token, without the space before its word. Bytes of one character share its
        span; a word's start that is a token of its own has the span of its space, or an empty one at the very start.
        """
        encoding = self._engine.encode(_encodable([text])[0])
        spans = encoding.offsets
        if self.kind in ("bpe", "unigram"):
            spans = [_span(text, *span, piece) for span, piece in zip(spans, encoding.tokens, strict=True)]
        return Tokens(encoding.ids, self.texts(encoding.ids), spans)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids; special tokens, `<unk>` included, leave no trace in it."""
        rows = [[id for id in row if id >= len(SPECIALS)] for row in ids]
        return self._engine.decode_batch(rows, skip_special_tokens=False)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What people are shown for each id: special tokens by name, a space as ▁, unprintable characters escaped."""
        return [self._shown[id] for id in ids]

    def save(self, path: Path) -> None:
        """Write one JSON file; raises OSError."""
        content = {"format": FORMAT, "kind": self.kind, **self.vocabulary._asdict()}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, cut short, or not a tokenizer of this version.
        """
        try:
            return cls(*_parse(json.loads(path.read_text(encoding="utf-8"))))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read the tokenizer: {error.strerror}. It belongs to the run; "
                                  "copy it from where the run was made, or train again") from None
        except Exception as error:  # the library raises plain Exception for a model that does not hold together
            raise CheckpointError(f"{path}: not a tokenizer of this version of Regard, or damaged ({error}). Copy it "
                                  "again from where the run was made, or train again") from None


class Tokenizers(NamedTuple):
    """The tokenizers of both sides; one and the same when the vocabulary is shared."""

    source: Tokenizer
    target: Tokenizer

    @property
    def shared(self) -> bool:
        """Whether both sides have one vocabulary."""
        return self.source is self.target

    def unlike(self, others: Self) -> Iterator[str]:
        """How the vocabularies differ from others, a text for each side; nothing if one id means the same in both."""
        for side, own, other in zip(("source", "target"), self, others, strict=True):
            if (own.kind, own.vocabulary) != (other.kind, other.vocabulary):
                yield f"the {side} vocabularies differ ({own.kind} of {own.size:,}, {other.kind} of {other.size:,})"

    @classmethod
    def train(cls, config: TokenizerConfig, *pairs: Pairs) -> Self:
        """Learn from pairs: one tokenizer from both sides' lines, or one from each."""
        sources = chain.from_iterable(part.sources for part in pairs)
        targets = chain.from_iterable(part.targets for part in pairs)
        if config.is_shared:
            both = Tokenizer.train(config.kind, config.size, chain(sources, targets))
            return cls(both, both)
        source, target = config.sides
        return cls(Tokenizer.train(source.kind, source.size, sources),
                   Tokenizer.train(target.kind, target.size, targets))

    def save(self, folder: Path) -> None:
        """Write shared.json, or source.json and target.json, into a folder that exists."""
        if self.shared:
            self.source.save(folder / "shared.json")
        else:
            self.source.save(folder / "source.json")
            self.target.save(folder / "target.json")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; raises CheckpointError when a file is missing or damaged."""
        if (folder / "shared.json").exists():
            both = Tokenizer.load(folder / "shared.json")
            return cls(both, both)
        return cls(Tokenizer.load(folder / "source.json"), Tokenizer.load(folder / "target.json"))


def _engine(kind: str, vocabulary: Vocabulary) -> hf.Tokenizer:
    """The library's tokenizer for a vocabulary. It knows no special tokens, only four entries that text never meets."""
    entries = _INNER + vocabulary.entries[len(SPECIALS):]
    ids = {entry: id for id, entry in enumerate(entries)}
    if len(ids) != len(entries):
        raise ValueError("an entry of the vocabulary is there twice")
    if kind == "unigram":
        engine = hf.Tokenizer(models.Unigram(list(zip(entries, vocabulary.scores, strict=True)), UNK))
    elif kind == "space":
        engine = hf.Tokenizer(models.WordLevel(ids, unk_token=_INNER[UNK]))
    else:
        engine = hf.Tokenizer(models.BPE(ids, vocabulary.merges, unk_token=_INNER[UNK], fuse_unk=kind == "bpe"))
    _SHAPES[kind](engine)
    return engine


def _words(engine: hf.Tokenizer) -> None:
    engine.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, "always")
    engine.decoder = decoders.Metaspace(WORD_START, "always")


def _characters(engine: hf.Tokenizer) -> None:
    engine.decoder = decoders.Fuse()


def _bytes(engine: hf.Tokenizer) -> None:
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()


def _spaces(engine: hf.Tokenizer) -> None:
    engine.pre_tokenizer = pre_tokenizers.Split(" ", "removed")


_SHAPES = {"bpe": _words, "unigram": _words, "char": _characters, "byte": _bytes, "space": _spaces}


def _learn(kind: str, size: int, lines: Iterable[str]) -> Vocabulary:
    """Train bpe or unigram."""
    trainer: trainers.Trainer
    if kind == "bpe":
        engine = hf.Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=_INNER, show_progress=False,
                                      limit_alphabet=size - len(SPECIALS))
    else:
        engine = hf.Tokenizer(models.Unigram())
        # The library starts from counts over distinct words, not over text; its default of 2 iterations does not get
        # away from there ("a man" became "▁ a ▁man"), and 8 come within 0.1% of the tokens that 32 give.
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=_INNER, show_progress=False,
                                          unk_token=_INNER[UNK], n_sub_iterations=8)
    _SHAPES[kind](engine)
    try:
        engine.train_from_iterator(lines, trainer)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"[tokenizer] size = {size} is too small for {kind}: {error} Use a larger size, or "
                          'kind = "bpe", which keeps the most frequent characters.') from None
    model = json.loads(engine.to_str())["model"]
    if kind == "unigram":
        entries, scores = map(list, zip(*model["vocab"], strict=True))
        return Vocabulary(SPECIALS + entries[len(SPECIALS):], [], scores)
    entries = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return Vocabulary(SPECIALS + entries[len(SPECIALS):], [tuple(merge) for merge in model["merges"]], [])


def _most_frequent(pieces: Iterator[str], most: int) -> list[str]:
    """The most frequent pieces, those of equal count in the order of their characters."""
    counts = Counter(piece for piece in pieces if piece)
    return list(islice(sorted(counts, key=lambda piece: (-counts[piece], piece)), most))


def _parse(content: dict[str, Any]) -> tuple[str, Vocabulary]:
    """Check what was read from a file; raises ValueError, KeyError or TypeError."""
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}, expected {FORMAT}")
    kind, entries = content["kind"], content["entries"]
    if kind not in _SHAPES or entries[:len(SPECIALS)] != SPECIALS:
        raise ValueError(f"kind {kind!r} with first entries {entries[:len(SPECIALS)]}")
    if kind == "byte" and set(entries[len(SPECIALS):]) != set(_BYTES):
        raise ValueError("its entries are not the 256 bytes")
    return kind, Vocabulary(entries, [(left, right) for left, right in content["merges"]], content["scores"])


def _encodable(lines: Iterable[str]) -> list[str]:
    """The lines; raises DataError when one holds half of a surrogate pair, which the library cannot read."""
    lines = list(lines)
    try:
        for line in lines:
            line.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object[:40]!r}: character {error.start + 1} is half of a surrogate pair, which is not "
                        "text. Read the text as UTF-8, with errors refused or replaced") from None
    return lines


def _span(text: str, start: int, end: int, piece: str) -> tuple[int, int]:
    """A piece's span without what ▁ stands for: the space before the word, or nothing at the very start."""
    if piece == WORD_START:
        return (start, end) if text[start] in (" ", WORD_START) else (start, start)
    return start + (end - start > 1 and text[start] == " "), end


def _shown(kind: str, entry: str) -> str:
    """What people are shown for an entry of the vocabulary."""
    if kind == "byte":
        byte = _BYTES[entry]
        entry = chr(byte) if 32 <= byte <= 126 else f"<0x{byte:02X}>"
    shown = (character if character.isprintable() else ascii(character)[1:-1] for character in entry)
    return "".join(shown).replace(" ", WORD_START)
