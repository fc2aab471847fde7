"""What a step learns from, decided without a model: nothing is lost or read twice, and a stopped run goes on as if it had gone on."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from megarl.checkpoint.train_state import TrainState
from megarl.config import ParallelConfig, PpoRun
from megarl.errors import RolloutError
from megarl.metrics import StepMetrics
from megarl.parallel import groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.harvest import Harvest, Harvester
from megarl.records import Prompt, Trajectory
from megarl.rollout.scripted import ScriptedEngine

END, LIMIT, PROMPTS = 9, 8, 4


@pytest.fixture(scope="module")
def alone() -> Iterator[ParallelLayout]:
    yield groups.initialize(ParallelConfig(), seed=0)
    groups.shutdown()


def tale(prompt_id: int, sample: int) -> tuple[int, ...]:
    """The whole response: 1 to 10 tokens, so that some are cut."""
    length = 1 + (5 * prompt_id + 3 * sample) % 10
    return tuple([1 + prompt_id % 5] * (length - 1) + [END])


def script(request):
    rest = tale(request.prompt_id, request.sample_index)[request.num_sampled :][: request.sampling.max_tokens]
    return rest, (-1.0,) * len(rest)


class Stream:
    """Prompt i stands at position i."""

    def from_position(self, position, count, seed, layout):
        return [Prompt(p, (1, 2)) for p in range(position, position + count)]


class Counting:
    """A judge: what has an odd prompt earns 1 for its first sample and 0 for others, the rest earns 0. Phases are of no interest."""

    on_finished = None
    policy_version = 0

    def __init__(self):
        self.judged = []

    def trajectories(self, prompts, completions):
        self.judged += [(c.prompt_id, c.sample_index) for c in completions]
        return [Trajectory(p, c, float(p.prompt_id % 2 and c.sample_index == 0), {}) for p, c in zip(prompts, completions)]

    def watch(self, trajectories):
        assert len(trajectories) == 2 * PROMPTS

    generating = scoring = staticmethod(nullcontext)


def harvester(alone, advantage="grpo", **rollout) -> tuple[Harvester, ScriptedEngine, Counting]:
    run = PpoRun.model_validate(
        {
            "output_dir": "out",
            "tokenizer": "tokenizer",
            "actor": {"path": "model"},
            "rewards": [{"kind": "exact"}],
            "data": {"path": "prompts.jsonl"},
            "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": 2, "max_response_tokens": LIMIT, **rollout},
            "ppo": {"total_steps": 1, "minibatch_size": 2 * PROMPTS, "advantage": advantage},
        }
    )
    engine, judge = ScriptedEngine(script), Counting()
    return Harvester(run, alone, Stream(), (END,), engine, judge), engine, judge


def ids(harvest: Harvest) -> list[int]:
    return [t.prompt.prompt_id for t in harvest.trajectories][::2]


def steps(parts, count: int, state: TrainState) -> tuple[list[Harvest], TrainState]:
    gatherer, engine, judge = parts
    found = []
    for _ in range(count):
        engine.policy_version = state.step
        found.append(gatherer.gather(state, judge, StepMetrics()))
        state = state.advance(found[-1].num_prompts)
    return found, state


def test_a_plain_step_takes_the_next_prompts(alone):
    found, state = steps(harvester(alone), 2, TrainState())
    assert [ids(harvest) for harvest in found] == [[0, 1, 2, 3], [4, 5, 6, 7]] and state.prompts_consumed == 8


def test_the_greedy_response_is_judged_and_stands_beside_the_samples(alone):
    parts = harvester(alone, advantage="remax")
    (harvest,), _ = steps(parts, 1, TrainState())
    assert all(t.greedy.completion.sample_index == 2 and t.greedy.prompt == t.prompt for t in harvest.trajectories)
    assert len(parts[2].judged) == 3 * PROMPTS


def test_groups_without_signal_give_way_and_the_position_is_behind_the_last_one_used(alone):
    found, state = steps(harvester(alone, refill={"rounds": 5}), 2, TrainState())
    assert [ids(harvest) for harvest in found] == [[1, 3, 5, 7], [9, 11, 13, 15]]
    assert [harvest.num_prompts for harvest in found] == [8, 8] and state.prompts_consumed == 16


def test_when_the_rounds_are_used_up_the_batch_is_filled_or_the_run_ends(alone, capsys):
    refill = {"rounds": 1, "low": 0.6}  # no group's mean is as high
    (harvest,), state = steps(harvester(alone, refill=refill), 1, TrainState())
    assert ids(harvest) == [0, 1, 2, 3] and state.prompts_consumed == 8  # two rounds of four were really asked for
    assert "step 1: 0 of 4 groups have a signal after 2 rounds" in capsys.readouterr().err
    with pytest.raises(RolloutError, match="rollout.refill.when_short is stop"):
        steps(harvester(alone, refill=refill | {"when_short": "stop"}), 1, TrainState())


def test_partial_responses_are_late_but_never_lost(alone):
    parts = harvester(alone, partial={"chunk_tokens": 2, "oversample": 1.5})
    found, state = steps(parts, 12, TrainState())
    learned = [i for harvest in found for i in ids(harvest)]
    waiting = [group.position for group in parts[0].carried]
    assert sorted(learned + waiting) == list(range(state.prompts_consumed))
    assert learned != sorted(learned) and len(parts[2].judged) == 2 * len(learned)  # some overtook others; each is judged once
    for harvest in found:
        for t in harvest.trajectories:
            c = t.completion
            assert c.token_ids == tale(c.prompt_id, c.sample_index)[:LIMIT]
            assert c.finish_reason == ("stop" if c.token_ids[-1] == END else "length")
    assert any(t.completion.later_versions for harvest in found for t in harvest.trajectories)
    oldest = max(step - t.completion.policy_version for step, harvest in enumerate(found) for t in harvest.trajectories)
    assert 0 < oldest <= LIMIT // 2  # a step a chunk


@pytest.mark.parametrize("refill", [None, {"rounds": 3}])
def test_a_resumed_run_goes_on_with_what_was_waiting(alone, refill):
    settings = {"partial": {"chunk_tokens": 2, "oversample": 3.0}, "refill": refill}
    straight, last = steps(harvester(alone, **settings), 8, TrainState())
    first = harvester(alone, **settings)
    _, middle = steps(first, 4, TrainState())
    saved = first[0].to_hand_on()
    assert first[0].carried and saved is not None
    second = harvester(alone, **settings)
    second[0].take_back([saved])
    resumed, state = steps(second, 4, TrainState.from_json(middle.to_json()))
    assert resumed == straight[4:] and state == last


def test_a_run_that_no_longer_samples_in_chunks_finishes_what_was_waiting(alone):
    first = harvester(alone, partial={"chunk_tokens": 2, "oversample": 1.5})
    found, state = steps(first, 3, TrainState())
    waiting = [group.position for group in first[0].carried]
    second = harvester(alone)
    second[0].take_back([first[0].to_hand_on()])
    more, state = steps(second, 3, state)
    assert waiting and sorted(i for harvest in (*found, *more) for i in ids(harvest)) == list(range(state.prompts_consumed))
    assert not second[0].carried
