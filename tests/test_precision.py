"""What training multiplies in, and that it is so."""

import pytest
import torch

from conftest import MODELS, make_batch, make_model
from regard.config_train import TrainConfig
from regard.errors import RunError
from regard.training import precision
from regard.training.objective import loss_of
from regard.training.precision import chosen, matrix_products, whole_update

CPU = torch.device("cpu")


def hardware(monkeypatch, name):
    monkeypatch.setattr(precision, "bfloat16_hardware", lambda device: name)


def test_auto_is_bfloat16_where_hardware_has_it_and_says_why(monkeypatch):
    hardware(monkeypatch, "AMX")
    assert chosen(TrainConfig(), CPU) == (
        "bfloat16", "AMX multiplies it about twice as fast or more; weights stay float32")
    assert chosen(TrainConfig(precision="float32"), CPU) == ("float32", "as asked")
    hardware(monkeypatch, None)
    assert chosen(TrainConfig(), CPU) == ("float32", "nothing here multiplies bfloat16 faster")


def test_bfloat16_is_refused_where_nothing_multiplies_it_fast(monkeypatch):
    hardware(monkeypatch, None)
    with pytest.raises(RunError, match=r'"bfloat16", but this machine multiplies bfloat16 no faster.*Use "auto"'):
        chosen(TrainConfig(precision="bfloat16"), CPU)


def test_products_are_rounded_as_they_are_called():
    left, right = (torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = left.double() @ right.double().T
    for kind, least, most in (("float32", 0.0, 1e-4), ("bfloat16", 1e-2, 1.0)):
        with whole_update(kind, CPU), matrix_products(kind, CPU):
            error = float((torch.matmul(left, right.T).double() - exact).abs().max())
        assert least <= error < most, kind


@pytest.fixture
def processor(monkeypatch):
    """A processor of AMD with AVX-512, whatever this one is; and the products that are made on it."""
    products, found = [], {"avx512_f": True, "cpu_name": "AMD EPYC"}
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: products.append(switch()) or left.mm(right))
    precision.onednn_pays.cache_clear()
    yield products
    precision.onednn_pays.cache_clear()


def switch():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_float32_goes_to_onednn_for_an_update_where_mkl_is_slow(processor, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "mm", lambda left, right: torch.full((1, 1), 64.03))  # as exact as float32
    before = switch()
    for kind, expected in (("float32", "bf16"), ("bfloat16", before)):
        with whole_update(kind, CPU):
            assert switch() == expected
        assert switch() == before
    assert processor == ["bf16"]  # one product was looked at, made by oneDNN


def test_float32_is_never_rounded_where_onednn_would(processor, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "mm", lambda left, right: torch.full((1, 1), 64.0))
    with whole_update("float32", CPU):
        assert processor == ["bf16"] and switch() != "bf16"


def test_other_processors_keep_to_mkl(processor, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "Intel"}, raising=False)
    with whole_update("float32", CPU):
        assert switch() != "bf16"
    assert not processor


@pytest.mark.parametrize("name", sorted(MODELS))
def test_losses_and_gradients_in_bfloat16_are_near_those_in_float32(name):
    model, batch = make_model(name).float().train(), make_batch()
    found = {}
    for kind in ("float32", "bfloat16"):
        with matrix_products(kind, CPU):
            loss, _ = loss_of(model, batch, 0.1)
        model.zero_grad()
        loss.backward()
        assert loss.dtype == torch.float32 and all(each.grad.dtype == torch.float32 for each in model.parameters())
        found[kind] = float(loss.detach()), torch.cat([each.grad.flatten() for each in model.parameters()])
    assert found["bfloat16"][0] == pytest.approx(found["float32"][0], rel=5e-3)
    assert found["bfloat16"][0] != found["float32"][0]
    cosine = torch.cosine_similarity(found["bfloat16"][1], found["float32"][1], dim=0)
    assert float(cosine) > 0.995
