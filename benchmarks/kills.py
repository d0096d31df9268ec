"""Kill a training again and again, and compare it with one that was left alone.

    python benchmarks/kills.py [--kills 50] [--seed 1] [--out FOLDER] [--json]

A small Transformer learns to turn sequences round, with dropout, each update in two pieces, and a checkpoint every five
updates. It is trained once as it is, and once killed by SIGKILL at random moments, each time a new process: one kill
in ten comes while it starts, four while it saves, the others anywhere. Then the losses of all updates, the last
weights, optimizer and random state and the average of the last checkpoints must be the same to the last bit; if they
are not, the exit code is 1. 50 kills take some minutes, most of which is the starting of processes.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from regard.config import Config, parse_config, write_config
from regard.training.checkpoint import UNFINISHED
from regard.training.run import Run
from regard.training.verify import Outcome

MOMENTS = {"start": 0.1, "save": 0.4, "any": 0.5}
"""When kills come, and how often."""
UPDATES, SAVE_EVERY = 16, 5
"""Updates for each kill, and from save to save."""
POLL = 0.001


class Kill(NamedTuple):
    """A kill that was done: at which moment it was meant, whether it cut a save, and the last update in the log."""

    moment: str
    in_a_save: bool
    update: int


def settings(folder: Path, kills: int) -> Config:
    """Write the data, and say what is trained."""
    draw = random.Random(1)
    for name, count in (("train", 400), ("valid", 10)):
        lines = [draw.choices("abcdefgh", k=draw.randint(2, 9)) for _ in range(count)]
        pairs = "".join(f"{' '.join(line)}\t{' '.join(line[::-1])}\n" for line in lines)
        (folder / f"{name}.tsv").write_text(pairs, encoding="utf-8")
    return parse_config({
        "data": {"train": [{"pairs": "train.tsv"}], "valid": {"pairs": "valid.tsv"}},
        "tokenizer": {"kind": "space"},
        "model": {"kind": "transformer", "width": 32, "layers": 2, "heads": 2, "feedforward": 64, "dropout": 0.3},
        "train": {"steps": UPDATES * kills, "batch_tokens": 256, "accumulate": 2, "validate_every": SAVE_EVERY,
                  "metric": "loss", "average": 2, "log_every": 1, "threads": 1, "device": "cpu"},
    }, "kills.py", folder)


def start(run: Run) -> subprocess.Popen[bytes]:
    """Begin the training, or go on with it, as a person would."""
    command = [sys.executable, "-c", "from regard.cli import main; main()", "train",
               str(run.folder.parent / "kills.toml"), "--out", str(run.folder), "--quiet"]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def last_update(run: Run) -> int:
    """The last update in the log."""
    return max((row["step"] for row in run.metrics() if row["kind"] == "train"), default=0)


def saving(run: Run) -> bool:
    """Whether a save is going on, or was cut short."""
    return any((run.folder / "checkpoints").glob(f"{UNFINISHED}*"))


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something is so, or the training has ended."""
    while process.poll() is None and not reached():
        time.sleep(POLL)


def kill_once(run: Run, moment: str, limit: int, startup: float, draw: random.Random) -> Kill:
    """Start the training, and kill it at a moment.

    Args:
        run: of the training.
        moment: "start", "save" or "any".
        limit: about the last update that it may come to.
        startup: seconds that a start takes.
        draw: chance.
    """
    log, began = run.metrics_file, time.perf_counter()
    file = log.stat().st_ino if log.exists() else None
    saved = int(run.checkpoints()[-1].name.removeprefix("step-")) if run.checkpoints() else 0
    process = start(run)
    delay = draw.uniform(0, startup) if moment == "start" else float("inf")
    # When the log is another file, the training has put it back to its last save, and begins.
    wait_for(lambda: time.perf_counter() - began > delay or (log.exists() and log.stat().st_ino != file), process)
    if moment != "start":
        update = draw.randint(saved, max(saved, limit))
        wait_for(lambda: last_update(run) >= update, process)
        if moment == "save":
            wait_for(lambda: saving(run), process)
        time.sleep(draw.expovariate(200))
    process.kill()
    if process.wait() != -signal.SIGKILL:
        sys.exit(f"{run.folder}: the training ended with {process.returncode} before it was killed")
    return Kill(moment, saving(run), last_update(run))


def kill_many(run: Run, kills: int, startup: float, draw: random.Random) -> list[Kill]:
    """Kill a training so many times, evenly over all of it, and then let it come to its end."""
    done: list[Kill] = []
    for number in range(1, kills + 1):
        moment, = draw.choices(list(MOMENTS), list(MOMENTS.values()))
        kill = kill_once(run, moment, run.config.train.steps * number // (kills + 1), startup, draw)
        done.append(kill)
        where = "in a save" if kill.in_a_save else "in its start" if moment == "start" else "in training"
        print(f"kill {number}/{kills}: {where}, update {kill.update}", file=sys.stderr)
    if start(run).wait():
        sys.exit(f"{run.folder}: the training does not come to its end")
    return done


def left_alone(run: Run) -> float:
    """Train without a kill; the seconds that its start took."""
    began = time.perf_counter()
    process = start(run)
    wait_for(lambda: last_update(run) > 0, process)
    startup = time.perf_counter() - began
    if process.wait():
        sys.exit(f"{run.folder}: the training does not come to its end")
    return startup


def average_of(run: Run) -> str:
    """SHA-256 of the weights that are the average of the last checkpoints."""
    return hashlib.sha256((run.average_path / "model.safetensors").read_bytes()).hexdigest()


def measure(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Train both ways, and compare."""
    config, began = settings(folder, kills), time.perf_counter()
    write_config(config, folder / "kills.toml")
    whole, parts = (Run(folder / name, config) for name in ("whole", "parts"))
    startup = left_alone(whole)
    done = kill_many(parts, kills, startup, random.Random(seed))
    expected, found = (Outcome.of(run, config.train.steps) for run in (whole, parts))
    same = [expected.losses[step] == found.losses.get(step) for step in expected.losses]
    moments = Counter("save" if kill.in_a_save else "start" if kill.moment == "start" else "training" for kill in done)
    difference = expected.difference(found) or (
        None if average_of(whole) == average_of(parts) else "the average of the last checkpoints is another")
    return {
        "kills": len(done), **{f"kills_in_{moment}": moments[moment] for moment in ("start", "training", "save")},
        "updates": config.train.steps, "losses_equal": sum(same), "validations_equal": validations(whole, parts),
        "sha256_left_alone": expected.digests() | {"average": average_of(whole)},
        "sha256_killed": found.digests() | {"average": average_of(parts)},
        "difference": difference, "seconds": time.perf_counter() - began, "torch": torch.__version__,
        "equal": difference is None,
    }


def validations(*runs: Run) -> bool:
    """Whether the validations of two runs gave the same losses."""
    one, other = ([(row["step"], row["loss"]) for row in run.metrics() if row["kind"] == "valid"] for run in runs)
    return one == other


def main() -> None:
    """Measure, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep both runs here; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error("--kills: expected 1 or more")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--out {folder}: is not empty; choose another folder")
        result = measure(folder.resolve(), arguments.kills, arguments.seed)
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            for row, text in (value if isinstance(value, dict) else {"": value}).items():
                print(f"{f'{name} {row}':<32} {text}")
    sys.exit(0 if result["equal"] else 1)


if __name__ == "__main__":
    main()
