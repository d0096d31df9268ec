"""Does the fast path learn what the plain one learns? Loss curves that lie over each other, and the same BLEU.

    python benchmarks/curves.py --data FOLDER --out FOLDER [--steps 800] [--json]

FOLDER holds train.en, train.de, val.en and val.de (docs/data.md says how to get them). A Transformer-tiny is made once
and trained on the same batches with the same optimizer and schedule: by a plain loop over `torch.nn.Transformer`, by
Regard with float32 products, and by Regard with bfloat16 products. Dropout draws other values in each, so the curves
may differ as those of two seeds of dropout do, which a fourth training shows. At the end all weights are put into a
model of Regard's, whose greedy output of the validation data is scored. Each training is kept in --out, so that the
script goes on where it was stopped; curves.png is drawn there.
"""

import argparse
import json
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common import SMOOTHING, PlainTransformer
from regard.config import Config, parse_config
from regard.data.batches import Batch, Order
from regard.data.shards import Prepared, prepare
from regard.heap import keep_freed
from regard.model.attention import MultiHeadAttention
from regard.model.seq2seq import Seq2Seq, build_model
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer
from regard.training.precision import matrix_products, whole_update
from regard.training.schedule import learning_rate
from regard.training.validation import Validation

PATHS = {"torch.nn.Transformer": "plain", "Regard, float32": "float32", "Regard, bfloat16": "bfloat16",
         "Regard, float32, other dropout": "other"}
SPAN = 20
"""Updates that a point of the picture is the mean of."""


def settings(data: Path, steps: int) -> Config:
    """The recipe's model, with a schedule for so few updates."""
    recipe = Path(__file__).parent.parent / "configs" / "multi30k-en-de-transformer.toml"
    values = tomllib.loads(recipe.read_text(encoding="utf-8"))
    values["data"]["root"] = str(data.resolve())
    values["train"] = {"steps": steps, "schedule": "cosine", "warmup": steps // 2, "learning_rate": 2e-3,
                       "batch_tokens": 4096, "label_smoothing": SMOOTHING}
    return parse_config(values, str(recipe), recipe.parent)


def pairs_of(plain: PlainTransformer, ours: Seq2Seq) -> list[tuple[Tensor, Tensor]]:
    """The weights of both models that are the same, parts of one where the other keeps them in one piece."""
    found = [(plain.embedding.weight, ours.output)]
    sides = ((plain.transformer.encoder, ours.encoder), (plain.transformer.decoder, ours.decoder))
    for theirs, own in ((a, b) for side, part in sides for a, b in zip(side.layers, part.layers, strict=True)):
        attentions, norms = [(theirs.self_attn, own.attention)], [own.attention_residual, own.feedforward_residual]
        if hasattr(own, "cross"):
            attentions.append((theirs.multihead_attn, own.cross))
            norms.insert(1, own.cross_residual)
        for attention in attentions:
            found += attention_pairs(*attention)
        modules = [(getattr(theirs, f"norm{number}"), each.norm) for number, each in enumerate(norms, 1)]
        modules += [(theirs.linear1, own.feedforward.inner), (theirs.linear2, own.feedforward.outer)]
        found += [(getattr(a, name), getattr(b, name)) for a, b in modules for name in ("weight", "bias")]
    return found


def attention_pairs(theirs: nn.MultiheadAttention, own: MultiHeadAttention) -> list[tuple[Tensor, Tensor]]:
    """The same of one attention."""
    width = own.query.in_features
    return [(theirs.in_proj_weight[:width], own.query.weight), (theirs.in_proj_weight[width:], own.key_value.weight),
            (theirs.in_proj_bias[:width], own.query.bias), (theirs.in_proj_bias[width:], own.key_value.bias),
            (theirs.out_proj.weight, own.output.weight), (theirs.out_proj.bias, own.output.bias)]


def alike(plain: PlainTransformer) -> None:
    """Have the plain model drop what the recipe drops, and normalise as often: a side has a second norm at its end."""
    for side in (plain.transformer.encoder, plain.transformer.decoder):
        side.norm = None
        for layer in side.layers:
            layer.self_attn.dropout = layer.dropout.p = 0.0
            if hasattr(layer, "multihead_attn"):
                layer.multihead_attn.dropout = 0.0


def made(config: Config, size: int) -> Seq2Seq:
    """The model that all trainings begin with."""
    torch.manual_seed(1)
    return build_model(config.model, size, size)


def trained(path: str, config: Config, prepared: Prepared) -> dict[str, object]:
    """Train by one path: the loss of each update, and what the validation says at the end."""
    size, device = prepared.tokenizers.target.size, torch.device("cpu")
    ours = made(config, size)
    model: nn.Module = ours
    loss: Callable[[Batch], Tensor] = lambda batch: loss_of(ours, batch, SMOOTHING)[0] / batch.tokens  # noqa: E731
    if path == "plain":
        model = plain = PlainTransformer(size)
        alike(plain)
        with torch.no_grad():
            for theirs, own in pairs_of(plain, ours):
                theirs.copy_(own)
        loss = plain.loss
    optimizer = make_optimizer(model, config.train)
    precision = {"plain": "", "bfloat16": "bfloat16"}.get(path, "float32")
    order, losses = Order(prepared.train, config.train.batch_tokens, config.train.seed), []
    torch.manual_seed(2 if path == "other" else 1)
    for step in range(1, config.train.steps + 1):
        batch = order.update(*divmod(step - 1, order.updates(0)))[0]
        with whole_update(precision, device):
            with matrix_products(precision, device):
                value = loss(batch)
            value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
    if path == "plain":
        with torch.no_grad():
            for theirs, own in pairs_of(plain, ours):
                own.copy_(theirs)
    return {"losses": losses, **Validation(config, prepared.tokenizers, device).scores(ours)}


def draw(found: dict[str, dict[str, list[float]]], place: Path) -> None:
    """The curves, each point the mean of some updates."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, each), style in zip(found.items(), ("-", "--", ":", "-."), strict=True):
        means = torch.tensor(each["losses"]).unfold(0, SPAN, SPAN).mean(1)
        axes.plot([SPAN * (index + 0.5) for index in range(len(means))], means, style, label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (nats a target token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(place, dpi=150)


def main() -> None:
    """Train what is not there yet, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.* and val.*")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for results and the picture")
    parser.add_argument("--steps", type=int, default=800, help="updates of 4,096 tokens (default 800)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed(1 << 30)
    config = settings(arguments.data, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    get = partial(prepare, config, arguments.out)
    found = {}
    for name, path in PATHS.items():
        place = arguments.out / f"{path}-{arguments.steps}.json"
        if not place.is_file():
            place.write_text(json.dumps(trained(path, config, get())))
        found[name] = json.loads(place.read_text())
        if not arguments.json:
            last = sum(found[name]["losses"][-100:]) / 100
            print(f"{name:<32} loss of the last 100 updates {last:.3f}, validation {found[name]['loss']:.3f} nats, "
                  f"BLEU {found[name]['bleu']:.2f}", flush=True)
    draw(found, arguments.out / "curves.png")
    if arguments.json:
        print(json.dumps({path: {key: found[name][key] for key in ("loss", "bleu")} for name, path in PATHS.items()}))


if __name__ == "__main__":
    main()
