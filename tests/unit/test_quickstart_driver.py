"""The quickstart's driver without its models: layouts, configurations, folders, stages that fail, the report of finished stages."""

import io
import json
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megarl.errors import ConfigError, LayoutError, MegarlError, SetupError
from megarl.quickstart import report
from megarl.quickstart.course import MARKER, STAGES, Course, Layout
from megarl.quickstart.stage import Stage, StageFailed, follow, lines_now


def course(out: Path, layout: str = "tp2pp2dp1", *overrides: str) -> Course:
    return Course(out, Layout.parse(layout), 7, overrides)


def stage(tmp_path: Path, program: str, **fields) -> Stage:
    return Stage("trial", [sys.executable, "-c", program], tmp_path / "trial.log", **fields)


@pytest.mark.parametrize(("text", "world_size"), [("tp2pp2dp1", 4), ("tp2pp1dp2", 4), ("tp1pp2dp2", 4), ("tp1pp1dp1", 1)])
def test_layout_reads_back(text: str, world_size: int) -> None:
    assert str(Layout.parse(text)) == text and Layout.parse(text).world_size == world_size


@pytest.mark.parametrize("text", ["", "tp2", "tp2pp2", "tp0pp1dp1", "dp1tp2pp2", "tp2pp2dp1 "])
def test_layout_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="expected a form like tp2pp2dp1"):
        Layout.parse(text)


@pytest.mark.parametrize("layout", ["tp2pp2dp1", "tp2pp1dp2", "tp1pp2dp2", "tp1pp1dp1"])
def test_every_stage_has_a_run_for_every_layout(tmp_path: Path, layout: str) -> None:
    runs = course(tmp_path / "q", layout).prepare()
    assert list(runs) == list(STAGES)
    for name, run in runs.items():
        assert (run.parallel.tensor, run.parallel.pipeline) == (int(layout[2]), int(layout[5])) and run.seed == 7
        assert run.output_dir == tmp_path / "q" / name
        assert "runs/quickstart" not in (tmp_path / "q" / "configs" / f"{name}.yaml").read_text()
        assert not (run.parallel.sequence and run.parallel.tensor == 1)


def test_overrides_reach_their_stage_and_nothing_else(tmp_path: Path) -> None:
    runs = course(tmp_path / "q", "tp2pp2dp1", "ppo:ppo.total_steps=3").prepare()
    assert runs["ppo"].ppo.total_steps == 3 and runs["sft"].train.total_steps > 3
    with pytest.raises(ConfigError, match="expected STAGE:key=value"):
        course(tmp_path / "q", "tp2pp2dp1", "ppo.total_steps=3").prepare()
    with pytest.raises(ConfigError, match="total_stepz"):
        course(tmp_path / "q", "tp2pp2dp1", "ppo:ppo.total_stepz=3").prepare()


def test_only_an_earlier_quickstart_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="no earlier quickstart"):
        course(tmp_path).prepare()
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    mine = course(tmp_path / "q")
    mine.prepare()
    (mine.out / "summary.json").write_text("old")
    mine.prepare()
    assert (mine.out / MARKER).exists() and not (mine.out / "summary.json").exists()


def test_a_layout_larger_than_the_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_HOST_GPUS", "2")
    with pytest.raises(LayoutError, match="needs 4 GPUs, this machine has 2"):
        course(tmp_path / "q").prepare()


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("import sys; print('megarl: error: found a', file=sys.stderr); print('later'); sys.exit(2)", 2, "found a"),
        ("raise ValueError('x')", 1, "ValueError: x"),
        ("import os; print('last'); import sys; sys.stdout.flush(); os.kill(os.getpid(), 9)", 1, "last"),
    ],
)
def test_a_failed_stage_says_why_and_where(tmp_path: Path, program: str, code: int, words: str) -> None:
    failing = stage(tmp_path, program)
    with pytest.raises(StageFailed) as failure:
        failing.run(Console(file=io.StringIO()))
    assert failure.value.exit_code == code
    assert "stage trial failed" in str(failure.value) and words in str(failure.value) and str(failing.log) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_progress_keeps_numbers_of_steps_it_does_not_show(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    program = f"""
import json
with open({str(metrics)!r}, "w") as file:
    for step in range(1, 6):
        file.write(json.dumps({{"step": step, "loss": step / 10, **({{"eval/accuracy": 0.25}} if step == 2 else {{}})}}) + chr(10))
"""
    said = io.StringIO()
    headline = {"loss": "loss", "accuracy": "eval/accuracy"}
    stage(tmp_path, program, metrics=metrics, total_steps=5, headline=headline).run(Console(file=said))
    lines = said.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("trial 1/5") and "loss 0.500  accuracy 0.250" in lines[1]


def test_an_interrupt_ends_the_whole_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "left"
    program = f"import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 2; touch {left}']); time.sleep(60)"

    def interrupt(_: float) -> None:
        if (tmp_path / "trial.log").exists() and time.monotonic() > begun + 0.5:
            raise KeyboardInterrupt

    begun = time.monotonic()
    monkeypatch.setattr("megarl.quickstart.stage.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, program).run(Console(file=io.StringIO()))
    monkeypatch.undo()
    time.sleep(2.2)
    assert not left.exists()


def test_a_growing_file_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = follow(path)
    assert list(lines_now(lines)) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(lines_now(lines)) == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert list(lines_now(lines)) == [{"step": 2}] and list(lines_now(lines)) == []


def finished(out: Path) -> Path:
    """A folder as the stages leave it."""
    lines = {
        "reward": [{"step": 0, "eval/pair_accuracy": 0.5}, {"step": 5, "eval/pair_accuracy": 0.9}],
        "ppo": [
            {"step": 0, "eval/accuracy": 0.4},
            {"step": 1, "reward/mean": 0.1, "kl/token_mean": 0.0},
            {"step": 2, "reward/mean": 0.3, "kl/token_mean": 0.2, "eval/accuracy": 0.7},
        ],
    }
    for name, rows in lines.items():
        (out / name).mkdir(parents=True)
        (out / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    (out / "verify").mkdir()
    (out / "verify" / "trained.json").write_text('{"sft_heldout_accuracy": 0.4}')
    (out / "verify" / "verification.json").write_text('{"max_abs_logit_difference": 1e-6, "vllm_greedy_agreement": 1.0}')
    return out


def test_the_summary_has_the_promised_keys(tmp_path: Path) -> None:
    stages = ("data", *STAGES, "export", "verify")
    summary = report.summarize(finished(tmp_path), "tp2pp2dp1", dict.fromkeys(stages, 1.0))
    assert set(summary) == {"versions", "layout", "sft", "reward", "ppo", "export", "seconds"}
    assert summary["sft"] == {"heldout_accuracy": 0.4} and summary["reward"] == {"heldout_pair_accuracy": 0.9}
    assert (summary["ppo"]["heldout_accuracy_before"], summary["ppo"]["heldout_accuracy_after"]) == (0.4, 0.7)
    assert summary["ppo"]["curve"][-1] == {"step": 2, "reward": 0.3, "kl": 0.2, "accuracy": 0.7}
    assert set(summary["export"]) == {"path", "max_abs_logit_difference", "vllm_greedy_agreement"}
    report.draw(summary["ppo"]["curve"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = io.StringIO()
    report.show(summary, [], tmp_path / "curves.png", Console(file=said, width=140))
    assert "40.0% -> 70.0%" in said.getvalue()


def test_a_number_that_was_never_reported_is_named(tmp_path: Path) -> None:
    (finished(tmp_path) / "reward" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(MegarlError, match="reported no eval/pair_accuracy"):
        report.summarize(tmp_path, "tp2pp2dp1", {})


def test_answers_that_changed_for_the_better_come_first() -> None:
    def sample(step: int, prompt: str, response: str, accuracy: float) -> dict:
        return {"step": step, "kind": "eval", "prompt": prompt, "response": response, "answer": "5", "accuracy": accuracy}

    before = [sample(0, "a", "5", 1.0), sample(0, "b", "4", 0.0)]
    samples = [*before, {"step": 1, "prompt": "x"}, sample(9, "a", "5", 1.0), sample(9, "b", "5", 1.0)]
    found = report.answers(samples)
    assert [answer.prompt for answer in found] == ["b", "a"] and (found[0].before, found[0].after) == ("4", "5")
