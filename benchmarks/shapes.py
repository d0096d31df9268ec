"""How many shapes of matrix products does a training in bfloat16 have, and how many must oneDNN keep its programs for?

    python benchmarks/shapes.py --data FOLDER [--updates 240] [--only NAME …] [--kept 128 512 1024] [--json]

FOLDER holds train.en and train.de (docs/data.md says how to get them). oneDNN makes a program for each shape of a
product, some milliseconds, and keeps those that it used last. No processor with bfloat16 is needed: those products are
noted in place of being made, and give zeros. For the models of families.py it counts the products of an update, their
shapes in all, and how many of a later update's, from half of the updates on, would not be among the last so many kept
(`PRODUCTS_KEPT` in regard/training/precision.py).
"""

import argparse
import json
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common import Contestant, batches_of
from families import FAMILIES, config_of
from regard.data.shards import prepare
from regard.errors import RegardError
from regard.model.seq2seq import build_model

OF_LEFT = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
OF_ROWS = {torch.ops.mkldnn._linear_pointwise}


class Noted(TorchDispatchMode):
    """Notes what each product is of, and gives zeros in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Hashable] = []

    def __torch_dispatch__(
        self, operation: Any, kinds: Sequence[type], given: Sequence[Any] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """What a call of torch gives."""
        named, packet = named or {}, operation.overloadpacket
        tensors = [each for each in given if isinstance(each, Tensor)]
        if packet not in OF_LEFT | OF_ROWS or tensors[-1].dtype != torch.bfloat16:
            return operation(*given, **named)
        self.shapes.append(tuple((each.dtype, each.shape, each.stride()) for each in tensors))
        if packet in OF_ROWS:
            x, weight = tensors[:2]
            return x.new_zeros(len(x), len(weight))
        if packet is torch.ops.aten.addmm_:
            return given[0].zero_()
        left, right = tensors[-2:]
        return named["out"].zero_() if "out" in named else left.new_zeros(*left.shape[:-1], right.shape[-1])


def new(shapes: Sequence[Sequence[Hashable]], kept: int) -> float:
    """How many shapes of an update, the mean of the later half, are not among the last so many that were used."""
    held: OrderedDict[Hashable, None] = OrderedDict()
    missed = [0] * len(shapes)
    for update, products in enumerate(shapes):
        for shape in products:
            missed[update] += shape not in held
            held[shape] = None
            held.move_to_end(shape)
            if len(held) > kept:
                held.popitem(last=False)
    later = missed[len(missed) // 2 :]
    return sum(later) / len(later)


def counted(data: Path, name: str, updates: int, kept: Sequence[int], watch: Callable[..., Any]) -> dict[str, float]:
    """The figures of a family."""
    config = config_of(FAMILIES[name], data)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config, Path(folder))
        batches = batches_of(prepared.train, config.train.batch_tokens, updates)
    size = prepared.tokenizers.target.size
    contestant, shapes = Contestant.ours(build_model(config.model, size, size), config.train, "bfloat16"), []
    for batch in watch(batches, description=name):
        with Noted() as noted:
            contestant.update(batch)
        shapes.append(noted.shapes)
    return {"products": sum(map(len, shapes)) / updates, "shapes": len({shape for each in shapes for shape in each}),
            **{f"new_of_{count}": new(shapes, count) for count in kept}}


def main() -> None:
    """Count, and print a table or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="holds train.en and train.de")
    parser.add_argument("--updates", type=int, default=240, help="of each model (default 240, two epochs of Multi30k)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(FAMILIES), default=list(FAMILIES),
                        help=f"some families alone, of: {'; '.join(FAMILIES)}")
    parser.add_argument("--kept", nargs="+", type=int, default=[128, 512, 1024], help="programs (default 128 512 1024)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    watch = partial(track, console=Console(stderr=True))
    try:
        found = {name: counted(options.data, name, options.updates, options.kept, watch) for name in options.only}
    except RegardError as error:
        sys.exit(str(error))
    if options.json:
        print(json.dumps(found))
        return
    print("| family | products | shapes in all |" + "".join(f" new, {count:,} kept |" for count in options.kept))
    print("|---" * (3 + len(options.kept)) + "|")
    for name, (products, shapes, *missed) in ((name, figures.values()) for name, figures in found.items()):
        print(f"| {name} | {products:.0f} | {shapes:,} |" + "".join(f" {count:.1f} |" for count in missed))


if __name__ == "__main__":
    main()
