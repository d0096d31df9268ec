"""Checkpoints: to the bit, whole or not at all, and every way to be damaged."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from conftest import make_model
from regard.errors import CheckpointError, RunError
from regard.training import checkpoint as module
from regard.training.checkpoint import Checkpoint, load, mean_weights, put_weights, save, weights_of

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
ONE = Checkpoint({"weights": torch.tensor([[1.0, float("-inf")], [1e-45, 0.1]])},
                 {"weights/step": torch.tensor(3.0), "random.cpu": torch.arange(5, dtype=torch.uint8)},
                 {"step": 3, "score": 0.1, "nested": {"loss": 1 / 3}, "text": "ü"})


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "step-00000003", ONE)
    return tmp_path / "step-00000003"


def assert_same(found, expected):
    assert dict(found.state) == dict(expected.state)
    for part in ("model", "optimizer"):
        left, right = getattr(found, part), getattr(expected, part)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        assert all(left[name].dtype == right[name].dtype for name in left)


def test_what_is_saved_is_loaded_to_the_bit(path):
    assert_same(load(path), ONE)
    assert sorted(file.name for file in path.iterdir()) == FILES
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[1:]}


def test_saving_again_takes_the_old_ones_place_and_leaves_nothing_beside_it(path):
    again = Checkpoint({"weights": torch.ones(2)}, {}, {"step": 4})
    save(path, again)
    assert_same(load(path), again)
    assert list(path.parent.iterdir()) == [path] and not (path / "optimizer.safetensors").exists()


def test_a_tied_table_is_saved_once():
    model = make_model("fixed-gru-reversed")
    weights = weights_of(model)
    assert len({tensor.data_ptr() for tensor in weights.values()}) == len(weights)
    assert sum(tensor.numel() for tensor in weights.values()) == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("harm, message", [
    (lambda file: file.unlink(), "is missing. Copy the whole folder again, or use another checkpoint (--checkpoint)"),
    (lambda file: os.truncate(file, 20), "is damaged: it has 20 bytes and is not what was saved (SHA-256 differs)"),
    (lambda file: os.truncate(file, 0), "is damaged: it has 0 bytes and is not what was saved"),
    (lambda file: file.write_bytes(flipped(file.read_bytes())), "is not what was saved (SHA-256 differs). Copy it"),
], ids=["missing", "cut", "empty", "flipped"])
def test_a_damaged_file_is_named(path, name, harm, message):
    harm(path / name)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value).startswith(f"{path / name}: ") and message in str(error.value)


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("content, message", [
    (None, "cannot be read: No such file or directory; this is no whole checkpoint"),
    ("{", "is damaged: Expecting property name"), ("[1]", "is damaged: expected a JSON object"),
    ("{}", "is damaged: it lists no file; expected model.safetensors, state.json and at most optimizer.safetensors"),
    ('{"model.safetensors": "0", "state.json": "0", "../../secret": "0"}', "is damaged: it lists ../../secret, model."),
], ids=["missing", "cut", "no object", "empty", "escape"])
def test_a_damaged_manifest(path, content, message):
    manifest = path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value).startswith(f"{manifest}: ") and message in str(error.value)


def test_a_file_that_may_not_be_read(path, monkeypatch):
    monkeypatch.setattr(module, "_sha256", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match=r"step-00000003: cannot be read: .*Input/output error"):
        load(path)


def test_a_file_that_is_no_safetensors_though_its_hash_is_right(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    manifest = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[1:]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"cannot be read: "):
        load(path)


@pytest.mark.parametrize("call, times", [
    ("save_file", 0), ("save_file", 1), ("_sha256", 0), ("_sha256", 2), ("_flush", 0), ("_flush", 4), ("rename", 0)])
def test_a_full_disk_leaves_the_old_checkpoint_whole(path, call, times, monkeypatch):
    place = Path if call == "rename" else module
    real, calls = getattr(place, call), []

    def full(*given):
        calls.append(given)
        if len(calls) > times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    monkeypatch.setattr(place, call, full)
    after = path.with_name("step-00000004")
    for target in (after, path) if call != "rename" else (after,):
        calls.clear()
        with pytest.raises(RunError, match=r"cannot be written: No space left on device. What was saved before is"):
            save(target, Checkpoint(ONE.model, ONE.optimizer, {"step": 4}))
    monkeypatch.undo()
    assert list(path.parent.iterdir()) == [path]
    assert_same(load(path), ONE)
    save(after, ONE)
    assert_same(load(after), ONE)


def test_what_a_killed_save_left_is_in_nobodys_way(path, monkeypatch):
    monkeypatch.setattr(module.shutil, "rmtree", lambda *given, **options: None)
    monkeypatch.setattr(module, "_sha256", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    after = path.with_name("step-00000004")
    with pytest.raises(KeyboardInterrupt):
        save(after, ONE)
    monkeypatch.undo()
    assert not after.exists() and len(list(path.parent.iterdir())) == 2
    save(after, ONE)
    assert sorted(path.parent.iterdir()) == [path, after]


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: Not a directory"):
        save(tmp_path / "file" / "step-00000001", ONE)


def test_put_weights_names_what_does_not_fit():
    model = make_model("after-general")
    weights = weights_of(model)
    first, second = list(weights)[:2]
    other = {**weights, "other": torch.ones(1), second: torch.ones(1)}
    del other[first]
    with pytest.raises(CheckpointError) as error:
        put_weights(model, other, Path("here"))
    assert str(error.value).startswith("here: these weights do not fit the model of the config: the file lacks "
                                       f"{first}; has unknown other; has another shape of {second}. Was [model]")
    with pytest.raises(CheckpointError, match=r"the file lacks \S+, \S+, \S+ …\. Was"):
        put_weights(model, {}, Path("here"))


def test_mean_of_weights(tmp_path):
    values = torch.randn(3, 4, 5)
    paths = [tmp_path / f"step-{number}" for number in range(3)]
    for path, value in zip(paths, values, strict=True):
        save(path, Checkpoint({"a": value, "b": value[0].clone()}, {}, {}))
    mean = mean_weights(paths)
    assert torch.equal(mean["a"], values.double().mean(0).float()) and mean["b"].shape == (5,)
