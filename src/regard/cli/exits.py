"""Exceptions to messages and exit codes: the one place where that happens.

    0     done
    1     `regard verify` has found a fault, and told it
    2     a mistake of the user, a missing file, a full disk: one message on stderr, no traceback
    130   interrupted by Ctrl-C          143   interrupted by SIGTERM, after saving
    141   whoever read our output stopped reading, as `| head` does; nothing is said

Anything else is a bug of ours, and shows its traceback.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from typer.core import TyperGroup

from regard.cli.output import say
from regard.errors import Interrupted, RegardError

_PIPE_CLOSED = 141  # 128 + SIGPIPE, a signal that Windows does not have
_ADVICE = {
    errno.ENOSPC: "Free some space, or write elsewhere; then run the same command again",
    errno.EDQUOT: "Free some of your quota, or write elsewhere; then run the same command again",
    errno.EFBIG: "Write to a file system that allows larger files",
    errno.EACCES: "Choose a place that you may read and write, or change its permissions",
    errno.EPERM: "Choose a place that you may read and write, or change its permissions",
    errno.EROFS: "The file system is read-only: choose another place",
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "A part of the path is a file where a folder is needed: check the path",
    errno.EISDIR: "A file is needed, and this is a folder: check the path",
    errno.EIO: "The disk or the network does not answer as it should: try another place",
}


class Commands(TyperGroup):
    """The group of all commands; whatever one of them raises ends here, before typer sees it."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and turn what it raises into a message and an exit code."""
        with exit_codes():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what is raised into a message on stderr and SystemExit with its code."""
    try:
        yield
    except Interrupted as error:
        _stop(str(error), 128 + error.signal)
    except RegardError as error:
        _stop(f"{type(error).__name__}: {error}", 2)
    except KeyboardInterrupt:
        _stop("Interrupted.", 128 + signal.SIGINT)
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(_PIPE_CLOSED)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        _drop_stdout()
        place = f"{error.filename}: " if error.filename else ""
        _stop(f"{type(error).__name__}: {place}{error.strerror}. {_ADVICE[error.errno]}.", 2)


def _stop(message: str, code: int) -> NoReturn:
    """Say why, and leave."""
    say(message)
    sys.exit(code)


def _drop_stdout() -> None:
    """Forget what is buffered for stdout: it cannot be written, and Python would try, and complain, at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
