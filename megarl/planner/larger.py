"""Machines on which a run fits, as it is or changed, when nothing about the run makes it fit those it has. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megarl.planner.devices import GPUS
from megarl.planner.plan import Plan, faults_of, make_plan
from megarl.planner.search import remedies
from megarl.planner.step_time import Machines

DOUBLINGS = 3


@dataclass(frozen=True)
class Larger:
    """Arguments of `megarl plan` for other machines and what must change there, and the plan on them."""

    arguments: str
    plan: Plan


def larger_machines(plan: Plan) -> list[Larger]:
    """The fewest GPUs of the same kind, in doublings, and as many GPUs of the kind with the least memory, that do."""
    found = (next(_more(plan), None), next(_others(plan), None))
    return [one for one in found if one is not None]


def _more(plan: Plan) -> Iterator[Larger]:
    for doubling in range(1, DOUBLINGS + 1):
        world_size = plan.layout.world_size << doubling
        if not faults_of(plan.run, plan.specs, world_size):
            yield from _fitting(f"--gpus {world_size}", plan, world_size, plan.machines)


def _others(plan: Plan) -> Iterator[Larger]:
    own, network = plan.machines.gpu, plan.machines.network
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes):
        if gpu.memory_bytes > own.memory_bytes:
            rate = gpu.network_bandwidth if network == own.network_bandwidth else network
            yield from _fitting(f"--gpu {gpu.name}", plan, plan.layout.world_size, replace(plan.machines, gpu=gpu, network=rate))


def _fitting(option: str, plan: Plan, world_size: int, machines: Machines) -> Iterator[Larger]:
    found = make_plan(plan.run, plan.specs, world_size, machines, plan.lengths, with_sync=False)
    if found.fits:
        yield Larger(option, found)
    for one in remedies(found)[:1]:
        yield Larger(" ".join((option, *one.overrides)), one.plan)
