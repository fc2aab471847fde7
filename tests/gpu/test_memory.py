"""Between phases the GPU holds what `parallel.phases.RESIDENT` says, by the bytes of torch's allocator, and training does not notice."""

import pytest

from tests.gpu.processes import run_on_devices
from tests.resting import Resting

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STEPS, SLACK = 3, 1.1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bytes_leave_the_device_and_come_back(machine, num_ranks, tmp_path):
    machine.need(num_ranks)
    for rank in run_on_devices(train, num_ranks, tmp_path, sizes=machine.model, is_cuda=not machine.is_rehearsal):
        print(rank["held"], rank["pieces"])
        assert rank["same"], "a tensor that waited in host memory came back changed"
        held, model = rank["held"], rank["weights_bytes"]
        for phase, expected in rank["expected"].items():  # by the sizes of the storages
            assert expected * 0.99 <= held[phase] <= expected * SLACK + rank["small"], phase
        assert held["generating"] <= rank["small"]
        assert held["publishing"] <= SLACK * model + rank["small"]
        assert held["learning"] > held["saving"] > held["scoring"] > held["publishing"]


def train(sizes: dict, is_cuda: bool) -> dict:
    """One rank: the same steps with everything resident and with all that may leave gone between phases."""
    import torch

    from megarl.config import ParallelConfig
    from megarl.parallel import device, groups

    assert device.is_cuda() == is_cuda
    layout = groups.initialize(ParallelConfig(), seed=0)
    plain, _ = steps(layout, sizes, "none")
    found, seen = steps(layout, sizes, "all")
    return seen | {"same": all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), "pieces": len(plain)}


def steps(layout, sizes: dict, offload: str) -> tuple[list, dict]:
    """The final tensors of actor and critic, on the CPU; bytes by phase."""
    import gc

    import torch

    from megarl.models.family import spec_from_hf_config
    from megarl.parallel import device
    from megarl.parallel.memory import Phases
    from megarl.parallel.phases import FROZEN
    from megarl.ppo.roles import Actor, Critic, Reference
    from tests.multi_rank.role_cases import NUM_ROWS, Case, DictSource, hf_config, make_experience, make_run, weights

    def allocated() -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if device.is_cuda() else sum(phases.resident_bytes().values())

    before = torch.cuda.memory_allocated() if device.is_cuda() else 0
    run = make_run(Case(precision="bf16", optimizer={"lr": 0.01, "eps": 1e-5}))
    spec = spec_from_hf_config(hf_config(**sizes))
    phases, held, expected = Phases(Resting(), offload), {}, {}
    actor = Actor(spec, run, layout, DictSource(weights(spec, "actor", 1)))
    critic = Critic(spec, run, layout, DictSource(weights(spec, "critic", 2)))
    reference = Reference(spec, run, layout, DictSource(weights(spec, "actor", 3)))
    for owner, role in (("actor", actor), ("critic", critic), (FROZEN, reference)):
        phases.admit(owner, role.movables)
    share = NUM_ROWS // layout.data
    mine = make_experience().rows(slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)).to(device.device())
    for _ in range(STEPS):
        for phase in ("publishing", "generating", "scoring", "learning"):
            with getattr(phases, phase)():
                if phase == "scoring":
                    actor.logprobs(mine), reference.logprobs(mine), critic.values(mine)
                if phase == "learning":
                    critic.update(mine), actor.update(mine)
                held[phase], expected[phase] = allocated() - before, sum(phases.resident_bytes().values())
    with phases.saving():
        held["saving"], expected["saving"] = allocated() - before, sum(phases.resident_bytes().values())
        tensors = [piece.view.cpu() for role in (actor, critic) for piece in role.pieces]
        tensors += [tensor.cpu() for role in (actor, critic) for tensor in role.learner.optimizer_state()]
    weights_bytes = actor.movables["weights"].resident_bytes
    return tensors, {"held": held, "expected": expected, "weights_bytes": weights_bytes, "small": 16 << 20 if device.is_cuda() else 0}
