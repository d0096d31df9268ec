"""What a training will take, before it begins: parameters, arithmetic, memory and time.

What happens on this machine is measured: a few updates are made, as training makes them, and thrown away. What would
happen on GPUs that are not here is computed from the model's own arithmetic and what such a GPU can do at most.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.config import Config
from regard.config_model import AnyModelConfig
from regard.data.batches import Batch, Order
from regard.data.shards import Prepared
from regard.decode.search import Limits, greedy
from regard.errors import ConfigError
from regard.heap import keep_freed
from regard.model.layers import Embedding
from regard.model.seq2seq import Seq2Seq, build_model
from regard.training import device as machine
from regard.training.gradients import Gradients, largest
from regard.training.optimizer import freeze, make_optimizer
from regard.training.precision import chosen
from regard.training.standing import Standing
from regard.training.validation import Validation

Say = Callable[[str], object]


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, as its maker describes it.

    Attributes:
        teraflops: dense bfloat16 matrix products, 10¹² floating-point operations a second, at most.
        gigabytes: of memory, 10⁹ bytes.
    """

    teraflops: float
    gigabytes: float


GPUS = {
    "rtx4090": GPU(165, 24),
    "l4": GPU(121, 24),
    "a100": GPU(312, 80),
    "h100": GPU(989, 80),
    "h200": GPU(989, 141),
    "b200": GPU(2250, 180),
}
UTILISATION = 0.3
"""Share of a GPU's peak that a training of sequences of unlike lengths is assumed to reach."""
HEAP_GROWS, HEAP_SEEN = 300, 24
"""For so many updates freed pieces of unlike sizes leave new holes in the heap of a processor's memory, about as many
in each doubling of the updates made; and how many updates it takes to see how many (docs/log.md, 2026-11-29)."""


@dataclass(frozen=True)
class Forecast:
    """What a training will take.

    Attributes:
        parameters, encoder, decoder, embeddings: numbers that the model has, and where; what is shared counts once.
        updates, epochs, source_tokens, target_tokens: of the whole training; real tokens, </s> included.
        operations: floating-point operations of an average update, forward and backward.
        precision: what matrices are multiplied in on this machine.
        update_seconds: of an average update on this machine.
        validation_seconds: of one validation, the output as long as the references.
        seconds: of the whole training on this machine, validations included.
        memory: bytes that the process takes at most on this machine; on a GPU, bytes of its memory.
        activations: bytes that the largest batch keeps for its gradient.
    """

    parameters: int
    encoder: int
    decoder: int
    embeddings: int
    updates: int
    epochs: float
    source_tokens: int
    target_tokens: int
    operations: float
    precision: str
    update_seconds: float
    validation_seconds: float
    seconds: float
    memory: int
    activations: int

    def on(self, gpu: GPU, count: int, utilisation: float = UTILISATION) -> dict[str, float]:
        """The same training on GPUs: seconds, and bytes of memory of each with and without sharding its state.

        A batch is shared among them, weights and the optimizer's averages are on each (DDP) or shared too (FSDP).
        """
        state = 4 * 4 * self.parameters + 2 * self.parameters  # weights, gradient, two averages; weights in bfloat16
        batch = self.activations / count
        rate = count * gpu.teraflops * 1e12 * utilisation
        return {"seconds": self.operations * self.updates / rate, "memory": state + batch,
                "memory_sharded": state / count + batch}

    def figures(self) -> dict[str, Any]:
        """All of it by name, as JSON takes it."""
        return asdict(self)


def matrices(part: nn.Module) -> int:
    """Weights of a part's matrices that every token is multiplied with; tables of tokens and positions are only looked
    up."""
    tables = {id(each.weight) for each in part.modules() if isinstance(each, Embedding)}
    return sum(each.numel() for name, each in part.named_parameters()
               if each.dim() > 1 and id(each) not in tables and not name.startswith("positions."))


def operations(model: Seq2Seq, config: AnyModelConfig, source: float, target: float, length: float) -> float:
    """Floating-point operations of an update: two for each weight of a matrix and each token in the forward pass, twice
    as many backward (Kaplan et al. 2020, section 2.1), and as many again for what attention compares.

    Args:
        model: whose matrices are counted.
        config: its settings.
        source: tokens of the sources.
        target: tokens of the targets.
        length: tokens of an average sentence, what each query is compared with.
    """
    products = matrices(model.encoder) * source + (matrices(model.decoder) + model.output.numel()) * target
    looks = attentions(config.decoder) * config.decoder.width * target
    if config.encoder.kind == "transformer":
        looks += config.encoder.layers * config.encoder.width * source
    return 6 * products + 12 * looks * length


def attentions(decoder: Any) -> int:
    """How many times a decoder looks at the source or at itself for one token."""
    return {"transformer": 2 * decoder.layers, "conv": decoder.layers}.get(decoder.kind) or int(
        decoder.attention != "none")


def forecast(config: Config, prepared: Prepared, seconds: float, say: Say) -> Forecast:
    """Measure on this machine for so many seconds, and compute the rest.

    Raises:
        RunError: memory does not hold a single pair, or the device or precision asked for is not here.
    """
    settings, device = config.train, machine.pick_device(config.train.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed(1 << 30)
    torch.manual_seed(settings.seed)
    source, target = prepared.tokenizers
    model = build_model(config.model, source.size, target.size).to(device)
    freeze(model, settings.freeze)
    pieces = 1 if settings.accumulate == "auto" else settings.accumulate
    order = Order(prepared.train, settings.batch_tokens, settings.seed, pieces)
    precision, _ = chosen(settings, device)
    gradients = Gradients(model, settings, precision, Standing(), say)
    machine.reset_peak(device)
    with saved_bytes() as saved:
        gradients.add([largest(order)])
    gradients.forget()
    say(f"measuring updates for {seconds:.0f} seconds, up to {3 * seconds:.0f} where they are slow …")
    update, peaks = measured_updates(model, config, gradients, order, seconds)
    validation = measured_validation(model, config, prepared, device)
    memory = machine.peak_memory(device) + (growth(peaks, settings.steps) if device.type == "cpu" else 0)
    rows, *tokens = order.sums(0)
    means = [count / order.updates(0) for count in tokens]
    whole = settings.steps * update + -(-settings.steps // settings.validate_every) * validation
    return Forecast(
        **parameters(model), updates=settings.steps, epochs=settings.steps / order.updates(0),
        source_tokens=round(settings.steps * means[0]), target_tokens=round(settings.steps * means[1]),
        operations=operations(model, config.model, means[0], means[1], sum(tokens) / 2 / rows),
        precision=precision, update_seconds=update, validation_seconds=validation,
        seconds=min(whole, 60 * settings.minutes) if settings.minutes else whole,
        memory=memory, activations=sum(saved.values()))


def parameters(model: Seq2Seq) -> dict[str, int]:
    """How many numbers a model has, and where; what is shared counts once, among the embeddings."""
    sizes = {id(each): each.numel() for each in model.parameters()}
    tables = {id(each.weight) for each in model.modules() if isinstance(each, Embedding)} | {id(model.output)}
    parts = {name: sum(each.numel() for each in part.parameters() if id(each) not in tables)
             for name, part in (("encoder", model.encoder), ("decoder", model.decoder))}
    return {"parameters": sum(sizes.values()), **parts, "embeddings": sum(sizes[each] for each in tables)}


def measured_updates(
    model: Seq2Seq, config: Config, gradients: Gradients, order: Order, seconds: float
) -> tuple[float, list[int]]:
    """Seconds of an update, the mean over as many as fit into the time, of which the first ones only warm up; and the
    most memory, in bytes, that there was up to each. Where the time is short for `HEAP_SEEN`, it takes up to three
    times as long."""
    optimizer = make_optimizer(model, config.train)
    times: list[float] = []
    peaks: list[int] = []
    begin, position = time.perf_counter(), 0
    while len(times) < 3 or (spent := time.perf_counter() - begin) < seconds or (
            spent < 3 * seconds and len(peaks) < HEAP_SEEN):
        start = time.perf_counter()
        batches = order.update(0, position % order.updates(0))
        gradients.add(batches)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-6  # the model must not become another one, whose output is shorter
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        position += 1
        if position > 2:
            times.append(time.perf_counter() - start)
        peaks.append(machine.peak_memory(gradients.device))
    return statistics.mean(times), peaks


def growth(peaks: Sequence[int], updates: int) -> int:
    """By how many bytes the heap will still grow until so many updates are made, from how it has grown."""
    each = (peaks[-1] - peaks[0]) / math.log2(len(peaks))  # doubling of the updates
    return round(each * math.log2(max(1.0, min(updates, HEAP_GROWS) / len(peaks))))


def measured_validation(model: Seq2Seq, config: Config, prepared: Prepared, device: torch.device) -> float:
    """Seconds of one validation, from one of its batches; outputs are held to the length of the references, since a
    model that has not learned does not end them."""
    validation = Validation(config, prepared.tokenizers, device)
    batches = list(validation.batches())
    rows = batches[len(batches) // 2]
    batch = Batch.of([validation.sources[row] for row in rows], [validation.targets[row] for row in rows]).to(device)
    model.eval()
    start = time.perf_counter()
    with torch.no_grad():
        model(batch)
        if config.train.metric != "loss":
            length = round(batch.tokens / len(rows))
            greedy(model, batch, Limits(length, least=length))
    return (time.perf_counter() - start) * len(validation.pairs) / len(rows)


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Collects what autograd keeps for the backward pass: bytes by storage; parameters are not counted."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def gpu_named(name: str) -> GPU:
    """A kind of GPU by its name.

    Raises:
        ConfigError: it is not known.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: known are {', '.join(GPUS)}. Any other is described with --teraflops and "
                          "--gigabytes")
    return GPUS[name.lower()]

