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
from regard.training.device import is_out_of_memory
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

    def batches(self) -> Iterator[list[int]]:
        """The row numbers of each batch, the longest first."""
        lengths = [max(len(source), len(target)) + 1 for source, target in zip(self.sources, self.targets, strict=True)]
        return by_length(lengths, BATCH_TOKENS)

    @torch.no_grad()
    def scores(self, model: Seq2Seq) -> dict[str, float]:
        """The loss, nats per target token without smoothing, and BLEU or token error rate where that is the metric."""
        model.eval()
        total, tokens = 0.0, 0
        outputs: list[list[int]] = [[]] * len(self.sources)
        metric = self.config.train.metric
        for rows in self.batches():
            surprise, count = self._read(model, rows, outputs)
            total, tokens = total + surprise, tokens + count
        scores = {"loss": total / tokens}
        if metric == "loss":
            return scores
        texts = self.tokenizers.target.decode(outputs)
        if metric == "bleu":
            return scores | {metric: bleu(texts, self.pairs.targets, self.config.data.bleu_tokenize).value}
        return scores | {metric: token_error_rate(texts, self.pairs.targets, self.config.data.bleu_tokenize).value}

    def _read(self, model: Seq2Seq, rows: list[int], outputs: list[list[int]]) -> tuple[float, int]:
        """The cross-entropy, nats, and the target tokens of some rows, whose outputs, where they are asked for, are put
        in their places; in halves where memory does not hold them."""
        try:
            batch = Batch.of([self.sources[row] for row in rows], [self.targets[row] for row in rows]).to(self.device)
            surprise = float(loss_of(model, batch)[1])
            if self.config.train.metric != "loss":
                limits = Limits(self.config.decode.max_length)
                for row, hypothesis in zip(rows, greedy(model, batch, limits), strict=True):
                    outputs[row] = hypothesis.tokens
            return surprise, batch.tokens
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        middle = len(rows) // 2
        (first, count), (second, others) = (self._read(model, part, outputs) for part in (rows[:middle], rows[middle:]))
        return first + second, count + others
