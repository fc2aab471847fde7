"""A whole plan: memory, batches, time and verdict of one run on one kind of GPU. No GPU, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from megarl.config import PpoRun, Run
from megarl.config_file import Fault
from megarl.cross_check import cross_check, layout_of
from megarl.models.spec import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.planner.memory import MemoryPlan, PhaseMemory, plan_memory
from megarl.planner.step_time import Lengths, Machines, StepTime, estimate
from megarl.planner.sync import SyncPlan, plan_sync


@dataclass(frozen=True)
class Plan:
    """`sync` is None where it was not asked for or nothing is synced; its time then counts as `sync_s` of the estimate."""

    run: Run
    specs: Mapping[str, ModelSpec]
    layout: ParallelLayout
    machines: Machines
    lengths: Lengths
    memory: MemoryPlan
    time: StepTime
    sync: SyncPlan | None

    @property
    def limit_bytes(self) -> int:
        """Bytes of a GPU that phases may fill."""
        given = self.machines.assumptions
        return int((self.machines.gpu.memory_bytes - given.reserved_bytes) / (1 + given.fragmentation))

    @property
    def peak(self) -> PhaseMemory:
        return self.memory.peak

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.limit_bytes


def make_plan(
    run: Run, specs: Mapping[str, ModelSpec], world_size: int, machines: Machines, lengths: Lengths, with_sync: bool = True
) -> Plan:
    """The plan of a run that `cross_check` has nothing against. Without `with_sync` the sync is taken to be as fast as all bytes allow."""
    layout = layout_of(run, world_size)
    memory = plan_memory(run, specs, layout, machines.gpu, machines.assumptions)
    sync, sync_s = None, 0.0
    if isinstance(run, PpoRun) and "actor" in specs:
        rate = machines.link(world_size)
        if with_sync:
            sync = plan_sync(run, specs["actor"], layout, machines.ranks_per_node)
            sync_s = sync.seconds(rate)
        else:
            weights = memory.worst("publishing").parts.get("sampler weights", 0)
            is_local = layout.pipeline == 1 and layout.tensor == run.rollout.tensor_parallel
            sync_s = 0.0 if is_local else weights / rate
    time = estimate(run, specs, layout, memory, machines, lengths, sync_s)
    return Plan(run, specs, layout, machines, lengths, memory, time, sync)


def faults_of(run: Run, specs: Mapping[str, ModelSpec], world_size: int) -> list[Fault]:
    """What `--check` would refuse."""
    return cross_check(run, world_size, specs)
