"""A checkpoint: a folder of safetensors and JSON that is swapped in whole.

    step-00001000/
      model.safetensors       the weights that translate: with train.ema, the average of those that learn
      optimizer.safetensors   what the optimizer keeps of each weight, "NAME/KIND"; the state of the random generators,
                              "random.DEVICE"; with train.ema the weights that learn, "trained.NAME"
      state.json              format, where the training stood, scores, its config and data, versions
      manifest.json           SHA-256 of each of the above, and of this list itself

It is written into a folder of another name, flushed to the disk, read back and then renamed, so a folder with this
name is complete. Nothing in it is a pickle.

Format 2 (2026-11) adds the config and the data's fingerprint to state.json, and its own SHA-256 to manifest.json;
checkpoints of format 1, which do not name a format, are read as before.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard import __version__
from regard.errors import CheckpointError, RunError
from regard.training.sharding import like

FORMAT = 2
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
"""What the names begin with of a file or folder that is being written or deleted, and of one that makes way."""
MANIFEST = "manifest.json"
NEEDED = {"model.safetensors", "state.json"}
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: weights by name, optimizer tensors by name, and where the training stood."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name, each table once, though it may serve in several places."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Copy weights into a model.

    Raises:
        CheckpointError: names or shapes are not the model's.
    """
    own = weights_of(model)
    missing, strange = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    unlike = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    if missing or strange or unlike:
        faults = [f"{title} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
                  for title, names in (("lacks", missing), ("has unknown", strange), ("has another shape of", unlike))
                  if names]
        raise CheckpointError(f"{where}: these weights do not fit the model of the config: the file "
                              f"{'; '.join(faults)}. Was [model] or [tokenizer] changed since they were trained?")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(like(tensor, weights[name]))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder, whole or not at all.

    When this returns, it is on the disk and its files read back as they were written: an older one may be deleted.

    Raises:
        RunError: the disk is full or fails, or the folder may not be written.
    """
    unfinished, replaced = (path.with_name(begin + path.name) for begin in (UNFINISHED, REPLACED))
    with disk_errors(path):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            _write(unfinished, checkpoint)
            _read_back(unfinished)
            if path.exists():  # no folder can be renamed over another; after a kill in between, `tidy` puts it back
                path.rename(replaced)
            unfinished.rename(path)
            flush(path.parent)
        finally:
            _tidy(path)


def tidy(folder: Path) -> None:
    """Clear away what saves and deletions that were cut short have left, and put back what was to be replaced."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            for begin in (UNFINISHED, REPLACED):
                if path.name.startswith(begin):
                    _tidy(path.with_name(path.name.removeprefix(begin)))


def _tidy(path: Path) -> None:
    """The same for one file or folder. What cannot be done now is done at the next start."""
    unfinished, replaced = (path.with_name(begin + path.name) for begin in (UNFINISHED, REPLACED))
    with suppress(OSError):
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        else:
            _remove(replaced)
    with suppress(OSError):
        _remove(unfinished)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Delete a file or a folder, under another name first: what has the name of a checkpoint is complete.

    Raises:
        RunError: the disk fails, or the folder may not be written.
    """
    doomed = path.with_name(UNFINISHED + path.name)
    with disk_errors(path, "deleted"):
        _remove(doomed)
        path.rename(doomed)
        _remove(doomed)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and hold each file against its SHA-256.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
        RunError: a newer version has written it.
    """
    hashes = verify(path)
    try:
        model = load_file(path / "model.safetensors")
        optimizer = load_file(path / OPTIMIZER) if OPTIMIZER in hashes else {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return Checkpoint(model, optimizer, state_of(path))


def verify(path: Path) -> dict[str, str]:
    """The SHA-256 of a checkpoint's files by their names, once each of them has it.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    hashes = _manifest_of(path)
    for name, expected in hashes.items():
        _verify(path / name, expected)
    return hashes


def state_of(path: Path) -> dict[str, Any]:
    """What state.json says, held against its SHA-256.

    Raises:
        CheckpointError: it or the manifest is missing, cut short or altered.
        RunError: a newer version has written it.
    """
    _manifest_of(path)
    return read_json(path / "state.json")


def _manifest_of(path: Path) -> dict[str, str]:
    """The SHA-256 that each file of a checkpoint should have, and its state.json has."""
    hashes = read_json(path / MANIFEST)
    own = hashes.pop(MANIFEST, None)
    if own not in (None, _sum_of(hashes)):
        raise CheckpointError(f"{path / MANIFEST}: is damaged: it is not what was saved (its own SHA-256 differs). "
                              "Copy it again, or use another checkpoint (--checkpoint)")
    if "state.json" in hashes:
        _verify(path / "state.json", hashes["state.json"])
        _refuse_newer(path)
    if not NEEDED <= hashes.keys() <= NEEDED | {OPTIMIZER}:
        listed = ", ".join(sorted(hashes)) or "no file"
        raise CheckpointError(f"{path / MANIFEST}: is damaged: it lists {listed}; expected "
                              f"{', '.join(sorted(NEEDED))} and at most {OPTIMIZER}. Use another checkpoint "
                              "(--checkpoint)")
    return hashes


def _refuse_newer(path: Path) -> None:
    """Refuse a checkpoint of a format that this version does not know; those before format 2 do not name theirs."""
    state = read_json(path / "state.json")
    if state.get("format", 1) not in range(1, FORMAT + 1):
        versions = state.get("versions")
        maker = versions.get("regard") if isinstance(versions, dict) else None
        raise RunError(f"{path}: is of format {state['format']}, written by regard {maker or 'of another version'}; "
                       f"this is regard {__version__}, which reads formats 1 to {FORMAT}. Update regard, or use "
                       "another checkpoint (--checkpoint)")


def _verify(file: Path, expected: str) -> None:
    """Refuse a file that is not what was saved."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing. Copy the whole folder again, or use another checkpoint "
                                  "(--checkpoint)")
        if _sha256(file) != expected:
            raise CheckpointError(f"{file}: is damaged: it has {file.stat().st_size:,} bytes and is not what was "
                                  "saved (SHA-256 differs). Copy it again, or use another checkpoint (--checkpoint)")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}. Use another checkpoint "
                              "(--checkpoint)") from None


def mean_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of several checkpoints' weights, summed in float64."""
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in load(path).model.items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    return {name: (tensor / len(paths)).float() for name, tensor in total.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; this is no whole checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: {error}. Use another checkpoint (--checkpoint)") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is damaged: expected a JSON object. Use another checkpoint (--checkpoint)")
    return value


@contextmanager
def disk_errors(path: Path, done: str = "written") -> Iterator[None]:
    """Turn what the operating system says about a write into an error that says what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{path}: cannot be {done}: {reason}. What was saved before is untouched: make room or "
                       "choose another --out, and start the same command again") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that after a kill it holds either all of this or what it held before.

    Args:
        path: the file.
        write: writes it, under the name that it is given.

    Raises:
        RunError: the disk is full or fails, or the file may not be written.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    with disk_errors(path):
        try:
            write(unfinished)
            flush(unfinished)
            unfinished.replace(path)
            flush(path.parent)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the operating system put a file or a folder on the disk, so that a file is read from there again."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        with suppress(AttributeError, OSError):  # a system or a file system without it
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, folder / "model.safetensors")
    if checkpoint.optimizer:
        save_file(dict(checkpoint.optimizer), folder / OPTIMIZER)
    state = {**checkpoint.state, "format": FORMAT}
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(folder.iterdir())
    hashes = {file.name: _sha256(file) for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**hashes, MANIFEST: _sum_of(hashes)}, indent=1), encoding="utf-8")
    for file in (*files, manifest, folder):
        flush(file)


def _read_back(folder: Path) -> None:
    """Refuse what the disk gives back otherwise than it was given."""
    try:
        verify(folder)
    except CheckpointError as error:
        raise RunError(f"{folder}: does not read back as it was written; the disk fails, and nothing was deleted. "
                       f"Start the same command again with another --out, or on another disk. {error}") from None


def _sum_of(hashes: Mapping[str, str]) -> str:
    """The manifest's own SHA-256."""
    return hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
