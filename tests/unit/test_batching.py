from dataclasses import replace

import pytest
import torch

from megarl.data.batching import collate_demonstrations, collate_preferences, pack, padded_length
from megarl.data.demonstrations import Demonstration
from megarl.data.preferences import Preference
from megarl.errors import RewardError, RolloutError
from megarl.records import Completion, Prompt, Trajectory

PAD = 9


def trajectory(prompt, response, reward=0.0, finish_reason="stop", prompt_id=0):
    logprobs = tuple(-0.5 - i for i in range(len(response)))
    completion = Completion(prompt_id, 0, tuple(response), logprobs, finish_reason, policy_version=0)
    return Trajectory(Prompt(prompt_id, tuple(prompt)), completion, reward)


def test_pack_puts_every_field_where_its_token_is():
    rows = [trajectory([1, 2, 3], [4, 5], 1.5), trajectory([6], [7, 8, 1, 2], -1.0, "length", prompt_id=1)]
    batch = pack(rows, pad_id=PAD, length=6, sample_ids=[4, 5], group_ids=[2, 2])
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, PAD], [6, 7, 8, 1, 2, PAD]]
    assert batch.lengths.tolist() == [5, 5]
    assert batch.response_mask.tolist() == [[False] * 3 + [True] * 2 + [False], [False] + [True] * 4 + [False]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, 0, -0.5, -1.5, 0], [0, -0.5, -1.5, -2.5, -3.5, 0]]
    assert batch.rewards.tolist() == [1.5, -1.0]
    assert batch.truncated.tolist() == [False, True]
    assert batch.sample_ids.tolist() == [4, 5] and batch.group_ids.tolist() == [2, 2]
    assert {getattr(batch, name).dtype for name in ("token_ids", "lengths", "sample_ids", "group_ids")} == {torch.int64}
    assert {getattr(batch, name).dtype for name in ("rollout_logprobs", "rewards")} == {torch.float32}
    assert batch.response_mask.dtype == batch.truncated.dtype == torch.bool


def test_pack_marks_the_tokens_that_could_not_end_a_response():
    rows = [trajectory([1, 2], [4, 5, 6]), trajectory([6], [7], prompt_id=1)]
    assert not pack(rows, PAD, 5, [0, 1], [0, 1]).must_go_on.any()
    found = pack(rows, PAD, 5, [0, 1], [0, 1], min_tokens=2).must_go_on
    assert found.tolist() == [[False, False, True, True, False], [False, True, *[False] * 3]]


def test_pack_refuses_what_is_no_completion():
    good = trajectory([1], [2, 3])
    cases = [
        (trajectory([1], []), RolloutError, "no tokens"),
        (replace(good, completion=replace(good.completion, rollout_logprobs=(0.0,))), RolloutError, "2 tokens but 1 log-probs"),
        (replace(good, completion=replace(good.completion, prompt_id=5)), RolloutError, "paired with prompt 0"),
        (replace(good, reward=float("nan")), RewardError, "reward nan"),
        (replace(good, reward=float("-inf")), RewardError, "reward -inf"),
    ]
    for bad, error, reason in cases:
        with pytest.raises(error, match=reason):
            pack([good, bad], PAD, 4, [0, 1], [0, 0])


def test_lengths_round_up():
    assert [padded_length([3, n], 4) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    assert padded_length([3, 7]) == 7


def test_demonstrations_collate():
    rows = [Demonstration((1, 2, 3), (False, True, True)), Demonstration((4,), (True,))]
    batch = collate_demonstrations(rows, PAD, multiple_of=2)
    assert batch.token_ids.tolist() == [[1, 2, 3, PAD], [4, PAD, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.lengths.tolist() == [3, 1] and batch.loss_mask.dtype == torch.bool
    assert collate_demonstrations(rows, PAD, length=7).token_ids.shape == (2, 7)
    with pytest.raises(AssertionError):
        collate_demonstrations(rows, PAD, length=2)


def test_preferences_collate_to_one_length():
    batch = collate_preferences([Preference((1, 2), (1, 3, 4)), Preference((5,), (6,))], PAD)
    assert batch.chosen_ids.tolist() == [[1, 2, PAD], [5, PAD, PAD]]
    assert batch.rejected_ids.tolist() == [[1, 3, 4], [6, PAD, PAD]]
    assert batch.chosen_lengths.tolist() == [2, 1] and batch.rejected_lengths.tolist() == [3, 1]
    assert len(batch) == 2 and batch.rows(torch.tensor([1])).chosen_ids.tolist() == [[5, PAD, PAD]]
