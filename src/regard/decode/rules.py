"""What may come next: lengths, prefixes, bans and no repetition. Each rule sets log-probabilities to -inf; what is left
keeps the model's own value.

N sentences, R open hypotheses, V vocabulary, t tokens of each hypothesis so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.data.batches import Ids
from regard.decode.constraints import Constraints
from regard.decode.hypotheses import Paths
from regard.text.tokenizer import BOS, EOS, PAD

NEVER = (PAD, BOS)
"""Tokens that no output may hold."""


@dataclass(frozen=True)
class Limits:
    """How long an output must and may become, in tokens; </s> counts in source and output.

    The longest is `most` tokens and no more than ratio × source + extra, but at least 1; the shortest is `least` tokens
    and no less than least_ratio × source. Where they cross, the longest wins.
    """

    most: int = 256
    ratio: float = 2.0
    extra: int = 10
    least: int = 0
    least_ratio: float = 0.0

    def between(self, source: int) -> tuple[int, int]:
        """Tokens of the shortest and of the longest output for so many of the source."""
        longest = min(self.most, max(1, math.floor(self.ratio * source + self.extra)))
        return min(longest, max(self.least, math.ceil(self.least_ratio * source))), longest

    def of(self, source_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The shortest and the longest output of each source, int64 (N,) each; mask bool (N, S)."""
        both = torch.tensor([self.between(length) for length in source_mask.sum(1).tolist()], device=source_mask.device)
        return both[:, 0], both[:, 1]


class Rules:
    """All rules of one search.

    Args:
        shortest: int64 (N,), tokens that an output must have.
        prefixes: int64 (N, P), the tokens that outputs begin with, -1 behind them.
        ban: phrases that no output may hold; a prefix may.
        no_repeat_ngram: no output holds the same n tokens twice; 0: it may.
        constraints: what an output must hold before it may end.
        sentence: int64 (U,), the sentence of each beam.
    """

    def __init__(self, shortest: Tensor, prefixes: Tensor, ban: Sequence[Ids], no_repeat_ngram: int,
                 constraints: Constraints | None, sentence: Tensor):
        self.shortest, self.prefixes, self.constraints = shortest, prefixes, constraints
        self.no_repeat_ngram, self.sentence, self.until = no_repeat_ngram, sentence, int(shortest.max())
        never = [*NEVER, *(int(phrase[0]) for phrase in ban if len(phrase) == 1)]
        self.never = torch.tensor(never, device=shortest.device)
        self.ban = [torch.as_tensor(phrase, device=shortest.device) for phrase in ban if len(phrase) > 1]

    def apply(self, log_p: Tensor, paths: Paths) -> None:
        """Rule out, in place, what may not follow the paths: log_p float (R, V)."""
        length = paths.length
        given = self._given(log_p, paths) if length < self.prefixes.shape[1] else None
        log_p.index_fill_(1, self.never, -torch.inf)
        if length + 1 < self.until:
            log_p[self.shortest[self.sentence[paths.unit]] > length + 1, EOS] = -torch.inf
        if paths.met is not None and self.constraints is not None:
            log_p[~self.constraints.complete(paths), EOS] = -torch.inf
        for phrase in self.ban:
            if length >= len(phrase) - 1:
                begun = (paths.tokens[:, length + 2 - len(phrase):] == phrase[:-1]).all(1)
                log_p[begun, phrase[-1]] = -torch.inf
        if 0 < self.no_repeat_ngram <= length:
            forbid_repeats(log_p, paths.tokens[:, 1:], self.no_repeat_ngram)
        if given is not None:
            rows, tokens, values = given
            log_p[rows] = -torch.inf
            log_p[rows, tokens] = values

    def _given(self, log_p: Tensor, paths: Paths) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose prefix goes on, its next token in each, and that token's log-probability."""
        tokens = self.prefixes[self.sentence[paths.unit], paths.length]
        rows = (tokens >= 0).nonzero().squeeze(1)
        return rows, tokens[rows], log_p[rows, tokens[rows]]


def forbid_repeats(log_p: Tensor, tokens: Tensor, n: int) -> None:
    """Rule out what would complete n tokens that stand there already: log_p float (R, V), tokens int64 (R, t)."""
    grams = tokens.unfold(1, n, 1)  # (R, t - n + 1, n)
    last = tokens[:, None, tokens.shape[1] - n + 1:]  # (R, 1, n - 1)
    rows, places = (grams[:, :, :-1] == last).all(-1).nonzero(as_tuple=True)
    log_p[rows, grams[rows, places, -1]] = -torch.inf
