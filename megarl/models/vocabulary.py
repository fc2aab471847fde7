"""Log-probability and entropy of tokens under an output layer whose vocabulary is split over tensor-parallel ranks.

Axis letters: N tokens, H hidden width, V vocabulary columns of this rank. No rank ever holds more than a slice of the logits: both
passes walk over the tokens in slices, and backward computes each slice's logits again (or, where backward follows at once and there is
one slice, finds them kept). Forward costs two all-reduces a slice (of N and 3 N numbers), backward none.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

HIDDEN_LOGIT = -1e30  # of padded columns and barred tokens: finite, so that probability 0 times logit is 0 and not nan


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns a rank holds and how it works through them.

    `first_column` is the vocabulary index of the rank's first column, `vocab_size` the number of real tokens (columns beyond are padding),
    `temperature` divides the logits, `rows_per_slice` bounds the tokens whose logits exist at once, `group` sums over the tensor-parallel
    ranks (None: this rank holds the whole vocabulary). `keeps_slice` True: a single slice's logits stay until backward, which saves a
    quarter of the work; only for callers that go backward before they go forward again, so that no second slice exists meanwhile.
    `barred_ids` are tokens that those cannot be which a caller says so of.
    """

    first_column: int
    vocab_size: int
    temperature: float
    rows_per_slice: int
    group: dist.ProcessGroup | None = None
    keeps_slice: bool = False
    barred_ids: tuple[int, ...] = ()


def vocabulary_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, with_entropy: bool, barred: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and, when asked, the entropy (nats) of its distribution; differentiable in both.

    Entered by every rank of `shard.group` with equal `hidden` and `targets`; the gradient of `hidden` is this rank's part, to be summed
    over the group. Shapes: `hidden` [N, H], `weight` [V, H], `targets` i64[N] -> two f32[N] (zeros for the entropy when not asked).
    Where `barred` bool[N] is True the distribution is the one over all tokens but `shard.barred_ids`.
    """
    barred = barred if shard.barred_ids else None
    return _VocabularyStats.apply(hidden, weight, targets, shard, with_entropy, barred)


class _VocabularyStats(torch.autograd.Function):
    """d logprob / d z = onehot - p and d entropy / d z = -p (log p + entropy), with z the tempered logits."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, with_entropy: bool, barred: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logprobs, log_total, entropy = torch.zeros((3, len(hidden)), dtype=torch.float32, device=hidden.device)
        slices = _slices(len(hidden), shard.rows_per_slice)
        keeps = shard.keeps_slice and len(slices) == 1 and any(ctx.needs_input_grad)
        kept = ()
        for rows in slices:
            logits = _tempered_logits(hidden[rows], weight, shard, None if barred is None else barred[rows])
            top = _reduced(logits.amax(1), shard, dist.ReduceOp.MAX)
            logits -= top[:, None]
            local, is_mine = _local_targets(targets[rows], weight, shard)
            chosen = logits.gather(1, local[:, None]).squeeze(1) * is_mine
            unnormalised = logits.exp()
            total = unnormalised.sum(1)
            spread = unnormalised.mul_(logits).sum(1) if with_entropy else torch.zeros_like(top)
            total, chosen, spread = _reduced(torch.stack([total, chosen, spread]), shard, dist.ReduceOp.SUM)
            logprobs[rows] = chosen - total.log()
            log_total[rows] = top + total.log()
            if keeps:
                kept = (logits, total.log())
            if with_entropy:
                entropy[rows] = total.log() - spread / total
        ctx.save_for_backward(hidden, weight, targets, log_total, entropy, *kept)
        ctx.shard, ctx.with_entropy, ctx.barred = shard, with_entropy, barred
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, targets, log_total, entropy, *kept = ctx.saved_tensors
        shard, barred = ctx.shard, ctx.barred
        if not ctx.with_entropy:
            grad_entropy = None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_total)
        slices = _slices(len(hidden), shard.rows_per_slice)
        grad_hidden = torch.empty_like(hidden)
        # one slice's product is the gradient; several are added in float32 so that the cut does not show in bf16
        grad_weight = torch.zeros_like(weight, dtype=torch.float32 if len(slices) > 1 else weight.dtype)
        for rows in slices:
            if kept:
                log_p = kept[0].sub_(kept[1][:, None])  # the graph is used up: nobody reads them again
            else:
                logits = _tempered_logits(hidden[rows], weight, shard, None if barred is None else barred[rows])
                log_p = logits.sub_(log_total[rows, None])
            p = log_p.exp()
            if grad_entropy is None:
                grad = p.mul_(-grad_logprobs[rows, None])
            else:
                log_p += entropy[rows, None]
                grad = p.mul_(log_p.mul_(grad_entropy[rows, None]).add_(grad_logprobs[rows, None]).neg_())
            local, is_mine = _local_targets(targets[rows], weight, shard)
            grad.scatter_add_(1, local[:, None], (grad_logprobs[rows] * is_mine)[:, None])
            grad = grad.div_(shard.temperature).to(weight.dtype)
            grad_hidden[rows] = (grad @ weight).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight += grad.t() @ hidden[rows].to(weight.dtype)
        return grad_hidden, grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None, None


def _slices(num_rows: int, rows_per_slice: int) -> list[slice]:
    return [slice(start, min(start + rows_per_slice, num_rows)) for start in range(0, num_rows, rows_per_slice)]


def _tempered_logits(hidden: Tensor, weight: Tensor, shard: VocabularyShard, barred: Tensor | None) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight).float()
    if shard.temperature != 1.0:
        logits.div_(shard.temperature)
    num_real = max(0, min(shard.vocab_size - shard.first_column, len(weight)))
    if num_real < len(weight):
        logits[:, num_real:] = HIDDEN_LOGIT
    here = [token - shard.first_column for token in shard.barred_ids if 0 <= token - shard.first_column < len(weight)]
    if barred is not None and here:
        logits[:, here] = logits[:, here].masked_fill(barred[:, None], HIDDEN_LOGIT)
    return logits


def _local_targets(targets: Tensor, weight: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where it lies elsewhere) and whether it lies here."""
    local = targets - shard.first_column
    is_mine = (local >= 0) & (local < len(weight))
    return torch.where(is_mine, local, 0), is_mine


def _reduced(tensor: Tensor, shard: VocabularyShard, operation: dist.ReduceOp) -> Tensor:
    if shard.group is not None and shard.group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=shard.group)
    return tensor
