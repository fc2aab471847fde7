"""Deals the requests of a rollout group to its generator replicas and brings the completions back."""

from collections.abc import Sequence
from dataclasses import astuple
from itertools import islice

import torch

from megarl.errors import RolloutError
from megarl.parallel import device
from megarl.parallel.collectives import Group, agree, gather_json, gather_rows
from megarl.parallel.layout import RolloutLayout
from megarl.records import Completion, RolloutRequest, Sampling
from megarl.rollout.placement import GeneratorLayout

FINISH_REASONS = ("stop", "length")


class Dealer:
    """The exchange inside one rollout group. Its methods are entered by every rank of `group`, the ranks of `layout.group`.

    With a `RolloutLayout` the ranks are the samplers; with a `GeneratorLayout` some of them speak for samplers elsewhere.
    """

    def __init__(self, layout: RolloutLayout | GeneratorLayout, group: Group):
        self.group = self._group = group
        ranks = layout.group
        self._replicas = layout.replicas_in(ranks)
        are_samplers = isinstance(layout, RolloutLayout)
        self._turns = [self._replicas.index(replica) for replica in ((layout.replica,) if are_samplers else layout.spoken_for)]
        self._has_all = are_samplers and len(self._replicas) == 1 or len(ranks) == 1
        self._tells = layout.is_leader if are_samplers else bool(self._turns)
        self._data_ranks = layout.data_ranks_in(ranks)
        training = layout.training
        self._own = self._data_ranks.index(training.dp_rank)
        # One rank of each model replica speaks for it; the others hold the same requests.
        self._speakers = [ranks.index(training.rank_at(dp=data_rank)) for data_rank in self._data_ranks]
        self._speaks_for_data = training.rank == training.rank_at(dp=training.dp_rank)

    def gather(self, requests: Sequence[RolloutRequest]) -> tuple[list[RolloutRequest], slice]:
        """The requests of the whole group, by data rank, and where this data rank's own are among them."""
        if len(self._data_ranks) == 1:
            return list(requests), slice(0, len(requests))
        encoded = [[astuple(request)[:3], list(astuple(request.sampling)), request.seed, request.num_sampled] for request in requests]
        replies = gather_json(encoded if self._speaks_for_data else [], self._group)
        parts = [[_request(*item) for item in replies[speaker]] for speaker in self._speakers]
        start = sum(len(part) for part in parts[: self._own])
        return [request for part in parts for request in part], slice(start, start + len(parts[self._own]))

    def hands(self, requests: Sequence[RolloutRequest]) -> list[list[RolloutRequest]]:
        """What each of this rank's replicas samples: every n-th request, which spreads long and short ones. Equal on all its ranks."""
        return [list(requests[turn :: len(self._replicas)]) for turn in self._turns]

    def agree(self, fault: RolloutError | None) -> None:
        """Raises on every rank of the group when the sampling of any of them failed."""
        agree(fault, self._group)

    def collect(self, sampled: Sequence[Sequence[Completion]], requests: Sequence[RolloutRequest]) -> list[Completion]:
        """The completions of all replicas in the order of `requests`; `sampled` are those of this rank's hands."""
        # Replicas come in rank order; each brings its hand in the order it was dealt.
        dealt = [index for turn in range(len(self._replicas)) for index in range(turn, len(requests), len(self._replicas))]
        told = [completion for hand in sampled for completion in hand] if self._tells or self._has_all else []
        if not self._has_all:
            told = self._gather([requests[index] for index in dealt], told)
        collected: list[Completion | None] = [None] * len(requests)
        for index, completion in zip(dealt, told, strict=True):
            collected[index] = completion
        return [completion for completion in collected if completion is not None]

    def _gather(self, dealt: Sequence[RolloutRequest], told: Sequence[Completion]) -> list[Completion]:
        """Everybody's completions, rank by rank: the answers to `dealt`, in that order."""

        def rows(values: list, width: int, dtype: torch.dtype) -> list:
            return gather_rows(torch.tensor(values, dtype=dtype, device=device.device()).view(-1, width), self._group).tolist()

        whole = torch.int64
        heads = rows(
            [[len(c.token_ids), FINISH_REASONS.index(c.finish_reason), c.policy_version, len(c.later_versions)] for c in told], 4, whole
        )
        tokens = iter(rows([token for c in told for token in c.token_ids], 1, whole))
        logprobs = iter(rows([value for c in told for value in c.rollout_logprobs], 1, torch.float32))
        later = iter(rows([span for c in told for span in c.later_versions], 2, whole))
        return [
            Completion(
                request.prompt_id,
                request.sample_index,
                tuple(token for (token,) in islice(tokens, length)),
                tuple(value for (value,) in islice(logprobs, length)),
                FINISH_REASONS[reason],
                version,
                tuple((start, newer) for start, newer in islice(later, num_later)),
            )
            for request, (length, reason, version, num_later) in zip(dealt, heads, strict=True)
        ]


def _request(identity: list, sampling: list, seed: int, num_sampled: int) -> RolloutRequest:
    prompt_id, sample_index, token_ids = identity
    return RolloutRequest(prompt_id, sample_index, tuple(token_ids), Sampling.from_list(sampling), seed, num_sampled)
