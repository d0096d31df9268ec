"""Several models that answer as one: at each step, the mean of their probabilities.

B batch, S source length, T target length, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.data.batches import Batch
from regard.model.state import State, Taps


@dataclass(frozen=True)
class JointState(State):
    """The states of all models; the memory is that of the first."""

    parts: tuple[State, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[State]) -> "JointState":
        """The states of all models, as one."""
        return cls(parts[0].memory, parts[0].length, beam=parts[0].beam, parts=tuple(parts))

    def select(self, rows: Tensor) -> "JointState":
        """The state of the given rows, repeated or left out as they say."""
        return JointState.of([part.select(rows) for part in self.parts])


class Ensemble(nn.Module):
    """Models that share their vocabularies, of any families: p(y | …) = Σ_m p_m(y | …) / M.

    Its features are a tuple of theirs. Taps get "cross.0", (B, T, S): the mean over the models that look at the source.
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def start(self, batch: Batch) -> JointState:
        """The state before the first target token."""
        return JointState.of([model.start(batch) for model in self._each()])

    def decoder(self, tokens: Tensor, state: State, taps: Taps | None = None) -> tuple[tuple[Tensor, ...], JointState]:
        """tokens int64 (B, T) -> features of each model, and the state after them."""
        assert isinstance(state, JointState)
        asked: list[Taps | None] = [None if taps is None else Taps() for _ in state.parts]
        read = [model.decoder(tokens, part, own)
                for model, part, own in zip(self._each(), state.parts, asked, strict=True)]
        _put_mean(taps, asked)
        features, states = zip(*read, strict=True)
        return features, JointState.of(states)

    def forward(self, batch: Batch, taps: Taps | None = None) -> tuple[Tensor, ...]:
        """Features of each model at every position of the batch's target."""
        asked: list[Taps | None] = [None if taps is None else Taps() for _ in self.models]
        features = tuple(model(batch, own) for model, own in zip(self._each(), asked, strict=True))
        _put_mean(taps, asked)
        return features

    def log_probabilities(self, features: Sequence[Tensor], source: Tensor) -> Tensor:
        """The logarithm of the mean of all models' probabilities: float (B, T, V), nats."""
        each = [model.log_probabilities(own, source) for model, own in zip(self._each(), features, strict=True)]
        return torch.stack(each).logsumexp(0) - math.log(len(each))

    def _each(self) -> Sequence[Any]:
        return list(self.models)


def attention_of(taps: Taps) -> Tensor | None:
    """The attention to the source, float (B, T, S): the mean over layers and heads; None where there is none."""
    crossed = [weights for name, weights in taps.items() if name.startswith("cross.")]
    means = [weights.mean(1) if weights.dim() == 4 else weights for weights in crossed]
    return torch.stack(means).mean(0) if means else None


def _put_mean(taps: Taps | None, asked: Sequence[Taps | None]) -> None:
    """Give the models' mean attention to the taps, if somebody asked and any of them looks at the source."""
    found = [looked for each in asked if each is not None and (looked := attention_of(each)) is not None]
    if taps is not None and found:
        taps["cross.0"] = torch.stack(found).mean(0)
