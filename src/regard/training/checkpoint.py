"""A checkpoint: a folder of safetensors and JSON that is swapped in whole.

    step-00001000/
      model.safetensors       the weights
      optimizer.safetensors   AdamW's running averages, and the state of the random generators
      state.json              where the training stood: step, epoch, position, scores, versions
      manifest.json           SHA-256 of each of the above

It is written into a folder of another name, flushed to the disk and then renamed, so a folder with this name is
complete. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard.errors import CheckpointError, RunError

UNFINISHED = ".unfinished-"
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
            tensor.copy_(weights[name])


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint folder, whole or not at all.

    Raises:
        RunError: the disk is full, or the folder may not be written.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    with disk_errors(path):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            _write(unfinished, checkpoint)
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and hold each file against its SHA-256.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    hashes = read_json(path / "manifest.json")
    if not NEEDED <= hashes.keys() <= NEEDED | {OPTIMIZER}:
        listed = ", ".join(sorted(hashes)) or "no file"
        raise CheckpointError(f"{path / 'manifest.json'}: is damaged: it lists {listed}; expected "
                              f"{', '.join(sorted(NEEDED))} and at most {OPTIMIZER}. Use another checkpoint "
                              "(--checkpoint)")
    try:
        for name, expected in hashes.items():
            _verify(path / name, expected)
        model = load_file(path / "model.safetensors")
        optimizer = load_file(path / OPTIMIZER) if OPTIMIZER in hashes else {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return Checkpoint(model, optimizer, read_json(path / "state.json"))


def _verify(file: Path, expected: str) -> None:
    """Refuse a file that is not what was saved."""
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing. Copy the whole folder again, or use another checkpoint "
                              "(--checkpoint)")
    if _sha256(file) != expected:
        raise CheckpointError(f"{file}: is damaged: it has {file.stat().st_size:,} bytes and is not what was "
                              "saved (SHA-256 differs). Copy it again, or use another checkpoint (--checkpoint)")


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
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into an error that says what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{path}: cannot be written: {reason}. What was saved before is untouched: make room or "
                       "choose another --out, and start the same command again") from None


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, folder / "model.safetensors")
    if checkpoint.optimizer:
        save_file(dict(checkpoint.optimizer), folder / OPTIMIZER)
    (folder / "state.json").write_text(json.dumps(dict(checkpoint.state), indent=1), encoding="utf-8")
    files = sorted(folder.iterdir())
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({file.name: _sha256(file) for file in files}, indent=1), encoding="utf-8")
    for file in (*files, manifest, folder):
        _flush(file)


def _flush(path: Path) -> None:
    """Have the operating system put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
