"""The product of search: the same as torch's own, in few shapes."""

import pytest
import torch
from torch import nn

from regard import products


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 17, 100, 300])
@torch.no_grad()
def test_it_is_torchs(rows, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(products, "LARGE", 1)
    x, table = torch.randn(rows, 2, 6), torch.randn(50, 6)
    for each in (x, x.transpose(0, 1), x.double()):
        torch.testing.assert_close(products.product(each, table.to(each.dtype)),
                                   nn.functional.linear(each, table.to(each.dtype)))


@torch.inference_mode()
def test_a_table_made_in_inference_mode_serves(monkeypatch):
    monkeypatch.setattr(products, "LARGE", 1)
    x, table = torch.randn(3, 6), torch.randn(50, 6)
    torch.testing.assert_close(products.product(x, table), nn.functional.linear(x, table))


def test_a_search_of_any_sizes_has_few_shapes():
    found = {rows: products.rounded(rows) for rows in range(1, 2000)}
    assert all(rows <= more <= max(1.6 * rows, rows + 15) for rows, more in found.items() if rows > 2)
    assert found[1] == 1 and found[3] == 4 and found[17] == 32 and found[257] == 320
    assert len(set(found.values())) <= 50 and all(products.rounded(more) == more for more in found.values())


@pytest.mark.parametrize("supported", {products.BFLOAT16, False})
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_map_is_torchs(kind, supported, monkeypatch):
    monkeypatch.setattr(products, "BFLOAT16", supported)
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(*shape).to(kind) for shape in ((40, 6), (5, 6), (5,)))
    found = products.mapped(x, weight, bias)
    assert found.dtype == kind
    torch.testing.assert_close(found, nn.functional.linear(x, weight, bias))
