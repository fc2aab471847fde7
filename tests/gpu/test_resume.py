"""A checkpoint brings back weights, optimizer and random states bit for bit; the run that continues does what the whole one did."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.course.lesson_files import read_metrics, sft_run, write_files
from tests.gpu.processes import run_on_devices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STEPS, KEEP = 6, {"every_steps": 3, "keep_last": 3}
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}  # heads of 64
LAYOUTS = {1: {}, 2: {"tensor": 2, "sequence": True}, 4: {"tensor": 2, "pipeline": 2, "sequence": True}}
# The state comes back exactly, but kernels that add with atomics order their sums anew in every run.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_resume_equals_no_stop(machine, num_ranks, precision, tmp_path):
    machine.need(num_ranks)
    root = write_files(tmp_path / "files", **SHAPE)
    settings = {"root": str(root), "precision": precision, "parallel": LAYOUTS[num_ranks] | {"microbatch_size": 8}}
    run_on_devices(train, num_ranks, tmp_path / "1", output="whole", **settings)
    for output in ("restored", "resumed"):
        step = root / "whole" / "checkpoints" / "step-00000003"
        shutil.copytree(step, root / output / "checkpoints" / step.name)
    exact = run_on_devices(restore, num_ranks, tmp_path / "2", output="restored", **settings)
    assert exact == [{"step": 3, "weights": True, "optimizer": True, "random": True}] * num_ranks
    run_on_devices(train, num_ranks, tmp_path / "3", output="resumed", **settings)
    whole, resumed = (read_metrics(root, output) for output in ("whole", "resumed"))
    assert sorted(resumed) == [4, 5, 6]
    assert whole[1]["loss"] - whole[6]["loss"] > 5 * TOLERANCE[precision] * whole[1]["loss"], "steps without learning look alike"
    for step, values in resumed.items():
        for name, factor in {"loss": 1, "grad_norm": 10, "lr": 1}.items():
            assert values[name] == pytest.approx(whole[step][name], rel=TOLERANCE[precision] * factor), (step, name)


def make_run(root: str, output: str, precision: str, parallel: dict):
    model = {"path": Path(root) / "shape", "random_init": True, "optimizer": {"lr": 1e-3}}
    return sft_run(Path(root), output, STEPS, precision=precision, parallel=parallel, checkpoint=KEEP, model=model)


def train(**settings) -> str:
    """One rank: the lesson, from its newest checkpoint if there is one."""
    from megarl.course.sft import train_sft
    from megarl.parallel import groups

    run = make_run(**settings)
    train_sft(run, groups.initialize(run.parallel, run.seed))
    return "trained"


def restore(**settings) -> dict:
    """One rank: what the store puts back, against what this rank's files hold."""
    import torch
    from safetensors.torch import load_file

    from megarl.checkpoint.files import plan_files
    from megarl.course.lesson import build_parts
    from megarl.course.sft import HEADLINE, DemonstrationSet, Imitation
    from megarl.parallel import device, groups

    run = make_run(**settings)
    layout = groups.initialize(run.parallel, run.seed)
    parts = build_parts("sft", run, layout, "actor", DemonstrationSet, partial(Imitation, run.parallel.logits_bytes), HEADLINE)
    state = parts.checkpoints.restore_or_start({"actor": parts.student})
    random = device.random_states()
    step = run.output_dir / "checkpoints" / "step-00000003"

    equal = {"weights": True, "optimizer": True, "random": True}
    for planned in plan_files(layout.rank, {"actor": parts.student}):
        live, stored = random if planned.entry.kind == "random" else planned.tensors, load_file(step / planned.path)
        same = live.keys() == stored.keys() and all(torch.equal(live[key].cpu(), stored[key]) for key in stored)
        equal[planned.entry.kind] = equal[planned.entry.kind] and same
    report = {"step": state.step, **equal}
    parts.log.close()
    return report
