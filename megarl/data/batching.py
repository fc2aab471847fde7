"""Rows of different lengths become right-padded tensors. B sequences, T tokens of the padded batch."""

from collections.abc import Sequence

import torch

from megarl.data.demonstrations import Demonstration
from megarl.data.preferences import Preference
from megarl.errors import RewardError, RolloutError
from megarl.records import DemonstrationBatch, PreferenceBatch, ResponseLists, RolloutBatch, Trajectory


def padded_length(lengths: Sequence[int], multiple_of: int = 1) -> int:
    """The longest of `lengths`, rounded up to a multiple (sequence parallelism splits T over the tensor-parallel ranks)."""
    return -(-max(lengths) // multiple_of) * multiple_of


def pack(
    trajectories: Sequence[Trajectory],
    pad_id: int,
    length: int,
    sample_ids: Sequence[int],
    group_ids: Sequence[int],
    policy_version: int = 0,
    min_tokens: int = 0,
) -> RolloutBatch:
    """Trajectories of one data-parallel replica as a `RolloutBatch` of B = len(trajectories) rows and T = `length` tokens.

    `sample_ids` are positions in the whole rollout, `group_ids` are equal for samples of one prompt; ages count back from `policy_version`;
    no response could end with one of its first `min_tokens` tokens.
    Raises `RolloutError` or `RewardError` for a completion without tokens, with mismatched log-probs, or with a reward that is not finite.
    """
    for trajectory in trajectories:
        _check(trajectory)
    rows = [(*t.prompt.token_ids, *t.completion.token_ids) for t in trajectories]
    token_ids, lengths = pad_rows(rows, pad_id, length)
    starts = torch.tensor([len(t.prompt.token_ids) for t in trajectories]).unsqueeze(1)
    positions = torch.arange(length).unsqueeze(0)
    response_mask = (positions >= starts) & (positions < lengths.unsqueeze(1))
    rollout_logprobs = torch.zeros(len(rows), length)
    ages = torch.zeros_like(token_ids)
    for i, t in enumerate(trajectories):
        start, end = len(t.prompt.token_ids), len(rows[i])
        rollout_logprobs[i, start:end] = torch.tensor(t.completion.rollout_logprobs)
        for first, version in ((0, t.completion.policy_version), *t.completion.later_versions):
            ages[i, start + first : end] = max(0, policy_version - version)
    return RolloutBatch(
        token_ids=token_ids,
        lengths=lengths,
        response_mask=response_mask,
        rollout_logprobs=rollout_logprobs,
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        truncated=torch.tensor([t.completion.finish_reason == "length" for t in trajectories]),
        group_ids=torch.tensor(list(group_ids), dtype=torch.int64),
        sample_ids=torch.tensor(list(sample_ids), dtype=torch.int64),
        baselines=torch.tensor([0.0 if t.greedy is None else t.greedy.reward for t in trajectories], dtype=torch.float32),
        baseline_truncated=torch.tensor([t.greedy is not None and t.greedy.completion.finish_reason == "length" for t in trajectories]),
        ages=ages,
        must_go_on=response_mask & (positions < starts + min_tokens),
    )


def collate_demonstrations(
    rows: Sequence[Demonstration], pad_id: int, multiple_of: int = 1, length: int | None = None
) -> DemonstrationBatch:
    """Demonstrations padded to `length`, or to the longest row rounded up to `multiple_of`."""
    length = length or padded_length([len(row.token_ids) for row in rows], multiple_of)
    token_ids, lengths = pad_rows([row.token_ids for row in rows], pad_id, length)
    loss_mask, _ = pad_rows([row.loss_mask for row in rows], 0, length)
    return DemonstrationBatch(token_ids=token_ids, lengths=lengths, loss_mask=loss_mask.bool())


def collate_preferences(rows: Sequence[Preference], pad_id: int, multiple_of: int = 1, length: int | None = None) -> PreferenceBatch:
    """Pairs with both sides padded to the same `length`, or to the longest sequence rounded up to `multiple_of`."""
    length = length or padded_length([n for row in rows for n in (len(row.chosen_ids), len(row.rejected_ids))], multiple_of)
    chosen_ids, chosen_lengths = pad_rows([row.chosen_ids for row in rows], pad_id, length)
    rejected_ids, rejected_lengths = pad_rows([row.rejected_ids for row in rows], pad_id, length)
    margins = torch.tensor([row.margin for row in rows], dtype=torch.float32)
    return PreferenceBatch(chosen_ids, chosen_lengths, rejected_ids, rejected_lengths, margins)


def collate_lists(
    rows: Sequence[Sequence[Sequence[int]]], num_prompt_tokens: Sequence[int], pad_id: int, multiple_of: int = 1
) -> ResponseLists:
    """Lists of whole sequences, each beginning with its list's prompt, padded to the longest sequence (rounded up) and the longest list."""
    length = padded_length([len(sequence) for row in rows for sequence in row], multiple_of)
    width = max(map(len, rows))
    token_ids, lengths = pad_rows([sequence for row in rows for sequence in [*row, *[()] * (width - len(row))]], pad_id, length)
    positions = torch.arange(length)
    starts = torch.tensor(num_prompt_tokens).clamp(min=1).repeat_interleave(width)  # nothing predicts the first token
    mask = (positions >= starts[:, None]) & (positions < lengths[:, None])
    return ResponseLists(token_ids.view(-1, width, length), lengths.view(-1, width), mask.view(-1, width, length))


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids i64[B, length], right-padded, and row lengths i64[B]."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    assert int(lengths.max()) <= length, f"a row of {int(lengths.max())} tokens in a batch of length {length}"
    padded = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded, lengths


def _check(trajectory: Trajectory) -> None:
    completion = trajectory.completion
    who = f"completion {completion.sample_index} of prompt {completion.prompt_id}"
    if completion.prompt_id != trajectory.prompt.prompt_id:
        raise RolloutError(f"{who} was paired with prompt {trajectory.prompt.prompt_id}; expected the order of the requests")
    if not completion.token_ids:
        raise RolloutError(f"{who} has no tokens; expected at least the end-of-text token")
    if len(completion.rollout_logprobs) != len(completion.token_ids):
        raise RolloutError(f"{who} has {len(completion.token_ids)} tokens but {len(completion.rollout_logprobs)} log-probs")
    if not abs(trajectory.reward) < float("inf"):
        raise RewardError(f"{who} has the reward {trajectory.reward}; expected a finite number")
