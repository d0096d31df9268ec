"""Memory of `regard translate` as its input grows, and how soon it answers.

    python benchmarks/memory.py RUN --source test.en [--lines 10000 100000] [--engines torch ctranslate2] [--beam 2]

The lines of the source are repeated, each with its number in the place of a word, so that no two are the same. A
process of its own translates each input: its greatest resident memory (ru_maxrss), seconds to its first answer (its
start and the loading included) and to its end. Before, a pipe that stays open gets one line after the other: seconds to
an answer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

ALLOWED = 1.05
"""Peak memory of the longest input over that of 10,000 lines, the shortest that fills all windows, at most."""
FULL = 10_000
SLOWLY = 20  # lines of the pipe that stays open


def made_up(lines: list[str], number: int) -> Iterator[str]:
    """So many lines, no two of them the same."""
    for place, line in enumerate(islice(cycle(lines), number)):
        words = line.split()
        yield " ".join([*words[: place % len(words)], str(place), *words[place % len(words) + 1 :]])


@contextmanager
def started(arguments: list[Any]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
    """`regard translate` as a process of its own, with its standard input and output."""
    command = [sys.executable, "-c", "from regard.cli import main; main()", "translate", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin and process.stdout
        yield process, process.stdin, process.stdout


def measure(arguments: list[Any], text: Path) -> dict[str, float]:
    """Translate a file: peak memory, MiB; seconds to the first answer and to the last."""
    begun = time.perf_counter()
    with started([*arguments, "--input", text]) as (process, _, answers):
        answers.readline()
        first = time.perf_counter() - begun
        answered = 1 + sum(1 for _ in answers)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    with text.open("rb") as file:
        if process.returncode or answered != sum(1 for _ in file):
            raise SystemExit(f"{arguments}: ended with {process.returncode} after {answered:,} lines")
    return {"lines": answered, "peak_mib": usage.ru_maxrss / 1024, "first_s": first,
            "all_s": time.perf_counter() - begun}


def slowly(arguments: list[Any], lines: list[str]) -> float:
    """Seconds to an answer where the next line comes after it; the median but for the first, which waits for the
    loading."""
    waits = []
    with started(arguments) as (_, asks, answers):
        for line in islice(cycle(lines), SLOWLY):
            begun = time.perf_counter()
            asks.write(line.encode() + b"\n")
            asks.flush()
            answers.readline()
            waits.append(time.perf_counter() - begun)
        asks.close()
    return statistics.median(waits[1:])


def faults_of(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with one engine: memory that grows, or answers that wait for the end."""
    longest, full = rows[-1], [row["peak_mib"] for row in rows if row["lines"] >= FULL]
    if full and full[-1] > ALLOWED * full[0]:
        yield f"{longest['engine']}: {full[-1]:,.0f} MiB at the end, over {ALLOWED:g} x {full[0]:,.0f}"
    if longest["lines"] > FULL and longest["first_s"] > longest["all_s"] / 2:
        yield f"{longest['engine']}: the first answer came after {longest['first_s']:.1f} of {longest['all_s']:.1f} s"


def main() -> int:
    """Measure each engine, print a table, and tell by the exit code whether something is wrong."""
    parser = argparse.ArgumentParser(description="Memory of regard translate as its input grows.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--lines", type=int, nargs="+", default=[FULL, 100_000])
    parser.add_argument("--engines", nargs="+", default=["torch", "ctranslate2"])
    parser.add_argument("--beam", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    asked = parser.parse_args()
    lines = [line for line in asked.source.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in asked.engines:
            arguments = [asked.run, "--engine", engine, "--beam", asked.beam]
            wait = slowly(arguments, lines)
            for number in sorted(asked.lines):
                text = Path(folder) / "text"
                text.write_text("".join(f"{line}\n" for line in made_up(lines, number)), encoding="utf-8")
                rows.append({"engine": engine, **measure(arguments, text), "answer_s": wait})
                print(rows[-1], file=sys.stderr)
    if asked.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| engine | lines | peak MiB | first answer | all | an answer in an open pipe |\n" + "|---" * 6 + "|")
        for row in rows:
            print("| {engine} | {lines:,} | {peak_mib:,.0f} | {first_s:.1f} s | {all_s:,.0f} s | {answer_s:.3f} s |"
                  .format(**row))
    faults = [fault for name in asked.engines for fault in faults_of([row for row in rows if row["engine"] == name])]
    print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
