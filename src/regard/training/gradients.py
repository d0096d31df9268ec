"""The gradient of one update, computed in as many pieces as memory and the processes that share it need."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from regard.config_train import TrainConfig
from regard.data.batches import Batch, Order
from regard.errors import RunError
from regard.model.seq2seq import Seq2Seq
from regard.training import device as machine
from regard.training.cluster import Cluster
from regard.training.objective import Guide, loss_of
from regard.training.optimizer import learning
from regard.training.precision import matrix_products, whole_update
from regard.training.r_drop import r_drop_loss_of
from regard.training.standing import Standing

SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of the free memory, how much a training may plan with: other processes and other batches need some too."""


class Gradients:
    """Adds the gradient of an update to a model's weights.

    The loss is normalised by all real target tokens of the update, whoever computes them, so that pieces change the
    gradient by rounding alone. What is drawn (dropout) is a function of the seed, the step and the number of the piece.
    A batch that memory does not hold is halved, as often as it takes, and draws other dropout; no sentence is left out.

    Args:
        model: on its device.
        settings: of the training.
        precision: of matrix products, "float32" or "bfloat16".
        standing: where the training stands; it remembers which batches are too large, so that a training that goes on
            later halves the same ones.
        say: tells a person.
        cluster: the processes that share an update; default: this one alone.
    """

    def __init__(
        self, model: Seq2Seq, settings: TrainConfig, precision: str, standing: Standing, say: Callable[[str], object],
        cluster: Cluster | None = None
    ):
        self.model, self.settings, self.precision, self.standing, self.say = model, settings, precision, standing, say
        self.device, self.guide = model.output.device, Guide.of(model, settings)
        self.cluster = cluster or Cluster(0, 1, self.device)
        self.sharded = settings.shard and self.cluster.size > 1

    def add(self, batches: Sequence[Batch], tokens: int | None = None, pieces: int | None = None) -> Tensor:
        """The gradient of an update, into weights that have none yet.

        Args:
            batches: the pieces that this process computes.
            tokens: real target tokens of all pieces; default: of these.
            pieces: how many there are in all; default: these.

        Returns:
            the cross-entropy of all pieces without smoothing, summed, nats; a scalar.

        Raises:
            RunError: memory does not hold a single pair, or another process has ended.
        """
        tokens = tokens or sum(batch.tokens for batch in batches)
        self.model.train()
        while isinstance(found := self.all_of(batches, tokens), Refusal):
            self.make_room(found)
        if self.sharded:  # the gradient has been summed on its way back
            self.keep_step(-(-(pieces or 0) // self.cluster.size) - len(batches))
            return self.cluster.sum(sum(found, self.nothing()))
        if self.settings.deterministic:
            return self.put(self.cluster.sum_in_order(found, pieces or len(batches)))
        if self.cluster.size > 1:
            return self.put(self.cluster.sum(self.taken(sum(found, self.nothing()))))
        return found[0] if len(found) == 1 else sum(found, self.nothing())

    def all_of(self, batches: Sequence[Batch], tokens: int) -> "list[Tensor] | Refusal":
        """Go through all batches: the cross-entropy of each, or where memory ended. In the deterministic mode its
        gradient comes with it, and is not left in the weights."""
        found = []
        for index, batch in enumerate(batches):
            machine.seed(self.settings.seed, self.standing.step, self.cluster.rank + index * self.cluster.size)
            total, refusal = self.attempt(list(self.parted(batch)), tokens)
            if refusal is not None:
                return refusal
            found.append(self.taken(total) if self.settings.deterministic else total)
        return found

    def taken(self, total: Tensor) -> Tensor:
        """The gradient of all weights that learn, and a sum behind it, as one row; the weights are left without."""
        parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in learning(self.model).values()]
        row = torch.cat([*(each.flatten() for each in parts), total[None]])
        self.model.zero_grad(set_to_none=True)
        return row

    def put(self, row: Tensor) -> Tensor:
        """Give the weights their part of a row that `taken` made; the sum behind it."""
        weights = list(learning(self.model).values())
        for each, part in zip(weights, torch.split(row[:-1], [each.numel() for each in weights]), strict=True):
            each.grad = part.view_as(each)
        return row[-1]

    def attempt(self, pieces: Sequence[Batch], tokens: int) -> tuple[Tensor, "Refusal | None"]:
        """Go through all pieces: their cross-entropy, and where it ended if memory did not hold one of them."""
        total = self.nothing()
        for piece in pieces:
            try:
                surprise = self.compute(piece, tokens)
            except (RuntimeError, MemoryError) as error:
                if not machine.is_out_of_memory(error):
                    raise
                return total, Refusal(piece, (str(error).splitlines() or ["MemoryError"])[0])
            total += surprise
        return total, None

    def compute(self, piece: Batch, tokens: int) -> Tensor:
        """Add the gradient of a piece to that of the weights; its cross-entropy."""
        with whole_update(self.precision, self.device):
            with matrix_products(self.precision, self.device):
                loss, surprise = self.loss_of(piece.to(self.device))
            # Parts of weights get the mean of what all processes send back.
            share = loss * (self.cluster.size if self.sharded else 1) / tokens
            share.backward()  # type: ignore[no-untyped-call]
        return surprise

    def keep_step(self, times: int) -> None:
        """Gather weights with the processes that have so many pieces more than this one, and add nothing."""
        for _ in range(times):
            (self.loss_of(Batch.of([[]], [[]]).to(self.device))[0] * 0).backward()  # type: ignore[no-untyped-call]

    def nothing(self) -> Tensor:
        """A sum of no loss."""
        return torch.zeros((), device=self.device, dtype=self.model.output.dtype)

    def loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the settings make smaller, and the plain cross-entropy; both summed."""
        settings = self.settings
        if settings.r_drop:
            return r_drop_loss_of(
                self.model, batch, settings.r_drop, settings.label_smoothing, settings.coverage_loss, self.guide)
        return loss_of(self.model, batch, settings.label_smoothing, settings.coverage_loss, self.guide)

    def parted(self, batch: Batch) -> Iterator[Batch]:
        """The batch, in halves of halves that are not known to be too large; whole where weights are gathered, which
        all processes must do equally often."""
        too_large = None if self.sharded else self.standing.too_large
        if too_large is None or size(batch) < too_large or len(batch) == 1:
            yield batch
            return
        middle = -(-len(batch) // 2)
        for rows in (slice(0, middle), slice(middle, None)):
            yield from self.parted(some(batch, rows))

    def make_room(self, refusal: "Refusal") -> None:
        """Forget an attempt, the part of a gradient that it left too, and remember what was too large for it."""
        self.forget()
        refused = refusal.batch
        lengths = f"up to {refused.source.shape[1]} + {refused.target_in.shape[1]} tokens"
        if self.sharded:
            raise RunError(f"process {self.cluster.rank} of {self.cluster.size}: memory does not hold a batch of "
                           f"{len(refused):,} pairs of {lengths} ({refusal.reason}). With train.shard it cannot be "
                           "halved by one process alone. What was saved before is whole: raise train.accumulate "
                           f"(it is {self.settings.accumulate}), and go on")
        if len(refused) == 1:
            raise RunError(f"memory does not hold the gradient of one pair of {lengths} ({refusal.reason}). What was "
                           "saved before is whole. Lower data.max_tokens, or use a smaller model")
        if self.standing.too_large is None:
            self.say(f"Memory does not hold a batch of {len(refused):,} pairs of {lengths}: from here on, such batches "
                     "are computed in halves. The gradient is still that of the whole batch")
        self.standing.too_large = size(refused)

    def forget(self) -> None:
        """Drop all gradients, and give back the memory."""
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, order: Order) -> None:
        """Find out how large a batch memory holds, by more and more sentences of the largest; nothing else changes."""
        batch = largest(order)
        before = machine.taken_memory(self.device)
        # What the optimizer and the average of the weights take besides, from the first update on.
        copies = 3 if self.settings.ema else 2
        kept = copies * sum(each.numel() * each.element_size() for each in learning(self.model).values())
        room = SHARE[self.device.type] * (machine.free_memory(self.device) - kept)
        machine.reset_peak(self.device)
        self.model.train()
        rows, taken, too_large = 1, 0, None
        while too_large is None:
            piece, last = some(batch, slice(0, rows)), taken
            refusal = self.attempt([piece], batch.tokens)[1]
            self.forget()
            taken = machine.peak_memory(self.device) - before
            if refusal is not None:
                too_large = size(piece)
            elif rows >= len(batch):
                too_large = 2 * size(batch)  # which nobody has tried
            elif taken + 2 * (taken - last) > room:  # what twice the rows would take
                too_large = size(some(batch, slice(0, 2 * rows)))
            rows *= 2
        self.standing.too_large = too_large
        pieces = len(list(self.parted(batch)))
        self.say(f"memory: the largest batch has {len(batch):,} pairs and is computed in {pieces} "
                 f"{'piece' if pieces == 1 else 'pieces'}; {room / 2**30:.1f} GiB can be planned with")


class Refusal(NamedTuple):
    """A batch that memory did not hold, and what torch said."""

    batch: Batch
    reason: str


def largest(order: Order) -> Batch:
    """The piece of the first epoch that takes most memory: the most tokens, and among those the longest sentences."""
    source, target = order.corpus.source_lengths, order.corpus.target_lengths

    def cost(position: int) -> int:
        rows = order.rows(0, position)[0]
        length = int(source[rows].max() + target[rows].max()) + 2  # with </s> and <s>
        return len(rows) * length * length

    return order.update(0, max(range(order.updates(0)), key=cost))[0]


def size(batch: Batch) -> int:
    """Padded tokens of both sides."""
    return batch.source.numel() + batch.target_in.numel()


def some(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, padded to the longest of them alone."""
    source, target = (int(mask[rows].sum(1).max()) for mask in (batch.source_mask, batch.target_mask))
    links, (first, last, _) = batch.alignment, rows.indices(len(batch))
    if links is not None:
        links = links[(links[:, 0] >= first) & (links[:, 0] < last)] - links.new_tensor([first, 0, 0])
    return replace(
        batch, alignment=links, source=batch.source[rows, :source], source_mask=batch.source_mask[rows, :source],
        target_in=batch.target_in[rows, :target], target_out=batch.target_out[rows, :target],
        target_mask=batch.target_mask[rows, :target], tokens=int(batch.target_mask[rows].sum()))
