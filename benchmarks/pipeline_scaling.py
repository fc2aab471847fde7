"""Time of a training pass against the simulator's prediction, over microbatches and stages.

The costs of F, H and B are measured once (computing time of every operation, waiting left out, at the largest number of microbatches of
each number of stages); the simulator then predicts every other pass. A pass is measured from the first operation of any stage to the
last. One stage runs Megatron's loop and is predicted as the sum of all operations of two stages.

Stages that compute stop at the number of cores: more would share them. Beyond that stages are *asleep*: a tiny model runs through the same
processes, loop and messages, and every operation sleeps between its receive and its send for as long as PAUSES says, as a stage does
whose accelerator computes.
"""

import os
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.pipeline_loss import MICROBATCH, experience, make_run, model_spec
from benchmarks.table import main
from megarl.models.random_weights import RandomSource
from megarl.models.token_stats import PolicyHead
from megarl.parallel import groups, pipeline, stage_loop
from megarl.parallel.schedule import Operation, Schedule, StageCosts, simulate
from megarl.parallel.stage_loop import StageLoop
from megarl.ppo.roles import Actor
from tests.ranks import run_ranks

VOCABULARY = 8192
PAUSES = {"F": 0.08, "H": 0.04, "B": 0.16}  # seconds; with them eight stages stay within two cores
ASLEEP = {"vocab_size": 512, "width": 32}  # and a layer a stage
KINDS = {"F": "_forward_step", "H": "_head_step", "B": "_backward_step"}


class Clock:
    """When each operation of this rank began and ended, and its computing time."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float, float]] = []
        for kind, name in KINDS.items():
            setattr(StageLoop, name, self._timed(kind, getattr(StageLoop, name)))

    def _timed(self, kind: str, step: Any) -> Any:
        def timed(loop: StageLoop, number: int) -> None:
            start, computing = time.perf_counter(), time.thread_time()
            step(loop, number)
            self.spans.append((kind, start, time.perf_counter(), time.thread_time() - computing))

        return timed


def _fall_asleep() -> None:
    """From now on every operation of this rank sleeps between its receive and its send."""

    def slower(kind: str, work: Any) -> Any:
        def paused(*arguments: Any, **options: Any) -> Any:
            time.sleep(PAUSES[kind])
            return work(*arguments, **options)

        return paused

    stage_loop.forward_step = slower("F", stage_loop.forward_step)
    stage_loop.backward_step = slower("B", stage_loop.backward_step)
    PolicyHead.of_share = slower("H", PolicyHead.of_share)


def passes(rank: int, world_size: int, counts: tuple[int, ...], repeats: int, is_asleep: bool) -> dict[str, list]:
    """For each number of microbatches: begin and end of every repeat, and the median cost of each kind of operation."""
    run = make_run({"pipeline": world_size, "distributed_optimizer": False}, max(counts) * MICROBATCH)
    layout = groups.initialize(run.parallel, seed=0)
    if is_asleep:
        _fall_asleep()
    spec = model_spec(layers=world_size, **ASLEEP) if is_asleep else model_spec(VOCABULARY)
    actor = Actor(spec, run, layout, RandomSource(spec.table("actor"), 0))
    batch, clock = experience(spec.vocab_size, max(counts) * MICROBATCH), Clock()
    slept = [PAUSES[kind] if is_asleep else 0.0 for kind in "FHB"]
    whole = _whole_passes() if world_size == 1 else None
    result: dict[str, list] = {"spans": [], "costs": [], "orders": []}
    for count in counts:
        rows, spans, costs, seen = batch.rows(slice(0, count * MICROBATCH)), [], [], []
        for repeat in range(repeats + 1):
            clock.spans.clear()
            torch.distributed.barrier()
            actor.update(rows)
            seen = list(whole if whole is not None else clock.spans)
            if repeat:
                spans.append((min(s[1] for s in seen), max(s[2] for s in seen)))
                costs.append([median([s[3] for s in seen if s[0] == kind] or [0.0]) + pause for kind, pause in zip("FHB", slept)])
            if whole is not None:
                whole.clear()
        result["orders"].append([kind for kind, *_ in seen])
        result["spans"].append(spans)
        result["costs"].append([median(cost[i] for cost in costs) for i in range(3)])
    return result


def executed(kinds: list[list[str]], num_microbatches: int) -> Schedule:
    """The schedule that the stages did, from the kinds of their operations."""
    orders = []
    for stage in kinds:
        done = {"F": 0, "H": 0, "B": 0}
        order = []
        for kind in stage:
            order.append(Operation(kind, done[kind]))
            done[kind] += 1
        orders.append(tuple(order))
    return Schedule(tuple(orders), num_microbatches)


def _whole_passes() -> list:
    """Where there is one stage: the begin and end of each pass."""
    found, original = [], pipeline.forward_backward

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        metrics = original(*arguments)
        found.append(("F", start, time.perf_counter(), 0.0))
        return metrics

    pipeline.forward_backward = timed
    return found


def measure(quick: bool) -> Mapping[str, Any]:
    counts, repeats = ((2, 8), 3) if quick else ((1, 2, 4, 8, 16), 5)
    rows, total = [], 0.0
    for stages in sorted(range(1, min(4, os.cpu_count() or 1) + 1), reverse=True):
        ranks = run_ranks(passes, stages, counts, repeats, False, timeout_s=900)
        total = sum(map(sum, _costs(ranks))) if stages > 1 else total
        rows += _rows(ranks, counts, "computing", total)
    for stages in (4,) if quick else (2, 4, 8):
        rows += _rows(run_ranks(passes, stages, (2, 8), 3, True, timeout_s=900), (2, 8), "asleep", 0.0)
    worst = max(rows, key=lambda r: abs(r["measured_over_predicted"] - 1))
    return {"passes": rows, "largest_deviation": abs(worst["measured_over_predicted"] - 1)}


def _costs(ranks: list[dict]) -> tuple[tuple[float, ...], ...]:
    """Forward, head and backward of every stage, at the largest number of microbatches."""
    return tuple(tuple(rank["costs"][-1][i] for rank in ranks) for i in range(3))


def _rows(ranks: list[dict], counts: tuple[int, ...], stages: str, total: float) -> list[dict[str, Any]]:
    """Measured and predicted; `total` is the prediction of a microbatch on one stage."""
    rows = []
    for number, count in enumerate(counts):
        spans = zip(*(rank["spans"][number] for rank in ranks), strict=True)
        measured = median(max(end for _, end in span) - min(start for start, _ in span) for span in spans)
        order = executed([rank["orders"][number] for rank in ranks], count)
        predicted = simulate(order, StageCosts(*_costs(ranks))).makespan if len(ranks) > 1 else count * total
        rows.append(
            {
                "stages": f"{len(ranks)} {stages}",
                "microbatches": count,
                "measured_s": measured,
                "predicted_s": predicted,
                "measured_over_predicted": measured / predicted,
            }
        )
    return rows


if __name__ == "__main__":
    main("pipeline_scaling", __doc__.splitlines()[0], measure)
