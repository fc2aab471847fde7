"""What leaves the device comes back in place, bit for bit; phases hold what the table says and wake the sampler in order."""

import pytest
import torch

from megarl.parallel.memory import Movable, Phases
from megarl.parallel.phases import FROZEN, REFERENCE, RESIDENT


def movable_of(tensor: torch.Tensor, contents: str = "changing") -> Movable:
    return Movable(lambda: [tensor], contents)


def test_every_view_survives_a_journey():
    whole = torch.arange(12, dtype=torch.float32)
    parameter = torch.nn.Parameter(whole[2:10].view(2, 4))
    column, other = parameter.data[:, 1], torch.ones(3, dtype=torch.bfloat16)
    movable = Movable(lambda: [whole, parameter.data, other])
    assert movable.resident_bytes == 12 * 4 + 3 * 2  # a shared storage counts once
    for step in range(2):
        before = [tensor.clone() for tensor in (whole, parameter.data, column, other)]
        movable.offload()
        movable.offload()
        assert movable.is_away and movable.resident_bytes == 0
        movable.onload()
        movable.onload()
        assert not movable.is_away and movable.resident_bytes == 54
        assert all(torch.equal(a, b) for a, b in zip(before, (whole, parameter.data, column, other)))
        with torch.no_grad():
            parameter.add_(step + 1)  # through one view, seen through the others
        assert torch.equal(column, whole[3::4][:2]) and not torch.equal(column, before[2])


def test_tensors_that_come_later_leave_too():
    held = [torch.ones(4)]
    movable = Movable(lambda: held)
    movable.offload()
    movable.onload()
    held.append(torch.full((8,), 2.0))
    movable.offload()
    assert movable.resident_bytes == 0
    movable.onload()
    assert held[0].sum() == 4 and held[1].sum() == 16


def test_what_cannot_be_resized_stays():
    lent, other = torch.ones(4), torch.ones(8)
    lent.numpy()
    movable = Movable(lambda: [lent, other])
    movable.offload()
    assert movable.resident_bytes == 16 and lent.sum() == 4
    movable.onload()
    assert movable.resident_bytes == 48 and other.sum() == 8


def test_constant_tensors_are_copied_once_and_scratch_never(monkeypatch):
    copies = []
    original = Movable._host_copy
    monkeypatch.setattr(Movable, "_host_copy", lambda self, key, storage: copies.append(self) or original(self, key, storage))
    constant, scratch, changing = (movable_of(torch.ones(4), contents) for contents in ("constant", "scratch", "changing"))
    for _ in range(3):
        for movable in (constant, scratch, changing):
            movable.offload()
            movable.onload()
    assert [copies.count(movable) for movable in (constant, scratch, changing)] == [1, 0, 3]
    assert constant._tensors()[0].tolist() == [1.0] * 4


class Sampler:
    """Sleeps like one on a GPU: weights are forgotten."""

    def __init__(self):
        self.policy_version, self.calls = None, []

    def sleep(self):
        self.policy_version = None
        self.calls.append("sleep")

    def wake(self, part):
        self.calls.append(part)

    def receive(self, version):
        self.wake("weights")
        self.policy_version = version


def phases_with_models(offload: str) -> tuple[Phases, Sampler]:
    """Every part of every model has a size of its own."""
    engine = Sampler()
    phases = Phases(engine, offload, engine.receive)
    size = 1
    for owner, parts in {"actor": 4, "critic": 3, FROZEN: 1, REFERENCE: 1}.items():
        movables = {}
        for part in ("weights", "gradients", "optimizer", "ema")[:parts]:
            movables[part] = movable_of(torch.ones(size, dtype=torch.uint8))
            size *= 2
        phases.admit(owner, movables)
    return phases, engine


@pytest.mark.parametrize("offload", ["none", "frozen", "all"])
def test_a_phase_holds_what_the_table_says(offload):
    phases, engine = phases_with_models(offload)
    everything = {name: 2**index for index, name in enumerate(phases.resident_bytes())}
    assert phases.resident_bytes() == everything | ({} if offload == "none" else {"frozen weights": 0})  # gone while others are built
    engine.receive(1)
    for phase in [
        "publishing",
        "generating",
        "scoring",
        "learning",
        "publishing",
        "generating",
        "scoring",
        "generating",
        "exchanging",
        "saving",
    ]:
        with getattr(phases, phase)():
            wanted = {" ".join(key) for key in RESIDENT[phase]} & everything.keys()
            stays = {"none": everything, "frozen": everything.keys() - {"frozen weights", "reference weights"}, "all": set()}[offload]
            found = phases.resident_bytes()
            if not (phase == "saving" and offload != "all"):
                assert found == {name: size if name in stays or name in wanted else 0 for name, size in everything.items()}, phase
            assert all(found[name] for name in wanted)


def test_the_sampler_wakes_weights_first_and_is_filled_before_it_generates():
    phases, engine = phases_with_models("all")
    engine.receive(3)
    with phases.scoring():  # a comparison before the first step
        pass
    assert engine.policy_version is None
    with phases.generating():
        assert engine.policy_version == 3
        assert sum(phases.resident_bytes().values()) == 0
    assert engine.calls == ["weights", "sleep", "weights", "kv_cache"]
    with phases.learning():
        pass
    with phases.publishing():
        engine.receive(4)
    with phases.saving():
        pass
    with phases.generating():
        assert engine.policy_version == 4
