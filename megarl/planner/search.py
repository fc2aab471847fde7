"""Other layouts for the same run: the cheapest changes that make it fit, and a ranking of what fits. Pure.

Every candidate is checked by the rules that `--check` applies and planned anew; nothing is judged by a rule of thumb.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from megarl.config import PpoRun, Run
from megarl.config.section import Section
from megarl.planner.memory import GENERATORS
from megarl.planner.plan import Plan, faults_of, make_plan

Changes = Mapping[str, Any]  # dotted keys and their new values
MOST_CHANGES = 6
MOST_STAGES = 32
LONG = 8192  # tokens of a sequence from which context parallelism is tried


@dataclass(frozen=True)
class Candidate:
    """A plan and how it differs from the run it started from."""

    changes: dict[str, Any]
    plan: Plan

    @property
    def overrides(self) -> tuple[str, ...]:
        """As the command line takes them."""
        return tuple(f"{key}={_text(value)}" for key, value in self.changes.items())


def changed(run: Run, changes: Changes) -> Run:
    """The run with other values at these keys."""
    for key, value in changes.items():
        run = _with(run, key.split("."), value)
    return run


def replanned(plan: Plan, changes: Changes, with_sync: bool = False) -> Candidate | None:
    """The plan with these changes; None where a key already has that value or the rules refuse the run."""
    own = {key: value for key, value in changes.items() if value_of(plan.run, key) != value}
    run = changed(plan.run, own)
    if faults_of(run, plan.specs, plan.layout.world_size):
        return None
    made = make_plan(run, plan.specs, plan.layout.world_size, plan.machines, plan.lengths, with_sync)
    return Candidate(own, made)


def value_of(run: Section, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


# ---------------------------------------------------------------- what makes a run fit
def remedies(plan: Plan) -> list[Candidate]:
    """Changes after which the run fits, the fastest first: single ones, else the shortest sequence of the most helpful ones.

    Empty when the run fits or nothing here helps.
    """
    if plan.fits:
        return []
    singles = [found for changes in _single_changes(plan) if (found := replanned(plan, changes)) is not None and found.changes]
    fitting = [found for found in singles if found.plan.fits]
    if fitting:
        return sorted(fitting, key=lambda found: found.plan.time.total)
    several = _several(plan)
    return [several] if several is not None else []


def _several(plan: Plan) -> Candidate | None:
    """One change after the other, each the one that lowers the peak most, until it fits; then those taken back that were not needed."""
    changes: dict[str, Any] = {}
    current = plan
    for _ in range(MOST_CHANGES):
        options = [found for step in _single_changes(current) if (found := replanned(plan, changes | dict(step))) is not None]
        options = [found for found in options if found.plan.peak.total < current.peak.total]
        if not options:
            return None
        fitting = [found for found in options if found.plan.fits]
        if fitting:
            best = min(fitting, key=lambda found: found.plan.time.total)
            return _pruned(plan, best)
        best = min(options, key=lambda found: found.plan.peak.total)
        changes, current = best.changes, best.plan
    return None


def _pruned(plan: Plan, found: Candidate) -> Candidate:
    for key in list(found.changes):
        fewer = replanned(plan, {name: value for name, value in found.changes.items() if name != key})
        if fewer is not None and fewer.plan.fits:
            found = fewer
    return found


def _single_changes(plan: Plan) -> Iterator[dict[str, Any]]:
    run, layout = plan.run, plan.layout
    parallel = run.parallel
    if not parallel.distributed_optimizer:
        yield {"parallel.distributed_optimizer": True}
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel.sequence": True}
    if parallel.recompute == "none":
        yield {"parallel.recompute": "selective"}
    if parallel.recompute != "full":
        yield {"parallel.recompute": "full"}
    if parallel.logits_bytes > 64 << 20:
        yield {"parallel.logits_bytes": 64 << 20}
    for size in _below(parallel.microbatch_size):
        yield {"parallel.microbatch_size": size}
    if isinstance(run, PpoRun):
        if run.memory.offload != "all":
            yield {"memory.offload": "all"}
        for tensor in _powers(plan.machines.ranks_per_node):
            if tensor > run.rollout.tensor_parallel:
                yield {"rollout.tensor_parallel": tensor}
        yield {"rollout.kv_cache_bytes": max(1 << 30, plan.memory.kv_cache // 2 >> 30 << 30)}
    tensors, pipelines = _powers(min(plan.machines.ranks_per_node, layout.world_size)), _powers(layout.world_size)
    for tensor, pipeline in product(tensors, pipelines):
        if tensor * pipeline < parallel.tensor * parallel.pipeline or (tensor, pipeline) == (parallel.tensor, parallel.pipeline):
            continue
        split = {"parallel.tensor": tensor, "parallel.sequence": tensor > 1} if tensor != parallel.tensor else {}
        stages = {"parallel.pipeline": pipeline, "parallel.virtual_pipeline": 1} if pipeline != parallel.pipeline else {}
        yield split | stages
    if any(spec.mixture is not None for spec in plan.specs.values()):
        for expert in _powers(layout.stage_size):
            if expert > parallel.expert:
                yield {"parallel.expert": expert}


# ---------------------------------------------------------------- what would be faster
def search(plan: Plan, most: int = 10) -> list[Candidate]:
    """Layouts of the run on the same ranks that fit, the fastest first.

    Trainer layouts are ranked with everything in host memory that may leave, whatever the sampler takes; the best ones are then planned
    with every sampler and both kinds of `memory.offload`, and the syncs of those that remain by the bridge's planner.
    """
    if isinstance(plan.run, PpoRun):
        trainers = _ranked(one for one in _planned(plan, _trainers(plan)) if _fits_training(one.plan))
        around = [one.changes | other for one in trainers[: 3 * most] for other in _around(plan)]
        found = _fitting(plan, around)
    else:
        found = _fitting(plan, _trainers(plan))
    planned = [replanned(plan, one.changes, with_sync=True) for one in _distinct(found)[:most]]
    return sorted((one for one in planned if one is not None), key=lambda one: one.plan.time.total)


def _planned(plan: Plan, layouts: Iterable[Changes]) -> Iterator[Candidate]:
    return (one for changes in layouts if (one := replanned(plan, changes)) is not None)


def _ranked(found: Iterable[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda one: (one.plan.time.total, len(one.changes)))


def _fitting(plan: Plan, layouts: Iterable[Changes]) -> list[Candidate]:
    return _ranked(one for one in _planned(plan, layouts) if one.plan.fits)


def _fits_training(plan: Plan) -> bool:
    """Whether the phases fit in which a sampler that sleeps holds next to nothing."""
    others = (phase for phase in plan.memory.names if phase not in ("publishing", "generating", GENERATORS))
    return all(plan.memory.worst(phase).total <= plan.limit_bytes for phase in others)


def _distinct(found: Iterable[Candidate]) -> list[Candidate]:
    """Without those that differ from a faster one in nothing that shows."""
    seen, kept = set(), []
    for one in found:
        key = (round(one.plan.time.total, 2), one.plan.layout)
        if key not in seen:
            seen.add(key)
            kept.append(one)
    return kept


def _around(plan: Plan) -> Iterator[dict[str, Any]]:
    """Samplers and what leaves memory."""
    samplers = _powers(min(plan.machines.ranks_per_node, plan.layout.world_size))
    for sampler, offload in product(samplers, ("none", "all")):
        yield {"rollout.tensor_parallel": sampler, "memory.offload": offload}


def _trainers(plan: Plan) -> Iterator[dict[str, Any]]:
    """Tensor x pipeline x virtual x context x expert x microbatch x recompute, on all of the plan's ranks."""
    run, world = plan.run, plan.layout.world_size
    parallel = run.parallel
    has_mixture = any(spec.mixture is not None for spec in plan.specs.values())
    fewest = min(spec.num_layers for spec in plan.specs.values())
    contexts = sorted({1, parallel.context, *((2, 4) if plan.lengths.total > LONG else ())})
    sizes = [parallel.microbatch_size] if parallel.max_tokens_per_microbatch else sorted({1, 2, 4, 8, parallel.microbatch_size})
    leaving = {"memory.offload": "all"} if isinstance(run, PpoRun) else {}
    tensors, pipelines = _powers(min(plan.machines.ranks_per_node, world)), _powers(min(MOST_STAGES, world))
    for tensor, pipeline, context in product(tensors, pipelines, contexts):
        if world % (tensor * pipeline * context) or pipeline > fewest:
            continue
        experts = _powers(world // pipeline) if has_mixture else [1]
        virtuals = [1, *(count for count in (2, 4) if pipeline > 1 and fewest % (pipeline * count) == 0)]
        for expert, virtual, size, recompute in product(experts, virtuals, sizes, ("none", "selective", "full")):
            yield {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.virtual_pipeline": virtual,
                "parallel.context": context,
                "parallel.expert": expert,
                "parallel.sequence": tensor > 1,
                "parallel.microbatch_size": size,
                "parallel.recompute": recompute,
                **leaving,
            }


def _powers(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`, and `most`."""
    return sorted({1 << bit for bit in range(most.bit_length()) if 1 << bit <= most} | {most})


def _below(size: int) -> list[int]:
    return [other for other in range(size - 1, 0, -1) if size % other == 0]


def _with(section: Section, names: list[str], value: Any) -> Any:
    name, *rest = names
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})


def _text(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
