"""Step time of pipeline schedules by simulation: the head on the last stage, whole layers moved off it, and the sharded head.

Units are layer-forwards; a backward costs two forwards. `floor` is perfect balance plus the bubble of 1F1B. `over_floor` is the sharded
schedule's time over it, `over_floor_latency` the same order executed with messages that take 5 % of a stage's forward.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.table import main
from megarl.parallel.schedule import floor, in_flight_bounds, last_stage_costs, plan_schedule, sharded_costs, simulate

SHAPES = ((2, 4, 1.0), (4, 28, 3.5), (8, 80, 1.3), (4, 28, 7.0), (8, 64, 3.0), (16, 96, 2.0))  # stages, layers, head in layers
MICROBATCHES_A_STAGE = 8
LATENCY = 0.05  # of a stage's forward


def stock_time(layers: tuple[float, ...], head: float, num_microbatches: int) -> float:
    """Makespan of 1F1B with the head on the last stage."""
    costs = last_stage_costs(layers, head)
    order = plan_schedule(costs, num_microbatches, in_flight_bounds(len(layers), extra=0), ties="BHF")
    return simulate(order, costs).makespan


def uneven_splits(num_layers: int, num_stages: int, head: float) -> list[tuple[int, ...]]:
    """Splits with up to a head's worth of layers taken off the last stage and spread over the others, earlier or later ones first."""
    splits, even = [], num_layers // num_stages
    for last in range(max(0, even - round(head) - 1), even + 1):
        share, rest = divmod(num_layers - last, num_stages - 1)
        for extra in (range(rest), range(num_stages - 1 - rest, num_stages - 1)):
            splits.append((*(share + (stage in extra) for stage in range(num_stages - 1)), last))
    return splits


def row(num_stages: int, num_layers: int, head: float) -> dict[str, Any]:
    """One line of the table."""
    count, even = MICROBATCHES_A_STAGE * num_stages, (num_layers / num_stages,) * num_stages
    costs = sharded_costs(even, head)
    order = plan_schedule(costs, count)
    timeline, least = simulate(order, costs), floor(costs, count)
    late = simulate(order, costs, LATENCY * even[0])
    stock = stock_time(even, head, count)
    return {
        "stages": num_stages,
        "layers": num_layers,
        "head_layers": head,
        "microbatches": count,
        "stock": stock,
        "best_uneven": min(stock_time(split, head, count) for split in uneven_splits(num_layers, num_stages, head)),
        "sharded": timeline.makespan,
        "floor": least,
        "over_floor": timeline.makespan / least,
        "over_floor_latency": late.makespan / least,
        "stock_over_sharded": stock / timeline.makespan,
        "in_flight_over_bound": max(a - b for a, b in zip(timeline.in_flight, in_flight_bounds(num_stages))),
    }


def measure(quick: bool) -> Mapping[str, Any]:
    rows = [row(*shape) for shape in (SHAPES[:4] if quick else SHAPES)]
    return {
        "schedules": rows,
        "over_floor": max(r["over_floor"] for r in rows),
        "over_floor_latency": max(r["over_floor_latency"] for r in rows),
    }


if __name__ == "__main__":
    main("pipeline_schedule", __doc__.splitlines()[0], measure)
