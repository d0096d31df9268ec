"""A converted model's folder: written whole and checked, or not at all; and the cache of a run.

    export.json       what it was made from, how the check came out, SHA-256 of each other file
    config.toml  tokenizer/                                as in a run
    model.bin  config.json  *_vocabulary.json              as CTranslate2 reads it

A run's cache is RUN/engines/, or where that cannot be written, regard/engines/ in the user's cache folder. The name of
a folder there holds the precision and a hash of the checkpoint and of all that a conversion depends on, so that what
has its name is up to date. Any of it may be deleted at any time.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from regard import __version__
from regard.config import Config, write_config
from regard.engines import check, ct2_model
from regard.engines.ct2 import CT2
from regard.engines.ct2_model import ctranslate2, positions_of, precisions, save
from regard.engines.engine import Torch
from regard.errors import CheckpointError, RunError
from regard.model.seq2seq import Seq2Seq
from regard.text.tokenizer import Tokenizers
from regard.training.checkpoint import MANIFEST, REPLACED, UNFINISHED, disk_errors, read_json
from regard.training.run import EXPORT, Run

FORMAT = 1
CACHE, KEPT, SAMPLE = "engines", 3, 32
"""A run's cache: its folder, the newest conversions that stay there, and the sentences that each is checked on."""


class Unlike(RunError):
    """A converted model does not translate as the one it was made from."""


class Overtaken(RunError):
    """Another process has made the folder in the meantime."""


def about(folder: Path) -> dict[str, Any] | None:
    """What export.json says of a folder; None where there is none.

    Raises:
        CheckpointError: it is damaged.
        RunError: it is of another version's format.
    """
    if not (folder / EXPORT).is_file():
        return None
    told = read_json(folder / EXPORT)
    if told.get("format") != FORMAT:
        raise RunError(f"{folder / EXPORT}: is of format {told.get('format')}, and this is regard {__version__}, which "
                       f"reads format {FORMAT}. Export the run again, or update regard")
    return told


def verify(folder: Path) -> None:
    """Raise CheckpointError where a file is not what was written."""
    for name, expected in (about(folder) or {}).get("files", {}).items():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise CheckpointError(f"{folder / name}: is missing or damaged: it is not what was written (SHA-256 "
                                  "differs). Copy the folder again, or export the run again")


@contextmanager
def new_folder(out: Path, told: dict[str, Any], over: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, with its export.json; after an error nothing is left.

    Args:
        out: the folder to be.
        told: what export.json says beside format and files; may be added to in between.
        over: whether what has that name by then may be replaced.

    Raises:
        Overtaken: it may not.
        RunError: the folder cannot be written.
    """
    unfinished, replaced = (out.with_name(f"{begin}{out.name}-{uuid4().hex}") for begin in (UNFINISHED, REPLACED))
    with disk_errors(out):
        unfinished.mkdir(parents=True)
    try:
        yield unfinished
        with disk_errors(out):
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(unfinished)): _sha256(path) for path in files}
            told = told | {"format": FORMAT, "regard": __version__, "files": hashes}
            (unfinished / EXPORT).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
            if out.exists() and over(out):
                out.rename(replaced)
            _rename(unfinished, out)
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        for path in (unfinished, replaced):
            shutil.rmtree(path, ignore_errors=True)


def _rename(folder: Path, out: Path) -> None:
    """Raise Overtaken where something has the name already."""
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise Overtaken(f"{out}: is there already; another process has made it in the meantime") from None
        raise


def convert(torch_engine: Torch, tokenizers: Tokenizers, config: Config, precision: str, folder: Path,
            sample: list[list[int]]) -> check.Agreement:
    """Write a model into a folder as CTranslate2 reads it, and hold its translations against ours.

    Raises:
        Unlike: they differ by more than the precision may.
    """
    assert isinstance(torch_engine.model, Seq2Seq)
    with disk_errors(folder):
        (folder / "tokenizer").mkdir()
        tokenizers.save(folder / "tokenizer")
        write_config(config, folder / "config.toml")
        save(torch_engine.model, tokenizers, config, precision, folder)
    engine = CT2(folder, precision, tokenizers, config, precision if precision in precisions() else "float32")
    agreement = check.compare(torch_engine, engine, sample, config)
    if reasons := "; ".join(agreement.reasons()):
        raise Unlike(f"the model in CTranslate2 ({precision}) does not translate as ours: {reasons}. Nothing was kept")
    return agreement


def cached(run: Run, checkpoint: Path, precision: str, torch_engine: Torch, tokenizers: Tokenizers) -> Path:
    """The folder of a run's checkpoint in CTranslate2's format, converted now where it is not there yet.

    Raises:
        Unlike: the conversion does not translate as the checkpoint does.
        RunError: it can be written nowhere.
    """
    name = f"ctranslate2-{precision}-{_key(run, checkpoint)}"
    places = [run.folder / CACHE, _user_cache() / CACHE]
    for place in places:
        if _whole(place / name):
            return place / name
    place = next((place for place in places if _writable(place)), places[0])
    told: dict[str, Any] = {"to": "ctranslate2", "precision": precision, "checkpoint": checkpoint.name}
    sample = check.sample_of(run.config, tokenizers, SAMPLE)
    with suppress(Overtaken), new_folder(place / name, told, lambda folder: not _whole(folder)) as folder:
        told["check"] = asdict(convert(torch_engine, tokenizers, run.config, precision, folder, sample))
    _prune(place, precision)
    return place / name


def _key(run: Run, checkpoint: Path) -> str:
    """A short hash of all that a conversion depends on, our own code included."""
    weights = read_json(checkpoint / MANIFEST).get("model.safetensors")
    parts = [weights, run.config.model.model_dump(mode="json"), positions_of(run.config), FORMAT, __version__,
             ctranslate2().__version__, _sha256(Path(ct2_model.__file__))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _whole(folder: Path) -> bool:
    """Whether a cached conversion is there and undamaged."""
    try:
        verify(folder)
        return about(folder) is not None
    except RunError:
        return False


def _prune(place: Path, precision: str) -> None:
    """Delete all but the newest conversions of one precision, and what conversions that were killed have left."""
    with suppress(OSError):
        found = sorted(place.glob(f"ctranslate2-{precision}-*"), key=lambda path: path.stat().st_mtime)
        killed = [path for path in place.glob(".*-ctranslate2-*") if time.time() - path.stat().st_mtime > 3600]
        for path in (*found[:-KEPT], *killed):
            shutil.rmtree(path, ignore_errors=True)


def _writable(place: Path) -> bool:
    """Whether folders can be made in a place, which is made if it is missing."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=place)).rmdir()
    except OSError:
        return False
    return True


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "regard"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
