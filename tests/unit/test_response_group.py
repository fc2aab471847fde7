"""Responses that are sampled in chunks are the responses that were sampled at once, and every token says which weights chose it."""

import json
from dataclasses import replace

import pytest

from megarl.config import LengthSchedule, PartialConfig, RolloutConfig
from megarl.records import Completion, Prompt
from megarl.rollout.engine import check_completions, make_requests, response_limit
from megarl.rollout.response_group import UNFINISHED, Asking, ResponseGroup
from megarl.rollout.scripted import ScriptedEngine

END = 9
TALES = {0: (1, 2, 3, 4, END), 1: (5, END), 2: (6, 7, 8, 6, 7, 8, 6, 7)}  # by sample: the last never ends


def script(request):
    """Tells each sample's tale from where it was left."""
    rest = TALES[request.sample_index][request.num_sampled :][: request.sampling.max_tokens]
    return rest, tuple(-float(token) for token in rest)


def asking(step: int = 0, chunk: int | None = 2, limit: int = 7, **changes) -> Asking:
    partial = None if chunk is None else PartialConfig(chunk_tokens=chunk)
    rollout = RolloutConfig(samples_per_prompt=2, max_response_tokens=limit, partial=partial, **changes)
    return Asking(rollout, (END,), run_seed=3, step=step, first_position=40, with_greedy=True)


def sampled(group: ResponseGroup, engine: ScriptedEngine, how: Asking) -> ResponseGroup:
    requests = group.requests(how)
    completions = engine.generate(requests)
    check_completions(requests, completions, vocab_size=10)
    return group.answered(completions, how)


def test_chunks_add_up_to_what_one_request_gives():
    engine, group = ScriptedEngine(script), ResponseGroup(41, Prompt(5, (0, 0)))
    whole = sampled(group, engine, asking(chunk=None))
    assert whole.is_complete and [r.finish_reason for r in whole.responses] == ["stop", "stop", "length"]
    counts = []
    while not group.is_complete:
        counts.append(len(group.requests(asking())))
        group = sampled(group, engine, asking())
    assert counts == [3, 2, 2, 1]  # finished responses are not asked for again
    assert group == whole


def test_the_first_requests_are_those_of_a_plain_run_and_later_ones_have_seeds_of_their_own():
    how, prompt = asking(), Prompt(5, (0, 0))
    group = ResponseGroup(41, prompt)
    plain = make_requests([prompt], how.rollout, (END,), (3, 0), first_position=1, with_greedy=True)
    first = group.requests(how)
    assert [replace(r, sampling=replace(r.sampling, max_tokens=7)) for r in first] == plain
    assert [r.sampling.temperature for r in first] == [1.0, 1.0, 0.0]
    later = sampled(group, ScriptedEngine(script), how).requests(replace(how, step=1))
    assert [(r.sample_index, r.token_ids, r.num_sampled) for r in later] == [(0, (0, 0, 1, 2), 2), (2, (0, 0, 6, 7), 2)]
    assert [r.sampling.temperature for r in later] == [1.0, 0.0]
    assert len({r.seed for r in [*first, *later]}) == 5


def test_every_token_says_which_weights_chose_it():
    engine, group = ScriptedEngine(script), ResponseGroup(41, Prompt(5, (0, 0)))
    for version in (4, 4, 6, 7):
        engine.policy_version = version
        group = sampled(group, engine, asking())
    assert [(r.policy_version, r.later_versions) for r in group.responses] == [(4, ((4, 6),)), (4, ()), (4, ((4, 6), (6, 7)))]


def test_versions_that_changed_within_a_chunk_are_kept():
    first = Completion(5, 0, (1, 2), (-1.0, -2.0), UNFINISHED, 4, ((1, 5),))
    more = Completion(5, 0, (3, END), (-3.0, -9.0), "stop", 5, ((1, 6),))
    (joined,) = ResponseGroup(41, Prompt(5, (0,)), (first,)).answered([more], asking()).responses
    assert (joined.policy_version, joined.later_versions) == (4, ((1, 5), (3, 6)))


def test_chunks_go_on_to_the_smallest_length_of_the_whole_response():
    group, how = ResponseGroup(41, Prompt(5, (0, 0))), asking(min_response_tokens=3)
    assert [r.num_unending for r in group.requests(how)] == [2, 2, 2]  # of a chunk
    (long,) = [Completion(5, 0, (1, 2), (-1.0, -2.0), UNFINISHED, 4)]
    assert [r.num_unending for r in replace(group, responses=(long,)).requests(how)] == [1]
    longer = replace(long, token_ids=(1, 2, 3, 4), rollout_logprobs=(-1.0,) * 4)
    assert [r.num_unending for r in replace(group, responses=(longer,)).requests(how)] == [0]


def test_a_group_survives_json():
    group = sampled(
        ResponseGroup(41, Prompt(5, (0, 0), "42", "what?", ({"role": "system", "content": "."},))), ScriptedEngine(script), asking()
    )
    assert ResponseGroup.from_json(json.loads(json.dumps(group.to_json()))) == group


@pytest.mark.parametrize("step, limit", [(0, 4), (1, 5), (2, 7), (3, 8), (4, 10), (9, 10)])
def test_the_limit_grows_in_a_line(step, limit):
    assert response_limit(RolloutConfig(max_response_tokens=10, length_schedule=LengthSchedule(start=4, steps=4)), step) == limit


def test_an_unfinished_response_may_use_a_limit_that_has_grown_meanwhile():
    engine, schedule = ScriptedEngine(script), LengthSchedule(start=4, steps=2)
    group = sampled(ResponseGroup(41, Prompt(5, (0, 0))), engine, asking(step=0, chunk=3, length_schedule=schedule))
    assert [len(r.token_ids) for r in group.responses] == [3, 2, 3]
    group = sampled(group, engine, asking(step=2, chunk=3, length_schedule=schedule))
    assert [(len(r.token_ids), r.finish_reason) for r in group.responses] == [(5, "stop"), (2, "stop"), (6, UNFINISHED)]
