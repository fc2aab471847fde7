"""Training whose tensors wait in host memory between phases ends bit for bit where training without that does, and holds what it says."""

import pytest
import torch

from megarl.models.family import spec_from_hf_config
from megarl.parallel import groups
from megarl.parallel.memory import Phases
from megarl.parallel.phases import FROZEN
from megarl.ppo.roles import Actor, Critic, Reference, RewardModel
from tests.multi_rank.role_cases import NUM_ROWS, Case, DictSource, hf_config, make_experience, make_run, weights
from tests.ranks import run_all
from tests.resting import Resting

STEPS = 3
TRAINING = {"lr": 0.01, "eps": 1e-5, "clip_grad": 0.5}
CORRECTED = {"correction": {"kind": "tis", "level": "sequence", "high": 1.5}}
CASES = [
    Case({}, optimizer=TRAINING, precision="bf16"),
    Case({"distributed_optimizer": False}, optimizer=TRAINING, precision="bf16"),
    Case({"pipeline": 2}, ppo=CORRECTED, optimizer=TRAINING, model={"tie_word_embeddings": True}),
    Case({"tensor": 2, "sequence": True}, optimizer=TRAINING),
]


def train(case: Case, offload: str) -> tuple[dict, dict[str, dict[str, int]], int]:
    """Every tensor a few steps end with and what was said on the way; bytes on the device by phase; the actor's weights on this rank."""
    run = make_run(case)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(hf_config(**case.model))
    phases, said, held = Phases(Resting(), offload), [], {}
    actor = Actor(spec, run, layout, DictSource(weights(spec, "actor", 1)))
    phases.admit("actor", actor.movables)
    reference = Reference(spec, run, layout, DictSource(weights(spec, "actor", 3)))
    phases.admit(FROZEN, reference.movables)
    reward_model = RewardModel(spec, run, layout, DictSource(weights(spec, "critic", 4)))
    phases.admit(FROZEN, reward_model.movables)
    critic = Critic(spec, run, layout, DictSource(weights(spec, "critic", 2)))
    phases.admit("critic", critic.movables)
    share = NUM_ROWS // layout.data
    mine = make_experience().rows(slice(layout.dp_rank * share, (layout.dp_rank + 1) * share))
    for _ in range(STEPS):
        with phases.publishing():
            said.append([piece.view.clone() for piece in actor.pieces])  # what the bridge reads through views taken at the start
            held["publishing"] = phases.resident_bytes()
        with phases.generating():
            held["generating"] = phases.resident_bytes()
        with phases.scoring():
            said += [actor.logprobs(mine), reference.logprobs(mine), critic.values(mine), reward_model.scores(mine)]
            held["scoring"] = phases.resident_bytes()
        with phases.learning():
            said += [critic.update(mine).to_json(), actor.update(mine).to_json()]
            held["learning"] = phases.resident_bytes()
    with phases.saving():
        held["saving"] = phases.resident_bytes()
        kept = {
            f"{name}.{number}": tensor.clone()
            for name, role in (("actor", actor), ("critic", critic))
            for number, tensor in enumerate(role.learner.optimizer_state())
        }
        kept |= {f"{piece.hf_name}.{index}": piece.view.clone() for role in (actor, critic) for index, piece in enumerate(role.pieces)}
    return {"said": said, "kept": kept}, held, sum(weight.numel() for weight in actor.learner.weights())


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare(rank: int, world_size: int, case: Case) -> dict:
    plain, _, _ = train(case, "none")
    result = {}
    for offload in ("frozen", "all"):
        found, held, size = train(case, offload)
        result[offload] = {"same": same(found, plain), "held": held}
    published = plain["said"][:: len(plain["said"]) // STEPS]
    changed = not same(published[0], published[-1])
    corrected = {name for line in plain["said"] if isinstance(line, dict) for name in line if name.startswith("actor/correction")}
    return result | {"size": size, "changed": changed, "corrected": corrected}


@pytest.fixture(scope="module")
def results() -> list[list[dict]]:
    return run_all([(compare, (case,)) for case in CASES], 2)


def test_results_are_the_same_bit_for_bit(results):
    for ranks in results:
        for rank in ranks:
            assert rank["changed"], "the test must train"
            assert rank["frozen"]["same"] and rank["all"]["same"]


def test_phases_hold_what_the_documentation_says(results):
    """Bytes a parameter of one rank, bf16 on two data ranks: weights 2, gradients 4; masters and two moments 12, sharded or not."""
    for ranks, optimizer_bytes in zip(results[:2], (6, 12)):
        for rank in ranks:
            held, weights_bytes = rank["all"]["held"], 2 * rank["size"]
            assert {phase: held[phase]["actor weights"] for phase in held} == {
                phase: pytest.approx(0 if phase == "generating" else weights_bytes, rel=0.05) for phase in held
            }
            assert sum(held["generating"].values()) == 0
            assert held["publishing"] == dict.fromkeys(held["publishing"], 0) | {"actor weights": held["publishing"]["actor weights"]}
            assert {name for name, size in held["scoring"].items() if size} == {"actor weights", "critic weights", "frozen weights"}
            assert held["learning"]["actor gradients"] == pytest.approx(4 * rank["size"], rel=0.05)
            assert held["learning"]["actor optimizer"] == pytest.approx(optimizer_bytes * rank["size"], rel=0.05)
            assert held["learning"]["frozen weights"] == 0 and held["saving"]["actor gradients"] == 0
            assert held["saving"]["critic optimizer"] == held["learning"]["critic optimizer"] > 0
            frozen = rank["frozen"]["held"]
            assert [phase for phase in frozen if frozen[phase]["frozen weights"]] == ["scoring"]
            assert frozen["generating"]["actor optimizer"] > 0


def test_the_correction_reports_under_a_pipeline(results):
    for rank in results[2]:
        assert rank["corrected"] == {f"actor/correction/{name}" for name in ("weight", "ratio_max", "cut_fraction")}
    assert not results[0][0]["corrected"]
