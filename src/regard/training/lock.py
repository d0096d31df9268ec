"""A lock, so that two trainings do not write into one folder.

The operating system holds it (flock) for as long as the process lives: a kill, also SIGKILL, leaves no stale lock. The
file says in words who holds it; what it says does not lock anything. Reading a run needs no lock.
"""

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regard.errors import RunError
from regard.training.checkpoint import disk_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system that has no locks answers."""
_held: set[int] = set()


@contextmanager
def lock(file: Path, warn: Callable[[str], object]) -> Iterator[None]:
    """Hold a lock.

    Args:
        file: made if it is missing, and left there, empty; its folder is what messages name.
        warn: told where there are no locks; the work goes on without.

    Raises:
        RunError: another process, or this one, holds it, or the file cannot be made.
    """
    with disk_errors(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        _take(handle, file, warn)
        try:
            yield
        finally:
            if handle in _held:
                _write(handle, "")
    finally:
        if handle in _held:  # else this is a forked worker, which has closed it
            _held.discard(handle)
            os.close(handle)


def _take(handle: int, file: Path, warn: Callable[[str], object]) -> None:
    """Lock an open file and write into it who holds it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{file.parent}: is in use: {_holder(file)} works in it. Wait until it ends, stop it, or "
                       "choose another --out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunError(f"{file}: cannot be locked: {error.strerror}. Choose another --out") from None
        warn(f"{file.parent}: its file system has no locks ({error.strerror}): nothing keeps a second training out. "
             "See to it that there is none; two in one folder destroy each other's checkpoints")
    _write(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}))


def _holder(file: Path) -> str:
    """Who holds the lock, as far as the file tells."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return f"process {told['process']} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _write(handle: int, text: str) -> None:
    """Put a text in the place of all that an open file holds. It only informs: a full disk may refuse it."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text.encode())


def _leave_to_the_parent() -> None:
    """Close the lock in a forked worker, which may outlive the training for a moment."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
