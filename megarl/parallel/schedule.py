"""The order of operations of each pipeline stage as data, and the simulator that times it. Pure Python.

Three operations a stage and microbatch m: F (layers forward), H (this stage's share of the head: forward, loss and its backward), B
(layers backward). F(p, m) needs F(p-1, m); H(p, m) needs F(last, m); B(last, m) needs H(q, m) of every stage q; B(p, m) needs B(p+1, m).
Without a sharded head there is no H and B(last, m) needs F(last, m); a pass without gradients has no B and ends with H.

The planner is a greedy list schedule: always the operation that can start earliest, ties F before H before B, at most P - p + 1
microbatches in flight on stage p. That is one more than 1F1B, which hides the round trip to the other stages' heads: without it a
step takes 1.5 to 1.8 times the floor. With equal stages and no latency the order reaches the floor, which is perfect balance
plus the bubble of 1F1B. Make the order once at latency 0 and keep it: planning with latencies is brittle and gains nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "H", "B"]
Event = tuple[Kind, int, int]  # (kind, stage, microbatch)


@dataclass(frozen=True)
class Operation:
    """One piece of a stage's work on one microbatch."""

    kind: Kind
    microbatch: int


@dataclass(frozen=True)
class StageCosts:
    """Time of each operation, one entry a stage, any one unit.

    `head` all zero: the head is not sharded, there is no H. `backward` all zero: a pass without gradients, there is no B.
    """

    forward: tuple[float, ...]
    head: tuple[float, ...]
    backward: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        return len(self.forward)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The operations of one microbatch on one stage, in order."""
        return ("F",) + (("H",) if any(self.head) else ()) + (("B",) if any(self.backward) else ())

    def of(self, kind: Kind, stage: int) -> float:
        return {"F": self.forward, "H": self.head, "B": self.backward}[kind][stage]


@dataclass(frozen=True)
class Schedule:
    """What each stage does, in order: `orders[p]` is the list of stage p. Microbatches pass every kind of operation in order."""

    orders: tuple[tuple[Operation, ...], ...]
    num_microbatches: int


@dataclass(frozen=True)
class Timeline:
    """A schedule with times: when the last operation ends; busy share and most microbatches in flight of each stage."""

    makespan: float
    busy_share: tuple[float, ...]
    in_flight: tuple[int, ...]


def sharded_costs(layers: tuple[float, ...], head: float, has_backward: bool = True) -> StageCosts:
    """Costs in layer-forwards of a head dealt evenly to all stages.

    Args: `layers` of each stage; `head` the output layer's forward, in layer-forwards (about vocabulary / (12 hidden width)).
    A backward costs twice its forward, for layers and head alike.
    """
    share = head * (3 if has_backward else 1) / len(layers)
    return StageCosts(tuple(layers), (share,) * len(layers), tuple(2 * n if has_backward else 0 for n in layers))


def last_stage_costs(layers: tuple[float, ...], head: float) -> StageCosts:
    """The same work with the whole head on the last stage, as in a stock pipeline."""
    forward = (*layers[:-1], layers[-1] + head)
    return StageCosts(forward, (0.0,) * len(layers), tuple(2 * cost for cost in forward))


def in_flight_bounds(num_stages: int, extra: int = 1) -> tuple[int, ...]:
    """Microbatches whose activations stage p may hold: P - p as in 1F1B, plus `extra`."""
    return tuple(num_stages - stage + extra for stage in range(num_stages))


def floor(costs: StageCosts, num_microbatches: int) -> float:
    """No schedule is faster: a stage starts when the first microbatch has crossed those before it, works without a gap, and its last
    gradient crosses them back. With equal stages this is perfect balance plus the bubble of 1F1B.
    """
    least, before = 0.0, 0.0
    for stage in range(costs.num_stages):
        work = sum(costs.of(kind, stage) for kind in costs.kinds)
        least = max(least, before + num_microbatches * work)
        before += costs.forward[stage] + costs.backward[stage]
    return least


def needs(kind: Kind, stage: int, microbatch: int, costs: StageCosts) -> tuple[Event, ...]:
    """What must have ended before this operation starts, on other stages or this one."""
    last = costs.num_stages - 1
    if kind == "F":
        return (("F", stage - 1, microbatch),) if stage else ()
    if kind == "H":
        return (("F", last, microbatch),)
    if stage < last:
        return (("B", stage + 1, microbatch),)
    return tuple(("H", other, microbatch) for other in range(last + 1)) if "H" in costs.kinds else (("F", last, microbatch),)


def plan_schedule(costs: StageCosts, num_microbatches: int, bounds: tuple[int, ...] | None = None, ties: str = "FHB") -> Schedule:
    """The greedy list schedule described at the top of this file.

    Args: `bounds` caps the microbatches in flight of each stage (default `in_flight_bounds`); `ties` orders operations that could
    start at the same time. Stock 1F1B is bounds of P - p with ties "BHF".
    """
    num_stages, kinds = costs.num_stages, costs.kinds
    bounds = bounds or in_flight_bounds(num_stages)
    end: dict[Event, float] = {}
    free = [0.0] * num_stages
    done = [{kind: 0 for kind in kinds} for _ in range(num_stages)]
    orders: list[list[Operation]] = [[] for _ in range(num_stages)]

    def choice(stage: int) -> tuple[float, int, int, Kind] | None:
        """What this stage can do next and when: the earliest, by `ties`."""
        found = []
        for kind in kinds:
            microbatch = done[stage][kind]
            if microbatch == num_microbatches or (kind == "F" and microbatch - done[stage][kinds[-1]] >= bounds[stage]):
                continue
            if kind != "F" and done[stage]["F"] <= microbatch:
                continue
            needed = needs(kind, stage, microbatch, costs)
            if all(event in end for event in needed):
                start = max([free[stage], *(end[event] for event in needed)])
                found.append((start, ties.index(kind), stage, kind))
        return min(found) if found else None

    choices = [choice(stage) for stage in range(num_stages)]
    for _ in range(num_stages * num_microbatches * len(kinds)):
        start, _, stage, kind = min(found for found in choices if found is not None)
        microbatch = done[stage][kind]
        free[stage] = end[kind, stage, microbatch] = start + costs.of(kind, stage)
        done[stage][kind] += 1
        orders[stage].append(Operation(kind, microbatch))
        for other in _affected(kind, stage, num_stages):
            choices[other] = choice(other)
    return Schedule(tuple(tuple(order) for order in orders), num_microbatches)


def _affected(kind: Kind, stage: int, num_stages: int) -> set[int]:
    """Stages whose next choice may change when `stage` ends an operation of this kind."""
    last = num_stages - 1
    if kind == "F":
        return set(range(num_stages)) if stage == last else {stage, stage + 1}
    return {stage, last} if kind == "H" else {stage, max(0, stage - 1)}


def simulate(schedule: Schedule, costs: StageCosts, latency: float = 0.0, on_end: Callable[[Event, float], None] | None = None) -> Timeline:
    """Execute a fixed order with blocking receives; a message between stages takes `latency`.

    `on_end(event, time)` hears of every operation. Raises `AssertionError` when the order deadlocks: a planner's mistake, not a user's.
    """
    num_stages = costs.num_stages
    end: dict[Event, float] = {}
    position, free, busy = [0] * num_stages, [0.0] * num_stages, [0.0] * num_stages
    held, most_held = [0] * num_stages, [0] * num_stages
    left = sum(len(order) for order in schedule.orders)
    while left:
        before = left
        for stage, order in enumerate(schedule.orders):
            while position[stage] < len(order):
                operation = order[position[stage]]
                needed = needs(operation.kind, stage, operation.microbatch, costs)
                if any(event not in end for event in needed):
                    break
                arrival = max((end[event] + (latency if event[1] != stage else 0.0) for event in needed), default=0.0)
                cost = costs.of(operation.kind, stage)
                event = (operation.kind, stage, operation.microbatch)
                free[stage] = end[event] = max(free[stage], arrival) + cost
                busy[stage] += cost
                held[stage] += (operation.kind == "F") - (operation.kind == costs.kinds[-1])
                most_held[stage] = max(most_held[stage], held[stage])
                position[stage] += 1
                left -= 1
                if on_end is not None:
                    on_end(event, free[stage])
        assert left < before, f"schedule deadlocks at positions {position}"
    makespan = max(free)
    return Timeline(makespan, tuple(share / makespan for share in busy), tuple(most_held))
