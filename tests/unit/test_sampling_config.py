"""What does not fit together about sampling is refused by name, and `--check` says what a step samples."""

import pytest

from megarl import cli
from tests.unit.tiny_run import write_run

CASES = {
    "lone samples": (
        ["rollout.refill.rounds=2", "rollout.samples_per_prompt=1", "ppo.minibatch_size=4"],
        "rollout.samples_per_prompt: found 1 with rollout.refill; expected at least 2: one response alone never differs, so that no prompt"
        " would be learned from",
    ),
    "a part that is none": (
        ["rollout.refill={by: accuracy}"],
        "rollout.refill.by: found 'accuracy'; expected reward or exact: the sum, or a part of the reward",
    ),
    "bounds the wrong way round": (
        ["rollout.refill={low: 0.8, high: 0.2}"],
        "rollout.refill.low: found 0.8 with rollout.refill.high 0.2; expected at most that",
    ),
    "a limit that does not grow": (
        ["rollout.length_schedule={start: 16, steps: 5}"],
        "rollout.length_schedule.start: found 16; expected less than rollout.max_response_tokens 16, which it grows to",
    ),
    "more tokens than a response may have": (
        ["rollout.min_response_tokens=17"],
        "rollout.min_response_tokens: found 17; expected at most rollout.max_response_tokens 16",
    ),
    "more tokens than a response may have at first": (
        ["rollout.min_response_tokens=9", "rollout.length_schedule={start: 8, steps: 5}"],
        "rollout.min_response_tokens: found 9; expected at most rollout.length_schedule.start 8",
    ),
    "a stop token of another vocabulary": (
        ["rollout.stop_token_ids=[3, 120]"],
        "rollout.stop_token_ids: found 120; expected less than the actor's vocabulary of 120",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused(tmp_path, capsys, name):
    overrides, expected = CASES[name]
    assert cli.run(["ppo", str(write_run(tmp_path)), *overrides, "--check"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": {expected}")


def test_the_check_says_what_a_step_samples(tmp_path, capsys):
    overrides = ["rollout.refill.rounds=2", "rollout.partial.chunk_tokens=4", "rollout.length_schedule={start: 8, steps: 5}"]
    path = str(write_run(tmp_path))
    assert cli.run(["ppo", path, "ppo.advantage=remax", "critic=null", *overrides, "--check"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "8 a step, one a prompt, judged and not learned from",
        "groups without signal give way to at most 2 x 8 further prompts a step",
        "12 groups under way, in chunks of 4 tokens; a response waits at most 3 steps for its end",
        "8 tokens, growing to 16 after 5 steps",
        "warning: rollout.partial lets tokens of older weights be learned from",
    ):
        assert words in printed, printed
