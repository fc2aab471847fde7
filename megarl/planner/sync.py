"""Seconds of a weight sync, by the bridge's own planner on the shapes that trainer and sampler hold."""

from dataclasses import dataclass

from megarl.bridge.plan import make_outline
from megarl.bridge.shapes import held, wanted
from megarl.config import PpoRun
from megarl.cross_check import num_generators
from megarl.models.spec import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.planner.memory import SYNC_ROUND_BYTES


@dataclass(frozen=True)
class SyncPlan:
    """`critical_bytes` adds up the most that one rank sends or receives in each round."""

    critical_bytes: int
    received_bytes: int  # by the rank that receives most
    total_bytes: int  # by all ranks
    rounds: int

    def seconds(self, network: float) -> float:
        return self.critical_bytes / network


def plan_sync(run: PpoRun, spec: ModelSpec, layout: ParallelLayout, ranks_per_node: int) -> SyncPlan:
    """The plan that the run would make of its own ranks; generators elsewhere are ranks behind the trainer's."""
    width = 2 if run.precision == "bf16" else 4
    source = list(held(spec, layout, chunks=run.parallel.virtual_pipeline))
    replicas, tensor = num_generators(run, layout.world_size), run.rollout.tensor_parallel
    target = list(wanted(spec, tensor, replicas))
    if run.rollout.placement != "colocated":
        source, target = source + [()] * len(target), [()] * len(source) + target
    outline = make_outline(source, target, bucket_bytes=SYNC_ROUND_BYTES, element_bytes=width, node_of=lambda rank: rank // ranks_per_node)
    schedule = outline.schedule
    received = schedule.received
    return SyncPlan(schedule.critical * width, int(received.max()) * width, int(received.sum()) * width, schedule.num_rounds)
