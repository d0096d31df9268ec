"""Training speed of Regard's Transformer beside a plain `torch.nn.Transformer`, on the same batches in the same run.

    python benchmarks/train.py --data FOLDER [--size tiny] [--batch-tokens 4096] [--device auto] [--json]

FOLDER holds train.en and train.de (docs/data.md says how to get them). All models are the Transformer-tiny of Wu et
al. (2021): 4 + 4 layers, 128 wide, 256 feed-forward, 4 heads, tied embeddings, label smoothing 0.1, and dropout 0.3 in
all the places where `nn.Transformer` has it; or, as large, the base or big one of Vaswani et al. (2017): those are for
a GPU, with larger batches. They take turns, a block of updates each, so that a machine that slows down slows all.
Regard runs as its users run it ("regard", train.precision = "auto") and, where that is bfloat16, with float32 products
too ("float32"). On a GPU the plain loop multiplies in bfloat16 as well. What counts are non-padding target tokens per
second, and the ratio to the plain loop's. Beside them stands what share of this machine's peak that is: operations of
an update as `regard plan` counts them, over those of a product of two large matrices, measured in the same run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import CPU, Contestant, PlainTransformer, batches_of, peak, ratios, take_turns
from regard.config import Config, parse_config
from regard.config_train import TrainConfig
from regard.data.shards import prepare
from regard.errors import RegardError
from regard.model.seq2seq import build_model
from regard.training.device import pick_device
from regard.training.plan import operations
from regard.training.precision import chosen

SIZES = {
    "tiny": {"width": 128, "layers": 4, "heads": 4, "feedforward": 256, "dropout": 0.3},
    "base": {"width": 512, "layers": 6, "heads": 8, "feedforward": 2048, "dropout": 0.1},
    "big": {"width": 1024, "layers": 6, "heads": 16, "feedforward": 4096, "dropout": 0.3},
}


def settings(data: Path, size: str, batch_tokens: int) -> Config:
    """The recipe that is timed."""
    recipe = Path(__file__).parent.parent / "configs" / "multi30k-en-de-transformer.toml"
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    values["data"]["root"] = str(data.resolve())
    values["train"]["batch_tokens"] = batch_tokens
    values["model"] |= SIZES[size] | dict.fromkeys(("attention_dropout", "feedforward_dropout"), SIZES[size]["dropout"])
    return parse_config(values, str(recipe), recipe.parent)


def measure(
    config: Config, plain: dict[str, Any], device: torch.device, precision: str, rounds: int, block: int, warmup: int
) -> tuple[dict[str, list[float]], float]:
    """Tokens per second of each block of updates, for all models; and operations for each target token.

    Args:
        config: of Regard's model and training.
        plain: the plain model's settings.
        device: where all train.
        precision: Regard's; on a GPU the plain loop's too.
        rounds, block, warmup: blocks of each model, updates in one, and updates before the first.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config, Path(folder))
        batches = batches_of(prepared.train, config.train.batch_tokens, warmup + rounds * block)
    size = prepared.tokenizers.target.size
    ours = partial(build_model, config.model, size, size)
    contestants = {"regard": lambda: Contestant.ours(ours().to(device), config.train, precision)}
    if precision != "float32":
        contestants["float32"] = lambda: Contestant.ours(ours().to(device), config.train, "float32")
    contestants["plain"] = lambda: Contestant.plain(
        PlainTransformer(size, **plain).to(device), torch.optim.AdamW, "" if device == CPU else precision)
    speeds = take_turns(contestants, batches, rounds, block, device=device)
    source, target, rows = (sum(count) for count in zip(
        *((int(each.source_mask.sum()), each.tokens, len(each)) for each in batches), strict=True))
    return speeds, operations(ours(), config.model, source, target, (source + target) / 2 / rows) / target


def main() -> None:
    """Measure, and print a line or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.en and train.de")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model (default tiny)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="padded target tokens in a batch (default 4096)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU, if any")
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each model (default 6)")
    parser.add_argument("--block", type=int, default=10, help="updates in a block (default 10)")
    parser.add_argument("--warmup", type=int, default=15, help="updates before the first block (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        device = pick_device(arguments.device)
        precision = chosen(TrainConfig(), device)[0]
        speeds, each = measure(
            settings(arguments.data, arguments.size, arguments.batch_tokens), SIZES[arguments.size], device, precision,
            arguments.rounds, arguments.block, arguments.warmup)
    except RegardError as error:
        sys.exit(str(error))
    ratio, least, most = ratios(speeds, "regard")
    exact = "float32" if "float32" in speeds else "regard"
    peaks = {kind: peak(getattr(torch, kind), device) for kind in dict.fromkeys((precision, "float32"))}
    rate = each * statistics.median(speeds["regard"])
    result = {
        **{f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()},
        "operations_per_token": each,
        **{f"peak_{name}": value for name, value in peaks.items()},
        **{f"share_of_{name}_peak": rate / value for name, value in peaks.items()},
        "size": arguments.size,
        "device": str(device) if device == CPU else torch.cuda.get_device_name(device),
        "precision": precision,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "ratio_float32": ratios(speeds, exact)[0],
        "ratio_min": least,
        "ratio_max": most,
        "ratio": ratio,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, values in speeds.items():
            print(f"{name:<8} {statistics.median(values):>8,.0f} tokens/s")
        print(f"regard does {rate / 1e9:,.0f} GFLOP/s: " + ", ".join(
            f"{rate / value:.0%} of this machine's {name} peak of {value / 1e9:,.0f}" for name, value in peaks.items()))
        print(f"regard ({precision}) / plain {result['ratio']:.2f} ({result['ratio_min']:.2f} to "
              f"{result['ratio_max']:.2f}), float32 / plain {result['ratio_float32']:.2f}")


if __name__ == "__main__":
    main()
