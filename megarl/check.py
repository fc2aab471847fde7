"""What `--check` says about a run before anything is started: the resolved keys and the arithmetic of its layout, batches and memory.

Pure arithmetic on the configuration and the models' `config.json`: no torch.distributed, no GPU, any world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megarl.config import PpoRun, Run, SampleRun
from megarl.config_file import draft_run, to_yaml
from megarl.cross_check import cross_check, layout_of, longest_sequence, num_generators, smallest_world, started_on
from megarl.errors import ConfigError
from megarl.models.family import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.planner.batch import batch_of
from megarl.planner.devices import DEFAULT_GPU, GIB, GPUS, Assumptions
from megarl.planner.memory import GENERATORS, plan_memory
from megarl.planner.models import fullest
from megarl.ppo.algorithms import ADVANTAGES
from megarl.rollout.check import sampling_notices, sampling_rows
from megarl.run_files import survey
from megarl.sampling.check import sample_rows

MIB = 1 << 20


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
            *sampling_rows(run, ADVANTAGES[run.ppo.advantage].greedy),
        ]
    elif isinstance(run, SampleRun):
        return rows + sample_rows(run, num_generators(run, inspection.world_size), longest)
    else:
        unit, together = run.unit, run.sequences_per_row
        rows += [
            (
                "batch",
                f"{batch.size} {unit} = {batch.words(unit)}",
            ),
            ("optimizer steps", f"{run.train.total_steps}, {run.train.total_steps * batch.size:,} {unit} in all"),
            ("tokens a step", f"at most {batch.size} x {longest}{f' x {together}' if together > 1 else ''}"),
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
        found += sampling_notices(run)
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
    plan = plan_memory(inspection.run, inspection.specs, inspection.layout, GPUS[DEFAULT_GPU], Assumptions())
    table = _table(console, f"Memory of the fullest rank on a {DEFAULT_GPU}, memory.offload {plan.offload}; megarl plan says more")
    for name in ("model", "parameters", "weights", "gradients", "optimizer", "sum"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model in plan.models:
        owned, count = fullest(model), model.spec.num_parameters(model.role)
        parts = (owned.weights, owned.gradients, owned.optimizer + owned.ema)
        table.add_row(_name(inspection, model.key), f"{count:,}", *map(_size, (*parts, owned.total)))
    for phase in plan.names:
        worst = plan.worst(phase)
        when = worst.words if phase == GENERATORS else f"while {phase}"
        table.add_row(f"all {when}", "", "", "", "", _size(worst.total))
    console.print(table)


def _name(inspection: Inspection, key: str) -> str:
    """A model's key; a reference that the run does not name is the start of the model that learns."""
    start = "actor" if isinstance(inspection.run, PpoRun) else "model"
    return f"{key} (the {start}'s start)" if key == "reference" and key not in inspection.specs else key


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / MIB:.2f} MiB"


def _table(console: Console, title: str) -> Table:
    is_pretty = console.is_terminal
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    return Table(box=box.ROUNDED if is_pretty else None, show_header=True, pad_edge=False)
