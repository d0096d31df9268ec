"""Training speed, memory and start-up as the data grows: 10 thousand, 1 million and 10 million pairs.

    python benchmarks/growth.py --data FOLDER [--pairs 10000 1000000 10000000] [--json]

FOLDER holds train.en and train.de (docs/data.md says how to get them). Their prepared pairs are repeated, one id in
twenty of each changed, and written as shards into a temporary folder (0.9 GB for 10 million pairs). In a process of its
own each corpus is opened, and a training of Transformer-tiny goes on at nine tenths of an epoch: seconds until its
first update is made, tokens per second of those after it, and the memory that the process itself holds (anonymous
pages; pages of the mapped files, which the system takes back when it likes, are told apart).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Contestant
from regard.config import parse_config
from regard.data.batches import Order
from regard.data.shards import Corpus, prepare
from regard.model.seq2seq import build_model
from regard.training.precision import chosen

MODEL = {"kind": "transformer", "layers": 4, "width": 128, "heads": 4, "feedforward": 256, "dropout": 0.3, "tie": "all"}
SIDES = ("source", "target")


def write_corpus(small: Corpus, folder: Path, pairs: int, size: int) -> None:
    """Shards of so many pairs, made of a corpus's own."""
    folder.mkdir()
    draw, manifest = np.random.default_rng(1), dict(small.manifest)
    rows = np.arange(pairs) % len(small)
    for side in SIDES:
        lengths = getattr(small, f"{side}_lengths")
        own = np.concatenate([getattr(small, side)(row) for row in range(len(small))]).astype(np.uint16)
        times, rest = divmod(pairs, len(small))
        ids = np.concatenate([np.tile(own, times), own[: lengths[:rest].sum()]])
        changed = draw.integers(len(ids), size=len(ids) // 20)
        ids[changed] = draw.integers(4, size, size=len(changed))
        np.save(folder / f"{side}.ids.npy", ids)
        np.save(folder / f"{side}.offsets.npy", np.cumsum(np.concatenate([[0], lengths[rows]]), dtype=np.int64))
    manifest["files"] = {file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
                         for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def config_of(data: Path) -> Any:
    """The training that is timed."""
    pair = {"source": "train.en", "target": "train.de"}
    return parse_config({
        "data": {"root": str(data.resolve()), "train": [pair], "valid": pair},
        "tokenizer": {"kind": "bpe", "size": 8000, "shared": True}, "model": MODEL, "train": {"batch_tokens": 4096},
    }, "the benchmark", Path.cwd())


def held(kind: str) -> int:
    """Bytes of memory of a kind that this process holds: RssAnon, its own; RssFile, pages of files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


def train_on(folder: Path, data: Path, size: int, updates: int, threads: int) -> dict[str, float]:
    """What a training that goes on in a corpus finds."""
    torch.set_num_threads(threads)
    config = config_of(data)
    contestant = Contestant.ours(
        build_model(config.model, size, size), config.train, chosen(config.train, torch.device("cpu"))[0])
    begin = time.perf_counter()
    corpus = Corpus(folder)
    opened = time.perf_counter() - begin
    order = Order(corpus, config.train.batch_tokens, 1)
    begin = time.perf_counter()
    batch, = order.update(0, 9 * order.updates(0) // 10)
    first = time.perf_counter() - begin
    contestant.speed([batch] * 3)
    begin, tokens, peak = time.perf_counter(), 0, 0
    for position in range(updates):
        batch, = order.update(0, position)
        contestant.update(batch)
        tokens, peak = tokens + batch.tokens, max(peak, held("RssAnon"))
    speed = tokens / (time.perf_counter() - begin)
    return {"open_and_verify_seconds": opened, "first_batch_seconds": first, "tokens_per_second": speed,
            "memory_mb": peak / 1e6, "file_pages_mb": held("RssFile") / 1e6}


def main() -> None:
    """Measure each size in a process of its own, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.en and train.de")
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--updates", type=int, default=40, help="timed updates (default 40)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # a corpus and its vocabulary's size: the inner run
    options = parser.parse_args()
    if options.only:
        folder, size = options.only
        print(json.dumps(train_on(Path(folder), options.data, int(size), options.updates, options.threads)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as place:
        small = prepare(config_of(options.data), Path(place) / "small", lambda line: print(line, file=sys.stderr))
        size = small.tokenizers.target.size
        for pairs in options.pairs:
            folder = Path(place) / str(pairs)
            write_corpus(small.train, folder, pairs, size)
            command = [sys.executable, __file__, "--data", str(options.data), "--updates", str(options.updates),
                       "--threads", str(options.threads), "--only", str(folder), str(size)]
            found[pairs] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            print(f"{pairs:,} pairs: {found[pairs]}", file=sys.stderr)
    if options.json:
        print(json.dumps(found))
        return
    print("| pairs | opened and verified | first batch at 9/10 of an epoch | tokens/s | own memory | pages of files |")
    print("|---|---|---|---|---|---|")
    for pairs, each in found.items():
        print(f"| {pairs:,} | {each['open_and_verify_seconds']:.2f} s | {each['first_batch_seconds']:.2f} s | "
              f"{each['tokens_per_second']:,.0f} | {each['memory_mb']:,.0f} MB | {each['file_pages_mb']:,.0f} MB |")


if __name__ == "__main__":
    main()
