"""The quickstart's course on CUDA devices: a larger model in bf16, the same commands, stages and summary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3000)]

# About 27 million parameters, fifty times the quickstart's; learning rates go down with the width.
WIDER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.03,
}
SETTINGS = [
    *(f"{stage}:precision=bf16" for stage in ("sft", "reward", "ppo")),
    *(f"{stage}:parallel.microbatch_size=256" for stage in ("sft", "reward", "ppo")),
    "sft:model.optimizer.lr=1.0e-3",
    "reward:model.optimizer.lr=3.0e-4",
    "ppo:actor.optimizer.lr=1.0e-4",
    "ppo:critic.optimizer.lr=3.0e-4",
    "ppo:ppo.total_steps=100",
    "ppo:rollout.kv_cache_bytes=4294967296",
]
REHEARSED = [
    *(f"{stage}:precision=bf16" for stage in ("sft", "reward", "ppo")),
    "sft:train.total_steps=12",
    "reward:train.total_steps=6",
    "ppo:ppo.total_steps=3",
]


@pytest.mark.parametrize("layout", ["tp1pp1dp1", "tp2pp1dp1", "tp2pp2dp1"])
def test_the_course_in_bf16(machine, layout, tmp_path):
    machine.need({"tp1pp1dp1": 1, "tp2pp1dp1": 2, "tp2pp2dp1": 4}[layout])
    out = tmp_path / "q"
    shape = save_shape(tmp_path / "shape", {} if machine.is_rehearsal else WIDER)
    changes = [f"sft:model.path={shape}", *(REHEARSED if machine.is_rehearsal else SETTINGS)]
    summary = quickstart(out, layout, *changes)
    print(json.dumps(summary, indent=1))
    check_summary(summary, out, total_steps=3 if machine.is_rehearsal else 100)
    if not machine.is_rehearsal:
        ppo = summary["ppo"]
        assert summary["reward"]["heldout_pair_accuracy"] >= 0.7
        assert ppo["heldout_accuracy_after"] - ppo["heldout_accuracy_before"] >= 0.1


def save_shape(folder: Path, changes: dict) -> Path:
    """The quickstart's config.json with other sizes."""
    from megarl.quickstart.make_data import MODEL_CONFIG

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG | changes))
    return folder


def quickstart(out: Path, layout: str, *overrides: str) -> dict:
    """Run it with this interpreter's packages and return summary.json."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MEGARL_", "LAYOUT", "SEED", "OUT"))}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "--layout", layout, "--out", str(out), *overrides],
        env=own | {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    logs = "".join(f"\n== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(out.glob("logs/*.log"))) if done.returncode else ""
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return json.loads((out / "summary.json").read_text())


def check_summary(summary: dict, out: Path, total_steps: int) -> None:
    """What must hold however much was learned."""
    ppo, export = summary["ppo"], summary["export"]
    assert [point["step"] for point in ppo["curve"]] == list(range(total_steps + 1))
    # The trainer in fp32 and the sampler in bf16 answer with the same weights: near ties may fall the other way.
    assert abs(summary["sft"]["heldout_accuracy"] - ppo["heldout_accuracy_before"]) <= 0.03
    assert export["max_abs_logit_difference"] < 2e-3  # both in fp32: sums in another order, over more layers than the quickstart's
    assert export["vllm_greedy_agreement"] >= 0.98
    config = json.loads((Path(export["path"]) / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    lines = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["rollout/logprob_gap"] for line in lines if "rollout/logprob_gap" in line]
    assert len(gaps) == total_steps and max(gaps) < 0.05, "sampler and trainer disagree about log-probabilities"
    assert all(line.get("actor/skipped_updates", 0) == 0 and line.get("critic/skipped_updates", 0) == 0 for line in lines)
