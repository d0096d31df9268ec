"""The prepared corpus: token ids on disk, memory-mapped, so that ten million pairs open at once and cost no memory.

    data/manifest.json        counts, what was left out and why, SHA-256 of each file, fingerprint
    data/source.ids.npy       uint16 or uint32 (tokens of all sources,), without special tokens
    data/source.offsets.npy   int64 (pairs + 1,): pair i is ids[offsets[i]:offsets[i + 1]]
    data/target.*.npy         the same for the targets
    data/shared.json          the tokenizer, or source.json and target.json; the run's tokenizer/ holds a copy

A folder is written beside its place and renamed in whole, so it is there entirely or not at all. The fingerprint, of
the training files' contents and of the settings that matter, tells when it is out of date. Why so:
docs/decisions/0003-shard-format.md.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regard.config import Config, DataConfig, TokenizerConfig
from regard.errors import DataError, RunError
from regard.text.corpus import LeftOut, Pairs, read_pairs, unreadable
from regard.text.tokenizer import Tokenizers

FORMAT = 1
CHUNK = 50_000  # pairs encoded at a time
MANIFEST = "manifest.json"

Ids = npt.NDArray[np.int64]
Say = Callable[[str], object]


class Corpus:
    """Memory-mapped ids of one prepared corpus, without special tokens."""

    def __init__(self, folder: Path):
        """Open a folder that `prepare` made.

        Raises:
            DataError: a file is missing, cut short or altered.
        """
        self.manifest = _verified(folder)
        self._source_ids, self._source_offsets = _open(folder, "source", "ids"), _open(folder, "source", "offsets")
        self._target_ids, self._target_offsets = _open(folder, "target", "ids"), _open(folder, "target", "offsets")

    def __len__(self) -> int:
        return len(self._source_offsets) - 1

    @property
    def digest(self) -> str:
        """SHA-256 of what it holds."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all sources, and of all targets."""
        return len(self._source_ids), len(self._target_ids)

    @cached_property
    def source_lengths(self) -> Ids:
        """uint32 (pairs,), tokens of each source."""
        return np.diff(self._source_offsets).astype(np.uint32)

    @cached_property
    def target_lengths(self) -> Ids:
        """uint32 (pairs,), tokens of each target."""
        return np.diff(self._target_offsets).astype(np.uint32)

    def source(self, index: int) -> Ids:
        """int64 (tokens,), the ids of one source."""
        return _row(self._source_ids, self._source_offsets, index)

    def target(self, index: int) -> Ids:
        """int64 (tokens,), the ids of one target."""
        return _row(self._target_ids, self._target_offsets, index)


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
    fingerprint = _fingerprint(config.data, config.tokenizer)
    begun = _begun_with(run, fingerprint)
    manifest = _manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint:
        _build(config, folder, fingerprint, begun, say)
    train = Corpus(folder)
    tokenizers = Tokenizers.load(folder)
    _copy_tokenizers(tokenizers, train.manifest, run / "tokenizer", begun is not None)
    say(f"data: {len(train):,} pairs, {train.tokens[0]:,} source and {train.tokens[1]:,} target tokens, in {folder}")
    return Prepared(tokenizers, train)


def _begun_with(run: Path, fingerprint: str) -> Tokenizers | None:
    """The tokenizers of a run that has checkpoints; raises RunError when it began with other data or settings."""
    if not any((run / "checkpoints").glob("step-*")):
        return None
    manifest = _manifest(run / "tokenizer")
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
    same = _manifest(folder) == {"fingerprint": made["fingerprint"], "files": digests}
    if same and not any(_faults(folder, digests)):
        return
    if begun:
        raise RunError(f"{folder}: not the tokenizer that the prepared corpus was made with, and the run has begun "
                       "with it. Put it back if it was altered; or delete the prepared corpus to have it made again.")
    _write_folder(folder, tokenizers.save, {"fingerprint": made["fingerprint"]})


def _build(config: Config, folder: Path, fingerprint: str, begun: Tokenizers | None, say: Say) -> None:
    """Read the text, train the tokenizers unless the run has them, and write the prepared folder."""
    parts = [read_pairs(corpus, config.data.root) for corpus in config.data.train]
    for part in parts:
        say(part.summary)
    if not any(parts):
        raise DataError(f"no pair to train on: {'; '.join(part.summary for part in parts)}. Expected at least one pair "
                        "with text on both sides. Nothing was written.")
    tokenizers = begun or Tokenizers.train(config.tokenizer, *parts)
    for line in _described(tokenizers, config.tokenizer, sum(map(len, parts))):
        say(line)
    source, target, left_out = _encode(parts, tokenizers, config.data.max_tokens)
    if not source.lengths:
        raise DataError(f"no pair to train on: {left_out}. Raise data.max_tokens. Nothing was written.")
    if left_out.counts:
        say(str(left_out))

    def save(place: Path) -> None:
        source.save(place, "source")
        target.save(place, "target")
        tokenizers.save(place)

    _write_folder(folder, save, {
        "fingerprint": fingerprint, "pairs": len(source.lengths), "source_tokens": sum(source.lengths),
        "target_tokens": sum(target.lengths), "left_out": asdict(left_out),
    })


class _Side:
    """One side's ids while they are gathered, in as few bytes as the vocabulary allows."""

    def __init__(self, size: int):
        self.dtype = np.uint16 if size <= 2**16 else np.uint32
        self.ids: list[npt.NDArray[Any]] = []
        self.lengths: list[int] = []

    def add(self, rows: Sequence[Sequence[int]]) -> None:
        lengths = [len(row) for row in rows]
        self.ids.append(np.fromiter(chain.from_iterable(rows), self.dtype, sum(lengths)))
        self.lengths += lengths

    def save(self, folder: Path, name: str) -> None:
        np.save(folder / f"{name}.ids.npy", np.concatenate(self.ids), allow_pickle=False)
        np.save(folder / f"{name}.offsets.npy", np.cumsum([0, *self.lengths], dtype=np.int64), allow_pickle=False)


def _encode(parts: Sequence[Pairs], tokenizers: Tokenizers, max_tokens: int) -> tuple[_Side, _Side, LeftOut]:
    """The ids of all pairs that are short enough, and what was left out, here and before."""
    source, target, left_out = _Side(tokenizers.source.size), _Side(tokenizers.target.size), LeftOut()
    for part in parts:
        left_out.merge(part.left_out)
        for start in range(0, len(part), CHUNK):
            sources = tokenizers.source.encode(part.sources[start:start + CHUNK])
            targets = tokenizers.target.encode(part.targets[start:start + CHUNK])
            fits = [max(map(len, pair)) <= max_tokens for pair in zip(sources, targets, strict=True)]
            source.add(list(compress(sources, fits)))
            target.add(list(compress(targets, fits)))
            for index in (index for index, fit in enumerate(fits) if not fit):
                left_out.add(f"a side longer than {max_tokens} tokens", part.place(start + index))
    return source, target, left_out


def _described(tokenizers: Tokenizers, config: TokenizerConfig, pairs: int) -> Iterator[str]:
    """One line for each tokenizer, such as "tokenizer: bpe 10,000, shared, from 58,000 lines"."""
    sides = [("shared", 2 * pairs)] if tokenizers.shared else [("source", pairs), ("target", pairs)]
    for (side, lines), tokenizer, asked in zip(sides, tokenizers, config.sides, strict=False):
        short = tokenizer.kind in ("bpe", "unigram") and tokenizer.size < asked.size
        yield (f"tokenizer: {tokenizer.kind} {tokenizer.size:,}, {side}, from {lines:,} lines"
               + (f"; they yield no more, {asked.size:,} were asked for" if short else ""))


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig) -> str:
    """SHA-256 of the training files' contents and of every setting that shapes the prepared corpus."""
    contents = [[_input_digest(data.root / path) for path in (corpus.source, corpus.target, corpus.pairs) if path]
                for corpus in data.train]
    settings = {"format": FORMAT, "max_tokens": data.max_tokens, "tokenizer": tokenizer.model_dump()}
    return hashlib.sha256(json.dumps([contents, settings], sort_keys=True).encode()).hexdigest()


def _input_digest(path: Path) -> str:
    """SHA-256 of a file of text; raises DataError when it cannot be read."""
    try:
        return _digest(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _digest(path: Path) -> str:
    """SHA-256 of a file, in constant memory; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of ours, or None when it has none."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        names = [name for name, _ in manifest["files"].items()]
        if "fingerprint" not in manifest or any(name != Path(name).name for name in names):
            raise ValueError("it has no fingerprint, or names a file elsewhere")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"not a manifest of ours ({error})") from None


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}. It is not as it was written. Put it back, or delete the folder {path.parent} "
                     "and run again: it is made anew from the text.")


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a folder in which every file is as it was written."""
    manifest = _manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: no prepared corpus here. `regard prepare` or `regard train` makes one.")
    for path, fault in _faults(folder, manifest["files"]):
        raise _damaged(path, fault)
    return manifest


def _faults(folder: Path, digests: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """The files that are missing or do not have their SHA-256."""
    for name, digest in digests.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            yield folder / name, error.strerror or str(error)
        else:
            if found != digest:
                yield folder / name, f"its SHA-256 begins with {found[:8]}, expected {digest[:8]}"


def _open(folder: Path, side: str, what: str) -> npt.NDArray[Any]:
    """Memory-map one array of one side, as a plain array: slices of numpy's own memmap class are slow."""
    path = folder / f"{side}.{what}.npy"
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None


def _row(ids: npt.NDArray[Any], offsets: Ids, index: int) -> Ids:
    """One row; raises IndexError beyond the last."""
    index = range(len(offsets) - 1)[index]
    return ids[offsets[index]:offsets[index + 1]].astype(np.int64)


def _write_folder(folder: Path, save: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Write a folder and its manifest beside its place, make it durable, and rename it in whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _make_way(folder)
        partial.replace(folder)
        _sync(folder.parent)
    except OSError as error:
        raise RunError(f"{folder}: cannot write it: {error.strerror or error}. Make room, or permission to write, or "
                       "choose another place with --out (or data.prepared).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_way(folder: Path) -> None:
    """Empty an older folder of ours, its manifest last, so that after a kill half way it is still known as ours.

    What is not ours is never deleted: a folder that holds anything else is refused.
    """
    manifest = _manifest(folder) or {"files": {}}
    ours = {*manifest["files"], MANIFEST}
    strangers = [path.name for path in folder.iterdir() if path.name not in ours] if folder.exists() else []
    if strangers:
        raise RunError(f"{folder}: holds files that Regard did not write ({', '.join(sorted(strangers)[:3])}). "
                       "Expected an empty folder, or none: move them away, or choose another place.")
    for name in sorted(ours, key=MANIFEST.__eq__):
        (folder / name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
