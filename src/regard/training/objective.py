"""What training makes smaller: the cross-entropy of each target token, with label smoothing.

The projection to the vocabulary is folded in and worked off in pieces, so that no tensor of (B, T, V) ever exists.
"""

from typing import Any

import torch
from torch import Tensor

from regard.data.batches import Batch
from regard.model.seq2seq import Seq2Seq

PIECE = 512
"""Rows whose logits exist at one time: 512 x 10,000 float32 are 20 MB."""


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of features @ weight.T, whose gradient is made piece by piece while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_features = torch.empty_like(features) if wanted else None
        grad_weight = torch.zeros_like(weight) if wanted else None
        loss, surprise = features.new_zeros(()), features.new_zeros(())
        # Two buffers serve all pieces: memory that is given back is faulted in again page by page, which costs more
        # than the arithmetic.
        logits, buffer = (features.new_empty(min(PIECE, len(features)), len(weight)) for _ in range(2))
        for start in range(0, len(features), PIECE):
            piece, right = features[start : start + PIECE], targets[start : start + PIECE, None]
            rows = len(piece)
            torch.mm(piece, weight.T, out=logits[:rows])
            log_p = torch.log_softmax(logits[:rows], dim=-1, out=buffer[:rows])
            right_log_p = log_p.gather(1, right)
            surprise -= right_log_p.sum()
            if smoothing:
                loss -= smoothing * log_p.mean(-1).sum()
            if grad_features is None or grad_weight is None:
                continue
            # d loss / d logits = softmax - (1 - smoothing) at the right token - smoothing / V everywhere.
            grad = log_p.exp_().sub_(smoothing / weight.shape[0])
            grad.scatter_add_(1, right, torch.full_like(right_log_p, smoothing - 1))
            torch.mm(grad, weight, out=grad_features[start : start + PIECE])
            grad_weight.addmm_(grad.T, piece)
        loss += (1 - smoothing) * surprise
        ctx.save_for_backward(grad_features, grad_weight)
        ctx.mark_non_differentiable(surprise)
        return loss, surprise

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features * grads[0], grad_weight * grads[0], None, None


def cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy (Szegedy et al. 2016, section 7) of logits = features @ weight.T, summed over rows.

    Args:
        features: float (N, D).
        weight: float (V, D), the output table.
        targets: int64 (N,).
        smoothing: share of each target spread evenly over the vocabulary.

    Returns:
        the loss to descend, and the plain cross-entropy without smoothing, for people to read; both nats, scalars.
    """
    loss, surprise = _ProjectedCrossEntropy.apply(features, weight, targets, smoothing)  # type: ignore[no-untyped-call]
    return loss, surprise


def loss_of(model: Seq2Seq, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss and the plain cross-entropy of a batch, each summed over its real target tokens, in nats."""
    features = model(batch)
    return cross_entropy(features[batch.target_mask], model.output, batch.target_out[batch.target_mask], smoothing)
