"""Bytes that a rank of a stage hands to its collectives and sends to other stages, by kind and by the axis of the ranks that meet. Pure.

A collective counts with its whole buffer: what a gather writes, what a scatter or an all-to-all reads, what is reduced or broadcast. Those
of a group of one do not count, nor do the few numbers of norms, counts and metrics. `benchmarks/planner.py` counts the same on real ranks.

A is a microbatch's hidden states, [S, Q, H] of whole sequences in the compute type.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from megarl.config import Run
from megarl.models.head_choice import chosen_head
from megarl.models.spec import ModelSpec, padded_vocab
from megarl.parallel.layout import ParallelLayout
from megarl.planner.activations import Microbatch
from megarl.planner.flight import layers_without_graph
from megarl.planner.models import PlannedModel
from megarl.planner.shards import layer_of

Axis = Literal["tp", "cp", "ep", "dp", "pp"]
Messages = Counter[tuple[str, Axis]]

REDUCE, GATHER, SCATTER, EXCHANGE = "all-reduce", "all-gather", "reduce-scatter", "all-to-all"
BROADCAST, REDUCE_TO_ONE, SEND = "broadcast", "reduce", "send"
FLOAT = 4


def layer_messages(run: Run, spec: ModelSpec, tokens: float, learns_weights: bool = True) -> tuple[Messages, Messages]:
    """(forward, backward) of one layer for `tokens` on a context-parallel rank; backward without what is computed again."""
    parallel, width = run.parallel, _width(run)
    forward: Messages = Counter()
    backward: Messages = Counter()
    size = int(tokens * spec.hidden_size * width)
    blocks = 2 if spec.mixture is None else 1  # attention and feed-forward; the experts' part goes another way
    if parallel.tensor > 1 and parallel.sequence:
        forward[GATHER, "tp"] = forward[SCATTER, "tp"] = blocks * size
        # gradients of outputs, and inputs once more for the weights' gradients
        backward[GATHER, "tp"] = (2 if learns_weights else 1) * blocks * size
        backward[SCATTER, "tp"] = blocks * size
    elif parallel.tensor > 1:
        forward[REDUCE, "tp"] = backward[REDUCE, "tp"] = blocks * size
    if spec.num_kv_heads < parallel.tensor:  # ranks hold parts of a group of queries: Megatron puts the projections of all together
        projected = int(tokens * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * width)
        forward[GATHER, "tp"] += projected
        backward[SCATTER, "tp"] += projected
    if parallel.context > 1:
        keys = 2 * spec.num_kv_heads * spec.head_dim * width // parallel.tensor
        forward[GATHER, "cp"] = backward[SCATTER, "cp"] = int(tokens * parallel.context * keys)
    if spec.mixture is not None and parallel.expert > 1:
        chosen = tokens * spec.mixture.experts_per_token / parallel.tensor
        both_ways = 2 * spec.hidden_size * width + FLOAT  # with the router's weight of each
        forward[EXCHANGE, "ep"] = backward[EXCHANGE, "ep"] = int(chosen * both_ways)
    return forward, backward


def pass_messages(
    run: Run, model: PlannedModel, layout: ParallelLayout, stage: int, batch: Microbatch, microbatches: int, is_learning: bool
) -> Messages:
    """One pass of a replica's microbatches through the stage: forward, and where it learns backward."""
    parallel, shard, spec = run.parallel, model.shards[stage], model.spec
    tokens = batch.tokens / parallel.context
    forward, backward = layer_messages(run, spec, tokens)
    _, backward_of_frozen = layer_messages(run, spec, tokens, learns_weights=False)
    one = _times(forward, shard.num_layers)
    if is_learning:
        without = layers_without_graph(parallel, shard, stage)
        one += _times(backward, shard.num_layers - shard.still) + _times(backward_of_frozen, shard.still - without)
        if parallel.recompute == "full":
            one += _times(forward, shard.num_layers)
    total = _times(one + _ends(run, model, stage, batch, is_learning) + _between(run, stage, tokens, spec, is_learning), microbatches)
    if chosen_head(parallel, model.role) == "sharded":
        total[BROADCAST, "pp"] += _head_elements(run, model) * _width(run)
        if is_learning:
            total[REDUCE_TO_ONE, "pp"] += _head_elements(run, model) * FLOAT
    if not is_learning and parallel.pipeline > 1:  # every stage gets what the last one says
        total[REDUCE, "pp"] += FLOAT * batch.tokens * microbatches
    return total


def update_messages(run: Run, model: PlannedModel, layout: ParallelLayout, stage: int) -> Messages:
    """Of one optimizer step: gradients summed over replicas, weights gathered from them, and what ranks of a replica hold in common.

    Megatron keeps an optimizer of its own for experts, and gathers all weights after each of the two.
    """
    parallel, shard, width = run.parallel, model.shards[stage], _width(run)
    found: Messages = Counter()
    dense = (shard.dense - shard.still_dense, layout.data * layout.context)
    experts = (shard.experts - shard.still_experts, max(1, layout.stage_size // layout.expert))
    for elements, holders in (dense, experts):
        if holders > 1 and parallel.distributed_optimizer:
            found[SCATTER, "dp"] += elements * FLOAT
            found[GATHER, "dp"] += elements * width * (1 if model.spec.mixture is None else 2)
        elif holders > 1:
            found[REDUCE, "dp"] += elements * FLOAT
    if parallel.tensor > 1 and parallel.sequence:
        copied = (shard.num_layers - shard.still) * layer_of(model.spec, parallel.tensor).copied
        found[REDUCE, "tp"] += FLOAT * (copied + (model.spec.hidden_size if stage == parallel.pipeline - 1 else 0))
    if model.role == "actor" and model.spec.tied and parallel.pipeline > 1 and stage in (0, parallel.pipeline - 1):
        found[REDUCE, "pp"] += FLOAT * _head_elements(run, model)
    return found


def _ends(run: Run, model: PlannedModel, stage: int, batch: Microbatch, is_learning: bool) -> Messages:
    """Of the embedding and the head, for a microbatch."""
    parallel, spec, width = run.parallel, model.spec, _width(run)
    found: Messages = Counter()
    tensor, tokens = parallel.tensor, batch.tokens / parallel.context
    size = int(tokens * spec.hidden_size * width)
    is_shared, is_last = chosen_head(parallel, model.role) == "sharded", stage == parallel.pipeline - 1
    if tensor > 1 and stage == 0:
        found[SCATTER if parallel.sequence else REDUCE, "tp"] += size
        if parallel.sequence and is_learning and not model.shards[0].still_dense:
            found[GATHER, "tp"] += size
    if tensor > 1 and is_last and parallel.sequence:  # whole sequences for the head
        found[GATHER, "tp"] += size if model.role == "actor" or is_shared else int(FLOAT * tokens)
        if is_learning and model.role == "actor" and not is_shared:
            found[SCATTER, "tp"] += size
    if tensor > 1 and model.role == "actor" and (is_last or is_shared):
        looked_at = batch.selected / parallel.context / (parallel.pipeline if is_shared else 1)
        found[REDUCE, "tp"] += int(4 * FLOAT * looked_at)  # the largest logit, and three sums
        if is_learning and (is_shared or not parallel.sequence):
            found[REDUCE, "tp"] += int(looked_at * spec.hidden_size * width)
    if parallel.context > 1 and (is_last or is_shared):
        found[REDUCE, "cp"] += (2 if model.role == "actor" else 1) * FLOAT * batch.tokens
    if is_shared:
        found[SEND, "pp"] += _dealt(run, spec, stage, batch, is_learning)
    return found


def _dealt(run: Run, spec: ModelSpec, stage: int, batch: Microbatch, is_learning: bool) -> int:
    """Hidden states that the last stage deals to the others, and their gradients on the way back."""
    stages = run.parallel.pipeline
    share = int(batch.selected / run.parallel.context / stages * spec.hidden_size * _width(run))
    return share * (stages - 1) if stage == stages - 1 else share * is_learning


def _between(run: Run, stage: int, tokens: float, spec: ModelSpec, is_learning: bool) -> Messages:
    """Activations to the next stage, gradients to the previous one."""
    parallel = run.parallel
    if parallel.pipeline == 1:
        return Counter()
    size = int(tokens * spec.hidden_size * _width(run) / (parallel.tensor if parallel.sequence else 1))
    chunks, last = parallel.virtual_pipeline, parallel.pipeline - 1
    return Counter({(SEND, "pp"): size * (chunks - (stage == last) + (chunks - (stage == 0)) * is_learning)})


def ring_s(messages: Messages, links: Mapping[Axis, tuple[int, float]]) -> float:
    """Seconds of collectives as rings; `links[axis]` are its ranks and bytes a second. An all-reduce is a scatter and a gather."""
    total = 0.0
    for (kind, axis), size in messages.items():
        ranks, rate = links[axis]
        total += size * (ranks - 1) / ranks * (2 if kind == REDUCE else 1) / rate
    return total


def _head_elements(run: Run, model: PlannedModel) -> int:
    rows = padded_vocab(model.spec.vocab_size, run.parallel.tensor) // run.parallel.tensor if model.role == "actor" else 1
    return rows * model.spec.hidden_size


def _times(messages: Messages, count: int) -> Messages:
    return Counter({kind: size * count for kind, size in messages.items()})


def _width(run: Run) -> int:
    return 2 if run.precision == "bf16" else 4
