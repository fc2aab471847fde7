"""A checkpoint continues under any layout, optimizer state included: what it holds comes back bit for bit, the loss goes on the same."""

import contextlib
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint.sharded import whole
from megarl.checkpoint.sources import CheckpointFiles, CheckpointSource
from tests.course.lesson_files import read_metrics, sft_run, write_files
from tests.multi_rank.role_cases import MIXTURE
from tests.ranks import run_ranks

DENSE = {"num_hidden_layers": 4, "vocab_size": 61}  # no multiple of anything: the vocabulary is padded
PLAIN = {"distributed_optimizer": False}
SEQUENCE = {"tensor": 2, "sequence": True}

# (model, precision, the layout that writes, layouts that read)
QUICK = [("dense", "fp32", {}, [SEQUENCE, PLAIN]), ("dense", "bf16", SEQUENCE | PLAIN, [{"pipeline": 2}])]
DENSE_LAYOUTS = {
    "dp4": {},
    "dp4 plain": PLAIN,
    "tp2 dp2": SEQUENCE,
    "tp4": {"tensor": 4, "sequence": True} | PLAIN,
    "pp2 dp2": {"pipeline": 2},
    "vpp2 tp2": {"pipeline": 2, "virtual_pipeline": 2, **SEQUENCE},
    "cp2 dp2": {"context": 2},
    "pp4": {"pipeline": 4} | PLAIN,
}
MIXTURE_LAYOUTS = {
    "ep1": {},
    "ep2": {"expert": 2},
    "ep4 plain": {"expert": 4} | PLAIN,
    "ep2 tp2": {"expert": 2, **SEQUENCE},
    "ep2 pp2": {"expert": 2, "pipeline": 2},
}


def pairs(layouts: dict[str, dict]) -> list[tuple[dict, list[dict]]]:
    """Each layout writes once, the next two read."""
    found = list(layouts.values())
    return [(writer, [found[(i + 1) % len(found)], found[(i + 3) % len(found)]]) for i, writer in enumerate(found)]


SLOW = [
    *(("dense", "fp32", writer, readers) for writer, readers in pairs(DENSE_LAYOUTS)),
    *(("mixture", "fp32", writer, readers) for writer, readers in pairs(MIXTURE_LAYOUTS)),
    ("dense", "bf16", DENSE_LAYOUTS["tp2 dp2"], [DENSE_LAYOUTS["dp4 plain"], DENSE_LAYOUTS["vpp2 tp2"]]),
]


def make_run(root: Path, output: str, precision: str, parallel: dict, steps: int = 4):
    data = {"path": root / "train.jsonl", "max_tokens": 16}
    settings = {"precision": precision, "parallel": {"microbatch_size": 2} | parallel, "data": data}
    return sft_run(root, output, steps, checkpoint={"every_steps": 2, "keep_last": 5, "background": "off"}, **settings)


def train(run) -> None:
    from megarl.course.sft import train_sft
    from megarl.parallel import groups

    train_sft(run, groups.initialize(run.parallel, run.seed))


def read_and_write(run, other) -> None:
    """Load the newest checkpoint of `run` and save it at once as one of `other`, which has the same layout."""
    from megarl.checkpoint.store import Checkpoints
    from megarl.course.lesson import build_parts
    from megarl.course.sft import HEADLINE, DemonstrationSet, Imitation
    from megarl.parallel import groups

    layout = groups.initialize(run.parallel, run.seed)
    parts = build_parts("sft", run, layout, "actor", DemonstrationSet, partial(Imitation, run.parallel.logits_bytes), HEADLINE)
    state = parts.checkpoints.restore_or_start({"actor": parts.student})
    copies = Checkpoints("sft", other, layout, parts.checkpoints.tokenizer, 4)
    copies.restore_or_start({"actor": parts.student})
    copies.save(state, {"actor": parts.student})
    parts.log.close()


def all_cases(rank: int, world_size: int, roots: dict[str, Path], cases: list) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for number, (model, precision, writer, readers) in enumerate(cases):
            root, name = roots[model], f"case{number}"
            train(make_run(root, name, precision, writer))
            for index, reader in enumerate(readers):
                for output in ("copied", "resumed"):
                    source = root / name / "checkpoints" / "step-00000002"
                    if rank == 0:
                        shutil.copytree(source, root / f"{name}-{output}{index}" / "checkpoints" / source.name)
                    dist.barrier()
                run = make_run(root, f"{name}-copied{index}", precision, reader)
                read_and_write(run, make_run(root, f"{name}-again{index}", precision, reader))
                train(make_run(root, f"{name}-resumed{index}", precision, reader))
    return said.getvalue()


def contents(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of every slot, put together."""
    files = CheckpointFiles(checkpoint)
    found = {}
    for slot in ("weight", "exp_avg", "exp_avg_sq", "main"):
        source = CheckpointSource(checkpoint, "actor", slot, files)
        found |= {(slot, name): source.read(name, whole(source.shape(name))) for name in source.names()}
    return found


def assert_cases(roots: dict[str, Path], cases: list) -> None:
    for number, (model, precision, writer, readers) in enumerate(cases):
        root, name = roots[model], f"case{number}"
        straight = read_metrics(root, name)
        written = contents(root / name / "checkpoints" / "step-00000002")
        slots = {slot for slot, _ in written}
        assert slots == {"weight", "exp_avg", "exp_avg_sq"} | ({"main"} if precision == "bf16" else set())
        assert all(tensor.any() for (slot, _), tensor in written.items() if slot != "weight"), "Adam has seen every weight"
        counts = json.loads((root / name / "checkpoints" / "step-00000002" / "manifest.json").read_text())["models"]["actor"]["counts"]
        assert counts == {"num_steps": 2, "num_updates": 2}
        for index, reader in enumerate(readers):
            what = f"{model} {precision}: {writer} -> {reader}"
            again = contents(root / f"{name}-again{index}" / "checkpoints" / "step-00000002")
            assert again.keys() == written.keys(), what
            assert [key for key in written if not torch.equal(written[key], again[key])] == [], what
            resumed = read_metrics(root, f"{name}-resumed{index}")
            assert sorted(resumed) == [3, 4]
            for step, values in resumed.items():
                assert values["lr"] == straight[step]["lr"], what
                tolerance = 1e-6 if precision == "fp32" else 2e-3  # bf16: another layout rounds elsewhere
                assert values["loss"] == pytest.approx(straight[step]["loss"], rel=tolerance), (what, step)


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    shapes = {"dense": DENSE, "mixture": MIXTURE}
    return {name: write_files(tmp_path_factory.mktemp(name), **shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def said(roots) -> list[str]:
    return run_ranks(all_cases, 2, roots, QUICK)


def test_a_checkpoint_continues_under_other_layouts(roots, said):
    assert_cases(roots, QUICK)
    assert "written by the layout tp1 pp1 dp2 fp32, this run has tp2 pp1 dp1 fp32: random states start from the seed" in said[0]
    assert said[1] == ""


def test_the_reader_in_the_documentation_reads_it(roots, said):
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    code = re.search(r"```python\n(.*?def read_checkpoint.*?)```", text, re.DOTALL)[1]
    namespace: dict = {}
    exec(compile(code, "docs/checkpoints.md", "exec"), namespace)  # the documentation is ours
    for number in range(len(QUICK)):
        directory = roots["dense"] / f"case{number}" / "checkpoints" / "step-00000002"
        for slot in ("weight", "exp_avg", "exp_avg_sq", "main"):
            expected = {name: tensor for (held, name), tensor in contents(directory).items() if held == slot}
            found = namespace["read_checkpoint"](str(directory), "actor", slot)
            assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_continues_under_many_layouts(roots, tmp_path_factory):
    fresh = {name: Path(shutil.copytree(root, tmp_path_factory.mktemp("slow") / name)) for name, root in roots.items()}
    for root in fresh.values():
        for output in root.glob("case*"):
            shutil.rmtree(output)
    run_ranks(all_cases, 4, fresh, SLOW, timeout_s=800)
    assert_cases(fresh, SLOW)
