"""A folder that is there in whole or not at all: written beside its place, with a manifest, and renamed.

What is not ours in it is never deleted, and what is not as it was written is found by its SHA-256.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from regard.errors import DataError, RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"


def write_folder(folder: Path, save: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Write a folder and its manifest beside its place, make it durable, and rename it in whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        files = {path.name: digest(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _make_way(folder)
        partial.replace(folder)
        _sync(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cannot_write(folder: Path, error: OSError) -> RunError:
    return RunError(f"{folder}: cannot write it: {error.strerror or error}. Make room, or permission to write, or "
                    "choose another place with --out (or data.prepared).")


def _make_way(folder: Path) -> None:
    """Empty an older folder of ours, its manifest last, so that after a kill half way it is still known as ours.

    What is not ours is never deleted: a folder that holds anything else is refused.
    """
    manifest = manifest_of(folder) or {"files": {}}
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


def _lock(file: IO[str], waiting: str, say: Callable[[str], object]) -> None:
    """Lock an open file, or say that one waits until another process lets go of it; raises OSError."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(waiting)
        fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def alone(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Keep others that share a prepared folder from making it meanwhile, or wait until they have; where the file system
    has no locks, nobody waits. Those who only read it need no lock: what they have mapped stays theirs."""
    place = folder.with_name(f".{folder.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("w")
    except OSError as error:
        raise cannot_write(folder, error) from None
    with file:
        with suppress(OSError):  # what a file system without locks answers
            _lock(file, f"{folder}: another training prepares it; waiting until that is done", say)
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, in constant memory; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path) -> dict[str, Any] | None:
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
        raise damaged(path, f"not a manifest of ours ({error})") from None


def damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}. It is not as it was written. Put it back, or delete the folder {path.parent} "
                     "and run again: it is made anew from the text.")


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a folder in which every file is as it was written."""
    manifest = manifest_of(folder)
    if manifest is None:
        raise DataError(f"{folder}: no prepared corpus here. `regard prepare` or `regard train` makes one.")
    for path, fault in faults(folder, manifest["files"]):
        raise damaged(path, fault)
    return manifest


def faults(folder: Path, digests: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """The files that are missing or do not have their SHA-256."""
    for name, expected in digests.items():
        try:
            found = digest(folder / name)
        except OSError as error:
            yield folder / name, error.strerror or str(error)
        else:
            if found != expected:
                yield folder / name, f"its SHA-256 begins with {found[:8]}, expected {expected[:8]}"
