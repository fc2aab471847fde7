"""From hidden states to numbers about tokens: log-probabilities, entropy, values, scores. The one next-token shift is here.

Axis letters: S positions (those of this rank; over all ranks at least T), B sequences, T tokens, H hidden
width, N selected tokens. Hidden states are `[S, B, H]`, Megatron's order; results are `[B, T]` on the house's time axis: entry t speaks
about token t and comes from the hidden state at position t - 1; entry 0 is 0. All functions are differentiable, entered by every
tensor- and context-parallel rank of the last stage with equal tokens and masks, and give every one of them the same result.

*Heads* are what `parallel.pipeline` applies to the last stage's hidden states: these functions with their settings.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarl.models.build import DecoderChunk
from megarl.models.head_sharing import HeadReplica, ResponseShares, ScoreShares, TokenScoreShares, ValueShares, VocabularyShares
from megarl.models.vocabulary import VocabularyShard, vocabulary_stats
from megarl.parallel import context, device
from megarl.parallel.token_shards import Deal, Share
from megarl.records import ResponseLists, TokenBatch

device.prepare()

from megatron.core import parallel_state  # noqa: E402  (the host is prepared first)
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def token_stats(
    model: torch.nn.Module,
    hidden: Tensor,
    sequences: TokenBatch,
    temperature: float,
    logits_bytes: int,
    with_entropy: bool,
    mask: Tensor | None = None,
    barred_ids: tuple[int, ...] = (),
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every token and, when asked, entropy (nats) of the distribution it came from, both f32[B, T].

    The output layer runs only where `mask` (bool[B, T], default everywhere) is True, on slices of tokens whose float32 logits take at
    most `logits_bytes` on a rank; results are 0 elsewhere. `temperature` divides the logits; columns past the vocabulary are left out, and
    so are `barred_ids` where `barred` (bool[B, T]) is True.
    """
    core = unwrapped(model)
    is_split = core.config.sequence_parallel
    if is_split:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    token_ids = sequences.token_ids
    mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    own = context.own_positions(len(hidden) * core.config.context_parallel_size)
    positions, tokens, factor = _selected(mask, sequences.places(), own, hidden.shape[1])
    rows = hidden.flatten(0, 1).index_select(0, positions)
    if not is_split:
        rows = copy_to_tensor_model_parallel_region(rows)
    weight = core.output_weight()
    shard = VocabularyShard(
        first_column=parallel_state.get_tensor_model_parallel_rank() * len(weight),
        vocab_size=core.spec.vocab_size,
        temperature=temperature,
        rows_per_slice=max(1, logits_bytes // (4 * len(weight))),
        group=parallel_state.get_tensor_model_parallel_group(),
        barred_ids=barred_ids,
    )
    barred = None if barred is None else barred.flatten()[tokens]
    logprobs, entropy = vocabulary_stats(rows, weight, token_ids.flatten()[tokens], shard, with_entropy, barred)
    empty = logprobs.new_zeros(token_ids.numel())
    stats = torch.stack([empty.index_copy(0, tokens, found * factor) for found in (logprobs, entropy)])
    return context.summed(stats).view(2, *token_ids.shape).unbind(0)


def values(model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch) -> Tensor:
    """The scalar head's value before each token is chosen, f32[B, T]."""
    outputs = context.whole_sequence(unwrapped(model).output_layer(hidden)).flatten()[sequences.places()]
    return torch.cat([torch.zeros_like(outputs[:, :1]), outputs[:, :-1]], dim=1)


def scores_at_end(model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch) -> Tensor:
    """The scalar head at the last token of each sequence, f32[B]. Source: semantics section 5."""
    ends = sequences.places().gather(1, (sequences.lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    return context.whole_sequence(unwrapped(model).output_layer(hidden)).flatten()[ends]


def scores_of_tokens(model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch) -> Tensor:
    """The scalar head at every token, 0 behind the last one of a sequence, f32[B, T]."""
    positions = torch.arange(sequences.token_ids.shape[1], device=sequences.lengths.device)
    outputs = context.whole_sequence(unwrapped(model).output_layer(hidden)).flatten()[sequences.places()]
    return torch.where(positions < sequences.lengths[:, None], outputs, 0.0)


@dataclass(frozen=True)
class LogprobHead(VocabularyShares):
    """f32[B, T] log-probabilities where `mask_field` of the rows (bool[B, T]) is True, 0 elsewhere; everywhere when it is None.

    Where `must_go_on` of the rows is True, `end_ids` have probability 0, as they had for the sampler. Without any nobody reads that field.
    """

    logits_bytes: int
    temperature: float = 1.0
    mask_field: str | None = None
    deals: Deal = "tokens"  # how stages share the work: a loss over whole sequences needs "rows"
    end_ids: tuple[int, ...] = ()

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any) -> Tensor:
        return self.stats(model, hidden, sequences, rows, with_entropy=False)[0]

    def of_share(self, replica: HeadReplica, hidden: Tensor, share: Share) -> Tensor:
        """See `parallel.token_shards.DealingHead`."""
        return self.share_stats(replica, hidden, share, with_entropy=False)[0]

    def stats(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any, with_entropy: bool) -> tuple[Tensor, Tensor]:
        mask = None if self.mask_field is None else getattr(rows, self.mask_field)
        return token_stats(model, hidden, sequences, self.temperature, self.logits_bytes, with_entropy, mask, *self.barred(rows))

    def barred(self, rows: Any) -> tuple[tuple[int, ...], Tensor | None]:
        """`end_ids`, and where tokens cannot be one of them, bool[B, T]."""
        return self.end_ids, rows.must_go_on if self.end_ids else None

    def result_shape(self, sequences: TokenBatch) -> tuple[int, ...]:
        return tuple(sequences.token_ids.shape)


@dataclass(frozen=True)
class PolicyHead(LogprobHead):
    """Log-probabilities and entropy, f32[B, T] each, for learning."""

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any) -> tuple[Tensor, Tensor]:
        return self.stats(model, hidden, sequences, rows, with_entropy=True)

    def of_share(self, replica: HeadReplica, hidden: Tensor, share: Share) -> tuple[Tensor, Tensor]:
        return self.share_stats(replica, hidden, share, with_entropy=True)


@dataclass(frozen=True)
class ResponseHead(ResponseShares):
    """f32[B] log-probabilities of whole responses, for `ResponseLists`: sums over the tokens that its `response_mask` marks."""

    logits_bytes: int
    temperature: float = 1.0

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: ResponseLists) -> Tensor:
        mask = rows.sequence_mask
        return token_stats(model, hidden, sequences, self.temperature, self.logits_bytes, with_entropy=False, mask=mask)[0].sum(1)

    def of_share(self, replica: HeadReplica, hidden: Tensor, share: Share) -> Tensor:
        return self.share_stats(replica, hidden, share, with_entropy=False)[0].sum(1)

    def result_shape(self, sequences: TokenBatch) -> tuple[int, ...]:
        return tuple(sequences.lengths.shape)


@dataclass(frozen=True)
class ValueHead(ValueShares):
    """f32[B, T] values of the scalar head. Stages that share it look only where `mask_field` of the rows (bool[B, T]) is True."""

    mask_field: str = "response_mask"
    deals: Deal = "tokens"

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any) -> Tensor:
        return values(model, hidden, sequences)

    def result_shape(self, sequences: TokenBatch) -> tuple[int, ...]:
        return tuple(sequences.token_ids.shape)


@dataclass(frozen=True)
class ScoreHead(ScoreShares):
    """f32[B] scores: the scalar head at the last token."""

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any) -> Tensor:
        return scores_at_end(model, hidden, sequences)

    def result_shape(self, sequences: TokenBatch) -> tuple[int, ...]:
        return tuple(sequences.lengths.shape)


@dataclass(frozen=True)
class TokenScoreHead(TokenScoreShares):
    """f32[B, T] scores: the scalar head at every token."""

    def __call__(self, model: torch.nn.Module, hidden: Tensor, sequences: TokenBatch, rows: Any) -> Tensor:
        return scores_of_tokens(model, hidden, sequences)

    def result_shape(self, sequences: TokenBatch) -> tuple[int, ...]:
        return tuple(sequences.token_ids.shape)


def unwrapped(model: torch.nn.Module) -> DecoderChunk:
    """The chunk inside Megatron's wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _selected(mask: Tensor, places: Tensor, own: Tensor, width: int) -> tuple[Tensor, Tensor, float]:
    """Where to look and where to write: rows of hidden [S width, H] and entries of [B T], both i64[N], and a factor for the results.

    `places` i64[B, T] are those of whole sequences; `own` i64[S], ascending, the positions that this rank holds: the token after one
    may lie on another context-parallel rank.

    A rank must run the head at least once a microbatch, so that its parameters always get a gradient: with nothing selected one entry
    is taken with the factor 0.
    """
    sequence, before = mask[:, 1:].nonzero(as_tuple=True)  # `before` is the position before the token: the one shift
    place = places[sequence, before]
    row = torch.searchsorted(own, place // width).clamp(max=len(own) - 1)
    is_here = own[row] == place // width
    positions, tokens = row * width + place % width, sequence * mask.shape[1] + before + 1
    if not is_here.any():
        nothing = torch.zeros(1, dtype=torch.int64, device=mask.device)
        return nothing, nothing, 0.0
    return positions[is_here], tokens[is_here], 1.0
