"""Phrases that an output must hold: how far each hypothesis has come, as tables that all rows look up at once.

N sentences, R hypotheses, C phrases of a sentence at most, L tokens of a phrase at most, W different tokens in a
sentence's phrases at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.data.batches import Ids
from regard.decode.hypotheses import Paths


class Constraints:
    """Counts, for each phrase, how many of its first tokens stand at the end of a hypothesis; once it stands there
    whole, the count stays. Phrases may overlap in an output, and a phrase asked for twice is met by one.

    Args:
        phrases: of each sentence, none, one or more; a phrase has at least one token.
        sentence: int64 (U,), the sentence of each beam.
    """

    def __init__(self, phrases: Sequence[Sequence[Ids]], sentence: Tensor):
        device, self.sentence = sentence.device, sentence
        N, C = len(phrases), max(map(len, phrases))
        L = max(len(phrase) for each in phrases for phrase in each)
        letters = [sorted({int(token) for phrase in each for token in phrase}) for each in phrases]
        W = max(map(len, letters))
        self.letters = torch.full((N, W), -1)
        self.lengths = torch.zeros(N, C, dtype=torch.int64)
        self.ahead = torch.full((N, C, L + 1), -1)  # the token that leads on from each count
        self.table = torch.zeros(N, C, L + 1, W + 1, dtype=torch.int64)  # the count after each token, "other" last
        for n, each in enumerate(phrases):
            self.letters[n, : len(letters[n])] = torch.tensor(letters[n], dtype=torch.int64)
            for c, phrase in enumerate(each):
                ids = [int(token) for token in phrase]
                self.lengths[n, c] = len(ids)
                self.ahead[n, c, : len(ids)] = torch.tensor(ids)
                self.table[n, c, len(ids)] = len(ids)
                for count in range(len(ids)):
                    after = [_count(ids, [*ids[:count], letter]) for letter in letters[n]]
                    self.table[n, c, count, : len(after)] = torch.tensor(after)
        for name in ("letters", "lengths", "ahead", "table"):
            setattr(self, name, getattr(self, name).to(device))

    def start(self, paths: Paths) -> Tensor:
        """Counts before the first token: int64 (R, C), all 0."""
        return torch.zeros_like(self.lengths[self.sentence[paths.unit]])

    def advance(self, unit: Tensor, met: Tensor, tokens: Tensor) -> Tensor:
        """The counts, int64 (…, C), after one more token of each, int64 (…,); unit int64 (…,)."""
        n = self.sentence[unit]
        same = self.letters[n] == tokens[..., None]  # (…, W)
        letter = torch.where(same.any(-1), same.byte().argmax(-1), same.shape[-1])
        phrase = torch.arange(met.shape[-1], device=met.device)
        return self.table[n[..., None], phrase, met, letter[..., None]]

    def next_tokens(self, unit: Tensor, met: Tensor) -> Tensor:
        """The token that each phrase waits for, int64 (R, C); -1 where it is met."""
        return self.ahead[self.sentence[unit]].gather(2, met[:, :, None]).squeeze(2)

    def complete(self, paths: Paths) -> Tensor:
        """Whether each row holds all its phrases: bool (R,)."""
        assert paths.met is not None
        return (paths.met == self.lengths[self.sentence[paths.unit]]).all(1)


def _count(phrase: list[int], tokens: list[int]) -> int:
    """How many tokens at the end of `tokens` are the first of the phrase, at most."""
    return next(count for count in range(min(len(phrase), len(tokens)), -1, -1)
                if tokens[len(tokens) - count:] == phrase[:count])
