"""What `megarl plan` says against what happens: memory by phase, bytes of messages and of weight syncs, published step times.

Two ranks of this host train models of three sizes in several layouts; every operation is asked what is allocated and what is sent.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from benchmarks import table
from benchmarks.planner_published import ASSUMED, published
from benchmarks.planner_runs import RANKS, Case, steps, sync
from megarl.cross_check import layout_of
from megarl.planner.batch import largest_microbatch
from megarl.planner.devices import Assumptions
from megarl.planner.memory import MemoryPlan, plan_memory
from megarl.planner.messages import pass_messages, update_messages
from megarl.planner.sync import plan_sync
from tests.ranks import run_ranks

TOLERANCE = 0.10
SMALLEST = 0.01  # of a rank's bytes: kinds below are numbers about tokens and norms
LARGE: tuple[dict[str, Any], ...] = ({}, {"parallel": {"tensor": 2, "sequence": True}}, {"parallel": {"pipeline": 2}})
MEDIUM = (
    *LARGE,
    {"parallel": {"tensor": 2, "sequence": True, "recompute": "full"}, "precision": "bf16"},
    {"parallel": {"pipeline": 2}, "frozen_layers": 2},
    {"parallel": {"expert": 2}, "is_mixture": True},
)
SMALL = (
    *MEDIUM,
    {"parallel": {"distributed_optimizer": False}},
    {"parallel": {"tensor": 2}},
    {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    {"parallel": {"context": 2}},
    {"precision": "bf16", "offload": "all"},
)
ALONE: tuple[dict[str, Any], ...] = ({}, {"parallel": {"recompute": "full"}, "precision": "bf16"}, {"frozen_layers": 2})
LAYOUTS = {"small": SMALL, "medium": MEDIUM, "large": LARGE}
SYNCS: tuple[tuple[dict[str, int], int], ...] = (({"pipeline": 2}, 2), ({"tensor": 2}, 1), ({"pipeline": 2}, 1))


def measure(quick: bool, size: str | None, ranks: int) -> dict[str, Any]:
    """All tables; `quick`: the small model only. With one of `ranks` there is memory alone, of what one rank can do."""
    sizes = [size] if size else ["small"] if quick else ["small", "medium", "large"]
    memory, messages, syncs = [], [], []
    for name in sizes:
        cases = [Case(name, **layout) for layout in (ALONE if ranks == 1 else LAYOUTS[name])]
        found = run_ranks(steps, ranks, cases, timeout_s=3000)
        for number, case in enumerate(cases):
            measured = [rank[number] for rank in found]
            memory += memory_rows(case, measured)
            messages += message_rows(case, measured)
        if ranks > 1:
            syncs += [sync_row(Case(name, parallel), generator) for parallel, generator in SYNCS]
    rows = [*memory, *messages, *syncs]
    return {
        "ratios": summary(memory, messages),
        "memory_MB": memory,
        "messages_kB": messages,
        "weight_sync_MB": syncs,
        "published_step_s": published(),
        "assumed": ASSUMED,
        f"beyond {TOLERANCE:.0%}": ", ".join(name_of(row) for row in rows if abs(row["ratio"] - 1) > TOLERANCE) or "none",
        "rows": len(rows),
        "largest difference": f"{max(abs(row['ratio'] - 1) for row in rows):.1%}",
    }


def summary(memory: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each run what is furthest from 1 of its phases, stages and kinds: predicted over measured."""

    def furthest(rows: Sequence[Mapping[str, Any]], run: tuple[str, str], key: str = "ratio") -> float | str:
        ratios = [row[key] for row in rows if (row["size"], row["layout"]) == run]
        return max(ratios, key=lambda ratio: abs(ratio - 1)) if ratios else ""

    runs = dict.fromkeys((row["size"], row["layout"]) for row in memory)
    return [
        {
            "size": run[0],
            "layout": run[1],
            "memory": furthest(memory, run),
            "of it passes": furthest(memory, run, "passes_ratio"),
            "messages": furthest(messages, run),
        }
        for run in runs
    ]


def name_of(row: Mapping[str, Any]) -> str:
    return f"{row['size']} {row['layout']} {row.get('phase', 'sync')} {row['ratio']:.2f}"


def memory_rows(case: Case, measured: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Resident bytes and the peak of each phase, of one rank of each stage."""
    run, specs = case.run, {"actor": case.spec, "critic": case.spec}
    layout = layout_of(run, len(measured))
    plan = plan_memory(run, specs, layout, None, Assumptions())
    for phase in ("scoring", "learning"):
        for stage in range(layout.pipeline):
            resident, peak = planned(plan, phase, stage)
            own = [one for number, one in enumerate(measured) if layout.at(number).pp_rank == stage]
            found, held = max(one["peak"][phase] for one in own), own[0]["resident"][phase]
            yield {
                "size": case.size,
                "layout": str(case),
                "phase": phase,
                "stage": stage,
                "resident": round(held / 1e6, 1),
                "resident_ratio": round(resident / held, 3),
                "predicted": round(peak / 1e6, 1),
                "measured": round(found / 1e6, 1),
                "ratio": round(peak / found, 3),
                "passes_ratio": round((peak - resident) / (found - held), 2),
                "other": round(max(one["other"][phase] for one in own) / 1e6, 1),
            }


def planned(plan: MemoryPlan, phase: str, stage: int) -> tuple[int, int]:
    """(resident, peak) bytes of the trainer."""
    (found,) = (one for one in plan.phases if one.phase == phase and one.stage == stage)
    parts = {name: size for name, size in found.parts.items() if not name.startswith(("sampler", "KV"))}
    resident = sum(size for name, size in parts.items() if name.split()[-1] in ("weights", "gradients", "optimizer"))
    return resident, sum(parts.values())


def message_rows(case: Case, measured: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Bytes of each kind of message in each phase, the mean of the ranks of a stage."""
    run, layout = case.run, layout_of(case.run, len(measured))
    batch = largest_microbatch(run, layout)
    count = run.ppo.minibatch_size // layout.data // batch.width
    models = plan_memory(run, {"actor": case.spec, "critic": case.spec}, layout, None, Assumptions()).models
    for phase in ("scoring", "learning"):
        for stage in range(layout.pipeline):
            expected: Counter = Counter()
            for model in models:
                if phase == "scoring":
                    expected += pass_messages(run, model, layout, stage, batch, count, False)
                elif model.is_trained:
                    expected += pass_messages(run, model, layout, stage, batch, count, True) + update_messages(run, model, layout, stage)
            by_kind: Counter = Counter()
            for (kind, _), size in expected.items():
                by_kind[kind] += size
            own = [Counter(one["sent"][phase]) for number, one in enumerate(measured) if layout.at(number).pp_rank == stage]
            found = Counter({kind: sum(one[kind] for one in own) / len(own) for kind in {*by_kind, *chain(*own)}})
            for kind in sorted(found):
                if max(found[kind], by_kind[kind]) > SMALLEST * found.total():
                    yield {
                        "size": case.size,
                        "layout": str(case),
                        "phase": phase,
                        "stage": stage,
                        "kind": kind,
                        "predicted": round(by_kind[kind] / 1e3, 1),
                        "measured": round(found[kind] / 1e3, 1),
                        "ratio": round(by_kind[kind] / found[kind], 3) if found[kind] else float("inf"),
                    }


def sync_row(case: Case, generator: int) -> dict[str, Any]:
    """Bytes that all ranks send in one weight sync into vLLM."""
    run = case.run.model_copy(update={"rollout": case.run.rollout.model_copy(update={"tensor_parallel": generator})})
    expected = plan_sync(run, case.spec, layout_of(run, RANKS), RANKS)
    measured = run_ranks(sync, RANKS, case, generator, timeout_s=600)
    sent, received = sum(rank["sent"] for rank in measured), max(rank["received"] for rank in measured)
    return {
        "size": case.size,
        "layout": f"{case} -> {RANKS // generator} x TP{generator}",
        "predicted": round(expected.total_bytes / 1e6, 2),
        "measured": round(sent / 1e6, 2),
        "ratio": round(expected.total_bytes / sent, 3) if sent else float(expected.total_bytes == 0),
        "busiest_predicted": round(expected.received_bytes / 1e6, 2),
        "busiest_measured": round(received / 1e6, 2),
    }


if __name__ == "__main__":
    options = {"size": {"choices": tuple(LAYOUTS)}, "ranks": {"type": int, "choices": (1, RANKS), "default": RANKS}}
    table.main("planner", "what plans say against what happens", measure, options)
