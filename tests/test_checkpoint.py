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
from regard.training.checkpoint import Checkpoint, load, mean_weights, put_weights, save, state_of, verify, weights_of

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
ONE = Checkpoint({"weights": torch.tensor([[1.0, float("-inf")], [1e-45, 0.1]])},
                 {"weights/step": torch.tensor(3.0), "random.cpu": torch.arange(5, dtype=torch.uint8)},
                 {"step": 3, "score": 0.1, "nested": {"loss": 1 / 3}, "text": "ü"})


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "step-00000003", ONE)
    return tmp_path / "step-00000003"


def manifest_of(path):
    """A manifest as it was before format 2."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()
            if file.name != "manifest.json"}


def assert_same(found, expected):
    assert dict(found.state) == {**expected.state, "format": module.FORMAT}
    for part in ("model", "optimizer"):
        left, right = getattr(found, part), getattr(expected, part)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        assert all(left[name].dtype == right[name].dtype for name in left)


def test_what_is_saved_is_loaded_to_the_bit(path):
    assert_same(load(path), ONE)
    assert sorted(file.name for file in path.iterdir()) == FILES
    manifest = json.loads((path / "manifest.json").read_text())
    own, hashes = manifest.pop("manifest.json"), manifest_of(path)
    assert manifest == hashes == verify(path) and own == module._sum_of(hashes)


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
    ('{"model.safetensors": "0", "../../secret": "0"}', "is damaged: it lists ../../secret, model.safetensors; exp"),
    ('{"model.safetensors": "0", "state.json": "0", "manifest.json": "0"}',
     "is damaged: it is not what was saved (its own SHA-256 differs). Copy it again, or use another checkpoint"),
], ids=["missing", "cut", "no object", "empty", "escape", "altered"])
def test_a_damaged_manifest(path, content, message):
    manifest = path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value).startswith(f"{manifest}: ") and message in str(error.value)


def test_a_file_that_may_not_be_read(path, monkeypatch):
    monkeypatch.setattr(module, "_sha256", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match=r"step-00000003/state.json: cannot be read: Input/output error\. Use an"):
        load(path)


def test_a_file_that_is_no_safetensors_though_its_hash_is_right(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    (path / "manifest.json").write_text(json.dumps(manifest_of(path)))
    with pytest.raises(CheckpointError, match=r"cannot be read: "):
        load(path)


def rewrite_state(path, own_sum, **changes):
    """Change state.json, and the manifest with it, as another version might have written them."""
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    hashes = manifest_of(path)
    (path / "manifest.json").write_text(json.dumps(hashes | ({"manifest.json": module._sum_of(hashes)} if own_sum
                                                             else {})))


def test_a_checkpoint_of_the_first_format_is_read_and_one_of_a_newer_is_refused(path):
    rewrite_state(path, False, format=None)
    assert dict(load(path).state) == dict(ONE.state) and state_of(path) == dict(ONE.state)
    for changes, maker in (({"format": 3, "versions": {"regard": "9.1"}}, "regard 9.1"),
                           ({"format": "x", "versions": 1}, "regard of another version")):
        rewrite_state(path, True, **changes)
        for read in (load, state_of, verify):
            with pytest.raises(RunError) as error:
                read(path)
            assert f"{path}: is of format {changes['format']}, written by {maker}; this is regard " in str(error.value)
            assert ", which reads formats 1 to 2. Update regard, or use another checkpoint (--check" in str(error.value)
            assert not isinstance(error.value, CheckpointError), "it is not damaged, and must not be set aside"


def test_a_newer_format_is_told_from_damage_though_it_has_other_files(path):
    (path / "more.safetensors").write_bytes(b"")
    rewrite_state(path, True, format=3)
    hashes = manifest_of(path) | {"more.safetensors": hashlib.sha256(b"").hexdigest()}
    (path / "manifest.json").write_text(json.dumps(hashes | {"manifest.json": module._sum_of(hashes)}))
    with pytest.raises(RunError, match=r"is of format 3, written by"):
        load(path)


@pytest.mark.parametrize("call, times", [
    ("save_file", 0), ("save_file", 1), ("_sha256", 0), ("_sha256", 2), ("flush", 0), ("flush", 4), ("rename", 0)])
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
    for target in (after, path):
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


def test_all_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    events, rename, unfinished = [], Path.rename, f"{module.UNFINISHED}step-00000004"
    monkeypatch.setattr(module, "flush", lambda place: events.append(place.name))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"rename {self.name}"), rename(self, to)))
    save(path.with_name("step-00000004"), ONE)
    assert events == [*FILES[1:], "manifest.json", unfinished, f"rename {unfinished}", path.parent.name]


def test_what_the_disk_gives_back_otherwise_is_no_checkpoint(path, monkeypatch):
    real = module.flush

    def failing(file):
        real(file)
        if file.name == "model.safetensors":
            file.write_bytes(flipped(file.read_bytes()))

    monkeypatch.setattr(module, "flush", failing)
    with pytest.raises(RunError, match=r"step-00000004: does not read back as it was written; the disk fails, and no.*"
                                       r"model.safetensors: is damaged: it has \d+ bytes"):
        save(path.with_name("step-00000004"), ONE)
    assert list(path.parent.iterdir()) == [path]


def test_tidy_puts_back_what_was_to_be_replaced_and_clears_away_the_rest(path):
    folder, other = path.parent, path.with_name("step-00000009")
    path.rename(folder / f"{module.REPLACED}{path.name}")  # killed before the new one had its name
    save(folder / f"{module.UNFINISHED}{path.name}", ONE)
    save(other, ONE)  # killed after it
    save(folder / f"{module.REPLACED}{other.name}", ONE)
    (folder / f"{module.UNFINISHED}metrics.jsonl").write_text("{")
    module.tidy(folder)
    assert sorted(folder.iterdir()) == [path, other] and verify(path) and verify(other)
    module.tidy(folder / "none")


def test_what_cannot_be_deleted_is_told(path, monkeypatch):
    monkeypatch.setattr(module.shutil, "rmtree", lambda *given: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(RunError, match=r"step-00000003: cannot be deleted: I/O error\. What was saved before is unt"):
        module.discard(path)
    monkeypatch.undo()
    assert not path.exists(), "half of a checkpoint must not have its name"
    module.tidy(path.parent)
    assert not list(path.parent.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.toml"
    module.write_whole(file, lambda place: place.write_text("old"))
    monkeypatch.setattr(module, "flush", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(RunError, match=r"config.toml: cannot be written: No space left"):
        module.write_whole(file, lambda place: place.write_text("new"))
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


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
