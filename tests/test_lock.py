"""The lock of a run's folder: held by one, freed by any death, and told where there is none."""

import errno
import os
import signal
import time

import pytest

from children import ended, fork
from regard.errors import RunError
from regard.training import lock as module
from regard.training.lock import lock


@pytest.fixture
def file(tmp_path):
    return tmp_path / ".lock"


def never(line):
    raise AssertionError(line)


def held_in_a_child(file, afterwards=lambda: None):
    """A child that holds the lock and waits to be killed."""
    ready, tell = os.pipe()

    def hold():
        with lock(file, never):
            afterwards()
            os.write(tell, b"!")
            time.sleep(60)

    child = fork(hold)
    os.read(ready, 1)
    return child


def test_one_holds_it_at_a_time(file):
    with lock(file, never):
        with pytest.raises(RunError) as error, lock(file, never):
            pass
        assert f"{file.parent}: is in use: process {os.getpid()} on " in str(error.value)
        assert " works in it. Wait until it ends, stop it, or choose another --out" in str(error.value)
        with pytest.raises(RunError, match=f"process {os.getpid()} on"), lock(file, never):
            pass  # who was refused has left it as it was
    assert file.read_text() == ""
    with lock(file, never):
        pass


def test_another_process_is_named_and_its_death_frees_the_lock(file):
    child = held_in_a_child(file)
    with pytest.raises(RunError, match=f"is in use: process {child} on "), lock(file, never):
        pass
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert str(child) in file.read_text(), "the words of the dead hold nothing"
    with lock(file, never):
        assert str(os.getpid()) in file.read_text()


def test_a_forked_worker_that_outlives_the_holder_does_not_keep_the_lock(file):
    alive, die = os.pipe()
    child = held_in_a_child(file, lambda: fork(lambda: os.read(alive, 1)))
    os.kill(child, signal.SIGKILL)
    ended(child)
    with lock(file, never):
        os.write(die, b"!")


def test_a_worker_that_ends_inside_leaves_the_lock_to_its_parent(file):
    parent = os.getpid()
    try:
        with lock(file, never):
            child = os.fork()
            if child == 0:
                raise KeyboardInterrupt
            assert ended(child) == 0
            with pytest.raises(RunError, match=f"process {parent} on "), lock(file, never):
                pass
    finally:
        if os.getpid() != parent:
            os._exit(0)


@pytest.mark.parametrize("number", sorted(module.NO_LOCKS))
def test_a_file_system_without_locks_is_told(file, number, monkeypatch):
    monkeypatch.setattr(module.fcntl, "flock", lambda *given: (_ for _ in ()).throw(OSError(number, "no locks")))
    said = []
    with lock(file, said.append):
        assert len(said) == 1 and f"{file.parent}: its file system has no locks (no locks): nothing keeps" in said[0]


def test_a_system_without_locks_is_told(file, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    said = []
    with lock(file, said.append):
        assert "(this system has no flock): nothing keeps a second training out. See to it that there is" in said[0]


def test_faults(file, monkeypatch):
    with pytest.raises(RunError, match=r"none/.lock: cannot be written: No such file"), lock(
            file.parent / "none" / ".lock", never):
        pass
    monkeypatch.setattr(module.fcntl, "flock", lambda *given: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(RunError, match=r".lock: cannot be locked: I/O error. Choose another --out"), lock(file, never):
        pass
    monkeypatch.undo()
    file.write_text("{")
    child = held_in_a_child(file)
    file.write_text("{")
    with pytest.raises(RunError, match=r"is in use: another process works in it"), lock(file, never):
        pass
    os.kill(child, signal.SIGKILL)
    ended(child)
