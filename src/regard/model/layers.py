"""Small parts that every family uses: dropout and embeddings."""

import math
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from numpy.random import SFC64
from torch import Tensor, nn

from regard.config_model import ConvSideConfig, TransformerSideConfig

M = TypeVar("M", bound=nn.Module)
S = TypeVar("S", ConvSideConfig, TransformerSideConfig)


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


def narrow(x: Tensor) -> Tensor:
    """What layers compute with: bfloat16 where products are made in it, so that nothing is cast back and forth."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and self.threshold > 0

    @property
    def scale(self) -> float:
        """What is multiplied with what stays, 1 / (1 - probability); 1 where nothing is dropped."""
        return 256 / (256 - self.threshold) if self.drops else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of x, any shape."""
        return x * self.mask(x.shape, x) if self.drops else x

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + what is left of a branch of the same shape."""
        return torch.addcmul(x, branch, self.mask(branch.shape, branch)) if self.drops else x + branch

    def mask(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A factor for each value: 0, or `scale`."""
        if like.is_cuda:
            return like.new_empty(tuple(shape)).bernoulli_(1 - self.threshold / 256).mul_(self.scale)
        return drop(like.new_full(tuple(shape), self.scale), self.bits(shape, like, new_noise()))

    def bits(self, shape: Sequence[int], like: Tensor, noise: SFC64) -> Tensor | None:
        """What `drop` leaves of each value, on a processor: all bits of those that stay, which are yet to be scaled,
        and none of the others, as an integer of their size; None where nothing is dropped."""
        if not self.drops:
            return None
        count = math.prod(shape)
        words = torch.from_numpy(noise.random_raw(-(-count // 8)).view(np.uint8))[:count]
        stays = words.ge_(self.threshold).view(torch.int8).neg_()
        return stays.to(INTEGERS[like.element_size()]).view(tuple(shape))


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop(x: Tensor, bits: Tensor | None) -> Tensor:
    """x without the bits that are not asked for, in place; x as it is for None. A third of the time of a product, for
    which bfloat16 is widened, and rounded again."""
    if bits is not None:
        x.view(bits.dtype).bitwise_and_(bits)
    return x


def new_noise() -> SFC64:
    """A source of random words, seeded from torch's own generator, so that a seed fixes it too."""
    return SFC64(int(torch.empty((), dtype=torch.int64).random_()))


class StochasticDepth(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, some sequences leave out a residual branch; where it stays, it
    counts 1 / (1 - probability), so that in eval mode nothing needs to change.

    Args:
        probability: share of sequences whose branch is left out in training.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    @property
    def leaves_out(self) -> bool:
        """Whether any branch is left out now."""
        return self.training and self.probability > 0

    def forward(self, branch: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return branch * self.shares(len(branch), branch)[:, None, None] if self.leaves_out else branch

    def shares(self, sequences: int, like: Tensor) -> Tensor:
        """How much the branch of each sequence counts, (B,): nothing, or a little more than it would."""
        keep = torch.rand(sequences, device=like.device) >= self.probability
        return (keep / (1 - self.probability)).to(like.dtype)


def at_depth(config: S, layer: int) -> S:
    """The settings of one layer, 0 the first: it leaves out l / L of the share of branches that the last layer does, l
    counted from 1 (Huang et al. 2016, eq. 4)."""
    share = config.stochastic_depth * (layer + 1) / config.layers
    return config.model_copy(update={"stochastic_depth": share})


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
