"""One sentence as one model saw it: tokens, probabilities, and where each output token looked.

Letters of the shapes: S source tokens, T target tokens. Layers and heads are counted from 1 wherever a person meets
them (arguments, captions, titles); the tensors are indexed from 0 as all tensors are: `trace.cross[0]` is layer 1.
"""

import math
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regard.errors import ConfigError

FIXED_VECTOR = ("This model read the whole source into one vector before it wrote its first token, so there is no "
                "place in the source to point to.")
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
# Fillers and variation selectors: they draw nothing either, but share their categories with letters and accents.
_IGNORABLE = frozenset([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0,
                        *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)])
_TOLERANCE = 1e-4  # of weights and probabilities, which are sums of many float32 numbers


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model did on one sentence. It holds tokens and tensors, and nothing of the model.

    Args:
        source: S tokens as people see them, the end symbol included.
        target: T tokens the same way; each was predicted from those before it.
        source_text: the source as it was given.
        target_text: the output as text.
        cross: float (layers, heads, T, S), the attention of each output token over the source. None when the decoder
            has only a fixed vector.
        encoder: float (layers, heads, S, S), the source's attention over itself. None for RNNs.
        decoder: float (layers, heads, T, T), the output's attention over itself. None for RNNs.
        log_probabilities: T values in nats, one for each target token.
        model: the model in words, such as "rnn, attention after the cell".

    Raises:
        ValueError: a shape or a value that no model can give.
    """

    source: list[str]
    target: list[str]
    source_text: str
    target_text: str
    cross: Tensor | None
    encoder: Tensor | None
    decoder: Tensor | None
    log_probabilities: list[float]
    model: str

    def __post_init__(self) -> None:
        if not self.source or not self.target:
            raise ValueError("Trace: source and target need at least one token each, the end symbol")
        S, T = len(self.source), len(self.target)
        if len(self.log_probabilities) != T:
            raise ValueError(f"Trace: {len(self.log_probabilities)} log_probabilities for {T} target tokens")
        if not all(value <= _TOLERANCE for value in self.log_probabilities):
            raise ValueError(f"Trace: log_probabilities must be numbers not above 0: {self.log_probabilities}")
        _check("cross", self.cross, T, S)
        _check("encoder", self.encoder, S, S)
        _check("decoder", self.decoder, T, T)

    @property
    def layers(self) -> int:
        """Layers of cross attention; 0 for a model with a fixed vector."""
        return 0 if self.cross is None else self.cross.shape[0]

    @property
    def heads(self) -> int:
        """Heads of each layer's cross attention; 0 for a model with a fixed vector."""
        return 0 if self.cross is None else self.cross.shape[1]

    @property
    def log_probability(self) -> float:
        """Of the whole target given the source, the end symbol included, in nats."""
        return math.fsum(self.log_probabilities)

    @property
    def probabilities(self) -> list[float]:
        """Of each target token given the source and the tokens before it: T values from 0 to 1."""
        return [min(1.0, math.exp(value)) for value in self.log_probabilities]

    def matrix(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """The cross attention of one layer and head.

        Args:
            layer: from 1; None takes the mean over all layers.
            head: from 1; None takes the mean over all heads.

        Returns:
            float32 (T, S) on the CPU, weights from 0 to 1.

        Raises:
            ConfigError: there is no such layer or head, or no attention at all.
        """
        if self.cross is None:
            raise ConfigError(f"{self.model}: no attention to show. {FIXED_VECTOR} Leave layer and head out")
        _check_choice("layer", layer, self.layers)
        _check_choice("head", head, self.heads)
        layers = self.cross if layer is None else self.cross[layer - 1 : layer]
        heads = layers if head is None else layers[:, head - 1 : head]
        return heads.detach().float().mean(dim=(0, 1)).cpu()

    def caption(self, layer: int | None = None, head: int | None = None) -> str:
        """Which matrix `matrix` gives for the same arguments, such as "layer 4 of 4, mean of 4 heads"."""
        self.matrix(layer, head)
        named = [
            f"{name} {chosen} of {count}" if chosen is not None else f"mean of {count} {name}s"
            for name, chosen, count in (("layer", layer, self.layers), ("head", head, self.heads))
            if count > 1
        ]
        return ", ".join(named) or "one layer, one head"

    def picture(self, path: str | Path, layer: int | None = None, head: int | None = None) -> None:
        """Draw the cross attention into a file; `regard.look.picture.save_picture` says how.

        Args:
            path: ends in .png, .svg or .pdf.
            layer: from 1; None draws each layer where there is room, else their mean.
            head: from 1; None draws each head where there is room, else their mean.

        Raises:
            ConfigError: an unknown suffix, or no such layer or head.
            RunError: the file cannot be written.
        """
        from regard.look.picture import save_picture  # here, because matplotlib takes half a second to import

        save_picture(self, path, layer, head)


def visible(token: str) -> str:
    """A token as text that can only be looked at: what a terminal or a page would obey, or not show, is escaped.

    Control, format, zero-width, private and unassigned characters and unusual spaces appear as Python escapes
    ("\\x1b", "\\u200b"), spaces at either end as "␣", an accent that stands first on "◌", nothing as "(empty)".
    """
    core = token.strip(" ")
    start = len(token) - len(token.lstrip(" ")) if core else len(token)
    end = len(token) - len(core) - start
    accent = "◌" if core and unicodedata.category(core[0]).startswith("M") and ord(core[0]) not in _IGNORABLE else ""
    return "␣" * start + accent + "".join(map(_visible, core)) + "␣" * end or "(empty)"


def _visible(character: str) -> str:
    """One character, escaped unless it draws something."""
    unseen = unicodedata.category(character) in _UNSEEN and character != " "
    return ascii(character)[1:-1] if unseen or ord(character) in _IGNORABLE else character


def _check(name: str, weights: Tensor | None, rows: int, columns: int) -> None:
    """Refuse weights of another shape, or that are no weights."""
    if weights is None:
        return
    if weights.dim() != 4 or weights.shape[2:] != (rows, columns) or 0 in weights.shape:
        raise ValueError(f"Trace: {name} has shape {tuple(weights.shape)}, expected (layers, heads, {rows}, {columns})")
    low, high = torch.aminmax(weights)
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise ValueError(f"Trace: {name} must hold weights from 0 to 1, and holds {low:.3g} to {high:.3g}")


def _check_choice(name: str, chosen: int | None, count: int) -> None:
    """Refuse a layer or head that is not there."""
    if chosen is not None and not 1 <= chosen <= count:
        expected = f"1 to {count}" if count > 1 else "only 1"
        raise ConfigError(f"{name} {chosen}: this model's cross attention has {name}s {expected}, counted from 1")
