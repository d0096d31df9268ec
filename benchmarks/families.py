"""Training speed of every family beside the plainest torch form of it, on the same batches in the same run.

    python benchmarks/families.py --data FOLDER [--threads N] [--rounds 6] [--block 10] [--only NAME ...] [--json]

FOLDER holds train.en and train.de (docs/data.md says how to get them). A plain form has the same architecture, the same
sizes, dropout and loss, and is what a person would write with torch's own modules: `nn.LSTM`, `nn.LSTMCell` in a loop,
`nn.Conv1d` with `weight_norm`, `nn.Transformer`; all logits at once in `cross_entropy`; `Adam`. The models of a family
take turns, a block of updates each, so that a machine that slows down slows all. Regard runs as its users run it
("regard", train.precision = "auto") and with float32 products ("float32"), the plain form in float32 as torch runs it;
the plain Transformer takes turns with every family ("transformer"), so that families can be held against one thing.
What counts are non-padding target tokens per second of whole updates (forward, loss, backward, clip, optimizer step),
and the ratios to the plain form's and to the plain Transformer's.

Letters in shapes: B batch, S source length, T target length, D width.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from common import SMOOTHING, Contestant, Plain, PlainTransformer, batches_of, ratios, take_turns
from regard.config import Config, parse_config
from regard.data.batches import Batch
from regard.data.shards import Prepared, prepare
from regard.errors import RegardError
from regard.model.seq2seq import build_model
from regard.training.precision import chosen

DROPOUT, WIDTH = 0.3, 256
LAYERS, KERNEL, LONGEST = 4, 3, 257
"""Of the convolutional model: layers of each side, positions that one convolution sees, places that are learned."""


def weigh(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax of scores, (B, T, S), over the real tokens of the source, mask (B, S)."""
    return torch.softmax(scores.masked_fill(~mask[:, None], -torch.inf), dim=-1)


# --- RNN -----------------------------------------------------------------------------------------------------------


class PlainRNN(Plain):
    """A bidirectional `nn.LSTM` reads; its last states, through tanh(W c + b), are where the decoder starts."""

    def __init__(self, size: int):
        super().__init__(size, WIDTH, DROPOUT)
        self.encoder = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(WIDTH, 2 * WIDTH)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """All states, (B, S, D), and the last of both directions, (B, D)."""
        x = self.dropout(self.vectors(batch.source))
        packed = pack_padded_sequence(x, batch.source_mask.sum(1), batch_first=True, enforce_sorted=False)
        states, (last, _) = self.encoder(packed)
        return pad_packed_sequence(states, batch_first=True)[0], torch.cat([last[0], last[1]], dim=-1)

    def start(self, summary: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's first hidden and cell state, each (B, D)."""
        hidden, cell = torch.tanh(self.bridge(summary)).chunk(2, dim=-1)
        return hidden.contiguous(), cell.contiguous()


class PlainInitial(PlainRNN):
    """The fixed vector starts an `nn.LSTM` over all T (Sutskever et al. 2014)."""

    def __init__(self, size: int):
        super().__init__(size)
        self.decoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def features(self, batch: Batch) -> Tensor:
        _, summary = self.encode(batch)
        hidden, cell = self.start(summary)
        states, _ = self.decoder(self.dropout(self.vectors(batch.target_in)), (hidden[None], cell[None]))
        features: Tensor = self.dropout(states)
        return features


class PlainReadout(PlainRNN):
    """Features tanh(W [context; hidden] + b) (Luong et al. 2015, eq. 5)."""

    def __init__(self, size: int):
        super().__init__(size)
        self.readout = nn.Linear(2 * WIDTH, WIDTH)

    def read(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Features, (…, D), of context and hidden state, each (…, D)."""
        return torch.tanh(self.readout(torch.cat([context, hidden], dim=-1)))


class PlainEveryStep(PlainReadout):
    """The fixed vector starts the decoder, and enters each step and the readout (Cho et al. 2014)."""

    def __init__(self, size: int):
        super().__init__(size)
        self.decoder = nn.LSTM(2 * WIDTH, WIDTH, batch_first=True)

    def features(self, batch: Batch) -> Tensor:
        _, summary = self.encode(batch)
        hidden, cell = self.start(summary)
        context = summary[:, None].expand(-1, batch.target_in.shape[1], -1)
        x = torch.cat([self.vectors(batch.target_in), context], dim=-1)
        states, _ = self.decoder(self.dropout(x), (hidden[None], cell[None]))
        features: Tensor = self.dropout(self.read(context, states))
        return features


class PlainAfter(PlainReadout):
    """`nn.LSTM` over all T, then attention of all T in one product, score query · W key (Luong et al. 2015)."""

    def __init__(self, size: int):
        super().__init__(size)
        self.decoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.score = nn.Linear(WIDTH, WIDTH, bias=False)

    def features(self, batch: Batch) -> Tensor:
        memory, summary = self.encode(batch)
        hidden, cell = self.start(summary)
        states, _ = self.decoder(self.dropout(self.vectors(batch.target_in)), (hidden[None], cell[None]))
        weights = weigh(states @ self.score(memory).transpose(1, 2), batch.source_mask)
        features: Tensor = self.dropout(self.read(weights @ memory, states))
        return features


class PlainFeeding(PlainReadout):
    """A loop over `nn.LSTMCell`: each step is told what the last attention made (Luong et al. 2015, section 3.3)."""

    def __init__(self, size: int):
        super().__init__(size)
        self.cell = nn.LSTMCell(2 * WIDTH, WIDTH)
        self.score = nn.Linear(WIDTH, WIDTH, bias=False)

    def features(self, batch: Batch) -> Tensor:
        memory, summary = self.encode(batch)
        hidden, cell = self.start(summary)
        keys = self.score(memory).transpose(1, 2)
        made, features = torch.zeros_like(hidden), []
        for token in self.vectors(batch.target_in).unbind(1):
            hidden, cell = self.cell(self.dropout(torch.cat([token, made], dim=-1)), (hidden, cell))
            weights = weigh(hidden[:, None] @ keys, batch.source_mask)
            made = self.read((weights @ memory)[:, 0], hidden)
            features.append(made)
        dropped: Tensor = self.dropout(torch.stack(features, dim=1))
        return dropped


class PlainBefore(PlainReadout):
    """A loop over `nn.LSTMCell`: the last state asks, v · tanh(W query + U key), and the context enters the cell
    (Bahdanau et al. 2015)."""

    def __init__(self, size: int):
        super().__init__(size)
        self.cell = nn.LSTMCell(2 * WIDTH, WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, 1, bias=False)

    def features(self, batch: Batch) -> Tensor:
        memory, summary = self.encode(batch)
        hidden, cell = self.start(summary)
        keys = self.key(memory)
        states, contexts = [], []
        for token in self.vectors(batch.target_in).unbind(1):
            scores = self.v(torch.tanh(self.query(hidden)[:, None] + keys)).transpose(1, 2)  # (B, 1, S)
            context = (weigh(scores, batch.source_mask) @ memory)[:, 0]
            hidden, cell = self.cell(self.dropout(torch.cat([token, context], dim=-1)), (hidden, cell))
            states.append(hidden)
            contexts.append(context)
        features: Tensor = self.dropout(self.read(torch.stack(contexts, dim=1), torch.stack(states, dim=1)))
        return features


# --- convolutions --------------------------------------------------------------------------------------------------


class PlainConv(Plain):
    """`nn.Conv1d` and gated linear units, weight norm, learned positions, attention in each decoder layer (Gehring et
    al. 2017)."""

    def __init__(self, size: int):
        super().__init__(size, WIDTH, DROPOUT)
        self.source_places, self.target_places = nn.Embedding(LONGEST, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.encoder = nn.ModuleList(convolution(KERNEL // 2) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(convolution(KERNEL - 1) for _ in range(LAYERS))
        self.query = nn.ModuleList(weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(LAYERS))
        self.maps = nn.ModuleDict({f"{side}_{end}": weight_norm(nn.Linear(WIDTH, WIDTH))
                                   for side in ("encoder", "decoder") for end in ("enter", "leave")})

    def embed(self, tokens: Tensor, places: nn.Embedding) -> Tensor:
        """Token vectors with positions."""
        vectors: Tensor = self.dropout(self.vectors(tokens) + places.weight[: tokens.shape[1]])
        return vectors

    def convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One convolution and its gate, (B, T, D) -> (B, T, D), its padding to the right cut off."""
        convolved = layer(self.dropout(x).transpose(1, 2))[:, :, : x.shape[1]]
        return nn.functional.glu(convolved, dim=1).transpose(1, 2)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys z and values (z + e) √½, each (B, S, D)."""
        padding = ~batch.source_mask[:, :, None]
        embedded = self.embed(batch.source, self.source_places)
        x = self.maps["encoder_enter"](embedded)
        for layer in self.encoder:
            x = (self.convolve(layer, x.masked_fill(padding, 0.0)) + x) * math.sqrt(0.5)
        keys = self.maps["encoder_leave"](x)
        return keys, (keys + embedded) * math.sqrt(0.5)

    def features(self, batch: Batch) -> Tensor:
        keys, values = self.encode(batch)
        root = batch.source_mask.sum(1)[:, None, None].sqrt()
        embedded = self.embed(batch.target_in, self.target_places)
        x = self.maps["decoder_enter"](embedded)
        for layer, query in zip(self.decoder, self.query, strict=True):
            hidden = self.convolve(layer, x)
            asked = (query(hidden) + embedded) * math.sqrt(0.5)
            context = weigh(asked @ keys.transpose(1, 2), batch.source_mask) @ values
            x = ((hidden + context * root) * math.sqrt(0.5) + x) * math.sqrt(0.5)
        features: Tensor = self.dropout(self.maps["decoder_leave"](x))
        return features


def convolution(padding: int) -> nn.Module:
    """D -> 2D channels, the second half for the gate; so many zeros on both sides."""
    normed: nn.Module = weight_norm(nn.Conv1d(WIDTH, 2 * WIDTH, KERNEL, padding=padding))
    return normed


# --- the families --------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A plain model by its vocabulary's size, and the [model] section of the same architecture."""

    plain: Callable[[int], Plain]
    model: dict[str, Any]


RNN = {"kind": "rnn", "cell": "lstm", "layers": 1, "width": WIDTH, "dropout": DROPOUT, "tie": "all"}
FAMILIES = {
    "fixed, initial": Family(PlainInitial, RNN),
    "fixed, every step": Family(PlainEveryStep, RNN | {"context": "every_step"}),
    "after, general": Family(PlainAfter, RNN | {"attention": "after", "score": "general"}),
    "after, general, input feeding": Family(PlainFeeding, RNN | {
        "attention": "after", "score": "general", "input_feeding": True}),
    "before, additive": Family(PlainBefore, RNN | {"attention": "before", "score": "additive"}),
    "conv": Family(PlainConv, {
        "kind": "conv", "layers": LAYERS, "width": WIDTH, "kernel": KERNEL, "max_positions": LONGEST,
        "dropout": DROPOUT, "tie": "all"}),
    "transformer": Family(PlainTransformer, {
        "kind": "transformer", "layers": 4, "width": 128, "heads": 4, "feedforward": 256, "norm": "post",
        "dropout": DROPOUT, "attention_dropout": DROPOUT, "feedforward_dropout": DROPOUT, "tie": "all"}),
}


RATIOS = {"ratio": ("regard", "plain"), "ratio_float32": ("float32", "plain"),
          "ratio_transformer": ("regard", "transformer")}
"""Whose speed is held against whose."""


def config_of(family: Family, data: Path) -> Config:
    """The config of a family's training."""
    return parse_config({
        "data": {"root": str(data.resolve()), "train": [{"source": "train.en", "target": "train.de"}],
                 "valid": {"source": "train.en", "target": "train.de"}},
        "tokenizer": {"kind": "bpe", "size": 8000, "shared": True},
        "model": family.model,
        "train": {"batch_tokens": 4096, "label_smoothing": SMOOTHING},
        "decode": {"max_source_tokens": LONGEST - 1},
    }, "the benchmark", Path.cwd())


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(weights.numel() for weights in model.parameters())


def measure(name: str, config: Config, size: int, batches: Sequence[Batch], rounds: int, block: int) -> dict[str, Any]:
    """What is found out about a family, as numbers of a JSON object."""
    ours, plain = partial(build_model, config.model, size, size), partial(FAMILIES[name].plain, size)
    contestants = {
        "regard": lambda: Contestant.ours(ours(), config.train, chosen(config.train, torch.device("cpu"))[0]),
        "float32": lambda: Contestant.ours(ours(), config.train, "float32"),
        "plain": lambda: Contestant.plain(plain(), torch.optim.Adam),
        "transformer": lambda: Contestant.plain(PlainTransformer(size), torch.optim.Adam)}
    if name == "transformer":
        del contestants["transformer"]
    speeds = take_turns(contestants, batches, rounds, block, f"{name}: ")
    speeds.setdefault("transformer", speeds["plain"])
    with torch.device("meta"):
        found: dict[str, Any] = {"parameters": parameters(ours()), "plain_parameters": parameters(plain())}
    found |= {f"{each}_tokens_per_second": statistics.median(values) for each, values in speeds.items()}
    for title, pair in RATIOS.items():
        found[title], found[f"{title}_min"], found[f"{title}_max"] = ratios(speeds, *pair)
    return found


def measure_all(data: Path, names: Sequence[str], rounds: int, block: int, warmup: int) -> dict[str, Any]:
    """The numbers of each family by name, over the same batches."""
    configs = {name: config_of(FAMILIES[name], data) for name in names}
    first = configs[names[0]]
    with tempfile.TemporaryDirectory() as folder:
        prepared: Prepared = prepare(first, Path(folder), lambda line: print(line, file=sys.stderr))
        batches = batches_of(prepared.train, first.train.batch_tokens, warmup + rounds * block)
        size = prepared.tokenizers.target.size
    return {name: measure(name, config, size, batches, rounds, block) for name, config in configs.items()}


def table(families: dict[str, Any]) -> Iterator[str]:
    """The speeds as a Markdown table: tokens per second, and ratios: median (least to greatest of a round)."""
    yield ("| family | parameters (plain) | plain tok/s | Regard tok/s | to plain | Regard float32 tok/s | to plain | "
           "plain Transformer tok/s | Regard to it |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, found in families.items():
        cells = [f"{found['parameters']:,} ({found['plain_parameters']:,})",
                 f"{found['plain_tokens_per_second']:,.0f}"]
        for speed, title in (("regard", "ratio"), ("float32", "ratio_float32"), ("transformer", "ratio_transformer")):
            least, most = found[f"{title}_min"], found[f"{title}_max"]
            cells += [f"{found[f'{speed}_tokens_per_second']:,.0f}", f"{found[title]:.2f} ({least:.2f} to {most:.2f})"]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.en and train.de")
    parser.add_argument("--rounds", type=int, default=6, help="blocks of each model (default 6)")
    parser.add_argument("--block", type=int, default=10, help="updates in a block (default 10)")
    parser.add_argument("--warmup", type=int, default=15, help="updates before the first block (default 15)")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(FAMILIES), default=list(FAMILIES),
                        help=f"some families alone, of: {'; '.join(FAMILIES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        families = measure_all(options.data, options.only, options.rounds, options.block, options.warmup)
    except RegardError as error:
        raise SystemExit(str(error)) from None
    precision, _ = chosen(config_of(FAMILIES["transformer"], options.data).train, torch.device("cpu"))
    result = {"precision": precision, "threads": torch.get_num_threads(), "torch": torch.__version__,
              "rounds": options.rounds, "block": options.block, "families": families}
    print(json.dumps(result) if options.json else "\n".join(table(families)))


if __name__ == "__main__":
    main()
