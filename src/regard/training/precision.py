"""How exactly training multiplies matrices. Weights, sums and everything else stay float32 in each case."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regard.config import TrainConfig
from regard.errors import RunError


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether this machine multiplies bfloat16 in hardware: a processor with AVX-512 BF16 or AMX, or a GPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def chosen(settings: TrainConfig, device: torch.device) -> str:
    """What `train.precision` comes to on this machine: "float32", or "fast", torch's fastest products.

    Raises:
        RunError: bfloat16 was asked for, and torch's fastest products are not rounded to it here.
    """
    if settings.precision == "bfloat16" and (found := measured("fast", device)) != "bfloat16":
        raise RunError(f'train.precision = "bfloat16", but torch multiplies in {found} on this machine even where it '
                       'may round. Use "auto", which takes the fastest products there are, or "float32"')
    if settings.precision == "auto":
        return "fast" if has_fast_bfloat16(device) else "float32"
    return "float32" if settings.precision == "float32" else "fast"


PRODUCTS_KEPT = 128
"""How many shapes of product oneDNN keeps its buffers for. Its own 1,024 come to gigabytes, since nearly every batch
brings new shapes; one update has fewer than 128."""


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Multiply float32 matrices exactly ("float32"), or as fast as torch can, rounded where it rounds ("fast")."""
    if precision == "fast":  # read by oneDNN when it makes its first product
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "fast" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ROUNDINGS = {"float32": 1e-3, "TF32": 6e-2, "bfloat16": float("inf")}
"""Kinds of product, and what the error of a sum of 256 terms of about 1 stays under in each."""


def measured(precision: str, device: torch.device) -> str:
    """In what a product is really rounded: "float32", "TF32" or "bfloat16". Only its error tells.

    What torch is asked for need not be what a processor's library does: on some that have AVX-512 BF16 and no AMX,
    oneDNN answers a wish for bfloat16 with its float32 kernels, which are still faster than the usual ones.
    """
    left, right = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    with matrix_products(precision):
        product = torch.matmul(left.to(device), right.to(device)).cpu()
    error = float((product.double() - left.double() @ right.double()).abs().max())
    return next(kind for kind, bound in ROUNDINGS.items() if error < bound)
