"""How long a step takes: an estimate from FLOPs, bytes and the project's own schedules, with `devices.Assumptions`. Pure.

Learning and scoring: matrix products at a share of the GPU's rate, tensor-parallel and expert traffic on top of them (not hidden), stages
by the simulator, gradients and weights over data-parallel ranks after the last backward, as the run does it (`overlap_grad_reduce` off).
Generating: a roofline of the memory bandwidth, as every token of every sequence reads weights once a batch and its keys and values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megarl.config import LessonRun, PpoRun, Run, SampleRun
from megarl.cross_check import longest_row, longest_sequence, num_generators
from megarl.data.pack_size import token_budget
from megarl.models.head_choice import chosen_head
from megarl.models.spec import ModelSpec
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.schedule import StageCosts
from megarl.planner.batch import batch_of, largest_microbatch, scoring_microbatches, text_microbatches
from megarl.planner.devices import Assumptions, Gpu
from megarl.planner.flight import Pass, layers_without_graph, timed_pass
from megarl.planner.memory import MemoryPlan, kv_bytes_per_token
from megarl.planner.messages import Axis, Messages, layer_messages, ring_s, update_messages
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
        judging = [model for model in memory.models if model.is_scoring]
        seconds["scoring"] = sum(_timed(run, model, layout, machines, lengths, count, False).seconds for model in judging)
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
        learning += updates * _text_s(run, model, layout, machines)
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
    """A pass of `microbatches` of the longest rows; packed, of as many as the average rows need, all as long as the largest pack."""
    batch = largest_microbatch(run, layout)
    tokens, selected, positions = float(batch.tokens), float(batch.selected), batch.positions
    if run.parallel.max_tokens_per_microbatch:
        budget = token_budget(run.parallel)
        rows = microbatches * max(1, budget // longest_row(run))
        row = lengths.total * (run.sequences_per_row if isinstance(run, LessonRun) else 1)
        packs = rows * row / budget if 2 * row <= budget else rows  # long rows leave room that no other fills
        microbatches = max(1, math.ceil(packs))
        positions, selected = int(lengths.total), batch.selected * lengths.response / lengths.total * row * rows / budget / microbatches
    costs = stage_costs(run, model, layout, machines, tokens, positions, selected, is_learning)
    return timed_pass(costs, microbatches, run.parallel.virtual_pipeline)


def _text_s(run: Run, model: PlannedModel, layout: ParallelLayout, machines: Machines) -> float:
    """The pass of the text that the policy imitates, rows as long as they may be."""
    text = text_microbatches(run, layout) if model.key == "actor" else None
    if text is None:
        return 0.0
    batch, count = text
    costs = stage_costs(run, model, layout, machines, batch.tokens, batch.positions, batch.selected, True)
    return timed_pass(costs, count, run.parallel.virtual_pipeline).seconds


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
    forward_wire, backward_wire = (_wire_s(one, layout, machines) for one in layer_messages(run, spec, tokens / parallel.context))
    forward = tuple(shard.num_layers * (compute + forward_wire) for shard in model.shards)
    head = 2 * spec.vocab_size * spec.hidden_size / parallel.tensor * selected / parallel.context / rate if model.role == "actor" else 0.0
    stages = parallel.pipeline
    is_shared = chosen_head(parallel, model.role) == "sharded"
    backward = (0.0,) * stages
    if is_learning:
        again = compute + forward_wire if parallel.recompute == "full" else 0.0
        backward = tuple(
            (shard.num_layers - layers_without_graph(parallel, shard, stage)) * (compute + backward_wire + again)
            + (shard.num_layers - shard.still) * compute  # of the weights that learn
            for stage, shard in enumerate(model.shards)
        )
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


def _wire_s(messages: Messages, layout: ParallelLayout, machines: Machines) -> float:
    """Seconds of one direction of a layer's collectives: two of each kind, for attention and feed-forward."""
    wide = layout.tensor * layout.context
    links: dict[Axis, tuple[int, float]] = {
        "tp": (layout.tensor, machines.link(layout.tensor)),
        "cp": (layout.context, machines.link(wide)),
        "ep": (layout.expert, machines.link(layout.expert)),
    }
    return ring_s(messages, links) + 2 * len(messages) * machines.assumptions.collective_s


def _update_s(run: Run, model: PlannedModel, layout: ParallelLayout, machines: Machines) -> float:
    """Gradients summed over replicas, weights gathered from them, and Adam reading and writing its state once."""
    copies = layout.data * layout.context
    links: dict[Axis, tuple[int, float]] = {
        "dp": (copies, machines.link(layout.tensor * copies)),
        "tp": (layout.tensor, machines.link(layout.tensor)),
        "pp": (2, machines.link(layout.world_size)),
    }
    worst = 0.0
    for stage, owned in enumerate(model.owned):
        touched = 2 * owned.optimizer + 2 * owned.gradients + owned.weights
        seconds = ring_s(update_messages(run, model, layout, stage), links) + touched / machines.gpu.memory_bandwidth
        worst = max(worst, seconds)
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
