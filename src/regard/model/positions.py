"""How a model that reads all positions at once is told their order."""

import math

import torch
from torch import Tensor, nn


class Sinusoidal(nn.Module):
    """Positions as sines and cosines, Vaswani et al. (2017), section 3.5.

    PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(the same). There is no longest position: the table grows.
    """

    table: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("table", self._rows(0, 256), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Add to x, float (B, T, D), the positions start, start + 1, …, start + T - 1."""
        end = start + x.shape[1]
        if end > self.table.shape[0]:
            self.table = self._rows(0, 2 * end).to(self.table)
        return x + self.table[start:end].to(x.dtype)

    def _rows(self, start: int, end: int) -> Tensor:
        position = torch.arange(start, end, dtype=torch.float64)[:, None]
        rate = torch.exp(torch.arange(0, self.width, 2, dtype=torch.float64) * (-math.log(10000.0) / self.width))
        table = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1)  # (T, D/2, 2)
        return table.flatten(1).float()
