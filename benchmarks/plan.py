"""Does `regard plan` foretell how long trainings take? Three configs are forecast, and then really trained.

    python benchmarks/plan.py --data FOLDER [--steps 60] [--json]

FOLDER holds train.en, train.de, val.en and val.de (docs/data.md says how to get them). Each config is forecast from
some seconds of updates; then `regard train` makes the same number of updates with one validation, start-up left out as
the forecast does. Both should lie within 15% of each other on a machine that nobody else uses. Validations compute the
loss alone: a model that has learned for so short a time does not end its outputs.
"""

import argparse
import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch

from regard.config import Config, parse_config
from regard.data.shards import prepare
from regard.training.loop import train
from regard.training.plan import forecast

CONFIGS = {
    "Transformer-tiny": {"kind": "transformer", "layers": 4, "width": 128, "heads": 4, "feedforward": 256},
    "LSTM, attention after": {"kind": "rnn", "cell": "lstm", "layers": 1, "width": 256, "attention": "after"},
    "convolution": {"kind": "conv", "layers": 3, "width": 128},
}


def settings(model: dict[str, Any], data: Path, steps: int) -> Config:
    """One of the configs, with the corpus of the recipe."""
    recipe = Path(__file__).parent.parent / "configs" / "multi30k-en-de-transformer.toml"
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    values["data"]["root"] = str(data.resolve())
    values["model"] = {**model, "dropout": 0.3}
    values["train"] = {"steps": steps, "validate_every": steps, "metric": "loss", "threads": torch.get_num_threads(),
                       "batch_tokens": values["train"]["batch_tokens"]}
    return parse_config(values, str(recipe), recipe.parent)


def foretold_and_trained(config: Config, seconds: float) -> tuple[float, float]:
    """Seconds of one training, as the forecast has them and as the training has them."""
    with tempfile.TemporaryDirectory() as folder:
        foretold = forecast(config, prepare(config, Path(folder)), seconds, lambda line: None)
        run = train(config, Path(folder) / "run", quiet=True)
        return foretold.seconds, run.metrics()[-1]["seconds"]


def main() -> None:
    """Measure, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.* and val.*")
    parser.add_argument("--steps", type=int, default=60, help="updates of each training (default 60)")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a forecast measures (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    for name, model in CONFIGS.items():
        told, took = foretold_and_trained(settings(model, arguments.data, arguments.steps), arguments.seconds)
        found[name] = {"foretold": told, "trained": took, "ratio": took / told}
        if not arguments.json:
            print(f"{name:<22} foretold {told:6.1f} s, trained {took:6.1f} s: {took / told:.2f}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
