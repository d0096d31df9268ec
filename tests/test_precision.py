"""What training multiplies in, told by what is measured and not by what was asked for."""

import pytest
import torch

from regard.config import TrainConfig
from regard.errors import RunError
from regard.training import precision
from regard.training.precision import ROUNDINGS, chosen, matrix_products, measured

CPU = torch.device("cpu")


def rounding(bits):
    """A product of factors that keep so many bits of their mantissa."""
    def product(left, right):
        step = 2 ** (bits + 1)
        left, right = ((part * step).round() / step * 2.0**power for part, power in map(torch.frexp, (left, right)))
        return left.double() @ right.double()

    return product


@pytest.mark.parametrize("kind, bits", [("float32", 23), ("TF32", 10), ("bfloat16", 7)])
def test_the_error_tells_the_rounding(kind, bits, monkeypatch):
    monkeypatch.setattr(torch, "matmul", rounding(bits))
    assert measured("float32", CPU) == kind


def test_exact_products_are_exact_whatever_was_set_before():
    before = torch.get_float32_matmul_precision()
    with matrix_products("fast"):
        assert torch.get_float32_matmul_precision() == "medium"
        assert measured("float32", CPU) == "float32"
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


def test_a_wish_that_the_machine_does_not_grant_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "measured", lambda mode, device: "float32")
    with pytest.raises(RunError, match=r'"bfloat16", but torch multiplies in float32 on this machine.*Use "auto"'):
        chosen(TrainConfig(precision="bfloat16"), CPU)
    monkeypatch.setattr(precision, "measured", lambda mode, device: "bfloat16")
    assert chosen(TrainConfig(precision="bfloat16"), CPU) == "fast"


def test_auto_is_what_is_fast(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device, fast=fast: fast)
        assert chosen(TrainConfig(), CPU) == ("fast" if fast else "float32")
    assert chosen(TrainConfig(precision="float32"), CPU) == "float32"
    assert list(ROUNDINGS) == ["float32", "TF32", "bfloat16"]
