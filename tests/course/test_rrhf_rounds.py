"""`launch/rrhf_rounds.sh` as a user starts it: each round samples from the model of the round before, and a torn one goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = [
    "sample.num_prompts=24",
    "rollout={prompts_per_step: 12, samples_per_prompt: 4, max_response_tokens: 4, kv_cache_bytes: 8388608}",
    "rewards=[{kind: length, target: 2}]",  # random weights say something about every prompt
]
RRHF = [
    "rrhf.max_responses=4",
    "parallel.microbatch_size=16",
    "train={total_steps: 3, batch_size: 8}",
    "model.optimizer={lr: 1.0e-2}",
    "checkpoint.background=off",
    "data.max_tokens=32",  # tokens that are no text become several
]


def rounds(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if not k.startswith("MEGARL_") and k not in ("ROUNDS", "SEED", "NPROC")}
    settings = {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, "NPROC": "1"} | settings
    return subprocess.run(["bash", "launch/rrhf_rounds.sh", *arguments], env=own | settings, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        (("a.yaml", "b.yaml"), {}, "usage: ROUNDS=3"),
        (("a.yaml", "b.yaml", "out"), {"ROUNDS": "0"}, "ROUNDS is '0'"),
        (("a.yaml", "b.yaml", "out"), {"SEED": "x"}, "SEED is 'x'"),
        (("a.yaml", "b.yaml", "out", "seed=3"), {}, "expected sample:key=value or rrhf:key=value"),
    ],
)
def test_a_mistake_is_one_line(arguments, settings, expected):
    done = rounds(*arguments, **settings)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr


def test_a_wrong_key_of_either_file_is_told_before_anything_is_sampled(tmp_path):
    files = [f"configs/quickstart/{kind}.yaml" for kind in ("sample", "rrhf")]
    done = rounds(*files, str(tmp_path / "out"), "rrhf:rrhf.max_response=4")
    assert done.returncode == 78 and "did you mean rrhf.max_responses" in done.stderr
    assert not (tmp_path / "out").exists()


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "model" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_round_starts_from_the_model_of_the_last_and_a_torn_one_goes_on(tmp_path):
    from megarl.quickstart.make_data import make_data

    make_data(tmp_path / "data", seed=0)
    files = []
    for kind in ("sft", "sample", "rrhf"):
        text = (ROOT / "configs" / "quickstart" / f"{kind}.yaml").read_text().replace("runs/quickstart", str(tmp_path))
        (tmp_path / f"{kind}.yaml").write_text(text)
        files.append(str(tmp_path / f"{kind}.yaml"))
    start = [sys.executable, "-m", "megarl", "sft", files.pop(0), "parallel={}", "train.total_steps=2", "checkpoint.background=off"]
    subprocess.run(start, check=True, cwd=ROOT)
    changes = [*(f"sample:{change}" for change in SAMPLE), *(f"rrhf:{change}" for change in RRHF)]
    out = tmp_path / "out"
    done = rounds(*files, str(out), *changes, ROUNDS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = out / "round-1", out / "round-2"
    settings = json.loads((second / "sampled" / "parts" / "settings.json").read_text())
    assert settings["actor"]["path"] == str(first / "model") and settings["seed"] == 2
    samples = [(folder / "sampled" / "samples.jsonl").read_text().splitlines() for folder in (first, second)]
    assert len(samples[0]) == len(samples[1]) == 24 and samples[0] != samples[1]
    logged = metrics_of(second)
    assert len(logged) >= 3

    (second / "finished").unlink()
    shutil.rmtree(second / "model")
    before = (first / "model" / "metrics.jsonl").stat().st_mtime_ns
    done = rounds(*files, str(out), *changes, ROUNDS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "round 1 of 2" not in done.stderr and "round 2 of 2" in done.stderr
    assert (first / "model" / "metrics.jsonl").stat().st_mtime_ns == before
    assert metrics_of(second) == logged and (second / "sampled" / "samples.jsonl").read_text().splitlines() == samples[1]
