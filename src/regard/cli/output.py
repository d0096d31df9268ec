"""Results to standard output, talk to standard error, and files that appear whole or not at all."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from rich.console import Console

QUIET_SECONDS = 10.0
"""Seconds between lines of progress where there is no terminal to draw on."""


def say(line: str) -> None:
    """One line of talk, on standard error."""
    print(line, file=sys.stderr, flush=True)


def figures(values: Any) -> None:
    """Figures as JSON on standard output."""
    print(json.dumps(values, indent=2, ensure_ascii=False))


def page() -> "Console":
    """What tables and pictures of characters are printed on: standard output, in colour if it is a terminal."""
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def results(path: Path | None) -> Iterator[BinaryIO]:
    """Where lines of results go: standard output, or a file.

    The file is written beside its place under another name and renamed when all is done, so that what stands under
    its own name is whole. What is not a plain file, such as a named pipe, is written directly.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        if path.parent.is_dir():
            unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def progress(
    doing: str, total: int | None = None, *, drawn: bool = True, unit: str = "lines"
) -> Iterator[Callable[[], None]]:
    """Progress on standard error: a bar on a terminal, else a plain line now and then.

    Args:
        doing: what is being done, such as "translating".
        total: how many lines there are, if that is known.
        drawn: False where a bar would stand between results on the same terminal.
        unit: of what there are so many, if not lines.

    Returns:
        What to call after each line.
    """
    if not sys.stderr.isatty():
        yield _plain_progress(doing, total, unit)
        return
    if not drawn:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with Progress(TextColumn(doing), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)


def _plain_progress(doing: str, total: int | None, unit: str) -> Callable[[], None]:
    """A line every so many seconds, for logs."""
    done, spoke = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, spoke
        done += 1
        if time.monotonic() - spoke >= QUIET_SECONDS:
            spoke = time.monotonic()
            say(f"{doing}: {done:,}{f' of {total:,}' if total else ''} {unit}")

    return advance
