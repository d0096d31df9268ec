"""A whole model: encoder, decoder and output. The one place that knows all families."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.config_model import AnyModelConfig, RNNDecoderConfig
from regard.data.batches import Batch
from regard.errors import ConfigError
from regard.model.conv import ConvDecoder, ConvEncoder
from regard.model.layers import INIT, Embedding
from regard.model.pointer import mixed_log_probabilities
from regard.model.rnn import RNNDecoder, RNNEncoder, reverse
from regard.model.rows import sentences
from regard.model.state import Memory, State, Taps
from regard.model.transformer import TransformerDecoder, TransformerEncoder
from regard.products import product

ENCODERS: dict[str, Callable[[Any, Embedding], nn.Module]] = {
    "rnn": RNNEncoder, "conv": ConvEncoder, "transformer": TransformerEncoder}
DECODERS: dict[str, Callable[[Any, Embedding, int], RNNDecoder | ConvDecoder | TransformerDecoder]] = {
    "rnn": RNNDecoder, "conv": ConvDecoder, "transformer": TransformerDecoder}
"""The parts of a model by the kind of their settings; a decoder is told the width of the memory that it looks at."""


class Seq2Seq(nn.Module):
    """Encoder and decoder, joined: `encode` the source, `decoder` over target tokens, `project` to the vocabulary.

    Args:
        config: the model's settings.
        source_size: entries of the source vocabulary.
        target_size: V, entries of the target vocabulary; the same table when `tie = "all"`.
    """

    def __init__(self, config: AnyModelConfig, source_size: int, target_size: int):
        super().__init__()
        encoder, decoder = config.encoder, config.decoder
        target = Embedding(target_size, decoder.width)
        source = target if config.tie == "all" else Embedding(source_size, encoder.width)
        self.encoder: nn.Module = ENCODERS[encoder.kind](encoder, source)
        self.decoder: RNNDecoder | ConvDecoder | TransformerDecoder = DECODERS[decoder.kind](
            decoder, target, encoder.width)
        self.output = target.weight if config.tie != "none" else nn.Parameter(torch.randn_like(target.weight) * INIT)
        self.recurrent = "rnn" in (encoder.kind, decoder.kind)
        self.reverse_source = config.reverse_source
        self.copies = isinstance(decoder, RNNDecoderConfig) and decoder.copy

    def encode(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S) -> `Memory`, its states (and the taps) in the source's own order."""
        memory: Memory
        if not self.reverse_source:
            memory = self.encoder(source, mask, taps)
            return memory
        asked = None if taps is None else Taps()
        memory = self.encoder(reverse(source, mask), mask, asked)
        if taps is not None and asked:
            order = reverse(torch.arange(source.shape[1], device=source.device).expand_as(source), mask)
            for name, weights in asked.items():  # (B, H, S, S)
                rows = weights.gather(2, order[:, None, :, None].expand_as(weights))
                taps[name] = rows.gather(3, order[:, None, None, :].expand_as(weights))
        states = reverse(memory.states, mask)
        values = states if memory.values is memory.states else reverse(memory.values, mask)
        return replace(memory, states=states, values=values, source=source, held=None)

    def start(self, batch: Batch) -> State:
        """The decoder's state before the first target token."""
        return self.decoder.start(self.encode(batch.source, batch.source_mask))

    def forward(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Features, float (B, T, D), of the batch's target, each position knowing the true tokens before it."""
        source, mask, target = self.filled(batch)
        features: Tensor
        features, _ = self.decoder(target, self.decoder.start(self.encode(source, mask, taps)), taps)
        if taps:
            taps.update({name: weights[: len(batch)] for name, weights in taps.items()})
        return features[: len(batch)]

    def filled(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sources, their mask and what the decoder reads. Where oneDNN writes a program for each number of rows that a
        recurrent network has in a step, the last row is repeated until there are as many as `sentences` says. (A
        Transformer's decoder goes another way, `real`: an RNN in front of it is left as it is.)"""
        given = batch.source, batch.source_mask, batch.target_in
        device, learns = batch.source.device.type, self.training and torch.is_grad_enabled()
        if not (self.recurrent and learns and device == "cpu" and torch.is_autocast_enabled(device)):
            return given
        rows = torch.arange(sentences(len(batch))).clamp_(max=len(batch) - 1)
        source, mask, target = (x[rows] for x in given)
        return source, mask, target

    def real(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Those of the real target tokens alone, float (N, D), sentence after sentence: what training asks for."""
        if not isinstance(self.decoder, TransformerDecoder):
            return batch.real(self.forward(batch, taps))
        return self.decoder.real(batch, self.decoder.start(self.encode(batch.source, batch.source_mask, taps)), taps)

    def project(self, features: Tensor) -> Tensor:
        """Features (…, D) -> logits (…, V)."""
        return product(features, self.output)

    def log_probabilities(self, features: Tensor, source: Tensor) -> Tensor:
        """What follows each position: float32 or wider (B, T, V), nats.

        Args:
            features: from the decoder, (B, T, D); one that copies appends its gate and its attention to them.
            source: int64 (B, S), the tokens that may be copied; or of each source once, where it has several rows.
        """
        if self.copies:
            each = source.repeat_interleave(len(features) // len(source), 0)
            return mixed_log_probabilities(features, self.output, each)
        logits = self.project(features)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits, dim=-1, out=None if torch.is_grad_enabled() else logits)


def build_model(config: AnyModelConfig, source_size: int, target_size: int) -> Seq2Seq:
    """A new model with random weights, drawn from torch's generator.

    Args:
        config: the `[model]` section.
        source_size: entries of the source vocabulary.
        target_size: entries of the target vocabulary.

    Raises:
        ConfigError: settings that cannot work together, all of them at once.
    """
    if reasons := list(config.reasons()):
        raise ConfigError("[model]: " + "; ".join(reasons))
    return Seq2Seq(config, source_size, target_size)
