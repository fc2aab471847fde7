"""Which groups a step starts, takes and hands over: equal on all ranks, a function of the table alone."""

from hypothesis import given
from hypothesis import strategies as st

from megarl.config import PartialConfig, RefillConfig, RolloutConfig
from megarl.ppo.refill import Entry, chosen, has_signal, learners, num_to_start, ready
from megarl.records import Completion, Prompt, Trajectory

ROLLOUT = RolloutConfig(prompts_per_step=8, samples_per_prompt=2, refill=RefillConfig(rounds=2))


def group(*rewards: float, **parts: float) -> list[Trajectory]:
    completion = Completion(0, 0, (1,), (-1.0,), "stop", 0)
    return [Trajectory(Prompt(0, (1,)), completion, reward, {"exact": reward > 0, **parts}) for reward in rewards]


def table(*signals: bool | None) -> list[Entry]:
    """Entries at positions 10, 11, ...; None: not complete."""
    return [Entry(10 + i, i % 2, signal is not None, bool(signal)) for i, signal in enumerate(signals)]


def test_a_group_of_equals_has_no_signal():
    assert has_signal(group(0, 1, 1), RefillConfig()) and not has_signal(group(1, 1, 1), RefillConfig())
    # of two parts one may differ and the other not: overlong shaping beside accuracy
    assert has_signal(group(1, 1.5), RefillConfig()) and not has_signal(group(1, 1.5), RefillConfig(by="exact"))


def test_a_pass_rate_outside_the_bounds_gives_way():
    bounds = RefillConfig(low=0.25, high=0.75)
    assert [has_signal(group(*rewards), bounds) for rewards in ((0, 0, 0, 1), (0, 0, 0, 0, 1), (1, 1, 1, 0), (1, 1, 1, 1, 0))] == [
        True,
        False,
        True,
        False,
    ]


def test_a_plain_step_starts_its_prompts_once():
    plain = RolloutConfig(prompts_per_step=8)
    assert num_to_start([], plain, 0, data=4) == 8
    assert num_to_start(table(*[True] * 8), plain, 1, data=4) == 0


def test_refilling_asks_for_what_is_missing_over_the_share_that_had_signal():
    assert num_to_start(table(*[True] * 6, False, False), ROLLOUT, 1, data=1) == 3  # 2 missing, three quarters have signal
    assert num_to_start(table(*[True] * 6, False, False), ROLLOUT, 1, data=2) == 4
    assert num_to_start(table(*[False] * 8), ROLLOUT, 1, data=1) == 8  # nothing known: a whole batch, not more
    assert num_to_start(table(*[True] * 6, False, None), ROLLOUT, 2, data=1) == 2  # one is still being sampled
    assert num_to_start(table(*[True] * 6, False, False), ROLLOUT, 3, data=1) == 0  # the rounds are used up
    assert num_to_start(table(*[True] * 8, False), ROLLOUT, 1, data=1) == 0


def test_partial_sampling_begins_with_more_than_a_step_needs_and_counts_what_was_carried():
    rollout = RolloutConfig(prompts_per_step=8, partial=PartialConfig(chunk_tokens=4, oversample=1.5))
    assert num_to_start([], rollout, 0, data=2) == 12
    assert num_to_start(table(*[None] * 5), rollout, 0, data=2) == 8  # 7 are missing
    assert num_to_start(table(*[None] * 12), rollout, 0, data=2) == 0


def test_the_oldest_with_signal_are_taken_and_gaps_are_filled_with_the_oldest_others():
    entries = table(True, False, True, None, False, True)
    assert [entry.position for entry in ready(entries)] == [10, 12, 15]
    assert [entry.position for entry in chosen(entries, 2)[0]] == [10, 12]
    taken, num_idle = chosen(entries, 4)
    assert [entry.position for entry in taken] == [10, 11, 12, 15] and num_idle == 1


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_every_data_rank_learns_from_equally_many_and_as_few_as_possible_move(data, share, draw):
    owners = draw.draw(st.lists(st.integers(0, data - 1), min_size=data * share, max_size=data * share))
    dealt = learners(owners, data)
    assert [dealt.count(rank) for rank in range(data)] == [share] * data
    moved = sum(owner != learner for owner, learner in zip(owners, dealt))
    assert moved == sum(max(0, owners.count(rank) - share) for rank in range(data))
