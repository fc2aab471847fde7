"""`--check` looks at the checkpoints that already lie in output_dir: another run's are refused before anything is loaded."""

import hashlib

import pytest

from megarl import cli
from megarl.checkpoint.manifest import FORMAT, MANIFEST, MANIFEST_HASH, Manifest, StoredLayout, StoredModel, manifest_hash_line
from tests.unit.tiny_run import PPO, SFT, write_run, write_shape

LEARNED = StoredModel(shapes={}, counts={"num_steps": 3, "num_updates": 3})


def write_checkpoint(root, step: int = 3, course: str = "ppo", precision: str = "bf16", models=("actor", "critic"), **shape) -> None:
    """A checkpoint as far as the manifest and the models' shapes go."""
    directory = root / "runs" / ("ppo" if course == "ppo" else "sft") / "checkpoints" / f"step-{step:08d}"
    for model in models:
        write_shape(directory / model, **shape)
    manifest = Manifest(
        format=FORMAT,
        course=course,
        state={"step": step},
        layout=StoredLayout(precision=precision, world_size=2),
        models=dict.fromkeys(models, LEARNED),
        files={},
    )
    data = manifest.model_dump_json().encode()
    (directory / MANIFEST).write_bytes(data)
    (directory / MANIFEST_HASH).write_bytes(manifest_hash_line(hashlib.sha256(data).hexdigest()))


def check(root, capsys, kind: str = "ppo", *overrides: str) -> tuple[int, list[str]]:
    path = write_run(root, {"ppo": PPO, "sft": SFT, "dpo": SFT}[kind])
    code = cli.run([kind, str(path), *overrides, "--check"])
    return code, [line.replace(str(root), "ROOT") for line in capsys.readouterr().err.splitlines()]


def test_the_runs_own_checkpoint_is_accepted_under_any_layout(tmp_path, capsys):
    write_checkpoint(tmp_path)
    assert check(tmp_path, capsys) == (0, [])
    assert check(tmp_path, capsys, "ppo", "parallel.pipeline=1") == (0, [])


HERE = "megarl: error: ROOT/run.yaml:1: output_dir: ROOT/runs/ppo/checkpoints/step-00000003 "
OTHER = "choose another output_dir"


@pytest.mark.parametrize(
    "written, overrides, said",
    [
        ({"num_hidden_layers": 2}, (), f"holds another actor: num_layers 2 in the checkpoint, 4 in the run; {OTHER} or that model's path"),
        (
            {"precision": "fp32"},
            (),
            "was written in precision fp32; this run has bf16: set precision back, or start a new output_dir from its weights (model path)",
        ),
        (
            {},
            ("ppo.advantage=rloo", "critic=null"),
            f"is a ppo checkpoint of ['actor', 'critic']; this is a ppo run of ['actor']: {OTHER}",
        ),
        (
            {},
            ("ppo.reference_refresh={every_steps: 1}",),
            f"is a ppo checkpoint of ['actor', 'critic']; this is a ppo run of ['actor', 'critic', 'reference']: {OTHER}",
        ),
    ],
)
def test_another_runs_is_refused_with_the_runs_own_line(tmp_path, capsys, written, overrides, said):
    write_checkpoint(tmp_path, **written)
    code, lines = check(tmp_path, capsys, "ppo", *overrides)
    assert code == 78 and lines == [HERE + said]


def test_another_stage_of_the_course_is_refused(tmp_path, capsys):
    write_checkpoint(tmp_path, course="sft", models=("actor",))
    assert check(tmp_path, capsys, "sft")[0] == 0
    code, lines = check(tmp_path, capsys, "dpo")
    assert code == 78 and "is a sft checkpoint of ['actor']; this is a dpo run of ['actor']" in lines[0]


def test_a_damaged_manifest_is_left_to_the_run_which_falls_back(tmp_path, capsys):
    write_checkpoint(tmp_path)
    write_checkpoint(tmp_path, step=4, precision="fp32")
    damaged = tmp_path / "runs" / "ppo" / "checkpoints" / "step-00000004" / MANIFEST
    damaged.write_bytes(damaged.read_bytes() + b" ")
    assert check(tmp_path, capsys) == (0, [])
