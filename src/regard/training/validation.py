"""How good a model is while it learns: its loss on the validation data, and the score of its greedy output."""

from collections.abc import Iterator

import torch

from regard.config import Config
from regard.data.batches import Batch, by_length
from regard.decode.search import Limits, greedy
from regard.errors import DataError
from regard.metrics import bleu, token_error_rate
from regard.model.seq2seq import Seq2Seq
from regard.text.corpus import read_pairs
from regard.text.tokenizer import Tokenizers
from regard.training.objective import loss_of

BATCH_TOKENS = 4096


class Validation:
    """The validation data, ready to score a model on.

    Args:
        config: its [data] names the files, its [train] the metric.
        tokenizers: of source and target.
        device: where the model is.

    Raises:
        DataError: the files cannot be read, or hold no pair.
    """

    def __init__(self, config: Config, tokenizers: Tokenizers, device: torch.device):
        self.config, self.tokenizers, self.device = config, tokenizers, device
        self.pairs = read_pairs(config.data.valid, config.data.root)
        if not len(self.pairs):
            raise DataError(f"data.valid: {self.pairs.summary}: no pair to validate on. Expected at least one with "
                            "text on both sides")
        self.sources = tokenizers.source.encode(self.pairs.sources)
        self.targets = tokenizers.target.encode(self.pairs.targets)

    def batches(self) -> Iterator[tuple[list[int], Batch]]:
        """Row numbers and their batch, the longest first."""
        lengths = [max(len(source), len(target)) + 1 for source, target in zip(self.sources, self.targets, strict=True)]
        for rows in by_length(lengths, BATCH_TOKENS):
            yield rows, Batch.of([self.sources[row] for row in rows], [self.targets[row] for row in rows])

    @torch.no_grad()
    def scores(self, model: Seq2Seq) -> dict[str, float]:
        """The loss, nats per target token without smoothing, and BLEU or token error rate where that is the metric."""
        model.eval()
        total, tokens = 0.0, 0
        outputs: list[list[int]] = [[]] * len(self.sources)
        metric = self.config.train.metric
        limits = Limits(self.config.decode.max_length)
        for rows, batch in self.batches():
            batch = batch.to(self.device)
            total += float(loss_of(model, batch)[1])
            tokens += batch.tokens
            if metric != "loss":
                for row, hypothesis in zip(rows, greedy(model, batch, limits), strict=True):
                    outputs[row] = hypothesis.tokens
        scores = {"loss": total / tokens}
        if metric == "loss":
            return scores
        texts = self.tokenizers.target.decode(outputs)
        if metric == "bleu":
            return scores | {metric: bleu(texts, self.pairs.targets, self.config.data.bleu_tokenize).value}
        return scores | {metric: token_error_rate(texts, self.pairs.targets, self.config.data.bleu_tokenize).value}
