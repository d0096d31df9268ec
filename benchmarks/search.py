"""Sentences per second of the torch engine on runs of any family, and of another version of it in turns.

    python benchmarks/search.py RUN [RUN ...] --source FILE [--against SRC] [--beams 5 1] [--rounds 5] [--threads N]
                                [--json]

SRC is the src folder of another version, such as that of `git worktree add ../before COMMIT`. Each version runs in a
process of its own, and they take turns, all lines with one beam in a turn, so that a machine that slows down slows
both. What counts is the whole way from text to text; start-up does not. Beside the clock the processor's time is
given, which other work on the machine changes less. benchmarks/decode.py compares the engines with other toolkits.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import regard
from regard.errors import RegardError
from regard.text.corpus import read_lines

HERE = Path(regard.__file__).parents[1]
WORKER = """
import inspect, json, sys, time
sys.path.insert(0, sys.argv[1])
import regard, torch
if threads := int(sys.argv[3]):
    torch.set_num_threads(threads)
engine = {"engine": "torch"} if "engine" in inspect.signature(regard.load).parameters else {}
translator = regard.load(sys.argv[2], **engine)
for order in sys.stdin:
    beam, lines = json.loads(order)
    clock, processor = time.perf_counter(), time.process_time()
    texts = [one.text for one in translator.translate(lines, beam=beam)]
    print(json.dumps([time.perf_counter() - clock, time.process_time() - processor, texts]), flush=True)
"""


class Version:
    """One version of Regard with a run, in a process of its own."""

    def __init__(self, source: Path, run: Path, threads: int):
        command = [sys.executable, "-c", WORKER, str(source), str(run), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def translate(self, lines: Sequence[str], beam: int) -> tuple[float, float, list[str]]:
        """Seconds by the clock and of the processor, and the texts."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([beam, lines]), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise SystemExit("a version ended with an error; it stands above")
        clock, processor, texts = json.loads(answer)
        return clock, processor, texts

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def measure(run: Path, lines: Sequence[str], beams: Sequence[int], rounds: int, threads: int,
            against: Path | None) -> Iterator[dict[str, Any]]:
    """The figures of a run for each beam."""
    sources = {"own": HERE} | ({} if against is None else {"other": against})
    versions = {name: Version(source, run, threads) for name, source in sources.items()}
    for beam in beams:
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
        texts: dict[str, list[str]] = {}
        for version in versions.values():
            version.translate(lines[:64], beam)
        for number in range(1, rounds + 1):
            for name, version in versions.items():
                clock, processor, texts[name] = version.translate(lines, beam)
                seconds[name].append((clock, processor))
                print(f"{run.name}, beam {beam}, round {number}/{rounds}  {name:<5} {len(lines) / clock:>7,.0f} "
                      f"sentences/s, {len(lines) / processor:,.0f} a processor second", file=sys.stderr)
        yield {"run": run.name, "beam": beam} | figures(seconds, texts, len(lines))
    for version in versions.values():
        version.close()


def figures(seconds: dict[str, list[tuple[float, float]]], texts: dict[str, list[str]], count: int) -> dict[str, Any]:
    """Medians over the rounds, and ratios of the seconds of each."""
    found: dict[str, Any] = {}
    for name, each in seconds.items():
        clock, processor = (statistics.median(column) for column in zip(*each, strict=True))
        found |= {f"{name}_per_second": count / clock, f"{name}_per_processor_second": count / processor}
    if "other" in seconds:
        pairs = list(zip(seconds["other"], seconds["own"], strict=True))
        for place, title in enumerate(("times", "times_processor")):
            found[title] = statistics.median(other[place] / own[place] for other, own in pairs)
        found["different"] = sum(one != other for one, other in zip(texts["own"], texts["other"], strict=True))
    return found


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The figures as a Markdown table."""
    each = "sentences/s | a processor second"
    yield f"| run | beam | {each} | other version: {each} | times | differ |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        cells = [row["run"], row["beam"], f"{row['own_per_second']:,.0f}", f"{row['own_per_processor_second']:,.0f}"]
        if "times" in row:
            cells += [f"{row['other_per_second']:,.0f}", f"{row['other_per_processor_second']:,.0f}",
                      f"{row['times']:.2f} (processor {row['times_processor']:.2f})", row["different"]]
        yield f"| {' | '.join(map(str, cells + [''] * (8 - len(cells))))} |"


def main() -> None:
    """Measure, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a trained run")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="sentences, one a line")
    parser.add_argument("--against", type=Path, metavar="SRC", help="src folder of another version")
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 1], help="default: 5 1")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each version (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="processor threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        lines = read_lines(options.source)
    except RegardError as error:
        raise SystemExit(str(error)) from None
    rows = [row for run in options.runs for row in measure(
        run, lines, options.beams, options.rounds, options.threads, options.against)]
    print(json.dumps(rows) if options.json else "\n".join(table(rows)))


if __name__ == "__main__":
    main()
