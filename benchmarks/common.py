"""What the benchmarks of training speed share: plain models, whole updates, and turns in blocks."""

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from regard.config_train import TrainConfig
from regard.data.batches import Batch, Order
from regard.data.shards import Corpus
from regard.heap import keep_freed
from regard.model.positions import Sinusoidal
from regard.model.seq2seq import Seq2Seq
from regard.text.tokenizer import PAD
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer
from regard.training.precision import matrix_products, whole_update

SMOOTHING = 0.1
CPU = torch.device("cpu")


class Plain(nn.Module):
    """What the plain models of all families share: one embedding for all, and the loss over all logits.

    Args:
        size: V, entries of the vocabulary.
        width: D, size of a token vector.
        dropout: share of values dropped in training.
    """

    def __init__(self, size: int, width: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(size, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.scale = math.sqrt(width)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Token vectors, float (B, T, D), of tokens, int64 (B, T)."""
        vectors: Tensor = self.embedding(tokens)
        return vectors * self.scale

    def features(self, batch: Batch) -> Tensor:
        """What the logits are made of, float (B, T, D)."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """The label-smoothed cross-entropy of a batch, per real target token."""
        logits = self.features(batch) @ self.embedding.weight.T
        targets = batch.target_out.masked_fill(~batch.target_mask, -100)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING)


class PlainTransformer(Plain):
    """What the torch tutorial would write: `nn.Transformer`, so many layers on each side."""

    def __init__(self, size: int, width: int = 128, dropout: float = 0.3, layers: int = 4, heads: int = 4,
                 feedforward: int = 256):
        super().__init__(size, width, dropout)
        self.positions = Sinusoidal(width)
        self.transformer = nn.Transformer(width, heads, layers, layers, feedforward, dropout, batch_first=True)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token vectors with positions."""
        vectors: Tensor = self.dropout(self.positions(self.vectors(tokens)))
        return vectors

    def features(self, batch: Batch) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(
            batch.target_in.shape[1], device=batch.source.device).isinf()
        padding = ~batch.source_mask
        features: Tensor = self.transformer(
            self.embed(batch.source), self.embed(batch.target_in), tgt_mask=causal, src_key_padding_mask=padding,
            tgt_key_padding_mask=~batch.target_mask, memory_key_padding_mask=padding, tgt_is_causal=True,
        )
        return features


@dataclass(frozen=True)
class Contestant:
    """A model in training.

    Attributes:
        loss: of a batch, per real target token.
        precision: of products, "float32" or "bfloat16"; empty: torch does as it does.
    """

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer
    precision: str = ""

    @classmethod
    def ours(cls, model: Seq2Seq, settings: TrainConfig, precision: str) -> "Contestant":
        """A model of Regard's, trained as Regard does."""
        keep_freed(1 << 30)
        return cls(model, lambda batch: loss_of(model, batch, SMOOTHING)[0] / batch.tokens,
                   make_optimizer(model, settings), precision)

    @classmethod
    def plain(cls, model: Plain, optimizer: type[torch.optim.Optimizer], precision: str = "") -> "Contestant":
        """A plain model, trained as torch does without being told, or only told to multiply in bfloat16."""
        return cls(model, model.loss, optimizer(model.parameters(), lr=1e-3), precision)  # type: ignore[call-arg]

    def update(self, batch: Batch) -> None:
        """One whole update: forward, loss, backward, clip, optimizer step."""
        device = next(self.model.parameters()).device
        with whole_update(self.precision, device):
            with matrix_products(self.precision, device):
                loss = self.loss(batch.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def speed(self, batches: Sequence[Batch]) -> float:
        """Real target tokens per second over an update on each of the batches."""
        start = time.perf_counter()
        for batch in batches:
            self.update(batch)
        next(self.model.parameters()).flatten()[0].item()  # a GPU has made the last update too
        return sum(batch.tokens for batch in batches) / max(time.perf_counter() - start, 1e-9)


def batches_of(corpus: Corpus, batch_tokens: int, count: int) -> list[Batch]:
    """The first batches of a training, epoch after epoch."""
    order = Order(corpus, batch_tokens, seed=1)
    places = (divmod(number, order.updates(0)) for number in range(count))
    return [order.update(epoch, position)[0] for epoch, position in places]


def peak(kind: torch.dtype, device: torch.device = CPU, seconds: float = 2.0) -> float:
    """Operations a second that square matrices of this type are multiplied with, 2,048 or, by a GPU, 8,192 wide."""
    size = 2048 if device == CPU else 8192
    a, times = torch.randn(size, size, device=device).to(kind), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()  # by which a GPU is waited for
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


Make = Callable[[], Contestant]
"""What makes a contestant, in the process that it is timed in."""


Ask = Callable[[int, int], float]
"""Gives a contestant's speed over the batches from the first to before the last."""


@contextmanager
def beside(make: Make, batches: Sequence[Batch]) -> Iterator[Ask]:
    """A contestant in this process."""
    torch.manual_seed(1)
    contestant = make()
    yield lambda first, last: contestant.speed(batches[first:last])


@contextmanager
def apart(make: Make, batches: Sequence[Batch]) -> Iterator[Ask]:
    """A contestant in a process of its own, with the memory settings that its users have."""
    forks = multiprocessing.get_context("fork")  # the batches are there already, and no thread is
    pipe, theirs = forks.Pipe()
    forks.Process(target=serve, args=(theirs, make, batches), daemon=True).start()
    theirs.close()

    def ask(first: int, last: int) -> float:
        pipe.send((first, last))
        speed: float = pipe.recv()
        return speed

    yield ask
    pipe.send(None)


def serve(pipe: Connection, make: Make, batches: Sequence[Batch]) -> None:
    """Answer each pair (first, last) with the speed over those batches, until None comes."""
    with beside(make, batches) as ask:
        while (block := pipe.recv()) is not None:
            pipe.send(ask(*block))


def take_turns(contestants: Mapping[str, Make], batches: Sequence[Batch], rounds: int, block: int,
               title: str = "", device: torch.device = CPU) -> dict[str, list[float]]:
    """Tokens per second of each block of updates, for each contestant.

    Args:
        contestants: by name; they take turns, a block each.
        batches: what is left of them after the blocks comes first, untimed.
        rounds: blocks of each contestant.
        block: updates in a block.
        title: begins each line of progress.
        device: where they are; those of a GPU share this process.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    lives, warmup = apart if device == CPU else beside, len(batches) - rounds * block
    with ExitStack() as stack:
        asks = {name: stack.enter_context(lives(make, batches)) for name, make in contestants.items()}
        for number in range(rounds + 1):
            for name, ask in asks.items():
                speed = ask(*(0, warmup) if number == 0 else (warmup + (number - 1) * block, warmup + number * block))
                if number:
                    speeds[name].append(speed)
                    print(f"{title}round {number}/{rounds}  {name:<11} {speed:>8,.0f} tokens/s", file=sys.stderr)
    return speeds


def ratios(speeds: Mapping[str, Sequence[float]], name: str, other: str = "plain") -> tuple[float, float, float]:
    """A contestant's speed over another's, of the blocks of each round: the median, the least, the greatest."""
    each = [ours / theirs for ours, theirs in zip(speeds[name], speeds[other], strict=True)]
    return statistics.median(each), min(each), max(each)
