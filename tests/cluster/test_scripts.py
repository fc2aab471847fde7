"""slurm/smoke.sh and the chain of slurm/course_70b.sh, small, from their first job to a verified export, and cut where a stage fails."""

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.jobs import ENVIRONMENT, OPTIONS, ROOT, Job
from tests.course.test_ppo import ppo_run
from tests.faults.started import write_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STAGES = ("sft", "reward", "ppo")


def test_smoke(cluster, tmp_path):
    options = ("--gpus-per-node=0", f"--output={tmp_path}/%x-%j.log")
    number = cluster.run(
        "sbatch", "--parsable", *options, "slurm/smoke.sh", cwd=ROOT, **ENVIRONMENT, SMOKE_DIR=str(tmp_path)
    ).stdout.strip()
    job = Job(cluster, ROOT / "configs/quickstart/sft.yaml", tmp_path / "sft", number=number)
    try:
        job.wait()
    except AssertionError:
        print(*(path.read_text() for path in tmp_path.glob("*.log")))
        raise
    assert job.outcome()["outcome"] == "done" and job.newest() == 20
    cluster.wait_until_idle()


def write_course(root: Path) -> dict[str, Path]:
    """Configurations of three short stages: each starts from what the one before it will have made."""
    from megarl.quickstart.make_data import make_data

    make_data(root / "data", seed=0)
    shape = root / "data" / "model"
    lesson = {"precision": "fp32", "tokenizer": root / "data" / "tokenizer.model", "parallel": {"microbatch_size": 8}}
    train = {"train": {"total_steps": 4, "batch_size": 16}}
    keys = {
        "sft": lesson
        | train
        | {"output_dir": root / "sft", "model": {"path": shape, "random_init": True}}
        | {"data": {"path": root / "data" / "sft.jsonl", "max_tokens": 16}},
        "reward": lesson
        | train
        | {"output_dir": root / "reward", "model": {"path": root / "sft", "shape": shape}}
        | {"data": {"path": root / "data" / "preferences.jsonl", "max_tokens": 16}},
    }
    judge = {"path": root / "reward", "shape": shape}
    changes = {"actor": {"path": root / "sft", "shape": shape}, "critic": judge, "rewards": [{"kind": "model", **judge}, {"kind": "exact"}]}
    changes |= {"ppo": {"total_steps": 2, "minibatch_size": 16}, "eval": None, "checkpoint": {}}
    keys["ppo"] = ppo_run(root, "ppo", **changes).model_dump(mode="json")
    return {stage: write_config(root / f"{stage}.yaml", keys[stage]) for stage in STAGES}


def submit_course(cluster, root: Path, **environment: str) -> list[Job]:
    configs = write_course(root)
    named = {f"{stage.upper()}_CONFIG": str(path) for stage, path in configs.items()}
    named |= {"EXPORT_FROM": str(root / "ppo"), "EXPORT_TO": str(root / "exported")}
    options = [*OPTIONS, f"--output={root}/%x-%j.log"]
    said = cluster.run("bash", "slurm/course_70b.sh", *options, cwd=ROOT, **ENVIRONMENT, **named, **environment).stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == [*STAGES, "export"]
    return [Job(cluster, configs.get(stage, root), root / stage, stage, line.split()[-1]) for stage, line in zip((*STAGES, "export"), said)]


def test_the_course_runs_to_a_verified_export(cluster, tmp_path):
    jobs = submit_course(cluster, tmp_path)
    try:
        for job in jobs:
            job.wait()
    finally:
        for path in sorted(tmp_path.glob("*.log"), key=lambda path: path.stat().st_mtime):
            print(f"== {path.name}\n{path.read_text()}")
    assert [job.outcome()["outcome"] for job in jobs[:3]] == ["done"] * 3
    assert [job.newest() for job in jobs[:3]] == [4, 4, 2]
    exported = tmp_path / "exported"
    assert json.loads((exported / "config.json").read_text())["architectures"] and list(exported.glob("*.safetensors"))
    count = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({str(exported)!r}).num_parameters())"
    loaded = cluster.run(sys.executable, "-c", count)
    assert int(loaded.stdout.split()[-1]) > 0
    starts = [cluster.job(job.number) for job in jobs]
    assert all(later["StartTime"] >= earlier["EndTime"] for earlier, later in zip(starts, starts[1:])), "one after another"
    cluster.wait_until_idle()


def test_a_stage_that_stops_for_good_cancels_those_behind_it(cluster, tmp_path):
    crash = {"MEGARL_FAULT": "learn:0:1:kill", "MEGARL_ALLOW_FAULTS": "1", "MEGARL_MAX_FRUITLESS": "1"}
    jobs = submit_course(cluster, tmp_path, **crash)
    jobs[0].wait("FAILED")
    assert jobs[0].shown()["ExitCode"] == "93:0"
    for job in jobs[1:]:
        job.wait("CANCELLED", 30)
        assert not job.run.joinpath("outcome.json").exists()
    cluster.wait_until_idle()


def test_the_course_submits_nothing_when_a_stage_cannot_work(cluster, tmp_path):
    configs = write_course(tmp_path)
    named = {f"{stage.upper()}_CONFIG": str(path) for stage, path in configs.items()} | {"PPO_CONFIG": str(tmp_path / "nowhere.yaml")}
    done = cluster.run("bash", "slurm/course_70b.sh", *OPTIONS, check=False, cwd=ROOT, **ENVIRONMENT, **named)
    assert done.returncode == 78 and "nowhere.yaml" in done.stderr and done.stdout == ""
    assert cluster.run("squeue", "-h").stdout == ""
