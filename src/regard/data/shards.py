"""The prepared corpus: token ids on disk, memory-mapped, so that ten million pairs open at once and cost no memory.

    data/manifest.json        counts, what was left out and why, SHA-256 of each file, fingerprint of the inputs
    data/source.ids.npy       uint16 or uint32 (tokens of all sources,), without special tokens
    data/source.offsets.npy   int64 (pairs + 1,): pair i is ids[offsets[i]:offsets[i + 1]]
    data/target.*.npy         the same for the targets
    data/shared.json          the tokenizer, or source.json and target.json; the run's tokenizer/ holds a copy

A folder is written beside its place and renamed in whole, so it is there entirely or not at all. The fingerprint, of
the training files' contents and of the settings that matter, tells when it is out of date.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regard.config import Config
from regard.errors import DataError, RunError
from regard.text.corpus import LeftOut, Pairs, read_pairs, unreadable
from regard.text.tokenizer import Tokenizers

FORMAT = 1
CHUNK = 50_000  # pairs encoded at a time
MANIFEST = "manifest.json"

Ids = npt.NDArray[np.int64]


class Corpus:
    """Memory-mapped ids of one prepared corpus, without special tokens."""

    def __init__(self, folder: Path):
        """Open a folder that `prepare` made.

        Raises:
            DataError: a file is missing, cut short or altered.
        """
        self.manifest = _verified(folder)
        self._source_ids, self._source_offsets = _open(folder, "source")
        self._target_ids, self._target_offsets = _open(folder, "target")

    def __len__(self) -> int:
        return len(self._source_offsets) - 1

    @cached_property
    def source_lengths(self) -> Ids:
        """int64 (pairs,), tokens of each source."""
        return np.diff(self._source_offsets)

    @cached_property
    def target_lengths(self) -> Ids:
        """int64 (pairs,), tokens of each target."""
        return np.diff(self._target_offsets)

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


def prepare(config: Config, run: Path, progress: Callable[[str], object] | None = None) -> Prepared:
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
    fingerprint = _fingerprint(config)
    begun = _begun_with(run, fingerprint)
    manifest = _manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint:
        _build(config, folder, fingerprint, begun, say)
    train = Corpus(folder)
    tokenizers = Tokenizers.load(folder)
    _give(run / "tokenizer", tokenizers, train.manifest, bool(begun))
    say(f"data: {len(train):,} pairs, {train.manifest['source_tokens']:,} source and "
        f"{train.manifest['target_tokens']:,} target tokens, in {folder}")
    return Prepared(tokenizers, train)


def _begun_with(run: Path, fingerprint: str) -> Tokenizers | None:
    """The tokenizers of a run that has checkpoints; raises RunError when its data or tokenizer settings have changed."""
    if not any((run / "checkpoints").glob("step-*")):
        return None
    manifest = _manifest(run / "tokenizer")
    if manifest is None or manifest["fingerprint"] != fingerprint:
        raise RunError(f"{run}: the training data or the tokenizer settings have changed since this run began. Put "
                       "them back to go on with it, or begin anew with --fresh or another --out")
    return Tokenizers.load(run / "tokenizer")


def _give(folder: Path, tokenizers: Tokenizers, made: dict[str, Any], begun: bool) -> None:
    """Put a copy of the prepared corpus's tokenizer into the run, unless the run has it."""
    manifest = _manifest(folder)
    digests = {name: digest for name, digest in made["files"].items() if name.endswith(".json")}
    if manifest == {"fingerprint": made["fingerprint"], "files": digests}:
        return
    if begun:
        raise RunError(f"{folder}: the prepared corpus was made with another tokenizer than this run's. Delete the "
                       "prepared folder to have it made again, or begin anew with --fresh or another --out")
    _write_folder(folder, tokenizers.save, {"fingerprint": made["fingerprint"]})


def _build(config: Config, folder: Path, fingerprint: str, begun: Tokenizers | None, say: Callable[[str], object]) -> None:
    """Read the text, train the tokenizers unless the run has them, and write the prepared folder."""
    parts = [read_pairs(corpus, config.data.root) for corpus in config.data.train]
    for part in parts:
        say(part.summary)
    if not any(parts):
        raise DataError(f"{' + '.join(part.summary for part in parts)}: no pair to train on. Expected at least one "
                        "pair with text on both sides. Nothing was written")
    tokenizers = begun or Tokenizers.train(config.tokenizer, *parts)
    say(_described(config, tokenizers))
    source, target, left_out = _encode(parts, tokenizers, config.data.max_tokens)
    if not source.lengths:
        raise DataError(f"no pair is left to train on: {left_out}. Raise data.max_tokens, or look at the text. "
                        "Nothing was written")
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
    """One side's ids while they are gathered."""

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


def _described(config: Config, tokenizers: Tokenizers) -> str:
    """Such as "tokenizer: bpe 10,000, shared"."""
    if tokenizers.shared:
        return f"tokenizer: {tokenizers.source.kind} {tokenizers.source.size:,}, shared"
    return "tokenizer: " + ", ".join(f"{side} {each.kind} {each.size:,}" for side, each in tokenizers._asdict().items())


def _fingerprint(config: Config) -> str:
    """SHA-256 of the training files' contents and of every setting that shapes the prepared corpus."""
    contents = [[_digest(config.data.root / path) for path in (corpus.source, corpus.target, corpus.pairs) if path]
                for corpus in config.data.train]
    settings = {"format": FORMAT, "max_tokens": config.data.max_tokens, "tokenizer": config.tokenizer.model_dump()}
    return hashlib.sha256(json.dumps([contents, settings], sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 of a file, in constant memory."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of ours, or None when it has none."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        return {"fingerprint": str(manifest["fingerprint"]), "files": dict(manifest["files"]), **manifest}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}. It is not as it was written. Delete the folder {path.parent} and run again: it "
                     "is made anew from the text")


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose every file is as it was written."""
    manifest = _manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: no prepared corpus here. `regard prepare` or `regard train` makes one")
    for name, digest in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file():
            raise _damaged(path, "the file is missing")
        if _digest(path) != digest:
            raise _damaged(path, "its SHA-256 is not that of manifest.json")
    return manifest


def _open(folder: Path, side: str) -> tuple[npt.NDArray[Any], Ids]:
    """The memory-mapped ids and offsets of one side."""
    ids, offsets = (np.load(folder / f"{side}.{name}.npy", mmap_mode="r", allow_pickle=False)
                    for name in ("ids", "offsets"))
    return ids, offsets


def _row(ids: npt.NDArray[Any], offsets: Ids, index: int) -> Ids:
    """One row; raises IndexError beyond the last."""
    index = range(len(offsets) - 1)[index]
    return ids[offsets[index]:offsets[index + 1]].astype(np.int64)


def _write_folder(folder: Path, save: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Write a folder and its manifest beside its place, make it durable, and rename it in whole.

    An older folder of ours gives way, file by file; one that holds anything else is left as it is.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _clear(folder)
        partial.replace(folder)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{folder}: cannot write it: {error.strerror}. Give the folder room and permission to write, "
                       "or choose another place with --out (or data.prepared)") from None


def _clear(folder: Path) -> None:
    """Empty an older folder of ours, its manifest last, so that a kill half way leaves it recognisable."""
    manifest = _manifest(folder)
    if manifest is not None:
        for name in (*manifest["files"], MANIFEST):
            (folder / Path(name).name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
