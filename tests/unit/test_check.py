"""The arithmetic of `--check` and the rules behind it, against brute force and published numbers."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import save_file

from megarl.check import arithmetic, inspect, show
from megarl.config import PpoRun
from megarl.config_file import Fault
from megarl.cross_check import cross_check, divisors, smallest_world, started_on
from megarl.errors import ConfigError
from megarl.models.family import read_spec
from megarl.parallel.layout import ParallelLayout
from megarl.planner.batch import batch_of
from megarl.planner.models import owned_of
from megarl.planner.shards import shards_of
from tests.recipes import kind_of
from tests.unit.text_files import sentencepiece_file
from tests.unit.tiny_run import SFT, write_run, write_shape

CONFIGS = Path(__file__).parents[2] / "configs"
RUN = {
    "output_dir": "x",
    "tokenizer": "x",
    "actor": {"path": "x"},
    "critic": {"path": "x"},
    "rewards": ({"kind": "exact"},),
    "data": {"path": "x"},
}


def ppo_run(tensor: int, pipeline: int, micro: int, prompts: int, samples: int, minibatch: int, generator: int = 1) -> PpoRun:
    return PpoRun(
        **RUN,
        parallel={"tensor": tensor, "pipeline": pipeline, "microbatch_size": micro},
        rollout={"prompts_per_step": prompts, "samples_per_prompt": samples, "tensor_parallel": generator},
        ppo={"total_steps": 3, "minibatch_size": minibatch},
    )


small = st.integers(1, 6)


@given(
    tensor=small,
    pipeline=small,
    micro=small,
    prompts=st.integers(1, 24),
    samples=small,
    minibatch=st.integers(1, 48),
    world=st.integers(1, 48),
)
def test_a_batch_is_refused_exactly_when_it_cannot_be_cut(tensor, pipeline, micro, prompts, samples, minibatch, world):
    run = ppo_run(tensor, pipeline, micro, prompts, samples, minibatch)
    faults = cross_check(run, world, {})
    fits = world % (tensor * pipeline) == 0
    data = world // (tensor * pipeline)
    cuts = fits and [
        (minibatches, microbatches)
        for minibatches in range(1, 145)
        for microbatches in range(1, 49)
        if minibatches * minibatch == prompts * samples and microbatches * micro * data == minibatch and prompts % data == 0
    ]
    assert bool(faults) == (not cuts)
    if cuts:
        batch = batch_of(run, world)
        assert (prompts * samples // batch.size, batch.microbatches) == cuts[0]
        assert batch.size == batch.microbatches * batch.microbatch_size * batch.data


@given(tensor=small, pipeline=small, generator=st.integers(1, 12))
def test_the_smallest_world_fits_both_layouts(tensor, pipeline, generator):
    run = ppo_run(tensor, pipeline, 1, 1, 1, 1, generator)
    worlds = [world for world in range(1, 36 * 12 + 1) if world % (tensor * pipeline) == 0 and world % generator == 0]
    assert smallest_world(run) == worlds[0]


def test_context_ranks_and_virtual_stages_are_counted(tmp_path):
    path = write_run(tmp_path)
    inspection = inspect("ppo", path, ["parallel.context=2", "parallel.virtual_pipeline=2", "parallel.microbatch_size=2"], 16)
    rows = dict(arithmetic(inspection))
    assert rows["layout"] == "tensor 2 x pipeline 2 x context 2 x data 2 = 16 ranks"
    assert rows["pipeline"] == "2 stages x 2 chunks, 4 microbatches: idle for 11% of an update"
    one = inspect("ppo", path, ["parallel.virtual_pipeline=2", "parallel.microbatch_size=16"], 4)
    assert any("filled up with empty ones to a multiple of the 2 stages" in notice for notice in one.notices)


@pytest.mark.parametrize("name, actor", [("llama3-70b", 70_553_706_496), ("llama3-8b", 8_030_261_248)])
def test_published_parameter_counts(name, actor):
    spec = read_spec(CONFIGS / "models" / name)
    assert spec.num_parameters("actor") == actor
    assert spec.num_parameters("critic") == actor - spec.vocab_size * spec.hidden_size + spec.hidden_size


def owned(run, spec, data, is_trained=True):
    """What the fullest rank owns of an actor on `data` replicas."""
    layout = ParallelLayout(run.parallel.tensor, run.parallel.pipeline, run.parallel.tensor * run.parallel.pipeline * data)
    found = [owned_of(run, shard, layout, is_trained) for shard in shards_of(spec, "actor", run.parallel)]
    return max(found, key=lambda one: one.weights)


def test_memory_without_parallelism_is_the_model():
    spec = read_spec(CONFIGS / "models" / "llama3-8b")
    memory = owned(ppo_run(1, 1, 1, 1, 1, 1), spec, 1)
    for found, expected in ((memory.weights, 2), (memory.gradients, 4), (memory.optimizer, 12)):
        assert found == spec.num_parameters("actor") * expected


@pytest.mark.parametrize("tensor, pipeline, data", [(8, 4, 4), (4, 1, 2), (1, 8, 1), (8, 3, 2)])
def test_the_fullest_rank_holds_at_least_its_share(tensor, pipeline, data):
    spec = read_spec(CONFIGS / "models" / "llama3-70b")
    memory = owned(ppo_run(tensor, pipeline, 1, 1, 1, 1), spec, data)
    share = spec.num_parameters("actor") / tensor / pipeline
    assert share * 2 <= memory.weights <= 1.2 * share * 2
    assert memory.optimizer == pytest.approx(memory.weights * 6 / data, rel=1e-6)
    frozen = owned(ppo_run(tensor, pipeline, 1, 1, 1, 1), spec, data, is_trained=False)
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (memory.weights, 0, 0)


def test_the_70b_run_is_what_its_comments_say(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    inspection = inspect("ppo", Path("configs/ppo_70b.yaml"), [])
    rows = dict(arithmetic(inspection))
    assert str(inspection.layout) == "tp8 pp4 dp4"
    assert rows["batch"] == "prompts 1024 x samples 1 = 1024 sequences = 4 minibatches x 32 microbatches x 2 sequences x data 4"
    assert rows["optimizer steps"] == "500 steps x 1 epochs x 4 minibatches = 2000 of the critic, 1960 of the actor"
    assert rows["generators"].startswith("16 replicas x tensor 8, about 64 sequences each")
    assert rows["tokens a step"] == "at most 1024 x 2048 = 2,097,152"
    assert set(inspection.specs) == {"actor", "critic", "rewards.0"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_we_ship_fit_their_clusters(monkeypatch, path):
    monkeypatch.chdir(CONFIGS.parent)
    recipe = path.relative_to(CONFIGS.parent)
    inspection = inspect(kind_of(recipe), recipe, [])
    assert inspection.run.cluster.world_size == inspection.world_size
    assert inspection.specs, "the shapes are known before the weights are there"
    assert all("does not exist" in notice for notice in inspection.notices), inspection.notices


def test_a_model_that_a_run_has_yet_to_make_is_missing_and_not_wrong(tmp_path):
    path = write_run(tmp_path, SFT.replace("path: {root}/actor\n  random_init: true", "path: {root}/earlier\n  shape: {root}/actor"))
    (tmp_path / "earlier" / "submitted").mkdir(parents=True)  # a job that waits, or has just begun
    (notice,) = inspect("sft", path, []).notices
    assert f"{tmp_path}/earlier is the folder of a run that has published no checkpoint" in notice
    with pytest.raises(ConfigError, match="has published no checkpoint"):
        inspect("sft", path, [], is_start=True)


def test_packed_microbatches_are_counted_at_most(tmp_path):
    """16 sequences a minibatch of at most 32 tokens, two in a pack of 80 (tensor 2: a multiple of 16); the divisor rule is off."""
    inspection = inspect("ppo", write_run(tmp_path), ["parallel.max_tokens_per_microbatch=80", "parallel.microbatch_size=5"])
    assert "2 minibatches x at most 8 microbatches of 80 tokens x data 1" in dict(arithmetic(inspection))["batch"]


def test_world_sizes_come_from_the_nearest_place(tmp_path):
    path = write_run(tmp_path)
    assert inspect("ppo", path, []).world_size == 4
    assert inspect("ppo", path, ["cluster={nodes: 1, ranks_per_node: 8}"]).world_size == 8
    assert inspect("ppo", path, ["cluster={nodes: 1, ranks_per_node: 8}"], 16).world_size == 16


def test_a_start_on_the_right_cluster_is_no_fault():
    run = ppo_run(1, 1, 1, 8, 1, 8).model_copy(update={"cluster": None})
    assert started_on(run, 8) == []
    run = PpoRun(**RUN, cluster={"nodes": 2, "ranks_per_node": 4}, rollout={}, ppo={"total_steps": 1, "minibatch_size": 8})
    assert started_on(run, 8) == []
    assert len(started_on(run, 4)) == 1


@pytest.mark.parametrize(
    "overrides, notice",
    [
        (["ppo.critic_warmup_steps=3"], "the actor will never learn"),
        (["cluster={nodes: 4, ranks_per_node: 1}"], "parallel.tensor 2 spans nodes"),
        (["parallel.pipeline=3", "ppo.minibatch_size=4", "parallel.microbatch_size=1"], "the first ones get one more"),
        (["parallel.microbatch_size=16"], "mostly idle"),
        (
            [
                "rollout={prompts_per_step: 1, tensor_parallel: 1, max_response_tokens: 8}",
                "ppo.minibatch_size=1",
                "parallel.microbatch_size=1",
            ],
            "nothing to do",
        ),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_notices_stop_nothing(tmp_path, overrides, notice):
    notices = inspect("ppo", write_run(tmp_path), [*overrides, "actor.random_init=true"]).notices
    assert any(notice in text for text in notices), notices


def test_plain_text_for_files_and_tables_for_terminals(tmp_path):
    inspection = inspect("ppo", write_run(tmp_path), [])
    texts = {}
    for is_terminal in (False, True):
        stream = io.StringIO()
        show(inspection, Console(file=stream, force_terminal=is_terminal, width=140, color_system="standard" if is_terminal else None))
        texts[is_terminal] = stream.getvalue()
        assert "8 x samples 4 = 32 sequences = 2 minibatches x 4 microbatches x 4 sequences x data 1" in texts[is_terminal]
    assert texts[False].isascii() and "\x1b" not in texts[False]
    assert "╭" in texts[True]


def test_a_fault_touches_what_holds_it_and_what_it_holds():
    fault = Fault(("parallel.tensor", "actor.path"), "")
    assert fault.touches(("parallel",)) and fault.touches(("actor.path.x",)) and fault.touches(("parallel.tensor",))
    assert not fault.touches(("parallel.tensors", "actor.optimizer", "critic"))


def test_divisors_stay_on_a_line():
    assert divisors(12) == "1, 2, 3, 4, 6, 12"
    assert divisors(360) == "1, 2, 3, 4, 5, 6, ..., 360"


# ---------------------------------------------------------------- weights that are there
def write_weights(directory: Path, role: str, **changes: object) -> None:
    """A Hugging Face directory with zeros for weights."""
    import numpy

    write_shape(directory, **changes)
    shapes = read_spec(directory).table(role).hf_shapes
    save_file({name: numpy.zeros(shape, numpy.float32) for name, shape in shapes.items()}, directory / "model.safetensors")


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        inspect("ppo", path, overrides)
    return raised.value.faults


def test_weights_are_asked_for_their_role(tmp_path):
    path = write_run(tmp_path)
    write_weights(tmp_path / "language", "actor")
    write_weights(tmp_path / "reward", "critic")
    language, reward = f"actor={{path: {tmp_path}/language}}", f"critic={{path: {tmp_path}/reward}}"
    part = f"rewards=[{{kind: model, path: {tmp_path}/reward}}]"
    assert set(inspect("ppo", path, [language, reward, part]).specs) == {"actor", "critic", "rewards.0"}
    (fault,) = faults_of(path, f"actor={{path: {tmp_path}/reward}}")
    assert "actor.path" in fault and "holds a reward model" in fault
    (fault,) = faults_of(path, f"rewards=[{{kind: model, path: {tmp_path}/language}}]")
    assert "rewards.0.path" in fault and "expected a trained reward model" in fault


def test_weights_must_be_those_of_their_config(tmp_path):
    path = write_run(tmp_path)
    write_weights(tmp_path / "language", "actor")
    write_shape(tmp_path / "language", intermediate_size=128)
    (fault,) = faults_of(path, f"actor={{path: {tmp_path}/language}}")
    assert "actor.path" in fault and "has shape" in fault


def test_a_sentencepiece_file_in_a_directory_is_counted(tmp_path):
    path = write_run(tmp_path)
    (tmp_path / "pieces").mkdir()
    sums = [f"{a}+{b}={a + b}" for a in range(9) for b in range(9)]
    sentencepiece_file(tmp_path / "pieces" / "tokenizer.model", sums, vocab_size=40)
    write_shape(tmp_path / "small", vocab_size=8)
    faults = faults_of(path, f"tokenizer={tmp_path}/pieces", f"actor={{path: {tmp_path}/small, random_init: true}}")
    assert any("tokens but actor has a vocabulary of 8" in fault for fault in faults), faults
