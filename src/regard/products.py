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
PACKED: Any = WeakTensorKeyDictionary()


def product(x: Tensor, table: Tensor) -> Tensor:
    """x @ table.T, without a gradient: (…, D) and (V, D) -> (…, V).

    A table that learns is left as it is: torch's fused optimizers change weights without a sign that they have changed.
    """
    exact = x.dtype == table.dtype == torch.float32 and x.device.type == ONEDNN
    if not exact or table.requires_grad or table.numel() < LARGE:
        return torch.nn.functional.linear(x, table)
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed(table), None, "none", [], "")
    return made


def packed(table: Tensor) -> Tensor:
    """A table in the order in which oneDNN reads it fastest, made anew when the table has been written to."""
    mark = table.data_ptr(), table._version
    known: tuple[Any, Tensor] | None = PACKED.get(table)
    if known is None or known[0] != mark:
        known = PACKED[table] = mark, torch.ops.mkldnn._reorder_linear_weight(table.detach())
    return known[1]
