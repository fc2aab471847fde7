"""Frozen lowest layers on two ranks: they stay bit for bit, the rest learns as without freezing, checkpoints hold everything."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint.manifest import read_manifest
from megarl.checkpoint.train_state import TrainState
from megarl.errors import CheckpointError
from megarl.models.family import spec_from_hf_config
from megarl.models.freezing import num_frozen
from megarl.parallel import groups
from megarl.ppo.roles import Actor, Critic
from tests.multi_rank.role_cases import (
    MIXTURE,
    NUM_ROWS,
    Case,
    DictSource,
    assembled,
    hf_config,
    make_experience,
    make_run,
    updated_weights,
    weights,
)
from tests.multi_rank.test_ema import checkpoints_of, stored_run
from tests.ranks import run_all
from tests.unit.text_files import sentencepiece_file

PLAIN = {"distributed_optimizer": False}
SEQUENCE = {"tensor": 2, "sequence": True}
# three layers, two of them on the first of two stages
CASES = [
    (1, Case({})),
    (1, Case(PLAIN | {"recompute": "full"})),
    (2, Case({"pipeline": 2})),
    (2, Case({"pipeline": 2, "head": "last_stage"})),
    (1, Case({"pipeline": 2, "recompute": "full"})),
    (1, Case(SEQUENCE | {"max_tokens_per_microbatch": 32})),
    (3, Case({"pipeline": 2, **PLAIN})),
    (1, Case({"expert": 2}, optimizer={"router_balance": 0.01}, model=MIXTURE)),
]


def frozen_run(run, num_layers: int):
    """Only the actor's, or only the critic's, layers: the numbers are separate."""
    return run.model_copy(update={"actor": run.actor.model_copy(update={"frozen_layers": num_layers})})


def start(case: Case, num_layers: int, run=None):
    run = frozen_run(run or make_run(case), num_layers)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(hf_config(**case.model))
    return Actor(spec, run, layout, DictSource(weights(spec, "actor", 1))), layout, run


def share(layout):
    size = NUM_ROWS // layout.data
    return make_experience().rows(slice(layout.dp_rank * size, (layout.dp_rank + 1) * size))


def update(rank: int, world_size: int, num_layers: int, case: Case) -> dict:
    result = {}
    for name, frozen in (("free", 0), ("frozen", num_layers)):
        actor, layout, run = start(case, frozen)
        metrics = actor.update(share(layout))
        result[name] = {"actor_weights": updated_weights(actor.pieces), "norm": metrics["actor/grad_norm"].value}
        slots = actor.learner.optimizer_pieces(actor.pieces)
        result[name]["learning"] = sorted({piece.hf_name for pieces in slots.values() for piece in pieces})
        result[name]["gradients"] = sum(tensor.numel() for tensor in actor.learner.gradients())
        result[name]["num_frozen"] = num_frozen([chunk.module for chunk in actor.learner.chunks])
        if frozen:
            critic = Critic(actor.spec, run, layout, DictSource(weights(actor.spec, "critic", 2)))
            assert num_frozen([chunk.module for chunk in critic.learner.chunks]) == 0
    return result


def keep(rank: int, world_size: int, root: Path) -> dict:
    """Two updates under one layout; the third under the same and under others is the third of the run that went on."""
    optimizer = {"lr": 0.01, "eps": 1e-5}
    results = []
    for index, parallel in enumerate([{}, {}, SEQUENCE, {"pipeline": 2}]):
        case = Case(parallel, optimizer=optimizer)
        run = stored_run(root, f"frozen{index}", case)
        if index and rank == 0:
            ignored = shutil.ignore_patterns(".*")
            shutil.copytree(root / "frozen0" / "checkpoints", root / f"frozen{index}" / "checkpoints", ignore=ignored)
        dist.barrier()
        actor, layout, run = start(case, 2, run)
        store = checkpoints_of(run, layout)
        store.restore_or_start({"actor": actor})
        if index == 0:
            for _ in range(2):
                actor.update(share(layout))
            store.save(TrainState(step=2), {"actor": actor})
            store.finish()
        actor.update(share(layout))
        results.append(updated_weights(actor.pieces))
    actor, layout, run = start(case, 1, run)
    with pytest.raises(CheckpointError) as caught:
        checkpoints_of(run, layout).restore_or_start({"actor": actor})
    return {"results": results, "said": str(caught.value)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("freezing")
    sentencepiece_file(place / "sp.model", ["1+2=3", "4+5=9"], vocab_size=20, model_type="char")
    (place / "model").mkdir()
    return place


@pytest.fixture(scope="module")
def on_two(root) -> list[list]:
    return run_all([*((update, case) for case in CASES), (keep, (root,))], 2)


def is_frozen(name: str, num_layers: int) -> bool:
    return name == "model.embed_tokens.weight" or any(name.startswith(f"model.layers.{layer}.") for layer in range(num_layers))


def test_frozen_layers_stay_and_the_others_learn_as_without_freezing(on_two):
    for (num_layers, case), ranks in zip(CASES, on_two, strict=False):
        spec = spec_from_hf_config(hf_config(**case.model))
        before = weights(spec, "actor", 1)
        free, frozen = (assembled([rank[name] for rank in ranks], "actor_weights", case) for name in ("free", "frozen"))
        for name in before:
            if is_frozen(name, num_layers):
                assert torch.equal(frozen[name], before[name]), (case, name)
                assert not torch.equal(free[name], before[name]), (case, name)
            else:  # lr 1, eps 1, no clipping: the update shows the gradient
                size = (free[name] - before[name]).abs().max()
                assert size > 0 and (frozen[name] - free[name]).abs().max() <= 1e-5 * size, (case, name)


def test_frozen_layers_have_no_gradients_and_no_optimizer_state(on_two):
    for (num_layers, case), ranks in zip(CASES, on_two, strict=False):
        learning = {name for rank in ranks for name in rank["frozen"]["learning"]}
        everything = {name for rank in ranks for name in rank["free"]["learning"]}
        assert learning == {name for name in everything if not is_frozen(name, num_layers)}, case
        for rank in ranks:
            assert rank["free"]["num_frozen"] == 0
            assert rank["frozen"]["gradients"] <= rank["free"]["gradients"]
        assert sum(rank["frozen"]["gradients"] for rank in ranks) < sum(rank["free"]["gradients"] for rank in ranks)
        assert 0 < ranks[0]["frozen"]["norm"] < ranks[0]["free"]["norm"]


def test_checkpoints_hold_frozen_weights_and_continue_under_any_layout(on_two, root):
    parts = [{"actor_weights": rank["results"][0]} for rank in on_two[-1]]
    straight = assembled(parts, "actor_weights", Case())
    for index in (1, 2, 3):
        resumed = assembled([{"actor_weights": rank["results"][index]} for rank in on_two[-1]], "actor_weights", Case())
        for name, tensor in straight.items():
            if index == 1:
                assert torch.equal(resumed[name], tensor), name
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)
    manifest = read_manifest(root / "frozen0" / "checkpoints" / "step-00000002")
    stored = {tensor.name for file in manifest.files_of("weights", "actor").values() for tensor in file.tensors}
    moments = {tensor.name for file in manifest.files_of("optimizer", "actor").values() for tensor in file.tensors}
    assert stored == set(straight) and moments == {name for name in stored if not is_frozen(name, 2)}


def test_what_was_frozen_cannot_begin_to_learn_in_the_middle(on_two):
    for rank in on_two[-1]:
        assert "holds no optimizer state of model.layers.1." in rank["said"] and "set actor.frozen_layers back" in rank["said"]
