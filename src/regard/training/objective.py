"""What training makes smaller: the cross-entropy of each target token, with label smoothing.

The projection to the vocabulary is folded in and worked off in pieces, so that no tensor of (B, T, V) ever exists.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from regard.config_train import TrainConfig
from regard.data.batches import Batch
from regard.model.pointer import mixed_log_probabilities
from regard.model.rnn import RNNDecoder
from regard.model.rows import whole
from regard.model.seq2seq import Seq2Seq
from regard.model.state import Taps

PIECE = 512
"""Rows whose logits exist at one time: 512 x 10,000 bfloat16 are 10 MB. Their products, 128 wide, run at 89% of the
peak, those of 1,024 rows at 81% (docs/log.md, 2026-11-21)."""
GPU_PIECE = 1 << 27
"""Logits that exist at one time on a GPU: 256 MB in bfloat16. Small pieces would be over before the next was asked for
(reckoned from a dozen calls of some 4 us for each, not measured)."""
SUMMED = 8
"""Pieces whose parts in the table's gradient are summed in bfloat16, before their sum is added to the others' in
float32. The gradient's error was 0.25% with that, and 0.24% without (docs/log.md, 2026-11-30)."""


class _TableGradient:
    """Σ pᵀ x over pieces, (V, D), in the weight's type; each product may be made in a narrower one."""

    def __init__(self, weight: Tensor, kind: torch.dtype):
        self.total = torch.zeros_like(weight)
        self.some = self.total if kind == weight.dtype else torch.empty_like(weight, dtype=kind)
        self.pieces = 0  # in `some`, and not yet in the total

    def add(self, p: Tensor, x: Tensor) -> None:
        """Add the product of a piece, inside the product."""
        kept = self.pieces > 0 or self.some is self.total
        torch.addmm(self.some, p.T, x, beta=int(kept), out=self.some)
        self.pieces += 1
        if self.pieces == SUMMED:
            self.sum()

    def sum(self) -> Tensor:
        """What all pieces so far come to."""
        if self.pieces and self.some is not self.total:
            self.total += self.some
        self.pieces = 0
        return self.total


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of features @ weight.T, whose gradient is made piece by piece while the probabilities are at hand.

    d loss / d logits = p - (1 - smoothing) at the right token - smoothing / V everywhere. Only p is as large as the
    logits: what the other two terms come to in the gradients is added at the end, and in full precision.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, smoothing: float, kind: torch.dtype,
        learns: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = learns and any(ctx.needs_input_grad[:2])
        w, count, features = weight.to(kind), len(features), features.to(weight.dtype)
        x, right = whole(features.to(kind)), whole(targets[:, None])
        grad_features = torch.empty_like(x, dtype=weight.dtype) if wanted else None
        grad_weight = _TableGradient(weight, kind) if wanted else None
        right_logits, right_log_p = (torch.empty_like(right, dtype=weight.dtype) for _ in range(2))
        # One buffer serves all pieces: memory that is given back is faulted in again page by page, which costs more
        # than the arithmetic.
        piece = max(PIECE, GPU_PIECE // len(w)) if x.is_cuda else PIECE
        buffer = x.new_empty(min(piece, len(x)), len(w))
        for start in range(0, len(x), piece):
            rows = slice(start, start + piece)
            logits = torch.mm(x[rows], w.T, out=buffer[: len(x[rows])])
            right_logits[rows] = logits.gather(1, right[rows]).to(weight.dtype)
            p = torch.softmax(logits, dim=-1, out=logits)
            right_p = p.gather(1, right[rows]).to(weight.dtype)
            right_log_p[rows] = right_p.clamp_min(torch.finfo(weight.dtype).tiny).log()
            if grad_features is not None and grad_weight is not None:
                grad_features[rows] = p @ w
                grad_weight.add(p, x[rows])
        surprise, mean = -right_log_p[:count].sum(), weight.mean(0)
        # The mean of log p over the vocabulary is that of the logits less log Z, and log Z = logit - log p.
        even = features.sum(0) @ mean - right_logits.sum() - surprise
        if grad_features is not None and grad_weight is not None:
            grad_features = grad_features[:count]
            grad_features -= (1 - smoothing) * weight[targets] + smoothing * mean
            table = grad_weight.sum().index_add_(0, targets, features, alpha=smoothing - 1)
            table -= smoothing / len(weight) * features.sum(0)
            ctx.save_for_backward(grad_features, table)
        ctx.mark_non_differentiable(surprise)
        return (1 - smoothing) * surprise - smoothing * even, surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features * grads[0], grad_weight * grads[0], None, None, None, None


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
    device = features.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    with torch.autocast(device, enabled=False):
        loss, surprise = _ProjectedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            features, weight, targets, smoothing, kind, torch.is_grad_enabled())
    return loss, surprise


def copying_cross_entropy(
    features: Tensor, weight: Tensor, batch: Batch, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `cross_entropy`, of a decoder that copies (`regard.model.pointer`), over a batch's real target tokens.

    Some sentences at a time, whose probabilities are not kept but made anew for their gradient.
    """
    loss, surprise = features.new_zeros(()), features.new_zeros(())
    sentences = max(1, PIECE // features.shape[1])
    for start in range(0, len(batch), sentences):
        piece = slice(start, start + sentences)
        mean, right = checkpoint(_copying_piece, features[piece], weight, batch.source[piece], batch.target_out[piece],
                                 batch.target_mask[piece], use_reentrant=False)
        loss = loss - smoothing * mean - (1 - smoothing) * right
        surprise = surprise - right.detach()
    return loss, surprise


def _copying_piece(
    features: Tensor, weight: Tensor, source: Tensor, target: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities summed over the real positions: the mean over the vocabulary, and that of the right token."""
    log_p = mixed_log_probabilities(features, weight, source)
    right = log_p.gather(-1, target[:, :, None]).squeeze(-1)
    return total(log_p.mean(-1), mask), total(right, mask)


def total(x: Tensor, mask: Tensor) -> Tensor:
    """The sum of x where the mask of its shape is True; a GPU is not asked how often it is."""
    return x.masked_fill(~mask, 0.0).sum()


def coverage_loss(weights: Tensor, mask: Tensor) -> Tensor:
    """What attention gives to places that it has looked at before, See et al. (2017), eq. 12: Σ_t Σ_i min(a_ti, c_ti).

    Args:
        weights: float (B, T, S), attention; c_t is the sum of its rows before t.
        mask: bool (B, T), True where there is a real target token.
    """
    before = weights.cumsum(1) - weights
    return total(torch.minimum(weights, before).sum(-1), mask)


def alignment_loss(weights: Tensor, links: Tensor) -> Tensor:
    """How far attention is from given links, guided alignment of Chen et al. (2016): -Σ_t Σ_s A_ts log α_ts.

    The links of a target position weigh 1 together; a position without links asks for nothing.

    Args:
        weights: float (B, T, S), attention; or (B, H, T, S), of which the first head is guided, as one is by Garg et
            al. (2019).
        links: int64 (L, 3), row, target position and source position, none of them twice.
    """
    weights = weights[:, 0] if weights.dim() == 4 else weights
    row, target, source = links.unbind(1)
    linked, place = weights[row, target, source], row * weights.shape[1] + target
    linked = linked.to(torch.promote_types(linked.dtype, torch.float32))
    of_place = linked.new_zeros(weights.shape[:2].numel()).index_add(0, place, torch.ones_like(linked))
    # What a local window does not look at has a weight of 0, and no gradient could change that.
    return -(linked.clamp_min(torch.finfo(linked.dtype).tiny).log() / of_place[place]).sum()


class Guide(NamedTuple):
    """What guides attention: λ, the weight of `alignment_loss`, and the name in taps of the attention it guides."""

    weight: float
    name: str = "cross.0"

    @classmethod
    def of(cls, model: Seq2Seq, settings: TrainConfig) -> "Guide | None":
        """As the settings say, by default the last layer but one (Garg et al. 2019); None: nothing is guided."""
        if not settings.guided_alignment:
            return None
        layers = 1 if isinstance(model.decoder, RNNDecoder) else len(model.decoder.layers)
        return cls(settings.guided_alignment, f"cross.{(settings.guided_layer or max(1, layers - 1)) - 1}")


def wanted_taps(batch: Batch, coverage: float, guide: Guide | None) -> Taps | None:
    """Where attention is to leave its weights when the loss asks something of them; None: it asks nothing."""
    guided = guide is not None and batch.alignment is not None and len(batch.alignment)
    return Taps() if coverage or guided else None


def attention_loss(taps: Taps, batch: Batch, coverage: float, guide: Guide | None) -> Tensor:
    """What the loss asks of attention, weighted and summed over a batch.

    Args:
        taps: the attention weights.
        batch: sources, targets and the links between them.
        coverage: weight of `coverage_loss`.
        guide: weight and place of `alignment_loss`; None: nothing is guided.
    """
    loss = batch.source.new_zeros((), dtype=next(iter(taps.values())).dtype)
    if coverage:
        loss = loss + coverage * coverage_loss(taps["cross.0"], batch.target_mask)
    if guide is not None and batch.alignment is not None:
        loss = loss + guide.weight * alignment_loss(taps[guide.name], batch.alignment)
    return loss


def loss_of(
    model: Seq2Seq, batch: Batch, smoothing: float = 0.0, coverage: float = 0.0, guide: Guide | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and the plain cross-entropy of a batch, each summed over its real target tokens, in nats.

    Args:
        model: in training or eval mode.
        batch: sources and targets.
        smoothing: share of each target spread evenly over the vocabulary.
        coverage: weight of `coverage_loss` in the loss (See et al. 2017, eq. 13).
        guide: weight and place of `alignment_loss` in it; None: attention is not guided.
    """
    taps = wanted_taps(batch, coverage, guide)
    if model.copies:
        loss, surprise = copying_cross_entropy(model(batch, taps), model.output, batch, smoothing)
    else:
        targets = batch.real(batch.target_out)
        loss, surprise = cross_entropy(model.real(batch, taps), model.output, targets, smoothing)
    if taps is not None:
        loss = loss + attention_loss(taps, batch, coverage, guide)
    return loss, surprise
