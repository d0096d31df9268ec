"""The exponential moving average of the weights while they learn (Polyak and Juditsky 1992; Vaswani et al. 2017 average
checkpoints instead)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regard.training.sharding import like

TRAINED = "trained."
"""What the names of the weights that learn begin with in optimizer.safetensors, where the model is their average."""


class WeightAverage:
    """avg ← decay avg + (1 - decay) weights after each update; decay is at most (1 + t) / (10 + t) at update t, so that
    the random start is soon forgotten.

    The averages are validated, saved as model.safetensors and translate; the weights that learn are saved beside the
    optimizer's state. Weights that are frozen are their own average.

    Args:
        model: on its device; what its weights are now is the average's start.
        decay: 0: there is no average, and nothing here does anything.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.learning = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
        self.averages = {name: weights.detach().clone() for name, weights in self.learning.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after an update; the first has step 1."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.averages.values()), list(self.learning.values()), 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[dict[str, Tensor]]:
        """Have the averages stand in the model for a while; gives the weights that learn, by their names in a file."""
        self._exchange()
        try:
            yield {TRAINED + name: weights for name, weights in self.averages.items()}
        finally:
            self._exchange()

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, whose model.safetensors is in the model already.

        Args:
            tensors: of its optimizer.safetensors; the weights that learn are among them, if it holds averages.
        """
        for name, weights in self.learning.items():
            if name in self.averages:
                self.averages[name].copy_(weights)
            if TRAINED + name in tensors:
                weights.copy_(like(weights, tensors[TRAINED + name]))

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.averages.items():
            held = average.clone()
            average.copy_(self.learning[name])
            self.learning[name].copy_(held)
