"""Layers whose activations wait on each stage, and how long a pass takes, by the project's own schedules and simulator. Pure."""

import math
from dataclasses import dataclass
from functools import lru_cache

from megarl.config import ParallelConfig
from megarl.models.head_choice import chosen_head
from megarl.models.spec import Role, stage_layers
from megarl.parallel.schedule import StageCosts, in_flight_bounds, plan_schedule, simulate
from megarl.planner.shards import Shard

EXACT_ROUNDS = 4  # microbatches a stage that are simulated; more only repeat the middle


@dataclass(frozen=True)
class Pass:
    """One pass of a replica's microbatches through its stages."""

    seconds: float
    busy: float  # share of the ranks' time
    in_flight: tuple[int, ...]  # microbatches that each stage holds at most


def layers_in_flight(parallel: ParallelConfig, role: Role, num_layers: int, microbatches: int) -> tuple[tuple[float, int], ...]:
    """For each stage: layers x microbatches kept at once, and layers of a chunk."""
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    layers = stage_layers(num_layers, stages * chunks)
    if chunks == 1:
        is_shared = chosen_head(parallel, role) == "sharded"
        held = _held(stages, microbatches, is_shared) if stages > 1 else (1,)
        return tuple((float(count * layers[stage]), layers[stage]) for stage, count in enumerate(held))
    filled = math.ceil(microbatches / stages) * stages
    found = []
    for stage in range(stages):  # Megatron's interleaved schedule: warm-up chunks, and one more in its steady state
        own = layers[stage]
        warm_up = (stages - stage - 1) * 2 + (chunks - 1) * stages
        held = filled * chunks if filled == stages else min(filled * chunks, warm_up + 1)
        found.append((float(held * own), own))
    return tuple(found)


def layers_without_graph(parallel: ParallelConfig, shard: Shard, stage: int) -> int:
    """Frozen layers of a stage that keep nothing for a backward and have none: those below the first layer that learns on the first stage.

    Later stages give their input a gradient, and so does the first one's embedding where layers are computed again (`models.freezing`).
    """
    if stage > 0 or parallel.recompute == "full":
        return 0
    return min(shard.still, stage_layers(shard.num_layers, parallel.virtual_pipeline)[0])


@lru_cache(maxsize=512)
def _held(stages: int, microbatches: int, is_shared: bool) -> tuple[int, ...]:
    """Microbatches in flight; equal stages."""
    head = 1.0 / stages if is_shared else 0.0
    costs = StageCosts((1.0,) * stages, (head,) * stages, (2.0,) * stages)
    return _pass(costs, min(microbatches, EXACT_ROUNDS * stages)).in_flight


@lru_cache(maxsize=4096)
def _pass(costs: StageCosts, microbatches: int) -> Pass:
    is_shared = any(costs.head)
    bounds = in_flight_bounds(costs.num_stages, extra=1 if is_shared else 0)
    if not any(costs.backward):
        bounds = tuple(bound + costs.num_stages for bound in bounds)
    order = plan_schedule(costs, microbatches, bounds, "FHB" if is_shared else "BHF")
    timeline = simulate(order, costs)
    return Pass(timeline.makespan, sum(timeline.busy_share) / costs.num_stages, timeline.in_flight)


def timed_pass(costs: StageCosts, microbatches: int, chunks: int = 1) -> Pass:
    """A pass whose operations take `costs` seconds. After `EXACT_ROUNDS` microbatches a stage the rest is added at the pace of the slowest.

    With `chunks` layers in turn (Megatron's interleaved schedule) filling and draining take 1 / chunks of the time: Narayanan et al. 2021.
    """
    if costs.num_stages == 1:
        total = microbatches * sum(sum(part) for part in (costs.forward, costs.head, costs.backward))
        return Pass(total, 1.0, (1,))
    exact = min(microbatches, EXACT_ROUNDS * costs.num_stages)
    found = _pass(costs, exact)
    pace = max(sum(costs.of(kind, stage) for kind in costs.kinds) for stage in range(costs.num_stages))
    work = sum(sum(part) for part in (costs.forward, costs.head, costs.backward)) * microbatches
    seconds = found.seconds + (microbatches - exact) * pace
    if chunks > 1:
        seconds = microbatches * pace + max(0.0, seconds - microbatches * pace) / chunks
    return Pass(seconds, work / (costs.num_stages * seconds), found.in_flight)
