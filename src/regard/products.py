"""The product that search asks for most: a few features times the whole output table, again and again.

torch multiplies float32 on AMD processors without AVX-512; oneDNN, which comes with it, takes it. Alone on 2 cores
(Zen 4), 10,000 tokens, 128 wide, it is 2.8, 2.0 and 1.4 times as fast for 5, 64 and 320 rows; 256 wide 4.3, 2.1 and
1.4. Small tables gain nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ONEDNN, LARGE = "cpu" if torch._C._has_mkldnn else "nowhere", 1 << 18
"""The device whose products oneDNN makes, and from how many numbers of a table on it pays."""
BFLOAT16 = ONEDNN == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN multiplies bfloat16 on this processor; it refuses where that has not even AVX-512."""
PACKED: Any = WeakTensorKeyDictionary()


def product(x: Tensor, table: Tensor) -> Tensor:
    """x @ table.T: (…, D) and (V, D) -> (…, V); by oneDNN where no gradient is wanted.

    A table that learns is left as it is: torch's fused optimizers change weights without a sign that they have changed.
    """
    exact = x.dtype == table.dtype == torch.float32 and x.device.type == ONEDNN
    if torch.is_grad_enabled() or not exact or table.requires_grad or table.numel() < LARGE:
        return torch.nn.functional.linear(x, table)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    some = x.new_zeros(rounded(rows), width)
    some[:rows] = x.reshape(rows, width)
    made: Tensor = torch.ops.mkldnn._linear_pointwise(some, packed(table), None, "none", [], "")
    return made[:rows].view(*x.shape[:-1], len(table))


def rounded(rows: int) -> int:
    """So many rows or a few more: a power of two up to 16, then a multiple of 16, of 64 from 256 on.

    oneDNN makes a program for each shape and keeps it. A search has hundreds of shapes, since hypotheses end one by
    one: they took 130 MB after 20,000 sentences, and to make them took what the faster product had saved.
    """
    step = 1 << (rows - 1).bit_length() if rows <= 16 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


def packed(table: Tensor) -> Tensor:
    """A table in the order in which oneDNN reads it fastest, made anew when the table has been written to."""
    mark = table.data_ptr(), 0 if table.is_inference() else table._version  # which an inference tensor has not
    known: tuple[Any, Tensor] | None = PACKED.get(table)
    if known is None or known[0] != mark:
        known = PACKED[table] = mark, torch.ops.mkldnn._reorder_linear_weight(table.detach())
    return known[1]


def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias, of rows (R, D), (E, D) and (E,) of one type, of which autograd is told nothing. In bfloat16
    oneDNN adds the bias inside the product, where torch would first write it into all rows."""
    if BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return torch.addmm(bias, x, weight.t())
