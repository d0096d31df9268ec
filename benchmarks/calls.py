"""What calls of torch cost an update: one of a Transformer so small that arithmetic costs nothing.

    python benchmarks/calls.py [--precision bfloat16] [--threads 2] [--json]

4 + 4 layers as in Transformer-tiny, but 8 wide, 64 tokens, batches of two short sentences, and rows in multiples of 16
in bfloat16 too, so that products are small. Milliseconds of each part of an update, the median of many, and how many
operations it asks torch for (those inside others not counted).
"""

import argparse
import json
import statistics
import time
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from regard.config_model import TransformerConfig
from regard.config_train import TrainConfig
from regard.data.batches import Batch
from regard.heap import keep_freed
from regard.model import rows
from regard.model.seq2seq import Seq2Seq, build_model
from regard.training.objective import loss_of
from regard.training.optimizer import make_optimizer
from regard.training.precision import matrix_products, whole_update

SIZE, CPU = 64, torch.device("cpu")
MODEL = TransformerConfig(
    kind="transformer", width=8, layers=4, heads=4, feedforward=16, norm="post", tie="all", dropout=0.3,
    attention_dropout=0.3, feedforward_dropout=0.3)


def batches(count: int) -> list[Batch]:
    """Two sentences each way, 5 to 9 tokens long."""
    draw = torch.Generator().manual_seed(1)

    def sentence() -> list[int]:
        length = int(torch.randint(5, 10, (), generator=draw))
        return [int(token) for token in torch.randint(4, SIZE, (length,), generator=draw)]

    return [Batch.of(*([sentence() for _ in range(2)] for _ in range(2))) for _ in range(count)]


def update(model: Seq2Seq, optimizer: torch.optim.Optimizer, batch: Batch, precision: str) -> list[float]:
    """Milliseconds of forward pass and loss, backward pass, clipping and step."""
    times = [time.perf_counter()]
    with whole_update(precision, CPU):
        with matrix_products(precision, CPU):
            loss = loss_of(model, batch, 0.1)[0] / batch.tokens
        times.append(time.perf_counter())
        loss.backward()  # type: ignore[no-untyped-call]
    times.append(time.perf_counter())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in pairwise(times)]


def operation(event: FunctionEvent | None) -> bool:
    """Whether what a profiler saw is an operation of torch; not an autograd node or a function of ours."""
    return event is not None and event.name.startswith("aten::")


def main() -> None:
    """Measure, and print a line or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of products (default bfloat16, also where the hardware has none)")
    parser.add_argument("--updates", type=int, default=300, help="that are timed (default 300)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed(1 << 30)
    rows.ROWS = rows.POSITIONS
    torch.manual_seed(1)
    model = build_model(MODEL, SIZE, SIZE).train()
    optimizer, some = make_optimizer(model, TrainConfig()), batches(40)
    times = [update(model, optimizer, some[number % len(some)], arguments.precision)
             for number in range(arguments.updates + 20)][20:]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for batch in some:
            update(model, optimizer, batch, arguments.precision)
    asked = sum(operation(each) and not operation(each.cpu_parent) for each in seen.events()) / len(some)
    names = ("forward_and_loss", "backward", "clip_and_step")
    result = {"precision": arguments.precision, "threads": arguments.threads, "torch": torch.__version__, **{
        f"{name}_ms": statistics.median(each) for name, each in zip(names, zip(*times, strict=True), strict=True)},
        "update_ms": statistics.median(map(sum, times)), "operations": asked}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(", ".join(f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in result.items()))


if __name__ == "__main__":
    main()
