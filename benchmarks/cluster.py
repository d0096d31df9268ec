"""The same training shared by 1, 2 and 4 processes of this machine: speed, losses, and the digest of what comes out.

    python benchmarks/cluster.py [--steps 60] [--json]

Each is started as a user starts it, `torchrun --nproc-per-node N --no-python regard train …`, one thread a process,
with dropout, four pieces an update. The data is made up: numbers, and the same numbers backwards. In the usual mode
losses differ by rounding; with train.deterministic the weights and the optimizer's state are the same to the last bit.
Then one of two processes is killed in mid-run (SIGKILL): the other must leave, torchrun must start both again, and what
comes out must be what came out without it. Efficiency is speed over that of one process, divided by the number of
processes; past the number of cores it tells nothing.
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
from pathlib import Path
from typing import Any

from regard.config import parse_config, write_config
from regard.training import checkpoint as checkpoints
from regard.training.optimizer import RANDOM
from regard.training.run import Run

SIZES = (1, 2, 4)
PIECES = 4
MODEL = {"kind": "transformer", "layers": 2, "width": 128, "heads": 4, "feedforward": 256, "dropout": 0.2}


def write_data(folder: Path, pairs: int = 4000) -> None:
    """Pairs of numbers, and the same backwards."""
    draw = random.Random(1)
    for name, count in (("train", pairs), ("valid", 20)):
        lines = [[str(draw.randrange(500)) for _ in range(draw.randint(3, 25))] for _ in range(count)]
        for side, step in (("source", 1), ("target", -1)):
            (folder / f"{name}.{side}").write_text("".join(" ".join(line[::step]) + "\n" for line in lines))


def write_plan(folder: Path, deterministic: bool, steps: int) -> Path:
    """The config of a training."""
    corpora = {name: {side: f"{name}.{side}" for side in ("source", "target")} for name in ("train", "valid")}
    config = parse_config({
        "data": {"train": [corpora["train"]], "valid": corpora["valid"], "prepared": str(folder / "prepared")},
        "tokenizer": {"kind": "space", "size": 600}, "model": MODEL,
        "train": {"steps": steps, "batch_tokens": 4096, "accumulate": PIECES, "warmup": 20, "log_every": 1,
                  "validate_every": max(1, steps // 4), "metric": "loss", "threads": 1, "device": "cpu",
                  "deterministic": deterministic},
    }, "the benchmark", folder)
    path = folder / f"{'deterministic' if deterministic else 'usual'}.toml"
    write_config(config, path)
    return path


def start(config: Path, out: Path, size: int, restarts: int = 0) -> "subprocess.Popen[str]":
    """Start a training shared by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
               "--max-restarts", str(restarts), "--no-python", str(Path(sys.executable).with_name("regard")),
               "train", str(config), "--out", str(out), "--quiet"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: "subprocess.Popen[str]") -> None:
    """Wait for a training."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the training ended with {process.returncode}:\n{said}")


def outcome(out: Path) -> dict[str, Any]:
    """Losses of all updates, tokens per second (the median after the first ten), and the digest of weights and
    optimizer."""
    run = Run.open(out)
    rows = [row for row in run.metrics() if row["kind"] == "train"]
    last = checkpoints.load(run.checkpoints()[-1])
    tensors = {**last.model, **{name: each for name, each in last.optimizer.items() if not name.startswith(RANDOM)}}
    speeds = sorted(row["tokens_per_second"] for row in rows[10:])
    return {"losses": [row["loss"] for row in rows], "tokens_per_second": speeds[len(speeds) // 2],
            "sha256": hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()}


def killed(config: Path, out: Path) -> dict[str, Any]:
    """Kill one of two processes once a checkpoint is there; seconds until both are gone, and what comes out."""
    process = start(config, out, 2, restarts=1)
    while not any((out / "checkpoints").glob("step-*")):
        time.sleep(0.05)
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    begin = time.perf_counter()
    while any(Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes()
              for worker in workers):
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    finish(process)
    return {"seconds_until_all_left": seconds, **outcome(out)}


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def measure(steps: int) -> dict[str, Any]:
    """All trainings, one after the other."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder)
        for mode in ("usual", "deterministic"):
            config = write_plan(folder, mode == "deterministic", steps)
            for size in SIZES:
                out = folder / f"{mode}-{size}"
                finish(start(config, out, size))
                found[f"{mode}, {size}"] = outcome(out)
                print(f"{mode}, {size} processes: done", file=sys.stderr)
        found["deterministic, 2, one killed"] = killed(config, folder / "killed")
    return found


def table(found: dict[str, Any]) -> list[str]:
    """What was found, as a Markdown table."""
    lines = ["| mode, processes | tokens/s | efficiency | largest difference of a loss | SHA-256 |",
             "|---|---|---|---|---|"]
    for name, each in found.items():
        mode, size = name.split(", ")[:2]
        alone = found[f"{mode}, 1"]
        apart = max(abs(one - other) for one, other in zip(each["losses"], alone["losses"], strict=True))
        efficiency = each["tokens_per_second"] / alone["tokens_per_second"] / int(size)
        lines.append(f"| {name} | {each['tokens_per_second']:,.0f} | {efficiency:.2f} | {apart:.1e} | "
                     f"{each['sha256'][:12]} |")
    seconds = found["deterministic, 2, one killed"]["seconds_until_all_left"]
    return [*lines, f"After SIGKILL of one process the other had left in {seconds:.1f} seconds."]


def main() -> None:
    """Measure, print a table or a JSON object, and end with 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates of each training (default 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options.steps)
    print(json.dumps(found) if options.json else "\n".join(table(found)))
    same = {each["sha256"] for name, each in found.items() if name.startswith("deterministic")}
    if len(same) > 1:
        raise SystemExit("the deterministic mode gave different weights")


if __name__ == "__main__":
    main()
