"""Training speed of Regard's Transformer beside a plain `torch.nn.Transformer`, on the same batches in the same run.

    python benchmarks/train.py --data FOLDER [--json]

FOLDER holds train.en and train.de (docs/data.md says how to get them). All models are the Transformer-tiny of Wu et
al. (2021): 4 + 4 layers, 128 wide, 256 feed-forward, 4 heads, tied embeddings, label smoothing 0.1, and dropout 0.3 in
all the places where `nn.Transformer` has it. They take turns, a block of updates each, so that a machine that slows
down slows all. Regard runs as its users run it ("regard", train.precision = "auto") and with float32 products
("float32"). What counts are non-padding target tokens per second, and the ratio to the plain loop's.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import torch
from torch import Tensor, nn

from regard.config import Config, TrainConfig, parse_config
from regard.data.batches import Batch, Order
from regard.data.shards import prepare
from regard.model.positions import Sinusoidal
from regard.model.seq2seq import Seq2Seq, build_model
from regard.text.tokenizer import PAD
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer
from regard.training.precision import chosen, matrix_products

SMOOTHING = 0.1


class Plain(nn.Module):
    """What the torch tutorial would write: `nn.Transformer`, one embedding for all, the loss over all logits."""

    def __init__(self, size: int, width: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(size, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.positions = Sinusoidal(width)
        self.dropout = nn.Dropout(0.3)
        self.transformer = nn.Transformer(width, 4, 4, 4, 256, 0.3, batch_first=True)
        self.scale = math.sqrt(width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token vectors with positions."""
        return self.dropout(self.positions(self.embedding(tokens) * self.scale))

    def loss(self, batch: Batch) -> Tensor:
        """The label-smoothed cross-entropy of a batch, per real target token."""
        causal = nn.Transformer.generate_square_subsequent_mask(batch.target_in.shape[1]).isinf()
        padding = ~batch.source_mask
        features = self.transformer(
            self.embed(batch.source), self.embed(batch.target_in), tgt_mask=causal, src_key_padding_mask=padding,
            tgt_key_padding_mask=~batch.target_mask, memory_key_padding_mask=padding, tgt_is_causal=True,
        )
        logits = features @ self.embedding.weight.T
        targets = batch.target_out.masked_fill(~batch.target_mask, -100)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, precision: str) -> None:
    """One update of any of the models."""
    with matrix_products(precision):
        if isinstance(model, Seq2Seq):
            loss = loss_of(model, batch, SMOOTHING)[0] / batch.tokens
        else:
            assert isinstance(model, Plain)
            loss = model.loss(batch)
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def settings(data: Path) -> Config:
    """The recipe that is timed."""
    recipe = Path(__file__).parent.parent / "configs" / "multi30k-en-de-transformer.toml"
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    values["data"]["root"] = str(data.resolve())
    values["model"] |= {"attention_dropout": 0.3, "feedforward_dropout": 0.3}
    return parse_config(values, str(recipe), recipe.parent)


def measure(config: Config, rounds: int, block: int, warmup: int) -> dict[str, list[float]]:
    """Tokens per second of each block of updates, for both models."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config, Path(folder))
        order = Order(prepared.train, config.train.batch_tokens, seed=1)
        batches = [order.update(0, position)[0] for position in range(warmup + rounds * block)]
    size = prepared.tokenizers.target.size
    torch.manual_seed(1)
    models = {name: build_model(config.model, size, size) for name in ("regard", "float32")} | {"plain": Plain(size)}
    precisions = {"regard": chosen(config.train, torch.device("cpu")), "float32": "float32", "plain": "float32"}
    optimizers = {name: make_optimizer(model, config.train) for name, model in models.items() if name != "plain"}
    optimizers["plain"] = torch.optim.AdamW(models["plain"].parameters(), lr=1e-3)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        first, last = (0, warmup) if number == 0 else (warmup + (number - 1) * block, warmup + number * block)
        for name, model in models.items():
            start = time.perf_counter()
            for batch in batches[first:last]:
                update(model, optimizers[name], batch, precisions[name])
            seconds = time.perf_counter() - start
            if number:
                speeds[name].append(sum(batch.tokens for batch in batches[first:last]) / seconds)
                print(f"round {number}/{rounds}  {name:<7} {speeds[name][-1]:>8,.0f} tokens/s", file=sys.stderr)
    return speeds


def main() -> None:
    """Measure, and print a line or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.en and train.de")
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each model (default 6)")
    parser.add_argument("--block", type=int, default=10, help="updates in a block (default 10)")
    parser.add_argument("--warmup", type=int, default=5, help="updates before the first block (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    speeds = measure(settings(arguments.data), arguments.rounds, arguments.block, arguments.warmup)
    ratios = [ours / plain for ours, plain in zip(speeds["regard"], speeds["plain"], strict=True)]
    float32 = [ours / plain for ours, plain in zip(speeds["float32"], speeds["plain"], strict=True)]
    result = {
        **{f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()},
        "precision": chosen(TrainConfig(), torch.device("cpu")),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "ratio_float32": statistics.median(float32),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio": statistics.median(ratios),
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, values in speeds.items():
            print(f"{name:<8} {statistics.median(values):>8,.0f} tokens/s")
        print(f"regard / plain {result['ratio']:.2f} ({result['ratio_min']:.2f} to {result['ratio_max']:.2f}), "
              f"float32 / plain {result['ratio_float32']:.2f}")


if __name__ == "__main__":
    main()
