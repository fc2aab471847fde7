"""A mixture of experts: Megatron's layer, and the load-balancing loss of its router.

**The loss.** For one sequence of n tokens in one layer, with E experts of which each token takes k: f_i = (times expert i was chosen)
/ (k n) is the load of expert i, P_i the mean over the tokens of its router probability (softmax over all E), and the loss is
E * sum_i f_i P_i: 1 when the load is even, at most E / k. It is added over the layers, averaged over **the sequences of the minibatch**
(all data-parallel ranks, all microbatches), and added to the loss with the coefficient `optimizer.router_balance`.
Megatron calls it `seq_aux_loss` (Fedus et al. 2021, eq. 4, over a sequence instead of a batch, as in DeepSeek-V3, section 2.1.2). Its
`aux_loss`, over the tokens of a microbatch, is another function for every way to cut a minibatch; this one is not: a sequence counts
the same alone, among others, padded, packed, or spread over ranks. Padding counts nowhere. The default coefficient is 0: Hugging Face
adds this loss only on request, and RL trainers turn it off, since it pulls the policy away from what the reward asks for.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megarl.metrics import Metric, Metrics
from megarl.parallel import device, groups
from megarl.parallel.collectives import sum_over
from megarl.parallel.layout import ParallelLayout

device.prepare()

from megatron.core.transformer import TransformerConfig  # noqa: E402  (the host is prepared first)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402


class BalancedRouter(TopKRouter):
    """Megatron's router, which also adds the gradient of the load-balancing loss while it learns.

    `balance_weight` is the coefficient divided by the sequences of the minibatch: `balance` sets it before every step, and
    `balance_metrics` reads the loss after it. `sequence_of` i64[S, B] numbers the sequence of each position, -1 for padding.
    """

    balance_weight: float = 0.0
    balance_loss: Tensor | float = 0.0  # this rank's part of the losses of all sequences since `balance`
    sequence_of: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """hidden states [S, B, H] -> router logits f32[S, B, E]; Megatron's own product in float32 needs Transformer Engine."""
        return super().gating(input) if device.has_transformer_engine() else F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits f32[S, B, E] -> weights f32[S B, E] of the chosen experts (0 elsewhere), and bool[S B, E] which ones they are."""
        weights, chosen = super().routing(logits, padding_mask)
        if self.balance_weight > 0 and self.training and torch.is_grad_enabled():
            assert self.sequence_of is not None, "nobody said which position belongs to which sequence"
            scores = logits.flatten(0, 1).softmax(-1, dtype=torch.float32)
            loss = sequence_balance(scores, chosen, self.sequence_of.flatten(), self.topk, self.tp_cp_group)
            self.balance_loss = self.balance_loss + loss.detach()
            weights = MoEAuxLossAutoScaler.apply(weights, self.balance_weight * loss)  # adds the loss's gradient in backward
        return weights, chosen


class HostDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher on a CPU host, where nothing is copied from a device; that copy is where it makes numbers of tensors."""

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """bool[S B, E] choices of this rank's tokens -> i64[local experts] tokens that each expert of this rank gets."""
        result = super().preprocess(routing_map)
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            if isinstance(splits := getattr(self, name), Tensor):
                setattr(self, name, splits.numpy())
        return result

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        return tokens_per_expert


class MixtureLayer(MoELayer):
    """Megatron's layer, for which `padding_mask` is the numbers of the positions' sequences, i64[B, S], -1 for padding.

    Megatron hands it to every layer beside the activations, so a layer computed again in backward sees those of its own microbatch.
    """

    def __init__(self, config: TransformerConfig, submodules: MoESubmodules, layer_number: int | None = None):
        super().__init__(config, submodules, layer_number)
        if not device.is_cuda():
            self.token_dispatcher = HostDispatcher(self.num_local_experts, self.local_expert_indices, config, get_default_pg_collection())

    def forward(self, hidden_states: Tensor, intermediate_tensors: tuple | None = None, padding_mask: Tensor | None = None) -> tuple:
        self.router.sequence_of = None if padding_mask is None else padding_mask.t()
        return super().forward(hidden_states, intermediate_tensors)


def sequence_balance(
    scores: Tensor, chosen: Tensor, sequence_of: Tensor, experts_per_token: int, group: dist.ProcessGroup | None
) -> Tensor:
    """This rank's part of the sum over sequences of E * sum_i f_i P_i: the ranks of `group`, each with some of the tokens, add up to it.

    Entered by every rank of `group`. Args: `scores` f32[N, E] router probabilities, `chosen` bool[N, E], `sequence_of` i64[N] numbers
    from 0, -1 for tokens that do not count. Differentiable in `scores`.
    """
    num_sequences = (sequence_of.max() + 1).clamp(min=1)
    _reduce(num_sequences, group, dist.ReduceOp.MAX)
    counts_here = sequence_of >= 0
    rows, scores = sequence_of[counts_here], scores[counts_here]
    empty = scores.new_zeros(int(num_sequences), scores.shape[1])
    load = empty.index_add(0, rows, chosen[counts_here].to(scores.dtype))  # k n f_i
    _reduce(load, group, dist.ReduceOp.SUM)
    num_tokens = (load.sum(1, keepdim=True) / experts_per_token).clamp(min=1)
    mean_scores = empty.index_add(0, rows, scores) / num_tokens
    return scores.shape[1] * (load / (experts_per_token * num_tokens) * mean_scores).sum()


def balance(chunks: Sequence[torch.nn.Module], weight: float) -> None:
    """Give every router of these chunks the factor of a sequence's load-balancing loss, and start to add the losses up."""
    for router in _routers(chunks):
        router.balance_weight, router.balance_loss = weight, 0.0


def balance_metrics(chunks: Sequence[torch.nn.Module], num_sequences: int, layout: ParallelLayout) -> Metrics:
    """`router_balance`: the load-balancing loss since `balance`, mean over layers and sequences, of the layers of this stage.

    `num_sequences` of this replica. Entered by every rank of the replica's stage, which get equal metrics; stages are added.
    """
    routers = list(_routers(chunks))
    total = torch.as_tensor(sum(router.balance_loss for router in routers), dtype=torch.float32, device=device.device())
    for axis in ("tp", "cp"):  # each rank has counted its own tokens
        total = sum_over(total, groups.group(layout, axis))
    return Metrics({"router_balance": Metric(total.item(), float(num_sequences * len(routers)))})


def _routers(chunks: Sequence[torch.nn.Module]) -> Iterator[BalancedRouter]:
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, BalancedRouter))


def _reduce(tensor: Tensor, group: dist.ProcessGroup | None, operation: dist.ReduceOp) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
