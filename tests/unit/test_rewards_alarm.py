from megarl.records import Trajectory
from megarl.rewards.constant import ConstantAlarm
from tests.unit.reward_samples import scorer_rows


def step(alarm, *columns):
    """One step of as many data ranks as there are columns of scores of the part `a`; part `b` is never constant."""
    spans = []
    for scores in columns:
        prompts, completions, _ = scorer_rows(["x"] * len(scores))
        rows = zip(prompts, completions, scores, range(len(scores)), strict=True)
        spans.append(alarm.spans([Trajectory(p, c, 0.0, {"a": score, "b": float(i)}) for p, c, score, i in rows]))
    return alarm.after_step(spans)


def test_a_constant_reward_is_said_after_5_steps_and_then_ever_less_often():
    alarm, said = ConstantAlarm(), {}
    for count in range(1, 45):
        if warnings := step(alarm, [0.5, 0.5], [0.5, 0.5]):
            said[count] = warnings
    assert list(said) == [5, 10, 20, 40]
    assert said[5] == [
        "reward a has been 0.5 for every response of the last 5 steps (this step: 4 responses to prompts 10 to 11); nothing is learned"
        " from it: look at samples.jsonl"
    ]


def test_one_different_score_on_any_rank_starts_the_count_again():
    alarm = ConstantAlarm()
    for _ in range(4):
        assert step(alarm, [0.0, 0.0], [0.0, 0.0]) == []
    assert step(alarm, [0.0, 0.0], [0.0, 0.1]) == []
    for _ in range(4):
        assert step(alarm, [0.0, 0.0], [0.0, 0.0]) == []
    assert len(step(alarm, [0.0, 0.0], [0.0, 0.0])) == 1


def test_one_response_a_step_is_never_constant():
    alarm = ConstantAlarm()
    assert not any(step(alarm, [1.0]) for _ in range(10))
