"""R-Drop (Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks"): what two passes of the same batch with
other dropout say shall agree."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from regard.data.batches import Batch
from regard.model.pointer import mixed_log_probabilities
from regard.model.rows import whole
from regard.model.seq2seq import Seq2Seq
from regard.training.objective import Guide, attention_loss, total, wanted_taps

PIECE = 256
"""Rows whose log-probabilities, of both passes, exist at one time."""


class _AgreeingCrossEntropy(torch.autograd.Function):
    """Half of eq. 4 over features @ weight.T of two passes, whose gradient is made piece by piece.

    Half, so that the loss is that of one pass and the learning rate means what it meant; α is the paper's:

        (1/2) (CE(p) + CE(q)) + (α/4) (KL(p || q) + KL(q || p)),    KL(p || q) + KL(q || p) = Σ (p - q) (log p - log q)

    With r = log p - log q, its gradient by the logits of p is p (1/2 + (α/4) (1 + r - Σ p r)) - (α/4) q, less what the
    targets ask for, added at the end: (1/2) ((1 - smoothing) at the right token + smoothing / V everywhere).
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, targets: Tensor, alpha: float, smoothing: float,
        kind: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        w, right, quarter, count = weight.to(kind), targets[:, None], alpha / 4, len(targets)
        x, y = passes = [whole(each.to(kind)) for each in (first, second)]
        grads = [torch.empty_like(each, dtype=weight.dtype) for each in passes]
        grad_weight = torch.zeros_like(weight)
        right_logits, surprise, apart = (weight.new_zeros(()) for _ in range(3))
        for start in range(0, len(x), PIECE):
            rows = slice(start, start + PIECE)
            logits = [(each[rows] @ w.T).to(weight.dtype) for each in passes]
            real = slice(0, count - start)
            right_logits += sum(each[real].gather(1, right[rows]).sum() for each in logits)
            log_p, log_q = (torch.log_softmax(each, dim=-1) for each in logits)
            surprise -= sum(each[real].gather(1, right[rows]).sum() for each in (log_p, log_q))
            ratio, p, q = log_p - log_q, log_p.exp_(), log_q.exp_()
            for own, other, sign, part, grad in ((p, q, 1, x, grads[0]), (q, p, -1, y, grads[1])):
                divergence = sign * torch.linalg.vecdot(own, ratio)[:, None]  # KL(own || other)
                apart += divergence.sum()
                by_logits = torch.add(0.5 + quarter * (1 - divergence), ratio, alpha=sign * quarter)
                by_logits = by_logits.mul_(own).sub_(other, alpha=quarter).to(kind)
                grad[rows] = by_logits @ w
                grad_weight += by_logits.T @ part[rows]
        mean, both = weight.mean(0), first.to(weight.dtype) + second.to(weight.dtype)
        # The mean of log p over the vocabulary is that of the logits less log Z, and log Z = logit - log p.
        even = both.sum(0) @ mean - right_logits - surprise
        grads = [grad[:count] for grad in grads]
        for grad in grads:
            grad -= 0.5 * ((1 - smoothing) * weight[targets] + smoothing * mean)
        grad_weight.index_add_(0, targets, both, alpha=0.5 * (smoothing - 1))
        grad_weight -= 0.5 * smoothing / len(weight) * both.sum(0)
        ctx.save_for_backward(*(grad.to(first.dtype) for grad in grads), grad_weight)
        surprise = surprise / 2
        ctx.mark_non_differentiable(surprise)
        return (1 - smoothing) * surprise - smoothing / 2 * even + quarter * apart, surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * grads[0] for grad in ctx.saved_tensors), None, None, None, None


def agreeing_cross_entropy(
    first: Tensor, second: Tensor, weight: Tensor, targets: Tensor, alpha: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Half of eq. 4, and the mean cross-entropy of both passes without smoothing; summed over rows, nats, scalars.

    Args:
        first: float (N, D), features of the first pass.
        second: float (N, D), of the second.
        weight: float (V, D), the output table.
        targets: int64 (N,).
        alpha: α, how much their difference weighs.
        smoothing: share of each target spread evenly over the vocabulary.
    """
    device = first.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
    with torch.autocast(device, enabled=False):
        loss, surprise = _AgreeingCrossEntropy.apply(  # type: ignore[no-untyped-call]
            first, second, weight, targets, alpha, smoothing, kind)
    return loss, surprise


def copying_agreeing_cross_entropy(
    first: Tensor, second: Tensor, weight: Tensor, batch: Batch, alpha: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """As `agreeing_cross_entropy`, of a decoder that copies, over a batch's real target tokens.

    Some sentences at a time, whose probabilities are not kept but made anew for their gradient.
    """
    loss, surprise = weight.new_zeros(()), weight.new_zeros(())
    sentences = max(1, PIECE // first.shape[1])
    for start in range(0, len(batch), sentences):
        piece = slice(start, start + sentences)
        right, even, apart = checkpoint(
            _copying_piece, first[piece], second[piece], weight, batch.source[piece], batch.target_out[piece],
            batch.target_mask[piece], use_reentrant=False)
        loss = loss - (1 - smoothing) * right - smoothing * even + alpha / 4 * apart
        surprise = surprise - right.detach()
    return loss, surprise


def _copying_piece(
    first: Tensor, second: Tensor, weight: Tensor, source: Tensor, target: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed over the real positions: the log-probability of the right token and the mean over the vocabulary, each the
    mean of both passes, and how far the two are apart."""
    log_p, log_q = (mixed_log_probabilities(each, weight, source) for each in (first, second))
    mean, apart = (log_p + log_q) / 2, ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    right = mean.gather(-1, target[:, :, None]).squeeze(-1)
    return total(right, mask), total(mean.mean(-1), mask), total(apart, mask)


def r_drop_loss_of(
    model: Seq2Seq, batch: Batch, alpha: float, smoothing: float = 0.0, coverage: float = 0.0,
    guide: Guide | None = None
) -> tuple[Tensor, Tensor]:
    """As `regard.training.objective.loss_of`, of two passes over the batch, each with dropout of its own.

    Args:
        model: in training mode.
        batch: sources and targets.
        alpha: α, how much their difference weighs.
        smoothing: share of each target spread evenly over the vocabulary.
        coverage: weight of `coverage_loss`, the mean of both passes.
        guide: weight and place of `alignment_loss`, the mean of both passes.
    """
    taps = [wanted_taps(batch, coverage, guide) for _ in range(2)]
    first, second = ((model if model.copies else model.real)(batch, each) for each in taps)
    if model.copies:
        loss, surprise = copying_agreeing_cross_entropy(first, second, model.output, batch, alpha, smoothing)
    else:
        targets = batch.real(batch.target_out)
        loss, surprise = agreeing_cross_entropy(first, second, model.output, targets, alpha, smoothing)
    for each in taps:
        if each is not None:
            loss = loss + attention_loss(each, batch, coverage, guide) / 2
    return loss, surprise
