"""Deals the requests of a rollout group to its generator replicas and brings the completions back."""

from collections.abc import Sequence
from dataclasses import astuple

import torch

from megarl.errors import RolloutError
from megarl.parallel import device
from megarl.parallel.collectives import Group, agree, gather_json, gather_rows
from megarl.parallel.layout import RolloutLayout
from megarl.records import Completion, RolloutRequest, Sampling

FINISH_REASONS = ("stop", "length")


class Dealer:
    """The exchange inside one rollout group. Its methods are entered by every rank of `group`, the ranks of `layout.group`."""

    def __init__(self, layout: RolloutLayout, group: Group):
        self._group = group
        ranks = layout.group
        self._replicas = layout.replicas_in(ranks)
        self._turn = self._replicas.index(layout.replica)
        self._speaks_for_replica = layout.is_leader
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
        encoded = [[astuple(request)[:3], list(astuple(request.sampling)), request.seed] for request in requests]
        replies = gather_json(encoded if self._speaks_for_data else [], self._group)
        parts = [[_request(*item) for item in replies[speaker]] for speaker in self._speakers]
        start = sum(len(part) for part in parts[: self._own])
        return [request for part in parts for request in part], slice(start, start + len(parts[self._own]))

    def hand(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """What this rank's replica samples: every n-th request, which spreads long and short ones. Equal on all its ranks."""
        return list(requests[self._turn :: len(self._replicas)])

    def agree(self, fault: RolloutError | None) -> None:
        """Raises on every rank of the group when the sampling of any of them failed."""
        agree(fault, self._group)

    def collect(self, sampled: Sequence[Completion], requests: Sequence[RolloutRequest], policy_version: int) -> list[Completion]:
        """The completions of all replicas in the order of `requests`; `sampled` are those of this replica's hand."""
        if len(self._replicas) == 1:
            return list(sampled)
        told = list(sampled) if self._speaks_for_replica else []
        where = device.device()
        heads = torch.tensor([[len(c.token_ids), FINISH_REASONS.index(c.finish_reason)] for c in told], device=where, dtype=torch.int64)
        tokens = torch.tensor([token for c in told for token in c.token_ids], device=where, dtype=torch.int64)
        logprobs = torch.tensor([value for c in told for value in c.rollout_logprobs], device=where, dtype=torch.float32)
        heads = gather_rows(heads.view(-1, 2), self._group).tolist()
        tokens, logprobs = gather_rows(tokens, self._group).tolist(), gather_rows(logprobs, self._group).tolist()
        # Leaders come in rank order, which is replica order; each brings its hand in the order it was dealt.
        dealt = [index for turn in range(len(self._replicas)) for index in range(turn, len(requests), len(self._replicas))]
        collected: list[Completion | None] = [None] * len(requests)
        start = 0
        for index, (length, reason) in zip(dealt, heads, strict=True):
            request, end = requests[index], start + length
            collected[index] = Completion(
                request.prompt_id,
                request.sample_index,
                tuple(tokens[start:end]),
                tuple(logprobs[start:end]),
                FINISH_REASONS[reason],
                policy_version,
            )
            start = end
        return [completion for completion in collected if completion is not None]


def _request(identity: list, sampling: list, seed: int) -> RolloutRequest:
    prompt_id, sample_index, token_ids = identity
    max_tokens, temperature, top_p, top_k, stop_token_ids = sampling
    return RolloutRequest(
        prompt_id, sample_index, tuple(token_ids), Sampling(max_tokens, temperature, top_p, top_k, tuple(stop_token_ids)), seed
    )
