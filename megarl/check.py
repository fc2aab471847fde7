"""What `--check` says about a run before anything is started: the resolved keys and the arithmetic of its layout, batches and memory.

Pure arithmetic on the configuration and the models' `config.json`: no torch.distributed, no GPU, any world size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megarl.config import PpoRun, Run
from megarl.config_file import draft_run, to_yaml
from megarl.cross_check import cross_check, layout_of, longest_row, longest_sequence, num_generators, smallest_world, started_on
from megarl.data.pack_size import token_budget
from megarl.errors import ConfigError
from megarl.models.family import ModelSpec, Role
from megarl.parallel.layout import ParallelLayout
from megarl.run_files import model_uses, survey

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Inspection:
    """A run that fits. `world_reason` says where the world size comes from; `notices` are worth a look but stop nothing."""

    run: Run
    world_size: int
    world_reason: str
    specs: dict[str, ModelSpec]
    notices: tuple[str, ...]

    @property
    def layout(self) -> ParallelLayout:
        return layout_of(self.run, self.world_size)


@dataclass(frozen=True)
class Batch:
    """The arithmetic of one optimizer step: `size` = microbatches x microbatch_size x data.

    With packing (`max_tokens`), these are the microbatches of the longest rows: real ones are fewer.
    """

    size: int
    microbatches: int
    microbatch_size: int
    data: int
    max_tokens: int = 0

    def words(self, unit: str) -> str:
        """How the batch is cut."""
        if self.max_tokens:
            return f"at most {self.microbatches} microbatches of {self.max_tokens} tokens x data {self.data}"
        return f"{self.microbatches} microbatches x {self.microbatch_size} {unit} x data {self.data}"


@dataclass(frozen=True)
class Memory:
    """Rough bytes of one model on the rank that holds most of it. Activations, buffers and fragmentation come on top."""

    parameters: int  # of the whole model
    weights: int
    gradients: int
    optimizer: int


def inspect(kind: str, path: Path, overrides: Sequence[str], world_size: int | None = None, is_start: bool = False) -> Inspection:
    """Read a run and check it against its world, models and files.

    Args: `world_size` None means the one the file is written for; `is_start`: the run is about to start on these ranks, so that missing
    files are faults instead of notices. Raises ConfigError with every fault, one line each.
    """
    draft = draft_run(kind, path, overrides)
    faults = list(draft.faults)
    if draft.run is not None:
        run, found = draft.run, survey(draft.run)
        world_size, reason = _world(run, world_size)
        later = [*cross_check(run, world_size, found.specs), *found.wrong]
        if is_start:
            later += [*started_on(run, world_size), *found.missing]
        faults += [fault for fault in later if not fault.touches(draft.faulty)]
    if faults:
        raise ConfigError(list(dict.fromkeys(draft.located(fault) for fault in faults)))
    notices = [draft.located(fault) for fault in found.missing]
    return Inspection(run, world_size, reason, found.specs, (*notices, *_notices(run, world_size, found.specs)))


def batch_of(run: Run, world_size: int) -> Batch:
    """How one optimizer step is cut."""
    layout = layout_of(run, world_size)
    size = run.ppo.minibatch_size if isinstance(run, PpoRun) else run.train.batch_size
    most, rows = run.parallel.max_tokens_per_microbatch, run.parallel.microbatch_size
    if most:
        rows = max(1, token_budget(run.parallel) // longest_row(run))
    return Batch(size, math.ceil(size // layout.data / rows), rows, layout.data, most)


def memory_of(run: Run, spec: ModelSpec, role: Role, data: int, is_trained: bool) -> Memory:
    """Rough bytes on the heaviest of `data` ranks that share out the optimizer's state.

    Float32 gradients and, per parameter, float32 Adam moments and (in bf16) float32 masters.
    """
    shapes = spec.table(role).hf_shapes
    experts = spec.num_expert_parameters()
    layers = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name) - experts
    ends = [math.prod(shape) for name, shape in shapes.items() if ".layers." not in name and len(shape) > 1]
    pipeline = run.parallel.pipeline
    outside = sum(ends) if pipeline == 1 else max(ends)
    split = math.ceil((layers / pipeline + outside) / run.parallel.tensor)
    own_experts = math.ceil(experts / pipeline / run.parallel.expert)
    local = split + own_experts
    width = 2 if run.precision == "bf16" else 4
    if run.parallel.distributed_optimizer:  # ranks with the same experts are others than those with the same part of everything else
        split, own_experts = split / data, own_experts / max(1, data * run.parallel.tensor // run.parallel.expert)
    optimizer = int((split + own_experts) * (12 if run.precision == "bf16" else 8))
    whole = spec.num_parameters(role)
    return Memory(whole, local * width, local * 4 if is_trained else 0, optimizer if is_trained else 0)


def show(inspection: Inspection, console: Console) -> None:
    """Print the resolved run and its arithmetic: tables on a terminal, plain aligned text elsewhere."""
    run = inspection.run
    console.print(to_yaml(run).rstrip(), markup=False, highlight=False, soft_wrap=True)
    console.print()
    _print_rows(console, "Arithmetic", arithmetic(inspection))
    if inspection.specs:
        console.print()
        _print_memory(console, inspection)
    for notice in inspection.notices:
        console.print(f"warning: {notice}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"check passed: {inspection.world_size} ranks, {inspection.layout}", style="green", highlight=False)


def arithmetic(inspection: Inspection) -> list[tuple[str, str]]:
    """Names and sentences of the run's numbers."""
    run, layout = inspection.run, inspection.layout
    batch = batch_of(run, inspection.world_size)
    mixtures = {key: spec for key, spec in inspection.specs.items() if spec.mixture is not None}
    longest, _, _ = longest_sequence(run)
    rows = [
        ("world", f"{inspection.world_size} ranks ({inspection.world_reason})"),
        ("layout", f"{_axes(layout)} = {layout.world_size} ranks"),
    ]
    rows += [(f"experts of {key}", _experts(spec, layout.expert)) for key, spec in mixtures.items()]
    if isinstance(run, PpoRun):
        sequences = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
        minibatches = sequences // batch.size
        replicas = num_generators(run, inspection.world_size)
        where = {"colocated": "", "separate": " beside the trainer's ranks", "remote": " that join from elsewhere"}[run.rollout.placement]
        updates = run.ppo.total_steps * run.ppo.num_epochs * minibatches
        learners = f"{updates} of the critic, " if run.critic is not None else ""
        frozen = min(run.ppo.critic_warmup_steps, run.ppo.total_steps) * run.ppo.num_epochs * minibatches
        rows += [
            (
                "generators",
                f"{replicas} replicas x tensor {run.rollout.tensor_parallel}{where}, about {sequences / replicas:.4g} sequences each",
            ),
            (
                "batch",
                f"prompts {run.rollout.prompts_per_step} x samples {run.rollout.samples_per_prompt} = {sequences} sequences ="
                f" {minibatches} minibatches x {batch.words('sequences')}",
            ),
            (
                "optimizer steps",
                f"{run.ppo.total_steps} steps x {run.ppo.num_epochs} epochs x {minibatches} minibatches = {learners}"
                f"{updates - frozen} of the actor",
            ),
            ("tokens a step", f"at most {sequences} x {longest} = {sequences * longest:,}"),
        ]
    else:
        unit = "examples" if run.__class__.__name__ == "SftRun" else "pairs"
        rows += [
            (
                "batch",
                f"{batch.size} {unit} = {batch.words(unit)}",
            ),
            ("optimizer steps", f"{run.train.total_steps}, {run.train.total_steps * batch.size:,} {unit} in all"),
            ("tokens a step", f"at most {batch.size} x {longest}{' x 2' if unit == 'pairs' else ''}"),
        ]
    if layout.pipeline > 1:
        chunks = run.parallel.virtual_pipeline
        idle = (layout.pipeline - 1) / (batch.microbatches * chunks + layout.pipeline - 1)
        stages = f"{layout.pipeline} stages" + (f" x {chunks} chunks" if chunks > 1 else "")
        rows.append(("pipeline", f"{stages}, {batch.microbatches} microbatches: idle for {idle:.0%} of an update"))
    return rows


def _experts(spec: ModelSpec, expert: int) -> str:
    assert spec.mixture is not None
    total, active = spec.num_parameters("actor"), spec.num_active_parameters("actor")
    chosen, count = spec.mixture.experts_per_token, spec.mixture.num_experts
    words = f"{count} a layer, {count // expert} on a rank, {chosen} for a token"
    return f"{words}: {active:,} of {total:,} parameters ({active / total:.0%}) active"


def _axes(layout: ParallelLayout) -> str:
    context = f" x context {layout.context}" if layout.context > 1 else ""
    return f"tensor {layout.tensor} x pipeline {layout.pipeline}{context} x data {layout.data}"


def _world(run: Run, world_size: int | None) -> tuple[int, str]:
    if world_size is not None:
        return world_size, "given"
    if run.cluster is not None:
        return run.cluster.world_size, f"cluster: {run.cluster.nodes} nodes x {run.cluster.ranks_per_node} ranks"
    return smallest_world(run), "the smallest that fits; --world N counts with another"


def _notices(run: Run, world_size: int, specs: dict[str, ModelSpec]) -> list[str]:
    found = []
    batch = batch_of(run, world_size)
    for key, spec in specs.items():
        stages, chunks = run.parallel.pipeline, run.parallel.virtual_pipeline
        if spec.num_layers % (stages * chunks):
            parts = f"{stages} stages" if chunks == 1 else f"{stages} stages x {chunks} chunks"
            found.append(f"{spec.num_layers} layers of {key} over {parts}: the first ones get one more")
    per_node = run.cluster.ranks_per_node if run.cluster is not None else None
    if per_node is not None and run.parallel.tensor > per_node:
        found.append(f"parallel.tensor {run.parallel.tensor} spans nodes of {per_node} ranks: every layer will wait for the network")
    if run.parallel.virtual_pipeline > 1 and batch.microbatches % run.parallel.pipeline:
        found.append(
            f"{batch.microbatches} microbatches, filled up with empty ones to a multiple of the {run.parallel.pipeline} stages:"
            " parallel.virtual_pipeline goes through them in rounds of that many"
        )
    if batch.microbatches < run.parallel.pipeline:
        found.append(
            f"{batch.microbatches} microbatches keep a pipeline of {run.parallel.pipeline} stages mostly idle:"
            " smaller parallel.microbatch_size, or larger minibatches"
        )
    if isinstance(run, PpoRun):
        sequences = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
        replicas = num_generators(run, world_size)
        if per_node is not None and run.rollout.tensor_parallel > per_node:
            found.append(f"rollout.tensor_parallel {run.rollout.tensor_parallel} spans nodes of {per_node} ranks")
        if sequences < replicas:
            found.append(f"{sequences} sequences a step for {replicas} generator replicas: some will have nothing to do")
        if run.ppo.critic_warmup_steps >= run.ppo.total_steps:
            found.append(f"ppo.critic_warmup_steps {run.ppo.critic_warmup_steps} of {run.ppo.total_steps}: the actor will never learn")
    return found


def _print_rows(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = _table(console, title)
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_memory(console: Console, inspection: Inspection) -> None:
    run, data = inspection.run, inspection.layout.data * inspection.layout.context  # ranks that share an optimizer's state
    table = _table(console, "Memory of the fullest rank, roughly; activations, buffers and KV cache come on top")
    for name in ("model", "parameters", "weights", "gradients", "optimizer", "sum"):
        table.add_column(name, justify="left" if name == "model" else "right")
    training = 0
    for use in model_uses(run):
        if use.key in inspection.specs:
            is_trained = use.key in ("actor", "critic", "model")
            role = "actor" if use.role == "actor" else "critic"
            memory = memory_of(run, inspection.specs[use.key], role, data, is_trained)
            training += _memory_row(table, use.key, memory)
    if isinstance(run, PpoRun) and "actor" in inspection.specs:
        actor = inspection.specs["actor"]
        if run.reference is None:
            training += _memory_row(table, "reference (the actor's start)", memory_of(run, actor, "actor", data, False))
        whole = actor.num_parameters("actor")
        width = 2 if run.precision == "bf16" else 4
        generator = _memory_row(table, "generator", Memory(whole, whole * width // run.rollout.tensor_parallel, 0, 0))
        if run.rollout.placement == "colocated":
            _sum_row(table, "sum while generating", training + generator)
    _sum_row(table, "sum while learning" if isinstance(run, PpoRun) else "sum", training)
    console.print(table)


def _memory_row(table: Table, name: str, memory: Memory) -> int:
    parts = (memory.weights, memory.gradients, memory.optimizer)
    table.add_row(name, f"{memory.parameters:,}", *(_size(part) for part in (*parts, sum(parts))))
    return sum(parts)


def _sum_row(table: Table, name: str, size: int) -> None:
    table.add_row(name, "", "", "", "", _size(size))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / MIB:.2f} MiB"


def _table(console: Console, title: str) -> Table:
    is_pretty = console.is_terminal
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    return Table(box=box.ROUNDED if is_pretty else None, show_header=True, pad_edge=False)
