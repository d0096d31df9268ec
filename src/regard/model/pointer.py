"""The pointer-generator of See et al. (2017): each token is generated from the vocabulary or copied from the source."""

import torch
from torch import Tensor


def mixed_log_probabilities(features: Tensor, output: Tensor, source: Tensor) -> Tensor:
    """log P(w) = log(p_gen P_vocab(w) + (1 - p_gen) Σ over positions of w in the source of their attention), eq. 9.

    Args:
        features: float (B, T, D + 1 + S) of a decoder that copies: its hidden values, the logit of its gate p_gen, and
            its attention over the source.
        output: float (V, D), the output table.
        source: int64 (B, S), tokens of the vocabulary that both sides share.

    Returns:
        float32 or wider (B, T, V), nats.
    """
    width = output.shape[1]
    hidden, gate, weights = features[..., :width], features[..., width : width + 1], features[..., width + 1 :]
    logits = torch.nn.functional.linear(hidden.to(output.dtype), output)  # attention may be wider
    logits, gate, weights = (x if x.dtype == torch.float64 else x.float() for x in (logits, gate, weights))
    generated = torch.nn.functional.logsigmoid(gate) + torch.log_softmax(logits, dim=-1)
    copied = torch.zeros_like(generated).scatter_add(
        -1, source[:, None, :].expand(-1, features.shape[1], -1), torch.sigmoid(-gate) * weights)
    tiny = torch.finfo(copied.dtype).tiny
    return torch.logaddexp(generated, copied.clamp(min=tiny).log())
