"""Small parts that every family uses: dropout and embeddings."""

import math
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


INIT = 0.02
"""Standard deviation of new weights, as in Devlin et al. (2019). Post-norm layers that begin this near to the identity
learn several times faster than with Xavier's wider weights (docs/log.md, 2026-11-21)."""


class Layers(nn.ModuleList, Generic[M]):
    """A `ModuleList` whose type says what it holds."""

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map with small random weights and no bias to begin with."""
    module = nn.Linear(inputs, outputs)
    nn.init.normal_(module.weight, std=INIT)
    nn.init.zeros_(module.bias)
    return module


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose cost does not show.

    On a CPU the usual dropout draws one random number for each value, on one thread. Here one random byte decides for
    each value: the probability is rounded to the nearest 1/256 (0.3 becomes 77/256 = 0.3008), and the values that stay
    are scaled by exactly what that asks for. Drawn from torch's own generator, so a seed fixes it.

    Args:
        probability: share of values set to 0 in training; in eval mode nothing happens.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.threshold = min(round(probability * 256), 255)

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of x, any shape."""
        if not self.training or self.threshold == 0:
            return x
        return x * self.mask(x.shape, x)

    def mask(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A factor for each value: 0, or 1 / (1 - probability)."""
        count = math.prod(shape)
        words = torch.empty(-(-count // 8), dtype=torch.int64, device=like.device).random_(-(2**63), None)
        keep = words.view(torch.uint8)[:count].view(tuple(shape)) >= self.threshold
        return keep.to(like.dtype).mul_(256 / (256 - self.threshold))


class Embedding(nn.Module):
    """A table of token vectors, scaled by √D as Vaswani et al. (2017), section 3.4, so that it can be the output's too.

    Args:
        size: entries of the vocabulary.
        width: D, the size of a vector.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width) * INIT)
        self.scale = math.sqrt(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors, float (B, T, D), of tokens, int64 (B, T)."""
        return nn.functional.embedding(tokens, self.weight) * self.scale
