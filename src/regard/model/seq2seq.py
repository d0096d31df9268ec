"""A whole model: encoder, decoder and output. The one place that knows all families."""

import torch
from torch import Tensor, nn

from regard.config import AnyModelConfig, RNNConfig
from regard.data.batches import Batch
from regard.model.layers import INIT, Embedding
from regard.model.rnn import RNNDecoder, RNNEncoder, reverse
from regard.model.state import Memory, State, Taps
from regard.model.transformer import TransformerDecoder, TransformerEncoder


class Seq2Seq(nn.Module):
    """Encoder and decoder, joined: `encode` the source, `decoder` over target tokens, `project` to the vocabulary.

    Args:
        config: the model's settings.
        source_size: entries of the source vocabulary.
        target_size: V, entries of the target vocabulary; the same table when `tie = "all"`.
    """

    def __init__(self, config: AnyModelConfig, source_size: int, target_size: int):
        super().__init__()
        target = Embedding(target_size, config.width)
        source = target if config.tie == "all" else Embedding(source_size, config.width)
        self.encoder: RNNEncoder | TransformerEncoder
        self.decoder: RNNDecoder | TransformerDecoder
        if isinstance(config, RNNConfig):
            self.encoder, self.decoder = RNNEncoder(config, source), RNNDecoder(config, target)
        else:
            self.encoder, self.decoder = TransformerEncoder(config, source), TransformerDecoder(config, target)
        self.output = target.weight if config.tie != "none" else nn.Parameter(torch.randn_like(target.weight) * INIT)
        self.reverse_source = config.reverse_source

    def encode(self, source: Tensor, mask: Tensor, taps: Taps | None = None) -> Memory:
        """source int64 (B, S), mask bool (B, S) -> `Memory`, its states (and the taps) in the source's own order."""
        memory: Memory
        if not self.reverse_source:
            memory = self.encoder(source, mask, taps)
            return memory
        asked: Taps | None = None if taps is None else {}
        memory = self.encoder(reverse(source, mask), mask, asked)
        if taps is not None and asked:
            order = reverse(torch.arange(source.shape[1], device=source.device).expand_as(source), mask)
            for name, weights in asked.items():  # (B, H, S, S)
                rows = weights.gather(2, order[:, None, :, None].expand_as(weights))
                taps[name] = rows.gather(3, order[:, None, None, :].expand_as(weights))
        return Memory(reverse(memory.states, mask), mask, memory.summary)

    def start(self, batch: Batch) -> State:
        """The decoder's state before the first target token."""
        return self.decoder.start(self.encode(batch.source, batch.source_mask))

    def forward(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Features, float (B, T, D), of the batch's target, each position knowing the true tokens before it."""
        memory = self.encode(batch.source, batch.source_mask, taps)
        features: Tensor
        features, _ = self.decoder(batch.target_in, self.decoder.start(memory), taps)
        return features

    def project(self, features: Tensor) -> Tensor:
        """Features (…, D) -> logits (…, V)."""
        return nn.functional.linear(features, self.output)


def build_model(config: AnyModelConfig, source_size: int, target_size: int) -> Seq2Seq:
    """A new model with random weights, drawn from torch's generator.

    Args:
        config: the `[model]` section.
        source_size: entries of the source vocabulary.
        target_size: entries of the target vocabulary.
    """
    return Seq2Seq(config, source_size, target_size)
