"""How long a step takes: an estimate from FLOPs, bytes and the project's own schedules, with `devices.Assumptions`. Pure.

Learning and scoring: matrix products at a share of the GPU's rate, tensor-parallel and expert traffic on top of them (not hidden), stages
by the simulator, gradients and weights over data-parallel ranks after the last backward, as the run does it (`overlap_grad_reduce` off).
Generating: a roofline of the memory bandwidth, as every token of every sequence reads weights once a batch and its keys and values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megarl.config import LessonRun, PpoRun, Run, SampleRun
from megarl.cross_check import longest_sequence, num_generators
from megarl.data.pack_size import token_budget
from megarl.models.head_choice import chosen_head
from megarl.models.spec import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.schedule import StageCosts
from megarl.planner.batch import batch_of, largest_microbatch, scoring_microbatches
from megarl.planner.devices import Assumptions, Gpu
from megarl.planner.flight import Pass, timed_pass
from megarl.planner.memory import MemoryPlan, kv_bytes_per_token
from megarl.planner.models import PlannedModel
from megarl.planner.offloading import moved_bytes
from megarl.planner.shards import layer_of, sampler_elements

MOST_SEQUENCES = 1024  # that vLLM computes at once, on a GPU


@dataclass(frozen=True)
class Lengths:
    """Tokens of an average prompt and of an average response (of a lesson: of a sequence, all of it `response`)."""

    prompt: float
    response: float

    @property
    def total(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True)
class Machines:
    """What the ranks are and how they are joined. `network` bytes a second of one GPU, one direction."""

    gpu: Gpu
    network: float
    ranks_per_node: int
    assumptions: Assumptions

    def link(self, span: int) -> float:
        """Bytes a second of a rank among `span` consecutive ranks."""
        return (self.gpu.peer_bandwidth if span <= self.ranks_per_node else self.network) * self.assumptions.link_efficiency


@dataclass(frozen=True)
class StepTime:
    """Seconds by phase; the pipeline's busy share of learning; the tokens of a step."""

    seconds: dict[str, float]
    busy: float
    tokens: float
    num_gpus: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens of prompts and responses a second and GPU."""
        return self.tokens / self.total / self.num_gpus


def longest_lengths(run: Run) -> Lengths:
    """Every sequence as long as it may be."""
    if isinstance(run, PpoRun | SampleRun):
        return Lengths(run.data.max_prompt_tokens, run.rollout.max_response_tokens)
    return Lengths(0, longest_sequence(run)[0])


def estimate(
    run: Run,
    specs: Mapping[str, ModelSpec],
    layout: ParallelLayout,
    memory: MemoryPlan,
    machines: Machines,
    lengths: Lengths,
    sync_s: float = 0.0,
) -> StepTime:
    """The time of a step. `sync_s` is the weight sync's, which `planner.sync` counts."""
    seconds: dict[str, float] = {}
    if isinstance(run, PpoRun | SampleRun):
        sequences = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
        updates = run.ppo.num_epochs * max(1, sequences // run.ppo.minibatch_size) if isinstance(run, PpoRun) else 0
        if "actor" in specs:
            seconds["generating"] = generation_s(run, specs["actor"], layout, memory, machines, lengths)
        count = scoring_microbatches(run, layout)
        seconds["scoring"] = sum(_timed(run, model, layout, machines, lengths, count, False).seconds for model in memory.models)
    else:
        assert isinstance(run, LessonRun)
        sequences, updates = run.train.batch_size * run.sequences_per_row, 1
        frozen = [model for model in memory.models if not model.is_trained]
        count = batch_of(run, layout.world_size).microbatches
        if frozen:
            seconds["scoring"] = sum(_timed(run, model, layout, machines, lengths, count, False).seconds for model in frozen)
    microbatches = batch_of(run, layout.world_size).microbatches
    learning, busy, weight = 0.0, 0.0, 0.0
    for model in (model for model in memory.models if model.is_trained):
        found = _timed(run, model, layout, machines, lengths, microbatches, True)
        learning += updates * (found.seconds + _update_s(run, model, layout, machines))
        busy, weight = busy + found.busy * found.seconds, weight + found.seconds
    if learning:
        seconds["learning"] = learning
    if isinstance(run, PpoRun):
        seconds["publishing"] = sync_s
        host = machines.gpu.host_bandwidth * machines.assumptions.link_efficiency
        seconds["moving"] = max(moved_bytes(memory, stage) for stage in range(layout.pipeline)) / host
    gpus = layout.world_size + (num_generators(run, layout.world_size) * run.rollout.tensor_parallel if _is_apart(run) else 0)
    return StepTime(seconds, busy / weight if weight else 1.0, sequences * lengths.total, gpus)


def _is_apart(run: Run) -> bool:
    return isinstance(run, PpoRun | SampleRun) and run.rollout.placement != "colocated"


def _timed(
    run: Run, model: PlannedModel, layout: ParallelLayout, machines: Machines, lengths: Lengths, microbatches: int, is_learning: bool
) -> Pass:
    """A pass of `microbatches` of the longest rows; packed, of as many as the average rows need."""
    batch = largest_microbatch(run, layout)
    tokens, selected, positions = float(batch.tokens), float(batch.selected), batch.positions
    if run.parallel.max_tokens_per_microbatch:
        rows_at_once = max(1.0, token_budget(run.parallel) // longest_sequence(run)[0])
        rows = microbatches * rows_at_once
        real = rows * lengths.total
        microbatches = max(1, math.ceil(real / token_budget(run.parallel)))
        tokens, positions = real / microbatches, int(lengths.total)
        selected = tokens * lengths.response / lengths.total
    costs = stage_costs(run, model, layout, machines, tokens, positions, selected, is_learning)
    return timed_pass(costs, microbatches, run.parallel.virtual_pipeline)


def stage_costs(
    run: Run,
    model: PlannedModel,
    layout: ParallelLayout,
    machines: Machines,
    tokens: float,
    positions: int,
    selected: float,
    is_learning: bool,
) -> StageCosts:
    """Seconds of each operation of each stage for a microbatch of `tokens` in sequences of `positions`."""
    parallel, spec = run.parallel, model.spec
    rate = machines.gpu.flops * machines.assumptions.learning_efficiency * (1.0 if run.precision == "bf16" else 0.125)
    compute = _layer_flops(spec, parallel.tensor, positions) * tokens / parallel.context / rate
    wire = _layer_wire_s(run, spec, layout, machines, tokens / parallel.context)
    forward = tuple(shard.num_layers * (compute + wire) for shard in model.shards)
    head = 2 * spec.vocab_size * spec.hidden_size / parallel.tensor * selected / parallel.context / rate if model.role == "actor" else 0.0
    stages = parallel.pipeline
    is_shared = chosen_head(parallel, model.role) == "sharded"
    again = 1 if parallel.recompute == "full" else 0
    backward = tuple((2 + again) * cost for cost in forward) if is_learning else (0.0,) * stages
    shares = (0.0,) * stages
    if is_shared:
        shares = (head * (3 if is_learning else 1) / stages,) * stages
    else:
        forward = (*forward[:-1], forward[-1] + head)
        if is_learning:
            backward = (*backward[:-1], backward[-1] + 3 * head)  # logits are computed again
    return StageCosts(forward, shares, backward)


def _layer_flops(spec: ModelSpec, tensor: int, positions: int) -> float:
    """Operations of a layer's forward for one token on a rank: 2 a weight it meets, 4 a channel for each causal pair."""
    layer = layer_of(spec, tensor)
    experts = 0.0
    if spec.mixture is not None:  # whole experts: with sequence parallelism every rank brings its own tokens
        experts = layer.experts * spec.mixture.experts_per_token / spec.mixture.num_experts / tensor
    return 2 * (layer.split + experts) + 2 * positions * spec.num_heads * spec.head_dim / tensor


def _layer_wire_s(run: Run, spec: ModelSpec, layout: ParallelLayout, machines: Machines, tokens: float) -> float:
    """Seconds of a layer's collectives in a forward: two gathers and two scatters of all tokens' channels, and a mixture's exchanges."""
    width, parallel = (2 if run.precision == "bf16" else 4), run.parallel
    size, seconds = tokens * spec.hidden_size * width, 0.0
    if parallel.tensor > 1:
        gathers = 4 if spec.mixture is None else 2
        span = parallel.tensor
        seconds += gathers * (size * (span - 1) / span / machines.link(span) + machines.assumptions.collective_s)
    if spec.mixture is not None and parallel.expert > 1:
        moved = size / parallel.tensor * spec.mixture.experts_per_token * (parallel.expert - 1) / parallel.expert
        seconds += 2 * (moved / machines.link(parallel.expert) + machines.assumptions.collective_s)
    return seconds


def _update_s(run: Run, model: PlannedModel, layout: ParallelLayout, machines: Machines) -> float:
    """Gradients summed over replicas, weights gathered from them, and Adam reading and writing its state once."""
    copies, span = layout.data * layout.context, layout.tensor * layout.data * layout.context
    width = 2 if run.precision == "bf16" else 4
    worst = 0.0
    for shard, owned in zip(model.shards, model.owned, strict=True):
        travels = shard.dense * (4 + (width if run.parallel.distributed_optimizer else 4)) * (copies - 1) / copies
        holders = max(1, layout.stage_size // layout.expert)
        travels += shard.experts * (4 + width) * (holders - 1) / holders
        touched = 2 * owned.optimizer + 2 * owned.gradients + owned.weights
        worst = max(worst, travels / machines.link(span) + touched / machines.gpu.memory_bandwidth)
    return worst


def generation_s(
    run: PpoRun | SampleRun, spec: ModelSpec, layout: ParallelLayout, memory: MemoryPlan, machines: Machines, lengths: Lengths
) -> float:
    """The slowest generator's time for its share: prompts at the matrix rate, then tokens at the memory's.

    Sequences take places in the KV cache as others leave; the longest one takes `rollout.max_response_tokens` steps.
    """
    gpu, given, tensor = machines.gpu, machines.assumptions, run.rollout.tensor_parallel
    width = 2 if run.precision == "bf16" else 4
    sequences = math.ceil(run.rollout.prompts_per_step * run.rollout.samples_per_prompt / num_generators(run, layout.world_size))
    kv_token = kv_bytes_per_token(spec, tensor, run.precision)
    kv_cache = memory.kv_cache
    fitting = int(kv_cache / kv_token / (lengths.prompt + lengths.response / 2))
    at_once = max(1, min(sequences, MOST_SEQUENCES, fitting))
    longest = run.rollout.max_response_tokens if lengths.response < run.rollout.max_response_tokens else lengths.response
    steps = max(longest, lengths.response * sequences / at_once)
    weights = sampler_elements(spec, tensor) * width
    if spec.mixture is not None:  # experts that nobody of the batch chose are not read
        share = 1 - (1 - spec.mixture.experts_per_token / spec.mixture.num_experts) ** at_once
        experts = spec.num_expert_parameters() / tensor * width
        weights -= int(experts * (1 - share))
    span = tensor
    hop = at_once * spec.hidden_size * width * 2 * (span - 1) / span / machines.link(span)
    wire = 2 * spec.num_layers * (hop + given.collective_s / 2) if tensor > 1 else 0.0
    read = steps * weights + sequences * lengths.response * (lengths.prompt + lengths.response / 2) * kv_token
    flops = 2 * spec.num_active_parameters("actor") / tensor * sequences
    decode = max(read / (gpu.memory_bandwidth * given.decode_efficiency), flops * lengths.response / (gpu.flops * given.prefill_efficiency))
    prefill = flops * lengths.prompt / run.rollout.samples_per_prompt / (gpu.flops * given.prefill_efficiency)
    return prefill + decode + steps * (given.decode_step_s + wire)
