"""The quickstart as a user starts it: short in the default selection, whole and learning in the slow one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {
    "sft": {"heldout_accuracy"},
    "reward": {"heldout_pair_accuracy"},
    "ppo": {"heldout_accuracy_before", "heldout_accuracy_after", "curve"},
    "export": {"path", "max_abs_logit_difference", "vllm_greedy_agreement"},
}
SHORT = ["sft:train.total_steps=12", "reward:train.total_steps=6", "ppo:ppo.total_steps=3", "ppo:ppo.critic_warmup_steps=1"]


def quickstart(out: Path, layout: str, *overrides: str, seed: int = 0) -> tuple[dict, str]:
    """Run it, return summary.json and what it printed."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MEGARL_", "LAYOUT", "SEED", "OUT"))}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "--layout", layout, "--seed", str(seed), "--out", str(out), *overrides],
        env=own | {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    logs = "".join(f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(out.glob("logs/*.log"))) if done.returncode else ""
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return json.loads((out / "summary.json").read_text()), done.stdout


def check(summary: dict, out: Path) -> None:
    """What must hold however short the course was."""
    for part, keys in KEYS.items():
        assert set(summary[part]) == keys
    assert set(summary["seconds"]) == {"data", "sft", "reward", "ppo", "export", "verify"}
    # one model and one set of prompts: Megatron, told the right answers, and vLLM, sampling greedily, count the same (but for ties)
    assert summary["sft"]["heldout_accuracy"] == pytest.approx(summary["ppo"]["heldout_accuracy_before"], abs=0.005)
    assert summary["export"]["max_abs_logit_difference"] < 1e-4
    assert summary["export"]["vllm_greedy_agreement"] >= 0.99
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (Path(summary["export"]["path"]) / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_course_ends_with_a_checked_export(tmp_path: Path) -> None:
    out = tmp_path / "q"
    summary, said = quickstart(out, "tp2pp1dp1", *SHORT)
    check(summary, out)
    assert [point["step"] for point in summary["ppo"]["curve"]] == [0, 1, 2, 3]
    assert "held-out accuracy" in said and str(out / "summary.json") in said


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", ["tp2pp2dp1", "tp2pp1dp2", "tp1pp2dp2"])
def test_every_layout_learns(tmp_path: Path, layout: str) -> None:
    summary, _ = quickstart(tmp_path / "q", layout)
    check(summary, tmp_path / "q")
    assert summary["reward"]["heldout_pair_accuracy"] >= 0.7
    assert summary["ppo"]["heldout_accuracy_after"] - summary["ppo"]["heldout_accuracy_before"] >= 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_seed_gives_the_same_curve(tmp_path: Path) -> None:
    first, second = (quickstart(tmp_path / name, "tp2pp2dp1", *SHORT, seed=3)[0] for name in ("a", "b"))
    assert first["ppo"]["curve"] == second["ppo"]["curve"]


def test_a_failed_stage_is_one_line_and_names_its_log(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "--layout", "tp1pp1dp1", "--out", str(tmp_path / "q"), "sft:data.path=/nowhere.jsonl"],
        env={k: v for k, v in os.environ.items() if not k.startswith("MEGARL_")} | {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode in (65, 78)
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in ("stage sft failed", "/nowhere.jsonl", "sft.log"))
