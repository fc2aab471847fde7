"""Models whose head all pipeline stages share: the head's weight on every stage, and what each kind of head says about a share.

The last stage owns the weight. The other stages get it anew for every pass (one broadcast along the pipeline, a few milliseconds
against a step of seconds) and forget it afterwards: no copy that must be loaded, checkpointed or kept equal. Their gradients, float32, are
summed into the owner's once a step, before Megatron's reduction over data-parallel replicas. Where embedding and head are one
tensor, the first stage uses its embedding as the head's weight; Megatron's own sum of the embedding's and the owner's gradient
then sees each part once.

Axis letters as in `parallel.token_shards`; V vocabulary columns of this rank.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megarl.config import ParallelConfig
from megarl.models.head_choice import chosen_head, head_layers
from megarl.models.spec import ModelSpec, Role, padded_vocab, stage_layers
from megarl.models.vocabulary import VocabularyShard, vocabulary_stats
from megarl.parallel import context, device, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.schedule import StageCosts
from megarl.parallel.token_shards import Share, gathered_by_owner, owners_of_rows, owners_of_tokens
from megarl.records import ResponseLists, TensorRecord, TokenBatch

device.prepare()

from megatron.core import parallel_state  # noqa: E402  (the host is prepared first)
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region  # noqa: E402


class HeadReplica:
    """The head on one stage during one pass; see `parallel.token_shards.HeadReplica`. Built by every stage together."""

    def __init__(self, model: torch.nn.Module, layout: ParallelLayout, is_learning: bool):
        while hasattr(model, "module"):
            model = model.module
        self.spec, self.config = model.spec, model.config
        self._group, self._owner = groups.group(layout, "pp"), layout.ranks_along("pp")[-1]
        self._is_owner = layout.is_last_stage
        if self._is_owner:
            self.weight = model.output_weight()
        elif layout.is_first_stage and model.share_embeddings_and_output_weights:
            self.weight = model.output_weight().detach()
        else:
            rows = padded_vocab(model.spec.vocab_size, layout.tensor) // layout.tensor if model.role == "actor" else 1
            self.weight = torch.empty(rows, self.config.hidden_size, dtype=self.config.params_dtype, device=device.device())
        dist.broadcast(self.weight.detach(), src=self._owner, group=self._group)
        self._gradient = None
        if is_learning and not self._is_owner:
            self.weight.requires_grad_()
            self._gradient = torch.zeros_like(self.weight, dtype=torch.float32, requires_grad=False)

    def keep_gradient(self) -> None:
        """Adds what backward left at the weight in float32. The owner's gradient is kept by Megatron's DDP."""
        if not self._is_owner and self.weight.grad is not None:
            self._gradient += self.weight.grad
            self.weight.grad = None

    def reduce_gradient(self) -> None:
        """Adds every stage's gradient to the owner's. Called once a step, by every stage."""
        gradient = self.weight.main_grad if self._is_owner else self._gradient
        assert gradient.dtype == torch.float32, gradient.dtype
        dist.reduce(gradient, dst=self._owner, group=self._group)


@dataclass(frozen=True)
class StageSharing:
    """See `parallel.token_shards.Sharing`."""

    layout: ParallelLayout
    layers: tuple[int, ...]  # of each stage
    head_layers: float  # the output layer's forward, in layers
    recomputes_layers: bool

    def replica(self, model: torch.nn.Module, is_learning: bool) -> HeadReplica:
        """The head for one pass. Called by every stage."""
        return HeadReplica(model, self.layout, is_learning)

    def costs(self, selected: float, is_learning: bool) -> StageCosts:
        """Layer-forwards of each operation. A backward is two forwards."""
        share = self.head_layers * selected * (3 if is_learning else 1) / len(self.layers)
        backward = (3 if self.recomputes_layers else 2) if is_learning else 0
        return StageCosts(
            forward=tuple(map(float, self.layers)),
            head=(max(share, 1e-3),) * len(self.layers),
            backward=tuple(float(backward * layers) for layers in self.layers),
        )


def sharing_of(spec: ModelSpec, role: Role, parallel: ParallelConfig, layout: ParallelLayout) -> StageSharing | None:
    """How the stages share the head of this model; None where it stays on the last stage."""
    if chosen_head(parallel, role) == "last_stage":
        return None
    layers = tuple(stage_layers(spec.num_layers, layout.pipeline))
    return StageSharing(layout, layers, head_layers(spec, role), parallel.recompute == "full")


def owned_weight(replica: HeadReplica) -> Tensor:
    """The weight, whose gradient counts on one tensor-parallel rank where Megatron will sum it over them all."""
    is_summed = replica.config.sequence_parallel and parallel_state.get_tensor_model_parallel_rank() > 0
    return replica.weight.detach() if is_summed else replica.weight


@dataclass(frozen=True)
class _TokenShares:
    """Dealing for heads that say something about every token under `mask_field` of the rows; everywhere when it is None."""

    def deal(self, rows: Any, sequences: TokenBatch, holders: context.Holders, num_shares: int, turn: int) -> list[Share]:
        """The shares of one microbatch, by tokens or by whole rows. Dealt by tokens, every context-parallel rank's are dealt evenly."""
        mask = self.token_mask(rows, sequences)
        places = sequences.places().roll(1, dims=1)  # the one shift: a token is predicted by the position before it
        holder = holders.rank[places]
        if self.deals == "rows":
            owner = owners_of_rows(mask.sum(1), num_shares, turn)[:, None].expand_as(mask)
        else:
            owner = torch.zeros_like(places)
            for rank in range(holders.num_ranks):
                held = mask & (holder == rank)
                owner = torch.where(held, owners_of_tokens(held, num_shares), owner)
        own = torch.where(mask & (holder == holders.own_rank), owner, -1)
        positions = holders.row[places].flatten()
        return [
            Share(self._rows_of(rows, mask & (owner == number)), positions[targets], targets, tuple(mask.shape))
            for number, targets in enumerate(gathered_by_owner(own.flatten(), num_shares))
        ]

    def token_mask(self, rows: Any, sequences: TokenBatch) -> Tensor:
        """bool[B, T]: the tokens the head speaks about. Nothing predicts the first one."""
        mask = torch.ones_like(sequences.token_ids, dtype=torch.bool) if self.mask_field is None else getattr(rows, self.mask_field).clone()
        mask[:, 0] = False
        return mask

    def _rows_of(self, rows: Any, mine: Tensor) -> Any:
        return rows if self.mask_field is None else replace(rows, **{self.mask_field: mine})


@dataclass(frozen=True)
class VocabularyShares(_TokenShares):
    """What a vocabulary head says about a share."""

    def share_stats(self, replica: HeadReplica, hidden: Tensor, share: Share, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy f32[B, T] of the share, 0 elsewhere.

        Entered by every context-parallel rank, and by every tensor-parallel one with equal `hidden`, whose gradient is whole on each.
        """
        weight = replica.weight
        barred_ids, barred = self.barred(share.rows)
        shard = VocabularyShard(
            first_column=parallel_state.get_tensor_model_parallel_rank() * len(weight),
            vocab_size=replica.spec.vocab_size,
            temperature=self.temperature,
            rows_per_slice=max(1, self.logits_bytes // (4 * len(weight))),
            group=parallel_state.get_tensor_model_parallel_group(),
            keeps_slice=True,  # a share's backward follows its loss
            barred_ids=barred_ids,
        )
        targets = share.rows.sequences().token_ids.flatten()[share.targets]
        barred = None if barred is None else barred.flatten()[share.targets]
        stats = vocabulary_stats(copy_to_tensor_model_parallel_region(hidden), weight, targets, shard, with_entropy, barred)
        return context.summed(torch.stack([_spread(found, share) for found in stats])).unbind(0)

    def barred(self, rows: Any) -> tuple[tuple[int, ...], Tensor | None]:
        """Tokens that the policy could not choose, and where, bool[B, T]; None: nowhere."""
        return (), None


@dataclass(frozen=True)
class ValueShares(_TokenShares):
    """What a scalar head says about every token of a share."""

    def of_share(self, replica: HeadReplica, hidden: Tensor, share: Share) -> Tensor:
        """Values f32[B, T] of the share, 0 elsewhere."""
        return context.summed(_spread(F.linear(hidden.float(), owned_weight(replica).float()).squeeze(-1), share))


@dataclass(frozen=True)
class ResponseShares(VocabularyShares):
    """Dealing for a head that says one number about every response: whole rows, so that responses which are compared stay together."""

    def deal(self, rows: ResponseLists, sequences: TokenBatch, holders: context.Holders, num_shares: int, turn: int) -> list[Share]:
        """The shares of one microbatch, by rows."""
        mask = rows.sequence_mask
        places = sequences.places().roll(1, dims=1)  # the one shift, as for tokens
        return _dealt_by_rows(rows, places, mask, rows.by_row(mask.sum(1)).sum(1), holders, num_shares, turn)


@dataclass(frozen=True)
class ScoreShares:
    """Dealing for heads that score sequences: whole rows, so that pairs stay together."""

    def deal(self, rows: TensorRecord, sequences: TokenBatch, holders: context.Holders, num_shares: int, turn: int) -> list[Share]:
        """The shares of one microbatch, by rows."""
        places, mask = self.places_read(sequences)
        return _dealt_by_rows(rows, places, mask, torch.ones(len(rows), dtype=torch.int64, device=mask.device), holders, num_shares, turn)

    def places_read(self, sequences: TokenBatch) -> tuple[Tensor, Tensor]:
        """Which place in the hidden states each entry of the result speaks about, i64 of its shape, and where it speaks, bool."""
        ends = sequences.places().gather(1, (sequences.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        return ends, torch.ones_like(ends, dtype=torch.bool)

    def of_share(self, replica: HeadReplica, hidden: Tensor, share: Share) -> Tensor:
        """The scores of the share's sequences, 0 elsewhere."""
        return context.summed(_spread(F.linear(hidden.float(), owned_weight(replica).float()).squeeze(-1), share))


@dataclass(frozen=True)
class TokenScoreShares(ScoreShares):
    """Scores of every token."""

    def places_read(self, sequences: TokenBatch) -> tuple[Tensor, Tensor]:
        positions = torch.arange(sequences.token_ids.shape[1], device=sequences.lengths.device)
        return sequences.places(), positions < sequences.lengths[:, None]


def _dealt_by_rows(
    rows: TensorRecord, places: Tensor, mask: Tensor, sizes: Tensor, holders: context.Holders, num_shares: int, turn: int
) -> list[Share]:
    """Shares of whole rows, evened out by `sizes` i64[B]. `places`, `mask` [Q, ...]: where to look, and for which entries of the result."""
    owner = owners_of_rows(sizes, num_shares, turn)
    of_sequence = owner.repeat(rows.sequences_per_row).view(-1, *[1] * (places.dim() - 1))
    own = torch.where(mask & (holders.rank[places] == holders.own_rank), of_sequence, -1)
    positions = holders.row[places].flatten()
    return [
        Share(rows.only(owner == number), positions[targets], targets, tuple(places.shape))
        for number, targets in enumerate(gathered_by_owner(own.flatten(), num_shares))
    ]


def _spread(found: Tensor, share: Share) -> Tensor:
    """f32[n] at the entries it speaks about, 0 elsewhere."""
    empty = found.new_zeros(torch.Size(share.shape).numel())
    return empty.index_copy(0, share.targets, found).view(share.shape)
