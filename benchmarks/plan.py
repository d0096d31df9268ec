"""Does `regard plan` foretell the time and memory of trainings? Three configs are forecast, and then really trained.

    python benchmarks/plan.py --data FOLDER [--steps 300] [--json]

FOLDER holds train.en, train.de, val.en and val.de (docs/data.md says how to get them). Each config is forecast from
some seconds of updates; then `regard train` makes the same number of updates with one validation, start-up left out as
the forecast does, each in a process of its own, whose highest memory is taken. Both should lie within 15% of each other
on a machine that nobody else uses. Validations compute the loss alone: a model that has learned for so short a time
does not end its outputs.
"""

import argparse
import json
import multiprocessing
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regard.config import Config, parse_config
from regard.data.shards import prepare
from regard.training.device import peak_memory
from regard.training.loop import train
from regard.training.plan import forecast

CONFIGS = {
    "Transformer-tiny": {"kind": "transformer", "layers": 4, "width": 128, "heads": 4, "feedforward": 256},
    "LSTM, attention after": {"kind": "rnn", "cell": "lstm", "layers": 1, "width": 256, "attention": "after"},
    "convolution": {"kind": "conv", "layers": 3, "width": 128},
}


def settings(model: dict[str, Any], data: Path, steps: int, threads: int) -> Config:
    """One of the configs, with the corpus of the recipe."""
    recipe = Path(__file__).parent.parent / "configs" / "multi30k-en-de-transformer.toml"
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    values["data"]["root"] = str(data.resolve())
    values["model"] = {**model, "dropout": 0.3}
    values["train"] = {"steps": steps, "validate_every": steps, "metric": "loss", "threads": threads,
                       "batch_tokens": values["train"]["batch_tokens"]}
    return parse_config(values, str(recipe), recipe.parent)


class Cost(NamedTuple):
    """What a training takes: seconds, and MB at most."""

    seconds: float
    memory: float


def foretold(config: Config, seconds: float) -> Cost:
    """As the forecast has it."""
    with tempfile.TemporaryDirectory() as folder:
        found = forecast(config, prepare(config, Path(folder)), seconds, lambda line: None)
    return Cost(found.seconds, found.memory / 1e6)


def trained(config: Config) -> Cost:
    """As a training has it."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, Path(folder) / "run", quiet=True)
        return Cost(run.metrics()[-1]["seconds"], peak_memory(torch.device("cpu")) / 1e6)


def apart(make: Callable[..., Cost], *given: object) -> Cost:
    """What comes of it in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(make, *given).result()


def main() -> None:
    """Measure, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.* and val.*")
    parser.add_argument("--steps", type=int, default=300, help="updates of each (default 300; heaps grow for so many)")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a forecast measures (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = {}
    for name, model in CONFIGS.items():
        config = settings(model, arguments.data, arguments.steps, arguments.threads)
        told = apart(foretold, config, arguments.seconds)
        took = apart(trained, config)
        ratio = Cost(*(a / b for a, b in zip(took, told, strict=True)))
        found[name] = {"foretold": told._asdict(), "trained": took._asdict(), "ratio": ratio._asdict()}
        if not arguments.json:
            both = (f"{each.seconds:6.1f} s, {each.memory:5,.0f} MB" for each in (told, took))
            print(f"{name:<22} foretold {{}}; trained {{}}".format(*both)
                  + f"; ratios {ratio.seconds:.2f}, {ratio.memory:.2f}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
