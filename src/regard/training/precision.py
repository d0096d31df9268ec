"""In what training multiplies matrices: float32, or bfloat16 where the hardware has it.

In bfloat16 the factors of a product are rounded to 8 bits of mantissa and summed in float32. The weights that learn,
the optimizer, norms and the sums of the loss stay float32 (Micikevicius et al. 2018).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

from regard.config_train import TrainConfig
from regard.errors import RunError

PRODUCTS_KEPT = 1024
"""How many shapes of product oneDNN keeps its program for, some 0.3 to 0.6 MB each. On batches of 4,096 tokens of
Multi30k an LSTM has 246, a convolution 594 (benchmarks/shapes.py); where programs come and go, the heap grows."""


def bfloat16_hardware(device: torch.device) -> str | None:
    """What multiplies bfloat16 on this machine faster than float32; None: nothing does."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name(device) if supported else None
    if torch.cpu._is_amx_tile_supported():
        return "the processor's AMX"
    return "the processor's AVX-512 BF16" if torch.cpu._is_avx512_bf16_supported() else None


def chosen(settings: TrainConfig, device: torch.device) -> tuple[str, str]:
    """What `train.precision` comes to on this machine, "float32" or "bfloat16", and why, for people to read.

    Raises:
        RunError: bfloat16 was asked for, and nothing here multiplies it faster than float32.
    """
    hardware = bfloat16_hardware(device)
    if settings.precision == "bfloat16" and hardware is None:
        raise RunError('train.precision = "bfloat16", but this machine multiplies bfloat16 no faster than float32: '
                       'it has neither AVX-512 BF16 nor AMX, nor a GPU that can. Use "auto" or "float32"')
    if settings.precision == "float32" or hardware is None:
        return "float32", "as asked" if settings.precision == "float32" else "nothing here multiplies bfloat16 faster"
    return "bfloat16", f"{hardware} multiplies it about twice as fast or more; weights stay float32"


def matrix_products(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrices are multiplied in "float32" or "bfloat16"; leave it before the backward pass."""
    if precision == "bfloat16":  # read by oneDNN when it makes its first product
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def whole_update(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context for forward and backward pass together, in which float32 matrices are multiplied as fast as can be."""
    if precision == "float32" and device.type == "cpu" and onednn_pays():
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))
        return by_onednn()
    return nullcontext()


@cache
def onednn_pays() -> bool:
    """Whether oneDNN makes the same float32 products as MKL, faster: it does on AMD processors with AVX-512, which MKL
    leaves unused there (twice as fast on Zen 5; docs/log.md, 2026-11-29)."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not (mkl and found.get("avx512_f") and "AMD" in found.get("cpu_name", "")):
        return False
    matrix = torch.full((64, 64), 1 + 2.0**-12)  # 1 in bfloat16
    with by_onednn():
        return float((matrix @ matrix)[0, 0]) > 64 + 2.0**-6


@contextmanager
def by_onednn() -> Iterator[None]:
    """A context in which oneDNN multiplies float32 matrices. torch gives them to it where it may round factors to
    bfloat16; it makes use of that with AMX alone."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
