"""How exactly training multiplies matrices. Weights, sums and everything else stay float32 in each case."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regard.config import TrainConfig


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether this machine multiplies bfloat16 in hardware: a processor with AVX-512 BF16 or AMX, or a GPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def chosen(settings: TrainConfig, device: torch.device) -> str:
    """ "float32" or "bfloat16": what `train.precision` comes to on this machine."""
    if settings.precision != "auto":
        return settings.precision
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


PRODUCTS_KEPT = 128
"""How many shapes of product oneDNN keeps its buffers for. Its own 1,024 come to gigabytes, since nearly every batch
brings new shapes; one update has fewer than 128."""


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Multiply float32 matrices exactly ("float32") or rounded to bfloat16 and summed in float32 ("bfloat16")."""
    if precision == "bfloat16":  # read by oneDNN when it makes its first product
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
