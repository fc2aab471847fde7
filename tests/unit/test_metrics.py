"""Metrics add up under any cut, an experience is described correctly, writers keep one line a step across a resume."""

import contextlib
import io
import json
import math

import pytest
import torch
from rich.console import Console

from megarl.config import LogConfig
from megarl.errors import SetupError
from megarl.metrics import Deviation, ExplainedVariance, Largest, Metric, Metrics, RunLog, StepMetrics, Total, describe, describe_rewards
from megarl.metrics.terminal import PPO_HEADLINE, Terminal
from megarl.metrics.values import mean_of
from megarl.metrics.writers import JsonLines
from megarl.records import Completion, Experience, Prompt, Trajectory


def experience(rows: int = 6, length: int = 8) -> Experience:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[:, 3] = True

    def per_token():
        return torch.randn(rows, length, generator=generator) * mask

    return Experience(
        token_ids=torch.zeros(rows, length, dtype=torch.int64),
        lengths=torch.full((rows,), length),
        response_mask=mask,
        rollout_logprobs=per_token(),
        rewards=torch.randn(rows, generator=generator),
        truncated=torch.arange(rows) % 3 == 0,
        group_ids=torch.arange(rows),
        sample_ids=torch.arange(rows),
        baselines=torch.zeros(rows),
        baseline_truncated=torch.zeros(rows, dtype=torch.bool),
        ages=torch.zeros(rows, length, dtype=torch.int64),
        must_go_on=torch.zeros(rows, length, dtype=torch.bool),
        old_logprobs=per_token(),
        ref_logprobs=per_token(),
        values=per_token(),
        token_rewards=per_token(),
        advantages=per_token(),
        returns=per_token(),
    )


def in_one_process(*parts: Metrics):
    """A `gather` that stands for ranks holding `parts`."""
    return lambda mine: json.loads(json.dumps([part.to_json() for part in parts]))


def test_kinds_combine_as_they_say():
    numbers = torch.tensor([1.0, 4.0, 7.0, 2.5, -1.0])
    first, second = (
        Metrics({"mean": mean_of(n), "total": Total(n.sum()), "largest": Largest(n.max()), "std": Deviation.of(n)})
        for n in (numbers[:2], numbers[2:])
    )
    expected = {"mean": numbers.mean(), "total": numbers.sum(), "largest": numbers.max(), "std": numbers.std()}
    for combined in ((first + second), first.reduced(in_one_process(first, second))):
        assert combined.values_by_name() == {name: pytest.approx(value.item(), rel=1e-6) for name, value in expected.items()}


def test_names_missing_on_a_rank_do_not_dilute_the_mean():
    parts = Metrics({"a": Metric(2.0, 2)}), Metrics({"b": Metric(3.0)})
    assert parts[0].reduced(in_one_process(*parts)).values_by_name() == {"a": 1.0, "b": 3.0}


def test_a_mean_of_nothing_is_zero():
    assert Metrics({"a": mean_of(torch.zeros(0))}).values_by_name() == {"a": 0.0}


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert Metrics({"x": ExplainedVariance.of(returns - 3, returns)}).values_by_name()["x"] == pytest.approx(1.0)
    assert Metrics({"x": ExplainedVariance.of(torch.ones(4), returns)}).values_by_name()["x"] == pytest.approx(0.0)
    assert Metrics({"x": ExplainedVariance.of(returns, torch.ones(4))}).values_by_name()["x"] == 0.0


def test_description_of_an_experience_agrees_with_loops():
    e = experience()
    values = describe(e, "k1", 0.05).values_by_name()
    sums, means, chosen = [], [], []
    for b in range(len(e)):
        kl = [(e.old_logprobs[b, t] - e.ref_logprobs[b, t]).item() for t in range(8) if e.response_mask[b, t]]
        sums.append(sum(kl))
        means.append(sum(kl) / len(kl))
        chosen += e.returns[b][e.response_mask[b]].tolist()
    assert values["kl/sequence_sum"] == pytest.approx(sum(sums) / len(e), abs=1e-6)
    assert values["kl/token_mean"] == pytest.approx(sum(means) / len(e), abs=1e-6)
    assert values["return/mean"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-6)
    assert values["reward/std"] == pytest.approx(e.rewards.std().item(), rel=1e-5)
    assert values["response/truncated_share"] == pytest.approx(1 / 3)
    assert values["response/tokens"] == len(chosen)


def test_without_a_reference_nothing_is_said_about_kl():
    assert not [name for name in describe(experience(), None, 0.0) if name.startswith("kl/")]


def test_without_a_critic_nothing_is_said_about_its_fit():
    names = describe(experience(), "k1", 0.1, has_critic=False)
    assert not [name for name in names if name.startswith(("value/", "return/"))] and "advantage/std" in names


def test_description_does_not_depend_on_how_ranks_hold_the_experience():
    e = experience()
    parts = [describe(e.rows(rows), "k3", 0.1) for rows in (torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5]))]
    reduced = parts[0].reduced(in_one_process(*parts)).values_by_name()
    assert reduced == {name: pytest.approx(value, abs=1e-6) for name, value in describe(e, "k3", 0.1).values_by_name().items()}


def test_reward_parts_are_described_one_by_one():
    completion = Completion(0, 0, (1,), (-0.1,), "stop", 0)
    trajectories = [Trajectory(Prompt(0, (1,)), completion, r, {"exact": r, "model": 2 * r}) for r in (0.0, 1.0)]
    assert describe_rewards(trajectories).values_by_name() == {"reward/exact": 0.5, "reward/model": 1.0}


def test_step_metrics_collect_and_keep_the_slowest_rank():
    ticks = iter([0.0, 1.0, 3.0, 4.0, 5.0, 10.0])
    metrics = StepMetrics(clock=lambda: next(ticks))
    with metrics.time("score"):
        pass
    with metrics.time("score"):
        pass
    metrics += Metrics({"loss": Metric(3.0, 2)})
    metrics += Metrics({"loss": Metric(1.0, 2)})
    slower = Metrics({"seconds/score": Largest(7.0), "seconds/step": Largest(9.0)})
    reduced = metrics.reduced(lambda mine: [mine, slower.to_json()])
    assert reduced.values_by_name() == {"loss": 1.0, "seconds/score": 7.0, "seconds/step": 10.0}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    first.start(0)
    for step in range(6):
        first.write(step, {"run": 1})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "ru')  # killed while writing
    second = JsonLines(path)
    second.start(3)
    for step in range(4, 8):
        second.write(step, {"run": 2})
    second.close()
    assert [(line["step"], line["run"]) for line in lines(path)] == [(s, 1) for s in range(4)] + [(s, 2) for s in range(4, 8)]


def test_a_fresh_run_forgets_the_lines_of_another(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    writer = JsonLines(path)
    writer.start(0)
    writer.close()
    assert path.read_text() == ""


def test_the_log_writes_metrics_samples_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog.open("ppo", tmp_path, LogConfig(tensorboard=True, samples=1), 2, PPO_HEADLINE, True, {})
    metrics = Metrics({"reward/mean": Metric(1.0, 4), "response/tokens": Total(50.0), "seconds/step": Largest(2.0)})
    with contextlib.closing(log):
        log.start(0)
        log.write(1, metrics, [{"a": 1}, {"a": 2}], [{"b": 1}])
        log.write(2, Metrics())
    expected = {"reward/mean": 0.25, "response/tokens": 50.0, "seconds/step": 2.0, "tokens_per_s": 25.0}
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **expected}]
    assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "a": 1}, {"step": 1, "b": 1}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("reward/mean")[0].value == 0.25


def test_ranks_that_do_not_write_leave_no_trace(tmp_path):
    log = RunLog.open("ppo", tmp_path, LogConfig(tensorboard=True), 2, PPO_HEADLINE, False, {})
    with contextlib.closing(log):
        log.start(0)
        log.write(1, Metrics({"a": Metric(1.0)}), [{"a": 1}])
    assert not list(tmp_path.iterdir())


def test_missing_wandb_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(SetupError, match="log.wandb_project is 'p', but wandb cannot be imported"):
        RunLog.open("ppo", tmp_path, LogConfig(wandb_project="p"), 2, PPO_HEADLINE, True, {})


def test_plain_lines_where_there_is_no_terminal():
    output, ticks = io.StringIO(), iter([0.0, 10.0, 20.0])
    terminal = Terminal("ppo", 10, PPO_HEADLINE, Console(file=output, force_terminal=False, width=40), clock=lambda: next(ticks))
    terminal.start(4)
    terminal.write(5, {"reward/mean": 0.5, "eval/accuracy": 0.25, "tokens_per_s": 12345.0})
    terminal.write(6, {"reward/mean": 0.75})
    terminal.close()
    assert output.getvalue().splitlines() == [
        "ppo 5/10  reward 0.500  accuracy 0.250  tokens/s 12,345  left 0:50",
        "ppo 6/10  reward 0.750  accuracy 0.250  tokens/s 12,345  left 0:40",
    ]


def test_one_live_line_on_a_terminal():
    output = io.StringIO()
    terminal = Terminal("ppo", 10, PPO_HEADLINE, Console(file=output, force_terminal=True, width=120))
    terminal.start(0)
    terminal.write(1, {"reward/mean": 0.5, "kl/token_mean": math.pi})
    terminal.close()
    assert "reward 0.500" in output.getvalue() and "KL 3.142" in output.getvalue() and "1/10" in output.getvalue()
