"""What `megarl plan` prints: tables for a terminal or plain text, and the same numbers as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megarl.planner.batch import batch_of
from megarl.planner.devices import GIB
from megarl.planner.larger import Larger
from megarl.planner.memory import GENERATORS
from megarl.planner.plan import Plan
from megarl.planner.search import Candidate


@dataclass(frozen=True)
class Ways:
    """What would make a run fit: changes of the run, the fastest first, and where there are none larger machines."""

    changes: Sequence[Candidate] = ()
    machines: Sequence[Larger] = ()


def show(plan: Plan, ways: Ways, found: Sequence[Candidate] | None, console: Console) -> None:
    """Print a plan, its verdict, and what a search found."""
    _memory(plan, console)
    _time(plan, console)
    _assumptions(plan, console)
    if found is not None:
        _ranking(plan, found, console)
    for line in verdict(plan, ways):
        console.print(line, markup=False, highlight=False, soft_wrap=True, style="green" if plan.fits else "red")


def verdict(plan: Plan, ways: Ways) -> list[str]:
    """One line that says whether the run fits, and one each way that would make it fit."""
    peak, gpu = plan.peak, plan.machines.gpu
    numbers = f"{_gib(peak.total)} of {_gib(plan.limit_bytes)} usable on {gpu.name}, {peak.words}"
    if plan.fits:
        return [f"fits: {numbers}"]
    lines = [f"does not fit: {numbers}"]
    if not ways.changes:
        lines.append(
            "  no change of layout, recompute, microbatch, sampler or offload helps"
            + ("" if ways.machines else ", nor do more GPUs or larger ones")
        )
    told = [(" ".join(one.overrides), one.plan) for one in ways.changes[:3]] + [(one.arguments, one.plan) for one in ways.machines]
    return lines + [f"  fits with {words}  ({_gib(other.peak.total)}, {_words(other.time.total)} a step)" for words, other in told]


def as_json(plan: Plan, ways: Ways, found: Sequence[Candidate] | None) -> dict[str, Any]:
    """All numbers of a plan; bytes and seconds."""
    batch = batch_of(plan.run, plan.layout.world_size)
    told: dict[str, Any] = {
        "gpu": plan.machines.gpu.name,
        "gpus": plan.layout.world_size,
        "network_bytes_s": plan.machines.network,
        "layout": str(plan.layout),
        "offload": plan.memory.offload,
        "batch": {"size": batch.size, "microbatches": batch.microbatches, "microbatch_size": batch.microbatch_size, "data": batch.data},
        "tokens": {"prompt": plan.lengths.prompt, "response": plan.lengths.response},
        "memory": [{"phase": one.phase, "stage": one.stage, "bytes": one.total, "parts": one.parts} for one in plan.memory.phases],
        "host_memory": [{"stage": stage, "bytes": sum(parts.values()), "parts": parts} for stage, parts in enumerate(plan.memory.host)],
        "limit_bytes": plan.limit_bytes,
        "seconds": plan.time.seconds,
        "step_s": plan.time.total,
        "tokens_s_gpu": plan.time.tokens_per_gpu,
        "pipeline_busy": plan.time.busy,
        "assumptions": vars(plan.machines.assumptions),
        "fits": plan.fits,
        "changes_that_fit": [_candidate(one) for one in ways.changes],
        "machines_that_fit": [{"arguments": one.arguments} | _numbers(one.plan) for one in ways.machines],
    }
    if plan.sync is not None:
        told["sync"] = vars(plan.sync)
    if found is not None:
        told["search"] = [_candidate(one) for one in found]
    return told


def _candidate(one: Candidate) -> dict[str, Any]:
    return {"overrides": list(one.overrides)} | _numbers(one.plan)


def _numbers(plan: Plan) -> dict[str, Any]:
    return {
        "layout": str(plan.layout),
        "step_s": plan.time.total,
        "tokens_s_gpu": plan.time.tokens_per_gpu,
        "peak_bytes": plan.peak.total,
        "phase": plan.peak.phase,
    }


# ---------------------------------------------------------------- tables
def _memory(plan: Plan, console: Console) -> None:
    table = _table(console, f"Memory of the fullest rank by phase: {plan.layout}, memory.offload {plan.memory.offload}")
    for name, side in (("phase", "left"), ("stage", "right"), ("sum", "right"), ("of it", "left")):
        table.add_column(name, justify=side, overflow="fold")
    for phase in plan.memory.names:
        worst = plan.memory.worst(phase)
        table.add_row(phase, "" if phase == GENERATORS else str(worst.stage), _gib(worst.total), _parts(worst.parts))
    host = max(plan.memory.host, key=lambda parts: sum(parts.values()))
    table.add_row("host, all phases", str(plan.memory.host.index(host)), _gib(sum(host.values())), _parts(host))
    per_node = min(plan.machines.ranks_per_node, plan.layout.world_size)
    table.add_row(f"host of {per_node} ranks", "", _gib(per_node * sum(host.values())), "pinned copies; a node's own needs come on top")
    console.print(table)


def _time(plan: Plan, console: Console) -> None:
    time = plan.time
    console.print()
    table = _table(console, "A step, estimated")
    for name, side in (("phase", "left"), ("time", "right"), ("share", "right"), ("what", "left")):
        table.add_column(name, justify=side, overflow="fold")
    batch = batch_of(plan.run, plan.layout.world_size)
    words = {"learning": f"pipeline busy {time.busy:.0%}, {batch.microbatches} microbatches an optimizer step"}
    if plan.sync is not None:
        words["publishing"] = f"{plan.sync.critical_bytes / 1e9:.3g} GB on the busiest link in {plan.sync.rounds} rounds"
    words["moving"] = "between GPU and host memory"
    for name, seconds in time.seconds.items():
        table.add_row(name, _words(seconds), f"{seconds / time.total:.0%}", words.get(name, ""))
    parts = [f"{tokens:g}" for tokens in (plan.lengths.prompt, plan.lengths.response) if tokens]
    sequence = f"{' + '.join(parts)} tokens a sequence"
    table.add_row("step", _words(time.total), "", f"{time.tokens_per_gpu:,.0f} tokens/s a GPU on {time.num_gpus} GPUs; {sequence}")
    console.print(table)


def _assumptions(plan: Plan, console: Console) -> None:
    given, gpu = plan.machines.assumptions, plan.machines.gpu
    sheet = (
        f"{gpu.name} ({gpu.source}): {gpu.flops / 1e12:g} TFLOP/s bf16, {gpu.memory_bandwidth / 1e9:g} GB/s memory,"
        f" {gpu.peer_bandwidth / 1e9:g} GB/s to peers; network {plan.machines.network / 1e9:g} GB/s a GPU"
    )
    shares = (
        f"{given.learning_efficiency:.0%} of the FLOPs in matrix products, {given.decode_efficiency:.0%} of the memory's bandwidth while"
        f" decoding and {given.decode_step_s * 1e3:g} ms a step, {given.link_efficiency:.0%} of the links;"
        f" {_gib(given.reserved_bytes)} reserved, {given.fragmentation:.0%} lost to fragmentation"
    )
    console.print(f"\nassumed: {sheet}; {shares}", markup=False, highlight=False, soft_wrap=True)


def _ranking(plan: Plan, found: Sequence[Candidate], console: Console) -> None:
    console.print()
    table = _table(console, f"Layouts that fit {plan.layout.world_size} x {plan.machines.gpu.name}, the fastest first")
    for name, side in (("layout", "left"), ("step", "right"), ("tokens/s/GPU", "right"), ("peak", "right"), ("overrides", "left")):
        table.add_column(name, justify=side, overflow="fold")
    for one in found:
        words = " ".join(one.overrides) or "(as it is)"
        numbers = (_words(one.plan.time.total), f"{one.plan.time.tokens_per_gpu:,.0f}", _gib(one.plan.peak.total))
        table.add_row(str(one.plan.layout), *numbers, words)
    if not found:
        table.add_row("none", "", "", "", "")
    console.print(table)
    console.print()


def _parts(parts: dict[str, int]) -> str:
    """The parts, the largest first; what is below a hundredth is left out."""
    total = max(1, sum(parts.values()))
    shown = sorted(((size, name) for name, size in parts.items() if size * 100 >= total), reverse=True)
    return ", ".join(f"{name} {_size(size)}" for size, name in shown)


def _table(console: Console, title: str) -> Table:
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    return Table(box=box.ROUNDED if console.is_terminal else None, pad_edge=False)


def _gib(size: int) -> str:
    return f"{_size(size)}B" if size < GIB // 10 else f"{size / GIB:.1f} GiB"


def _size(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB // 10 else f"{size / (1 << 20):.3g} Mi"


def _words(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
