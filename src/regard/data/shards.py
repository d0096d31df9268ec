"""The prepared corpus: token ids on disk, memory-mapped, so that ten million pairs open at once and cost no memory.

    data/manifest.json        counts, what was left out and why, SHA-256 of each file, fingerprint
    data/source.ids.npy       uint16 or uint32 (tokens of all sources,), without special tokens
    data/source.offsets.npy   int64 (rows + 1,): row i is ids[offsets[i]:offsets[i + 1]]
    data/target.*.npy         the same for the targets
    data/alignment.*.npy      where a corpus has an alignment: links, uint16 or uint32 (links, 2), source and target
                              token, and offsets, as of the ids
    data/shared.json          the tokenizer, or source.json and target.json; the run's tokenizer/ holds a copy

A row is a pair. With BPE-dropout there are several samples of all pairs, each with other segmentations, one after
another: row k * pairs + i is pair i in sample k, and epoch e reads sample e modulo samples.

A folder is written beside its place and renamed in whole, so it is there entirely or not at all. The fingerprint, of
the training files' contents and of the settings that matter, tells when it is out of date. Why so:
docs/decisions/0003-shard-format.md.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from regard.config import Config, CorpusConfig, DataConfig, TokenizerConfig
from regard.data.folder import MANIFEST, alone, damaged, digest, faults, manifest_of, verified, write_folder
from regard.data.taken import digest_of, has_begun, taken
from regard.errors import DataError, RunError
from regard.text.alignment import token_links, words_of
from regard.text.corpus import LeftOut, Pairs, read_pairs, unreadable
from regard.text.sampling import Sampler
from regard.text.tokenizer import Tokenizers

FORMAT = 1
CHUNK = 50_000  # pairs encoded at a time

Ids = npt.NDArray[np.int64]
Say = Callable[[str], object]


class Corpus:
    """Memory-mapped ids of one prepared corpus, without special tokens."""

    def __init__(self, folder: Path, weights: Sequence[float] = ()):
        """Open a folder that `prepare` made.

        Args:
            folder: where it is.
            weights: how often an epoch holds each pair of its corpora, on average; none: once.

        Raises:
            DataError: a file is missing, cut short or altered.
        """
        self.manifest = verified(folder)
        self._source_ids, self._source_offsets = _open(folder, "source", "ids"), _open(folder, "source", "offsets")
        self._target_ids, self._target_offsets = _open(folder, "target", "ids"), _open(folder, "target", "offsets")
        self._links = None
        if "alignment.links.npy" in self.manifest["files"]:
            self._links = _open(folder, "alignment", "links"), _open(folder, "alignment", "offsets")
        self.samples = self._samples(folder)
        self.shares = self._shares(folder, weights) if weights else []
        self.parts = self.shares if set(weights) - {1.0} else []

    def _samples(self, folder: Path) -> int:
        """Segmentations of each pair; one where a manifest does not tell."""
        samples, rows = self.manifest.get("samples", 1), len(self._source_offsets) - 1
        if type(samples) is not int or samples < 1 or rows % samples:
            raise damaged(folder / MANIFEST, f"its samples are {samples!r}, expected a number that divides {rows:,}, "
                          "its rows")
        return samples

    def _shares(self, folder: Path, weights: Sequence[float]) -> list[tuple[int, float]]:
        """Pairs and weight of each corpus; none where an earlier version did not count them, and all weigh the same."""
        if uncounted(self.manifest, weights) and set(weights) == {1.0}:
            return []
        counts = self.manifest.get("corpora", [len(self)])
        whole = isinstance(counts, list) and [type(count) for count in counts] == [int] * len(weights)
        if not whole or sum(counts) != len(self):
            raise damaged(folder / MANIFEST, f"its corpora are {counts}, expected {len(weights)} numbers whose sum is "
                           f"{len(self)}")
        return list(zip(counts, weights, strict=True))

    def __len__(self) -> int:
        """Pairs, which have so many rows for each sample."""
        return (len(self._source_offsets) - 1) // self.samples

    @property
    def digest(self) -> str:
        """SHA-256 of what it holds."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all sources, and of all targets, in all samples."""
        return len(self._source_ids), len(self._target_ids)

    @cached_property
    def source_lengths(self) -> Ids:
        """uint32 (rows,), tokens of each source."""
        return np.diff(self._source_offsets).astype(np.uint32)

    @cached_property
    def target_lengths(self) -> Ids:
        """uint32 (rows,), tokens of each target."""
        return np.diff(self._target_offsets).astype(np.uint32)

    def source(self, index: int) -> Ids:
        """int64 (tokens,), the ids of one source."""
        return _row(self._source_ids, self._source_offsets, index)

    def target(self, index: int) -> Ids:
        """int64 (tokens,), the ids of one target."""
        return _row(self._target_ids, self._target_offsets, index)

    def alignment(self, index: int) -> Ids | None:
        """int64 (L, 2), source token and target token of the links of one pair; None: no corpus has an alignment."""
        return None if self._links is None else _row(*self._links, index)


def uncounted(manifest: dict[str, Any], weights: Sequence[float]) -> bool:
    """Whether a prepared corpus of several is of an earlier version, which did not count the pairs of each."""
    return "corpora" not in manifest and len(weights) > 1


class Prepared(NamedTuple):
    """What training reads."""

    tokenizers: Tokenizers
    train: Corpus


def prepare(config: Config, run: Path, progress: Say | None = None) -> Prepared:
    """Make the tokenizer and the prepared corpus, or open them when they are up to date.

    Args:
        config: its [data] and [tokenizer] say what to make.
        run: the run's folder, which gets tokenizer/ and, unless `data.prepared` says otherwise, data/.
        progress: called with a line of plain talk at each stage.

    Raises:
        DataError: the text cannot be used, or a prepared file is damaged.
        ConfigError: the tokenizer's size does not fit the text.
        RunError: the run began with other data or another tokenizer, or a folder cannot be written.
    """
    say = progress or (lambda line: None)
    folder = config.data.root / config.data.prepared.expanduser() if config.data.prepared else run / "data"
    folder = folder.resolve()  # it may be a link to another disk
    given = taken(config, run)
    fingerprint = _fingerprint(config.data, config.tokenizer, given)
    begun = _begun_with(run, fingerprint) or given
    weights = [corpus.weight for corpus in config.data.train]
    if _state(folder, fingerprint, weights) != "ready":
        with alone(folder, say) if config.data.prepared else nullcontext():
            state = _state(folder, fingerprint, weights)  # others may have made it meanwhile
            if state == "missing":
                _build(config, folder, fingerprint, begun, say)
            elif state == "uncounted":
                say(f"{folder}: an earlier version made it, and did not count the pairs of each corpus: it is made "
                    "anew")
                _build(config, folder, fingerprint, begun or Tokenizers.load(folder), say)
    train = Corpus(folder, weights)
    tokenizers = Tokenizers.load(folder)
    _copy_tokenizers(tokenizers, train.manifest, run / "tokenizer", has_begun(run))
    drawn = f"{train.samples:,} segmentations of each, " if train.samples > 1 else ""
    say(f"data: {len(train):,} pairs, {drawn}{train.tokens[0]:,} source and {train.tokens[1]:,} target tokens, in "
        f"{folder}")
    if train.parts or len(train.shares) > 1:
        say(f"data: an epoch holds {_in_an_epoch(config.data.train, train.shares)}")
    return Prepared(tokenizers, train)


def _state(folder: Path, fingerprint: str, weights: Sequence[float]) -> Literal["ready", "missing", "uncounted"]:
    """Whether a prepared folder can be used as it is."""
    manifest = manifest_of(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint:
        return "missing"
    return "uncounted" if uncounted(manifest, weights) and set(weights) != {1.0} else "ready"


def _begun_with(run: Path, fingerprint: str) -> Tokenizers | None:
    """The tokenizers of a run that has checkpoints; raises RunError when it began with other data or settings."""
    if not has_begun(run):
        return None
    manifest = manifest_of(run / "tokenizer")
    if manifest is None:
        raise RunError(f"{run / 'tokenizer'}: missing, and the run has begun with it. Put it back to go on, or begin "
                       "anew with --fresh or another --out.")
    if manifest["fingerprint"] != fingerprint:
        raise RunError(f"{run}: the training data or the tokenizer settings have changed since this run began. Put "
                       "them back to go on with it, or begin anew with --fresh or another --out.")
    return Tokenizers.load(run / "tokenizer")


def _copy_tokenizers(tokenizers: Tokenizers, made: dict[str, Any], folder: Path, begun: bool) -> None:
    """Give the run the tokenizers of the prepared corpus, unless it has them."""
    digests = {name: digest for name, digest in made["files"].items() if name.endswith(".json")}
    same = manifest_of(folder) == {"fingerprint": made["fingerprint"], "files": digests}
    if same and not any(faults(folder, digests)):
        return
    if begun:
        raise RunError(f"{folder}: not the tokenizer that the prepared corpus was made with, and the run has begun "
                       "with it. Put it back if it was altered; or delete the prepared corpus to have it made again.")
    write_folder(folder, tokenizers.save, {"fingerprint": made["fingerprint"]})


def _build(config: Config, folder: Path, fingerprint: str, begun: Tokenizers | None, say: Say) -> None:
    """Read the text, train the tokenizers unless the run has them, and write the prepared folder."""
    parts = [read_pairs(corpus, config.data.root) for corpus in config.data.train]
    for part in parts:
        say(part.summary)
    if not any(parts):
        raise DataError(f"no pair to train on: {'; '.join(part.summary for part in parts)}. Expected at least one pair "
                        "with text on both sides.")
    tokenizers = begun or Tokenizers.train(config.tokenizer, *parts)
    for line in _described(tokenizers, config.tokenizer, sum(map(len, parts))):
        say(line)
    if config.tokenizer.dropout:
        dropout, samples = config.tokenizer.dropout, config.tokenizer.samples
        say(f"tokenizer: drawing {samples:,} segmentation{'s' * (samples > 1)} of each pair, in which each merge is "
            f"left out with probability {dropout:g} …")
    found = _Gathered(parts, tokenizers, config)
    if not any(found.counts):
        raise DataError(f"no pair to train on: {found.left_out}. Raise data.max_tokens.")
    if found.left_out.counts:
        say(str(found.left_out))
    write_folder(folder, found.save, {"fingerprint": fingerprint, **found.facts()})


class _Side:
    """One side's ids while they are gathered, sample by sample, in as few bytes as the vocabulary allows."""

    def __init__(self, size: int, sampler: Sampler | None = None):
        self.dtype, self.sampler = np.uint16 if size <= 2**16 else np.uint32, sampler
        self.ids: list[list[npt.NDArray[Any]]] = [[] for _ in range(sampler.samples if sampler else 1)]
        self.lengths: list[list[Ids]] = [[] for _ in self.ids]

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        """Add rows to the only sample."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        self._put(0, np.fromiter(chain.from_iterable(rows), self.dtype, lengths.sum()), lengths)

    def draw(self, lines: Sequence[str], max_tokens: int) -> None:
        """Add lines to each sample, in other segmentations; a plain one in the place of a longer one than is kept."""
        assert self.sampler is not None
        for sample, (ids, lengths) in enumerate(self.sampler.draw(lines, max_tokens)):
            self._put(sample, ids.astype(self.dtype), lengths)

    def _put(self, sample: int, ids: npt.NDArray[Any], lengths: Ids) -> None:
        self.ids[sample].append(ids)
        self.lengths[sample].append(lengths)

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(map(len, chain.from_iterable(self.ids)))

    def save(self, folder: Path, name: str) -> None:
        offsets = np.cumsum(np.concatenate([[0], *chain.from_iterable(self.lengths)]), dtype=np.int64)
        np.save(folder / f"{name}.ids.npy", np.concatenate([*chain.from_iterable(self.ids)]), allow_pickle=False)
        np.save(folder / f"{name}.offsets.npy", offsets, allow_pickle=False)


class _Links:
    """Links between tokens while they are gathered, in as few bytes as the longest side allows."""

    def __init__(self, tokenizers: Tokenizers, max_tokens: int):
        self.tokenizers, self.dtype = tokenizers, np.uint16 if max_tokens <= 2**16 else np.uint32
        self.links, self.lengths = [np.empty((0, 2), self.dtype)], [0]

    def add(self, part: Pairs, index: int) -> None:
        """Those of one pair, none where its corpus has no alignment."""
        words = None if part.links is None else part.links[index]
        if words is not None and len(words):
            texts = part.sources[index], part.targets[index]
            source, target = (words_of(text, each.tokens(text).spans, each.kind in ("bpe", "unigram"))
                              for text, each in zip(texts, self.tokenizers, strict=True))
            self.links.append(token_links(words, source, target).astype(self.dtype))
            self.lengths.append(len(self.links[-1]))
        else:
            self.lengths.append(0)

    def save(self, folder: Path) -> None:
        np.save(folder / "alignment.links.npy", np.concatenate(self.links), allow_pickle=False)
        np.save(folder / "alignment.offsets.npy", np.cumsum(self.lengths, dtype=np.int64), allow_pickle=False)


class _Gathered:
    """The pairs of all corpora that are short enough, while they are gathered; and what was left out, here and before.

    Args:
        parts: the corpora.
        tokenizers: of both sides.
        config: says how long the longest side may be, and how many segmentations there are.
    """

    def __init__(self, parts: Sequence[Pairs], tokenizers: Tokenizers, config: Config):
        self.tokenizers, self.max_tokens, self.left_out = tokenizers, config.data.max_tokens, LeftOut()
        dropout, samples = config.tokenizer.dropout, config.tokenizer.samples
        self.source, self.target = (
            _Side(each.size, Sampler(each, dropout, samples, side) if dropout else None)
            for side, each in enumerate(tokenizers))
        self.links = _Links(tokenizers, self.max_tokens) if any(part.links is not None for part in parts) else None
        self.counts: list[int] = []
        for part in parts:
            self.left_out.merge(part.left_out)
            self.counts.append(sum(self.add(part, start) for start in range(0, len(part), CHUNK)))

    def add(self, part: Pairs, start: int) -> int:
        """Add some pairs of a corpus; how many of them are short enough."""
        lines = part.sources[start:start + CHUNK], part.targets[start:start + CHUNK]
        rows = [each.encode(own) for each, own in zip(self.tokenizers, lines, strict=True)]
        fits = [max(map(len, pair)) <= self.max_tokens for pair in zip(*rows, strict=True)]
        for side, plain, own in zip((self.source, self.target), rows, lines, strict=True):
            if side.sampler is None:
                side.add(list(compress(plain, fits)))
            else:
                side.draw(list(compress(own, fits)), self.max_tokens)
        for index, fit in enumerate(fits, start):
            if not fit:
                self.left_out.add(f"a side longer than {self.max_tokens} tokens", part.place(index))
            elif self.links is not None:
                self.links.add(part, index)
        return sum(fits)

    def save(self, folder: Path) -> None:
        self.source.save(folder, "source")
        self.target.save(folder, "target")
        if self.links is not None:
            self.links.save(folder)
        self.tokenizers.save(folder)

    def facts(self) -> dict[str, Any]:
        """What the manifest tells of them."""
        samples = {} if self.source.sampler is None else {"samples": self.source.sampler.samples}
        return {"pairs": sum(self.counts), "corpora": self.counts, **samples, "source_tokens": self.source.tokens,
                "target_tokens": self.target.tokens, "left_out": asdict(self.left_out)}


def _described(tokenizers: Tokenizers, config: TokenizerConfig, pairs: int) -> Iterator[str]:
    """One line for each tokenizer, such as "tokenizer: bpe 10,000, shared, from 58,000 lines"."""
    sides = [("shared", 2 * pairs)] if tokenizers.shared else [("source", pairs), ("target", pairs)]
    for (side, lines), tokenizer, asked in zip(sides, tokenizers, config.sides, strict=False):
        if config.take_from is not None:
            yield f"tokenizer: {tokenizer.kind} {tokenizer.size:,}, {side}, of {config.take_from}"
            continue
        short = tokenizer.kind in ("bpe", "unigram") and tokenizer.size < asked.size
        yield (f"tokenizer: {tokenizer.kind} {tokenizer.size:,}, {side}, from {lines:,} lines"
               + (f"; they yield no more, {asked.size:,} were asked for" if short else ""))


def _in_an_epoch(corpora: Sequence[CorpusConfig], shares: Sequence[tuple[int, float]]) -> str:
    """Such as "29,000 pairs x 1 of train.en + train.de (74.4%), 4,000 pairs x 2.5 of more.tsv (25.6%)"."""
    files = (" + ".join(str(path) for path in (each.source, each.target, each.pairs) if path) for each in corpora)
    whole = sum(count * weight for count, weight in shares)
    return ", ".join(f"{count:,} pairs x {weight:g} of {names} ({count * weight / whole:.1%})"
                     for names, (count, weight) in zip(files, shares, strict=True))


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig, given: Tokenizers | None) -> str:
    """SHA-256 of the training files' contents and of every setting that shapes the prepared corpus."""
    contents = [[_input_digest(data.root / path) for path in (corpus.source, corpus.target, corpus.pairs) if path]
                for corpus in data.train]
    own = tokenizer.model_dump(exclude={"take_from", "dropout", "samples"})
    tokens = own if given is None else digest_of(given)
    settings: dict[str, Any] = {"format": FORMAT, "max_tokens": data.max_tokens, "tokenizer": tokens}
    if tokenizer.dropout:  # only then, so that what was prepared before there was dropout stays valid
        settings |= {"dropout": tokenizer.dropout, "samples": tokenizer.samples}
    if any(corpus.alignment for corpus in data.train):
        settings["alignments"] = [
            corpus.alignment and _input_digest(data.root / corpus.alignment) for corpus in data.train]
    return hashlib.sha256(json.dumps([contents, settings], sort_keys=True).encode()).hexdigest()


def _input_digest(path: Path) -> str:
    """SHA-256 of a file of text; raises DataError when it cannot be read."""
    try:
        return digest(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _open(folder: Path, side: str, what: str) -> npt.NDArray[Any]:
    """Memory-map one array of one side, as a plain array: slices of numpy's own memmap class are slow."""
    path = folder / f"{side}.{what}.npy"
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from None


def _row(ids: npt.NDArray[Any], offsets: Ids, index: int) -> Ids:
    """One row; raises IndexError beyond the last."""
    index = range(len(offsets) - 1)[index]
    return ids[offsets[index]:offsets[index + 1]].astype(np.int64)
